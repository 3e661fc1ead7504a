"""The work of every peer for a request: bytes to pixels, one stock call, pixels to bytes.

Only the serving differs between the peers. The work is Imagen's, with the same weights, defaults,
working sizes and networks, but with a stock diffusers call in place of the engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.driving import drive
from deployments import images
from deployments.buckets import choose_bucket, fit_to_bucket, restore_from_bucket
from deployments.catalogue import load_registry
from deployments.contract import Img2ImgRequest, complete, parse
from deployments.engine.row import Pixels, RowInput
from deployments.images import Picture
from deployments.registry import ModelSpec
from deployments.settings import ROOT, LimitSettings, enforce_offline
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

Upload = tuple[bytes, Mapping[str, str]]
"""An image file, and the other form fields."""

MODELS: Final = ROOT / "configs/models/starter.yaml"
# As in configs/local.yaml; each model is one process.
TORCH_THREADS: Final = 1
PIXEL_THREADS: Final = 2
MAX_BATCH: Final = {task: 4 for task in Task if task.needs_picture} | {Task.BACKGROUND: 8}
# As in configs/local.yaml, for servers that have a timeout.
TIMEOUT_S: Final = 60
_LIMITS: Final = LimitSettings()
_FOREVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A request, ready for the model: the decoded upload, and what the model sees of it."""

    picture: Picture
    row: RowInput[Any]

    @property
    def key(self) -> Hashable:
        """Items with equal keys may share a call."""
        size, request = self.row.pixels.shape[:2], self.row.request
        if not isinstance(request, Img2ImgRequest):
            return size
        return (*size, request.steps, request.strength, request.guidance_scale)


class Work:
    """One model with a network that Imagen's own pipeline runs, loaded in this process."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.spec = spec
        self.pool = ThreadPoolExecutor(PIXEL_THREADS, thread_name_prefix="pixels")
        self.load(folder)

    def load(self, folder: Path) -> None:
        family = import_module(f"deployments.pipelines.{self.spec.family}")
        self._pipeline = family.PIPELINE(self.spec, folder)

    def fit(self, picture: Picture, request: Any) -> Pixels:
        """The model's input, `H x W x 3`, uint8."""
        return self._pipeline.fit(picture, request)

    def call_one_key(self, items: Sequence[Item]) -> list[Pixels]:
        """The outputs of items of equal keys, in one call."""
        return drive(self._pipeline, [item.row for item in items])

    def restore(self, output: Pixels, item: Item) -> Picture:
        """The result for the client."""
        return self._pipeline.restore(output, item.picture, item.row.request)

    def decode(self, image: bytes, fields: Mapping[str, str]) -> Item:
        """Check the upload and its fields, and prepare them for `call`."""
        spec = self.spec
        request = complete(parse(spec.task.request, fields), spec.defaults, spec.parameters)
        picture = images.decode(image, _LIMITS)
        seed = getattr(request, "seed", None)
        seed = secrets.randbits(32) if seed is None else seed
        return Item(picture, RowInput(request, self.fit(picture, request), seed, _FOREVER_S))

    def call(self, items: Sequence[Item]) -> list[Pixels]:
        """The outputs of any items in their order, with one call for each key."""
        groups: dict[Hashable, list[Item]] = {}
        for item in items:
            groups.setdefault(item.key, []).append(item)
        outputs: dict[Item, Pixels] = {}
        for group in groups.values():
            outputs.update(zip(group, self.call_one_key(group), strict=True))
        return [outputs[item] for item in items]

    def encode(self, item: Item, output: Pixels) -> bytes:
        """The result as a file with metadata; a PNG unless the request names another format."""
        request = item.row.request
        parameters = request.model_dump(include=set(self.spec.parameters))
        if "seed" in parameters:
            parameters["seed"] = item.row.seed
        metadata = {"task": str(self.spec.task), "model": self.spec.name, "parameters": parameters}
        return images.encode(
            self.restore(output, item),
            request.output_format or "png",
            metadata if request.metadata == "full" else None,
        )

    def serve(self, uploads: Sequence[Upload]) -> list[bytes]:
        """Serve a batch: decode and encode on two threads, and call the model on this one."""
        files, fields = zip(*uploads, strict=True)
        items = list(self.pool.map(self.decode, files, fields))
        return list(self.pool.map(self.encode, items, self.call(items)))


class Img2Img(Work):
    """A stock call of diffusers."""

    def load(self, folder: Path) -> None:
        import diffusers

        from deployments.pipelines.stock import load_stable_diffusion, read_index

        kind = getattr(diffusers, read_index(self.spec, folder)["_class_name"])
        self.stock = load_stable_diffusion(kind, kind, self.spec, folder)

    def fit(self, picture: Picture, request: Any) -> Pixels:
        bucket = choose_bucket(picture.width_px, picture.height_px, self.spec.buckets)
        return fit_to_bucket(picture.rgb, bucket)

    def call_one_key(self, items: Sequence[Item]) -> list[Pixels]:
        import torch

        requests = [item.row.request for item in items]
        stacked = torch.from_numpy(np.stack([item.row.pixels for item in items]))
        result = self.stock(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            image=stacked.permute(0, 3, 1, 2).float() / 255,
            strength=requests[0].strength,
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(item.row.seed) for item in items],
            output_type="np",
        )
        return list((result.images.clip(0, 1) * 255).round().astype(np.uint8))

    def restore(self, output: Pixels, item: Item) -> Picture:
        picture = item.picture
        rgb = restore_from_bucket(output, picture.width_px, picture.height_px, working=False)
        return Picture(rgb, picture.alpha, picture.notes)


def load(task: Task | str, *, sliced: bool = False) -> Work:
    """Load the starter model of a task into this process, on the CPU.

    Args:
        task: a task or its name.
        sliced: compute attention in slices, which is slower and takes less memory.
    """
    enforce_offline()
    import torch

    torch.set_num_threads(TORCH_THREADS)
    spec = load_registry(MODELS)[Task(task)]
    folder = ROOT / "starter_models" / spec.task
    if spec.family != "img2img":
        return Work(spec, folder)
    work = Img2Img(spec, folder)
    if sliced:
        work.stock.enable_attention_slicing()
    return work
