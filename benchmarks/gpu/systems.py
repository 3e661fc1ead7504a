"""The systems that are compared: the old worker loop, stock diffusers, and ours."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from benchmarks.gpu import options as speed
from benchmarks.gpu.architectures import is_xl
from benchmarks.gpu.pipelines import (
    DiffusionBench,
    NetworkBench,
    apply_network,
    drive,
    make_row,
)
from benchmarks.gpu.workloads import Item, low_res_scheduler
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits, Pace
from deployments.pipelines.denoiser import Denoiser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.options import Options
    from benchmarks.gpu.workloads import Parts
    from deployments.engine.row import Pixels, Row

Load = Literal["uniform", "mixed"]
_RESULT_TIMEOUT_S = 300


class System(Protocol):
    """A system that makes pictures of requests.

    Attributes:
        load: the kind of load it gets.
        batch: its fastest number of images at a time; runs are multiples of it.
        grouped: the most images that shared a pass.
        shared_bytes: size of its networks that all systems of a workload share.
    """

    load: Load
    batch: int
    grouped: int
    shared_bytes: int

    def warm_up(self) -> None: ...

    def run(self, items: Sequence[Item]) -> list[Pixels]: ...

    def close(self) -> None: ...


def shared_bytes(parts: Parts, modules: Sequence[Any]) -> int:
    """Bytes of the workload's own weights that these networks use."""
    own = [module for module in (parts.unet, parts.vae, parts.network) if module is not None]
    known = {weight.data_ptr() for module in own for weight in module.parameters()}
    weights = [weight for module in modules for weight in module.parameters()]
    return sum(weight.nbytes for weight in weights if weight.data_ptr() in known)


def items(parts: Parts, load: Load, count: int, seeds: int = 10_000) -> list[Item]:
    """`count` requests with at most `seeds` different seeds."""
    workload = parts.workload
    requests = workload.mixed if load == "mixed" else (workload.request,)
    return [Item(requests[i % len(requests)], i % seeds) for i in range(count)]


class Stock:
    """A stock diffusers pipeline, or a plain forward pass of a network.

    Args:
        batch: requests of a call.
        sliced: with attention slicing, as in the old worker loop.
        upcast: with an autoencoder that is cast to float32 and back at each call, as the one in
            the model's own repository is.
    """

    def __init__(
        self,
        parts: Parts,
        batch: int = 1,
        load: Load = "uniform",
        *,
        sliced: bool = False,
        upcast: bool = False,
    ) -> None:
        self.load: Load = load
        self.batch = self.grouped = batch
        self._parts, self._sliced = parts, sliced
        self._pipe = None if parts.unet is None else stock_pipeline(parts, upcast=upcast)
        held = [parts.network] if self._pipe is None else [self._pipe.unet, self._pipe.vae]
        self.shared_bytes = shared_bytes(parts, held)

    def warm_up(self) -> None:
        for _ in range(2 if self._parts.timed else 1):
            self.run(items(self._parts, self.load, self.batch))

    def run(self, items: Sequence[Item]) -> list[Pixels]:
        done: list[Pixels] = []
        # All systems share the UNet: it is sliced for these calls only.
        if self._sliced:
            self._parts.unet.set_attention_slice("auto")
        try:
            for start in range(0, len(items), self.batch):
                done += self._call(items[start : start + self.batch])
        finally:
            if self._sliced:
                self._parts.unet.set_attention_slice(None)
        return done

    def _call(self, items: Sequence[Item]) -> list[Pixels]:
        parts = self._parts
        if self._pipe is None:
            pixels = [parts.pixels] * len(items)
            return apply_network(parts, parts.network, parts.dtype, pixels)
        pictures = [Image.fromarray(parts.pixels) for _ in items]
        images = self._pipe(image=pictures, **_arguments(parts, items)).images
        return [np.asarray(image) for image in images]

    def close(self) -> None:
        self._pipe = None


