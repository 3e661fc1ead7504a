"""Image to image with Stable Diffusion 1.x and 2.x, and with the SDXL refiner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from deployments.buckets import choose_bucket, fit_to_bucket, resize, restore_from_bucket
from deployments.contract import Img2ImgRequest
from deployments.images import Picture
from deployments.pipelines import diffusion

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from deployments.contract import TaskRequest
    from deployments.pipelines.base import Pixels, Row
    from deployments.registry import ModelSpec


class Img2Img:
    """One stock call for a group of rows that agree in everything the call takes as a scalar.

    No safety checker runs. Working sizes are the spec's buckets; the result has the input's size.
    """

    def __init__(self, spec: ModelSpec, folder: Path, device: str) -> None:
        self._buckets = spec.buckets
        is_xl = "XL" in diffusion.read_index(spec, folder)["_class_name"]
        if is_xl:
            self._pipeline = diffusion.load_pipeline(
                StableDiffusionXLImg2ImgPipeline, spec, folder, device, add_watermarker=False
            )
        else:
            self._pipeline = diffusion.load_pipeline(
                StableDiffusionImg2ImgPipeline,
                spec,
                folder,
                device,
                **diffusion.NO_SAFETY_CHECKER,
            )

    def fit(self, picture: Picture, request: TaskRequest) -> Pixels:
        bucket = choose_bucket(picture.width_px, picture.height_px, self._buckets)
        return fit_to_bucket(picture.rgb, bucket)

    def to(self, device: str) -> None:
        self._pipeline.to(device)

    def key(self, row: Row) -> Hashable:
        request = cast("Img2ImgRequest", row.request)
        size = row.pixels.shape[:2]
        return (*size, request.steps, request.strength, request.guidance_scale)

    def begin(self, row: Row) -> None:
        """Nothing: the stock call prepares its own latents."""

    def step(self, rows: Sequence[Row]) -> None:
        requests = [cast("Img2ImgRequest", row.request) for row in rows]
        result = self._pipeline(
            prompt=[r.prompt for r in requests],
            negative_prompt=[r.negative_prompt for r in requests],
            image=diffusion.to_tensor(rows),
            strength=requests[0].strength,
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            generator=diffusion.generators(rows),
            callback_on_step_end=_stop_when_abandoned(rows),
            output_type="np",
        )
        diffusion.set_images(rows, result.images)

    def finish(self, row: Row) -> Pixels:
        return diffusion.to_pixels(row.state)

    def restore(self, output: Pixels, picture: Picture, request: TaskRequest) -> Picture:
        working = cast("Img2ImgRequest", request).output_size == "working"
        rgb = restore_from_bucket(output, picture.width_px, picture.height_px, working=working)
        alpha = picture.alpha
        if alpha is not None and working:
            alpha = resize(alpha, rgb.shape[1], rgb.shape[0])
        return Picture(rgb, alpha, picture.notes)


def _stop_when_abandoned(rows: Sequence[Row]) -> Any:
    """A step callback that ends the call early once nobody waits for any of its rows."""

    def callback(pipeline: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if all(row.cancelled for row in rows):
            pipeline._interrupt = True
        return values

    return callback
