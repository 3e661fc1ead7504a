"""The work of every peer for a request: bytes to pixels, one stock call, pixels to bytes.

Only the serving differs between the peers. The work is Imagen's, with the same weights, defaults
and working sizes, but with a stock diffusers call in place of the engine.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from deployments import images
from deployments.buckets import choose_bucket, fit_to_bucket, resize, restore_from_bucket
from deployments.contract import BackgroundRequest, ImageRequest, Img2ImgRequest, complete, parse
from deployments.images import Picture
from deployments.registry import ModelSpec, load_registry
from deployments.settings import ROOT, LimitSettings, enforce_offline
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from pathlib import Path

Upload = tuple[bytes, Mapping[str, str]]
"""An image file, and the other form fields."""

MODELS: Final = ROOT / "configs/models/starter.yaml"
# As in configs/local.yaml; each model is one process.
TORCH_THREADS: Final = 1
PIXEL_THREADS: Final = 2
MAX_BATCH: Final = {**dict.fromkeys(Task, 4), Task.BACKGROUND: 8}
# As in configs/local.yaml, for servers that have a timeout.
TIMEOUT_S: Final = 60
_LIMITS: Final = LimitSettings()
_SCALE: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A request, ready for the model.

    Attributes:
        request: complete: every field has its final value.
        picture: the decoded upload.
        pixels: the model's input, `H x W x 3`, uint8.
        seed: of this item's random generator.
    """

    request: ImageRequest
    picture: Picture
    pixels: images.Array
    seed: int

    @property
    def key(self) -> Hashable:
        """Items with equal keys may share a call."""
        size = self.pixels.shape[:2]
        if not isinstance(self.request, Img2ImgRequest):
            return size
        return (*size, self.request.steps, self.request.strength, self.request.guidance_scale)


class Work(ABC):
    """One model, loaded in this process."""

    def __init__(self, spec: ModelSpec, folder: Path, *, sliced: bool) -> None:
        self.spec = spec
        self.sliced = sliced
        self.pool = ThreadPoolExecutor(PIXEL_THREADS, thread_name_prefix="pixels")
        self._load(folder)

    @abstractmethod
    def _load(self, folder: Path) -> None: ...

    @abstractmethod
    def _fit(self, picture: Picture) -> images.Array:
        """The model's input, `H x W x 3`, uint8."""

    @abstractmethod
    def _call(self, items: Sequence[Item]) -> list[images.Array]: ...

    @abstractmethod
    def _restore(self, output: images.Array, item: Item) -> Picture:
        """The result for the client."""

    def decode(self, image: bytes, fields: Mapping[str, str]) -> Item:
        """Check the upload and its fields, and prepare them for `call`."""
        request = complete(
            parse(self.spec.task.request, fields), self.spec.defaults, self.spec.parameters
        )
        picture = images.decode(image, _LIMITS)
        seed = getattr(request, "seed", None)
        return Item(
            request, picture, self._fit(picture), secrets.randbits(32) if seed is None else seed
        )

    def call(self, items: Sequence[Item]) -> list[images.Array]:
        """Run items of equal keys in one call.

        Raises:
            ValueError: their keys differ.
        """
        if len({item.key for item in items}) != 1:
            raise ValueError("one call takes items of one key")
        return self._call(items)

    def encode(self, item: Item, output: images.Array) -> bytes:
        """The result as a file with metadata; a PNG unless the request names another format."""
        request = item.request
        parameters = request.model_dump(include=set(self.spec.parameters))
        if "seed" in parameters:
            parameters["seed"] = item.seed
        metadata = {"task": str(self.spec.task), "model": self.spec.name, "parameters": parameters}
        return images.encode(
            self._restore(output, item),
            request.output_format or "png",
            metadata if request.metadata == "full" else None,
        )

    def call_groups(self, items: Sequence[Item]) -> list[images.Array]:
        """The outputs of any items in their order, with one call for each key."""
        outputs: dict[int, images.Array] = {}
        for places in _groups(items):
            found = self.call([items[place] for place in places])
            outputs.update(zip(places, found, strict=True))
        return [outputs[place] for place in range(len(items))]

    def serve(self, uploads: Sequence[Upload]) -> list[bytes]:
        """Serve a batch: decode and encode on two threads, and call the model on this one."""
        files, fields = zip(*uploads, strict=True)
        items = list(self.pool.map(self.decode, files, fields))
        return list(self.pool.map(self.encode, items, self.call_groups(items)))


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
    kinds = {"img2img": Img2Img, "upscale_gan": Upscale, "matting": Matting}
    return kinds[spec.family](spec, ROOT / "starter_models" / spec.task, sliced=sliced)


