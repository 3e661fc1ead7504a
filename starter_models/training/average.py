"""A running mean of a network's weights, which is steadier than the weights of any one step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Exponential moving average of weights and buffers, `module`, ready to use.

    Args:
        net: what is trained.
        decay: of the mean; nearer 0 in the first steps.
    """

    def __init__(self, net: nn.Module, decay: float = 0.998) -> None:
        self.module = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay, self._step = decay, 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        self._step += 1
        decay = min(self.decay, self._step / (self._step + 20))
        own, new = self.module.state_dict(), net.state_dict()
        floats = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([own[k] for k in floats], [new[k] for k in floats], 1 - decay)


def all_finite(net: nn.Module) -> bool:
    """Whether no weight is NaN or infinite: a run that broke must not replace what it saved."""
    return all(bool(p.isfinite().all()) for p in net.parameters())
