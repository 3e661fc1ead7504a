"""Loads a model on the CPU in a process without a network, before it is published.

`deployments.store.publish` starts it: specification and folder come as JSON on stdin. The exit code
is 0 if the model loads; else stderr says why not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deployments.errors import SetupError
from deployments.loader import build
from deployments.registry import ModelSpec
from deployments.settings import Settings

_NETWORK = frozenset(
    {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}
    | {"socket.gethostbyname"}
)


def _refuse_network(event: str, _: tuple[Any, ...]) -> None:
    if event in _NETWORK:
        raise OSError(f"no network during a smoke load: {event}")


def main() -> None:
    """Load the model that stdin describes."""
    sys.addaudithook(_refuse_network)
    work = json.load(sys.stdin)
    # This machine may have no GPU, and the kind of attention changes no weights.
    spec = ModelSpec.model_validate(work["spec"]).model_copy(update={"attention": "sdpa"})
    try:
        build(spec, Path(work["folder"]), Settings(device="cpu"))
    except SetupError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
