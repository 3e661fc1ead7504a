"""Which of our networks a checkpoint is for, by the keys and shapes of its tensors alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.pipelines import matting, upscale_gan
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from deployments.pipelines.networks import differences

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]
_MOST_PARTS = 1000
"""More blocks or layers are a broken file, and would take long to build."""


@dataclass(frozen=True)
class Recognised:
    """A network of ours beside a checkpoint.

    Attributes:
        title: the network in words.
        family: the pipeline family that runs it.
        config: what its `config.json` holds, as far as shapes tell.
        scale: how many times it enlarges; None for another task.
        unknown: keys of `config.json` that no shape tells, with the default that holds for each.
        tensors: how many the network has.
        differences: what keeps the checkpoint from a strict load; empty where it fits.
    """

    title: str
    family: str
    config: Config
    scale: int | None
    tensors: int
    differences: list[str]
    unknown: Config = field(default_factory=dict[str, Any])


def recognise(shapes: Shapes) -> Recognised:
    """The network that a checkpoint fits, or else the nearest one.

    Args:
        shapes: of its tensors, by key.
    """
    found = [_compared(kind, shapes) for kind in _KINDS]
    return min(found, key=lambda one: len(one.differences) / one.tensors)


def _compared(kind: _Kind, shapes: Shapes) -> Recognised:
    try:
        config = kind.read(shapes)
        net = kind.build(config)
    except (KeyError, ValueError, IndexError):
        config = {"architecture": kind.architecture}  # of the published size
        net = kind.build(config)
    upscales = isinstance(net, RRDBNet | SRVGGNetCompact)
    return Recognised(
        title=kind.title,
        family="upscale_gan" if upscales else "matting",
        config=config,
        scale=net.scale if upscales else None,
        tensors=len(net.state_dict()),
        differences=differences(net, shapes),
        unknown={} if upscales else matting.untold(net),
    )


def _rrdb(shapes: Shapes) -> Config:
    features, folded = shapes["conv_first.weight"][:2]
    scales = {3: 4, 12: 2}
    return {
        "architecture": "rrdb",
        "num_feat": features,
        "num_block": _count(shapes, r"body\.(\d+)\."),
        "num_grow_ch": shapes["body.0.rdb1.conv1.weight"][0],
        "scale": scales[folded],
    }


def _srvgg(shapes: Shapes) -> Config:
    last = _count(shapes, r"body\.(\d+)\.") - 1
    scale = math.isqrt(shapes[f"body.{last}.weight"][0] // 3)
    convolutions = [key for key in shapes if re.fullmatch(r"body\.\d+\.weight", key)]
    return {
        "architecture": "srvgg",
        "num_feat": shapes["body.0.weight"][0],
        "num_conv": sum(len(shapes[key]) == 4 for key in convolutions) - 2,
        "scale": scale,
    }


def _isnet(shapes: Shapes) -> Config:
    stem = {"stem": shapes["conv_in.weight"][0]}
    return {"architecture": "isnet", "widths": stem | _widths(shapes)}


def _u2net(shapes: Shapes) -> Config:
    if "outconv.weight" not in shapes:
        raise ValueError("no fused output")
    return {"architecture": "u2net", "widths": _widths(shapes)}


def _birefnet(shapes: Shapes) -> Config:
    stages = [f"bb.layers.{i}.blocks" for i in range(4)]
    tables = [shapes[f"{stage}.0.attn.relative_position_bias_table"] for stage in stages]
    widths = {
        "channels": shapes["bb.patch_embed.proj.weight"][0],
        "depths": [_count(shapes, rf"{re.escape(stage)}\.(\d+)\.") for stage in stages],
        "heads": [heads for _, heads in tables],
        "window": (math.isqrt(tables[0][0]) + 1) // 2,
    }
    return {"architecture": "birefnet", "widths": widths}


def _widths(shapes: Shapes) -> Config:
    def widths(block: str, stages: list[str]) -> list[int]:
        return [shapes[f"{stage}.{block}.conv_s1.weight"][0] for stage in stages]

    encoder = [f"stage{i}" for i in range(1, 7)]
    decoder = [f"stage{i}d" for i in range(5, 0, -1)]
    return {
        "middle": widths("rebnconv1", encoder),
        "out": widths("rebnconvin", encoder),
        "decoder_middle": widths("rebnconv1", decoder),
        "decoder_out": widths("rebnconvin", decoder),
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number at a place of the keys.

    Raises:
        ValueError: there is none, or one that no network has.
    """
    count = 1 + max(int(match[1]) for key in shapes if (match := re.match(pattern, key)))
    if count > _MOST_PARTS:
        raise ValueError(f"{count} parts")
    return count


def _build_upscaler(config: Config) -> RRDBNet | SRVGGNetCompact:
    with torch.device("meta"):
        net = upscale_gan.build_net(config)
    if net is None:
        raise KeyError(config["architecture"])
    return net


def _build_matting(config: Config) -> matting.Net:
    with torch.device("meta"):
        return matting.build_net(config)


@dataclass(frozen=True)
class _Kind:
    """An architecture.

    Attributes:
        architecture: its name in `config.json`.
        title: for people.
        read: makes a `config.json` of the shapes of a checkpoint; raises KeyError, ValueError or
            IndexError if it is for another network.
        build: the network of a `config.json` on the meta device.
    """

    architecture: str
    title: str
    read: Callable[[Shapes], Config]
    build: Callable[[Config], Any]


_KINDS = (
    _Kind("rrdb", "RRDBNet (Real-ESRGAN)", _rrdb, _build_upscaler),
    _Kind("srvgg", "SRVGGNetCompact (Real-ESRGAN, compact)", _srvgg, _build_upscaler),
    _Kind("isnet", "IS-Net", _isnet, _build_matting),
    _Kind("u2net", "U2-Net", _u2net, _build_matting),
    _Kind("birefnet", "BiRefNet", _birefnet, _build_matting),
)
