"""The memory of a GPU on a machine without one."""

from __future__ import annotations

import torch


class FakeDeviceMemory:
    """A `DeviceMemory` of which tests take as much as they like, up to its cap."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._cap_bytes = total_bytes
        self._taken_bytes = 0
        self._peak_bytes = 0

    def reserve(self, amount_bytes: int) -> None:
        """Take memory.

        Raises:
            torch.OutOfMemoryError: more than the cap leaves; nothing is taken then.
        """
        if self._taken_bytes + amount_bytes > self._cap_bytes:
            left = self._cap_bytes - self._taken_bytes
            raise torch.OutOfMemoryError(
                f"The fake device has {left} of {self._cap_bytes} bytes left, not {amount_bytes}."
            )
        self._taken_bytes += amount_bytes
        self._peak_bytes = max(self._peak_bytes, self._taken_bytes)

    def release(self, amount_bytes: int) -> None:
        self._taken_bytes -= amount_bytes

    def total_bytes(self) -> int:
        return self._total_bytes

    def allocated_bytes(self) -> int:
        return self._taken_bytes

    def reserved_bytes(self) -> int:
        return self._taken_bytes

    def peak_bytes(self) -> int:
        return self._peak_bytes

    def reset_peak(self) -> None:
        self._peak_bytes = self._taken_bytes

    def set_cap(self, fraction: float) -> None:
        self._cap_bytes = int(fraction * self._total_bytes)
