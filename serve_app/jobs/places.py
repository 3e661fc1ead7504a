"""Places for answers that take long, so that they stay few and no API key takes all of them."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.errors import Full, RateLimited

if TYPE_CHECKING:
    from collections.abc import Generator

_RETRY_S = 2


class Places:
    """The places of this process for answers of one kind.

    Args:
        most: how many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, owner: str = "", share: float = 1.0) -> Generator[None]:
        """Hold a place.

        Args:
            owner: id of the API key; empty where nobody knows it.
            share: of all places that this owner may have, in [0, 1]; one is always allowed.

        Raises:
            Full: every place is taken.
            RateLimited: the owner has its share.
        """
        self.check(owner, share)
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
            self._taken += Counter()  # drops owners without a place

    def check(self, owner: str = "", share: float = 1.0) -> None:
        """Whether there is a place at this moment; raises as `take`."""
        remedy = "Try again after Retry-After seconds; GET /api/v1/jobs/{id} needs no place."
        if (taken := self._taken.total()) >= self._most:
            raise Full(
                "Too many clients wait for jobs or results at the moment.",
                value=f"{taken} clients",
                remedy=remedy,
                retry_after_s=_RETRY_S,
            )
        if self._taken[owner] >= max(int(self._most * share), 1):
            raise RateLimited(
                "This API key has its share of the clients that may wait for jobs.",
                value=f"wait_share = {share:g}",
                remedy=remedy,
                retry_after_s=_RETRY_S,
            )
