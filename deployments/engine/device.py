"""A GPU's streams, events and errors; without CUDA, streams and events do nothing."""

from __future__ import annotations

import os
import re
import threading
from typing import Any

import torch

_NICENESS = 10
"""A tenth of the share of a core that others get who want it at the same time."""
_DEVICE_ERROR = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error")


def is_fatal(error: BaseException) -> bool:
    """Whether the device is unusable afterwards: any CUDA error but running out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    # cuBLAS and cuDNN report their errors as plain RuntimeErrors.
    is_named = isinstance(error, RuntimeError) and _DEVICE_ERROR.search(str(error)) is not None
    return isinstance(error, torch.AcceleratorError) or is_named


def use_own_stream() -> None:
    """Give the calling thread a stream of its own."""
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.Stream())


def finish_stream() -> None:
    """Wait until the device has done what this thread asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def record_event() -> Any:
    """An event at this point of the thread's stream; None without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(blocking=True)  # a thread that waits for it leaves the core to others
    event.record()
    return event


def wait_for_event(event: Any) -> None:
    """Make this thread's stream wait for an event of another stream."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def free_cached_memory() -> None:
    """Give cached blocks back, for a second try after running out of memory."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def lower_priority() -> None:
    """On a CPU, let the threads that carry requests go before the calling thread.

    They need little time, so that requests are read and refused at once although passes take every
    core. Threads that the calling thread starts inherit its priority. With CUDA nothing changes.
    """
    if not torch.cuda.is_initialized():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
