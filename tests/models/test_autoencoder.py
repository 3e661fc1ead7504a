"""Pictures are decoded in bounded pieces, and as the stock autoencoder decodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from gathering import until
from stock import as_row

from deployments.contract import ComicRequest, UpscaleRequest
from deployments.errors import ModelFailed
from deployments.pipelines.autoencoder import Autoencoder, image_tensor
from deployments.pipelines.noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from deployments.engine.pipeline import AnyPipeline


def drain(pieces: Generator[None, None, Any]) -> tuple[int, Any]:
    """After how many pieces it stopped for others, and what came of it."""
    count = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return count, end.value
        count += 1


def latents(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed)) * 0.2


def stock_levels(vae: Any, z: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        image = vae.decode(z / vae.config.scaling_factor).sample[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4"])
def test_a_picture_decoded_whole_is_the_stock_autoencoders(
    name: str, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline: Any = tiny_pipeline(name)
    vae = pipeline.autoencoder.vae
    vae.use_tiling = False
    z = latents(8, 12)
    _, pixels = drain(Autoencoder(vae).decode(z))
    assert (pixels == stock_levels(vae, z)).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 64), (40, 130), (128, 47), (97, 97)])
def test_a_picture_decoded_in_tiles_is_the_stock_autoencoders(
    height: int, width: int, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline: Any = tiny_pipeline("x4")
    vae, ours = pipeline.autoencoder.vae, Autoencoder(pipeline.autoencoder.vae, tile_px=256)
    seen: list[int] = []
    hook = vae.decoder.conv_in.register_forward_hook(
        lambda _module, inputs, _output: seen.append(max(inputs[0].shape[2:]))
    )
    z = latents(height, width)
    try:
        count, pixels = drain(ours.decode(z))
    finally:
        hook.remove()
    vae.use_tiling = True
    expected = stock_levels(vae, z)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert max(seen) <= 64
    assert len(seen) == 1 or count >= len(seen), "others have their turn after each tile"


def test_an_encoded_picture_is_the_stock_autoencoders(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    pipeline: Any = tiny_pipeline("sd_ddim")
    vae, pixels = pipeline.autoencoder.vae, tiny.picture(3).rgb
    ours = pipeline.autoencoder.encode(pixels, Noise(5))
    with torch.no_grad():
        encoded = vae.encode(image_tensor(pixels)).latent_dist
        expected = encoded.sample(torch.Generator().manual_seed(5)) * vae.config.scaling_factor
    assert (ours == expected).all()


@pytest.mark.parametrize("tile_px", [None, 256])
def test_a_decode_may_be_given_up_anywhere(
    tile_px: int | None, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline: Any = tiny_pipeline("x4")
    ours, z = Autoencoder(pipeline.autoencoder.vae, tile_px), latents(80, 64)
    count, expected = drain(ours.decode(z))
    for last in range(count):
        pieces = ours.decode(z)
        for _ in range(last):
            next(pieces)
        pieces.close()
        if last == 3:
            break
    assert (drain(ours.decode(z))[1] == expected).all()


def test_two_decodes_in_turns_do_not_mix(tiny_pipeline: Callable[..., AnyPipeline]) -> None:
    pipeline: Any = tiny_pipeline("x4")
    ours = Autoencoder(pipeline.autoencoder.vae, tile_px=128)
    zs = [latents(40, 64, seed) for seed in (1, 2)]
    expected = [drain(ours.decode(z))[1] for z in zs]
    first, second = (ours.decode(z) for z in zs)
    for _ in range(3):
        next(first)
        next(second)
    assert (drain(first)[1] == expected[0]).all()
    assert (drain(second)[1] == expected[1]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tile_px", [None, 256])
def test_a_value_that_is_no_number_fails_the_picture(
    tile_px: int | None, value: float, tiny_pipeline: Callable[..., AnyPipeline]
) -> None:
    pipeline: Any = tiny_pipeline("x4")
    z = latents(80, 64)
    z[0, 0, 79, 63] = value
    with pytest.raises(ModelFailed, match="NaN"):
        drain(Autoencoder(pipeline.autoencoder.vae, tile_px).decode(z))


@pytest.mark.parametrize("name", ["sd_ddim", "x4"])
def test_others_step_beside_every_piece_of_a_slow_decode(
    name: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each piece waits until the other row has stepped: else all would stand still."""
    pipeline: Any = tiny_pipeline(name)
    if name == "x4":
        kind, options, side_px = UpscaleRequest, {}, 16
    else:
        kind, options, side_px = ComicRequest, {"strength": 1.0}, 64
    short, long = (
        as_row(pipeline, kind(steps=steps, seed=1, **options), tiny.picture(1, side_px, side_px))
        for steps in (1, 8)
    )
    waits: list[int] = []
    for block in pipeline.autoencoder.vae.decoder.up_blocks:
        whole = block.forward

        def slow(*args: Any, whole: Callable[..., Any] = whole, **kwargs: Any) -> Any:
            if left := long.progress.steps_left:
                until(lambda: long.progress.steps_left < left, 20)
                waits.append(left - long.progress.steps_left)
            return whole(*args, **kwargs)

        monkeypatch.setattr(block, "forward", slow)
    run_together(pipeline, [short, long])
    for row in (short, long):
        assert row.future.exception() is None
    assert len(waits) == len(pipeline.autoencoder.vae.decoder.up_blocks)
    assert min(waits) >= 1
