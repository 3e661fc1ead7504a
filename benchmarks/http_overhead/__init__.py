"""`make bench-http`: what HTTP costs on the way to the fastest model, beside LitServe.

__main__.py (rounds, tables) → systems.py (the servers) → direct.py (the same work without one).
"""
