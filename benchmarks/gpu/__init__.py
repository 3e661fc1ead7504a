"""What the production models do on the GPU at hand, beside stock diffusers: `make bench-gpu`.

Needs torch, diffusers and transformers only: no server, no network, no weights.
"""
