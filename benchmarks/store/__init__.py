"""`make bench-store`: pulls and verified loads beside the ways they replace.

__main__.py (turns, tables) → worker.py (one run in a process of its own) → pulls.py, loads.py.
"""