def stock_pipeline(parts: Parts, *, upcast: bool) -> Any:
    """The stock pipeline of a workload, without text encoders."""
    quiet()
    vae = parts.vae
    if upcast or vae.dtype != parts.dtype:
        vae = copy.deepcopy(vae).to(parts.dtype)
        vae.register_to_config(force_upcast=upcast or vae.config.force_upcast)
    nothing = _none("text_encoder", "tokenizer")
    common: dict[str, Any] = {"vae": vae, "unet": parts.unet, "scheduler": parts.scheduler()}
    if parts.workload.family == "upscale_diffusion":
        pipe: Any = StableDiffusionUpscalePipeline(
            **common, **nothing, low_res_scheduler=low_res_scheduler()
        )
    elif is_xl(parts.workload.model):
        pipe = StableDiffusionXLImg2ImgPipeline(
            **common,
            **nothing,
            **_none("text_encoder_2", "tokenizer_2"),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionImg2ImgPipeline(
            **common,
            **nothing,
            **_none("safety_checker", "feature_extractor"),
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _none(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def quiet() -> None:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def _arguments(parts: Parts, items: Sequence[Item]) -> dict[str, Any]:
    """Arguments of a stock pipeline's call; the items differ in their seeds alone."""
    request, count = items[0].request, len(items)
    assert parts.positive
    assert parts.negative
    arguments: dict[str, Any] = {
        "prompt_embeds": parts.positive.text.repeat(count, 1, 1),
        "negative_prompt_embeds": parts.negative.text.repeat(count, 1, 1),
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(item.seed) for item in items],
    }
    if parts.workload.family == "upscale_diffusion":
        return arguments | {"noise_level": request.noise_level}
    if parts.positive.pooled is not None and parts.negative.pooled is not None:
        arguments["pooled_prompt_embeds"] = parts.positive.pooled.repeat(count, 1)
        arguments["negative_pooled_prompt_embeds"] = parts.negative.pooled.repeat(count, 1)
    return arguments | {"strength": request.strength}


class Whole(Pace):
    """Groups as large as the limits allow, even if that gains nothing."""

    def best_size(self, rows: Sequence[Row]) -> int:
        return len(rows)


@dataclass(slots=True)
class Ours:
    """Our denoiser and autoencoder behind our engine, with two passes' worth of clients waiting.

    Args:
        options: how it runs.
        load: what clients send.
    """

    parts: Parts
    options: Options
    load: Load = "uniform"
    batch: int = 1
    grouped: int = 1
    shared_bytes: int = 0
    pipeline: Any = None
    engine: Any = None

    def __post_init__(self) -> None:
        self.batch = 1 if self.options.exact else self.options.group or self.parts.workload.group
        self.pipeline = self._pipeline()

    def _pipeline(self) -> Any:
        parts, options = self.parts, self.options
        pipeline: Any
        if parts.unet is None:
            network = speed.apply(parts.network, options, self.batch)
            self.shared_bytes = shared_bytes(parts, [network])
            pipeline = NetworkBench(parts, network, options.dtype or parts.dtype)
        else:
            unet = speed.apply(parts.unet, options, 2 * self.batch)
            vae = speed.apply_vae(parts.vae, options)
            self.shared_bytes = shared_bytes(parts, [unet, vae])
            pipeline = DiffusionBench(parts, Denoiser(unet, parts.scheduler()), vae)
        return pipeline

    def warm_up(self) -> None:
        """Run every size of a pass on this thread alone, then start the engine."""
        guided = self.parts.workload.request
        plain = replace(guided, guidance_scale=1.0)
        drive(self.pipeline, [make_row(self.parts, Item(plain, 0))])
        for count in dict.fromkeys([*(1 << i for i in range(self.batch.bit_length())), self.batch]):
            drive(self.pipeline, [make_row(self.parts, Item(guided, i)) for i in range(count)])
        limits = GroupLimits(self.batch, exact=self.options.exact)
        pace = Pace() if self.options.group is None else Whole()
        self.engine = Engine(self.pipeline, limits, pace=pace)
        if self.parts.timed:
            # Enough steps for the engine to learn which groups gain.
            self.run(items(self.parts, self.load, 4 * self.batch))

    def run(self, items: Sequence[Item]) -> list[Pixels]:
        slots = threading.Semaphore(2 * self.batch)
        rows = [make_row(self.parts, item) for item in items]
        for row in rows:
            slots.acquire()
            row.future.add_done_callback(lambda _: slots.release())
            self.engine.put([row])
        pictures = [row.future.result(_RESULT_TIMEOUT_S) for row in rows]
        self.grouped = max(self.grouped, *(row.progress.batch_size for row in rows))
        return pictures

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = self.pipeline = None