class Img2Img(Work):
    """A stock call of diffusers."""

    def _load(self, folder: Path) -> None:
        import diffusers
        import torch

        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = str(index["_class_name"])
        options: dict[str, Any] = {"add_watermarker": False}
        if "XL" not in name:
            options = {
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
        self._pipeline = getattr(diffusers, name).from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        for part in (self._pipeline.unet, self._pipeline.vae):
            part.to(memory_format=torch.channels_last)  # as Imagen does: faster on a CPU
        if self.sliced:
            self._pipeline.enable_attention_slicing()

    def _fit(self, picture: Picture) -> images.Array:
        bucket = choose_bucket(picture.width_px, picture.height_px, self.spec.buckets)
        return fit_to_bucket(picture.rgb, bucket)

    def _call(self, items: Sequence[Item]) -> list[images.Array]:
        import torch

        requests = [cast("Img2ImgRequest", item.request) for item in items]
        stacked = torch.from_numpy(np.stack([item.pixels for item in items]))
        result = self._pipeline(
            prompt=[request.prompt for request in requests],
            negative_prompt=[request.negative_prompt for request in requests],
            image=stacked.permute(0, 3, 1, 2).float() / 255,
            strength=requests[0].strength,
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in items],
            output_type="np",
        )
        return [_to_bytes(image) for image in result.images]

    def _restore(self, output: images.Array, item: Item) -> Picture:
        picture = item.picture
        rgb = restore_from_bucket(output, picture.width_px, picture.height_px, working=False)
        return Picture(rgb, picture.alpha, picture.notes)


class Upscale(Work):
    """SRVGG over Imagen's tiles, which is faster than the whole picture at once."""

    def _load(self, folder: Path) -> None:
        from deployments.pipelines import networks
        from deployments.pipelines.nets.srvgg import SRVGGNetCompact

        config = networks.read_config(self.spec, folder)
        self._net = SRVGGNetCompact(int(config["num_feat"]), int(config["num_conv"]))
        networks.load_weights(self._net, self.spec, folder, "cpu")

    def _fit(self, picture: Picture) -> images.Array:
        return picture.rgb

    def _call(self, items: Sequence[Item]) -> list[images.Array]:
        import torch

        pixels = np.stack([item.pixels for item in items])
        count, height, width, _ = pixels.shape
        canvas = np.empty((count, height * _SCALE, width * _SCALE, 3), np.uint8)
        for top, left, tile in self._tiles(pixels):
            with torch.inference_mode():
                output = self._net(torch.from_numpy(tile).permute(0, 3, 1, 2).float() / 255)
            result = (output.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            self._paste(canvas, result, top, left)
        return list(canvas)

    def _tiles(self, pixels: images.Array) -> Iterator[tuple[int, int, images.Array]]:
        """Top and left of each tile, and its pixels with the margin that the network sees."""
        side, around = self.spec.tile_px, self._net.receptive_field_px
        for top in range(0, pixels.shape[1], side):
            for left in range(0, pixels.shape[2], side):
                rows = slice(max(top - around, 0), top + side + around)
                columns = slice(max(left - around, 0), left + side + around)
                yield top, left, np.ascontiguousarray(pixels[:, rows, columns])

    def _paste(self, canvas: images.Array, tile: images.Array, top: int, left: int) -> None:
        side, around = self.spec.tile_px * _SCALE, self._net.receptive_field_px
        y, x = min(top, around) * _SCALE, min(left, around) * _SCALE
        target = canvas[:, top * _SCALE :, left * _SCALE :][:, :side, :side]
        target[:] = tile[:, y : y + target.shape[1], x : x + target.shape[2]]

    def _restore(self, output: images.Array, item: Item) -> Picture:
        alpha = item.picture.alpha
        if alpha is not None:
            alpha = resize(alpha, output.shape[1], output.shape[0])
        return Picture(output, alpha, item.picture.notes)


class Matting(Work):
    """IS-Net at its own square size."""

    def _load(self, folder: Path) -> None:
        from deployments.pipelines import networks
        from deployments.pipelines.nets.isnet import ISNet, ISNetWidths

        config = networks.read_config(self.spec, folder)
        self._side_px = int(config["input_px"])
        self._stretch = bool(config["stretch"])
        self._net = ISNet(ISNetWidths(**config["widths"]))
        networks.load_weights(self._net, self.spec, folder, "cpu")

    def _fit(self, picture: Picture) -> images.Array:
        return resize(picture.rgb, self._side_px, self._side_px)

    def _call(self, items: Sequence[Item]) -> list[images.Array]:
        import torch

        stacked = torch.from_numpy(np.stack([item.pixels for item in items]))
        with torch.inference_mode():
            logits = self._net(stacked.permute(0, 3, 1, 2).float() / 255 - 0.5, sides=1)[0]
            alpha = logits.sigmoid()[:, 0]
        if self._stretch:
            low, high = alpha.amin((1, 2), keepdim=True), alpha.amax((1, 2), keepdim=True)
            alpha = (alpha - low) / (high - low).clamp(min=1e-6)
        return [_to_bytes(mask) for mask in alpha.numpy()]

    def _restore(self, output: images.Array, item: Item) -> Picture:
        picture, request = item.picture, cast("BackgroundRequest", item.request)
        alpha = resize(output, picture.width_px, picture.height_px)
        if picture.alpha is not None:
            alpha = (alpha.astype(np.uint16) * picture.alpha // 255).astype(np.uint8)
        if request.output == "mask":
            return Picture(alpha, None, picture.notes)
        if request.output == "rgba":
            return Picture(picture.rgb, alpha, picture.notes)
        colour = np.array(list(bytes.fromhex(request.color[1:])), np.float32)
        share = alpha[..., None].astype(np.float32) / 255
        mixed = picture.rgb * share + colour * (1 - share)
        return Picture(mixed.round().astype(np.uint8), None, picture.notes)


def _to_bytes(image: Any) -> images.Array:
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _groups(items: Sequence[Item]) -> list[list[int]]:
    """The indices of items that share a key, in order of their first item."""
    places: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.key, []).append(place)
    return list(places.values())
