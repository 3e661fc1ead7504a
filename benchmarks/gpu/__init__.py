"""`make bench-gpu`: the production models on this machine's GPU, beside stock diffusers.

__main__.py (the command) → tasks.py (what to measure, in order) → bench.py (one measurement) →
systems.py and options.py (what is compared) → table.py (gpu.md). profile.py is `make profile-gpu`.
Needs torch, diffusers and transformers only: no server, no network, no weights.
"""
