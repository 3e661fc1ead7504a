"""The engine: steps requests through one model together.

    pipeline.py     what the engine asks of a model family
    row.py          one request in the engine
    grouping.py     which rows take the next step together
    staging.py      a thread for what comes before and after the steps
    device.py       streams, events and errors of a GPU
    passes.py       a network's passes: prepared for a few shapes, plain for all others
    preparation.py  how they are prepared: compiled, recorded, or both
    graphs.py       records passes as CUDA graphs
    engine.py       the thread that steps, and the life of a row

Only the first three can be imported where there is no torch.
"""
