"""How networks are prepared for their passes: compiled, recorded as CUDA graphs, or both."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

    from deployments.engine.graphs import Recorder
    from deployments.engine.passes import Forward, Tensors
    from deployments.registry import CompileMode


_MOST_VARIANTS = 64
"""Sizes and numbers of rows that torch compiles one function for."""


@dataclass(slots=True)
class Preparation:
    """What is done to each network.

    Attributes:
        mode: full compiles whole networks, each for one size and any number of rows; blocks
            compiles the blocks that a UNet repeats, for every size, which is quicker to compile and
            slower to run.
        sizes: how many of a model's usual sizes, from the first on, `full` compiles.
        recorder: records passes; None where they are called, as on a CPU.
        backend: of torch.compile.
        changed: networks whose layout was changed.
    """

    mode: CompileMode = "off"
    sizes: int = 1
    recorder: Recorder | None = None
    backend: str = "inductor"
    changed: list[Any] = field(default_factory=list[Any])

    def undo(self) -> None:
        """Give networks back the layout in which they run best without being compiled."""
        for network in self.changed:
            if next(network.parameters()).is_cuda:
                network.to(memory_format=torch.contiguous_format)

    def compiled(self, network: Any, plain: Forward) -> Forward | None:
        """The compiled network; None where calls go to the network itself.

        Args:
            network: of diffusers, or of our own.
            plain: calls it.
        """
        if self.mode == "blocks" and getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks(dynamic=True, backend=self.backend)
        if self.mode != "full":
            return None
        _use_channels_last(network)
        self.changed.append(network)
        compiled = torch.compile(plain, backend=self.backend)

        def forward(tensors: Tensors) -> torch.Tensor:
            return compiled({name: _normal(tensor) for name, tensor in tensors.items()})

        return forward

    def counts(self, most: int) -> list[int]:
        """Numbers of rows that are worth preparing, ascending: powers of two, and the largest.

        torch compiles one row apart from several; recorded passes of one row are filled up to two.
        """
        counts = [1 << i for i in range(most.bit_length())]
        if self.mode == "full" and self.recorder is not None and most > 1:
            counts.remove(1)
        return sorted({*counts, most})


@contextmanager
def compiling() -> Generator[None]:
    """Let torch compile within the context, and never afterwards in this process.

    What was compiled before is forgotten, because it belonged to another model.
    """
    import torch._dynamo as dynamo

    torch.compiler.reset()
    torch.compiler.set_stance("default")
    # Else the second size would be compiled for every size, which takes minutes.
    each_size = dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=_MOST_VARIANTS)
    try:
        with each_size:
            yield
    finally:
        torch.compiler.set_stance("eager_on_recompile")


def _use_channels_last(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the one layout that is compiled, whatever made it.

    What is compiled serves every number of rows above one. It serves one size only: networks that
    were compiled for every size at once took over five minutes on an H100.
    """
    # Imported here, because it takes a second and 70 MB even where nothing is compiled.
    from torch._dynamo.decorators import maybe_mark_dynamic

    # A copy: strides of dimensions of length one may differ although the layout is the same.
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    tensor = tensor.clone(memory_format=layout)
    maybe_mark_dynamic(tensor, 0)
    return tensor
