"""The engine: steps requests through one model together.

    pipeline.py   what the engine asks of a model family
    row.py        one request in the engine
    grouping.py   which rows take the next step together
    staging.py    a thread for what comes before and after the steps
    device.py     streams, events and errors of a GPU
    engine.py     the thread that steps, and the life of a row

Only the last three import torch, so that the others can be imported where there is none.
"""
