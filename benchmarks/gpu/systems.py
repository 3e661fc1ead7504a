"""The systems that are compared: the old worker loop, stock diffusers, and ours."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

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

from benchmarks.driving import drive
from benchmarks.gpu import options as speed
from benchmarks.gpu.architectures import is_xl
from benchmarks.gpu.options import BASE
from benchmarks.gpu.pipelines import DiffusionBench, NetworkBench, apply_network, call_network
from benchmarks.gpu.workloads import Item, low_res_scheduler
from deployments.engine.engine import Engine
from deployments.engine.graphs import CudaGraphs
from deployments.engine.grouping import GroupLimits, Pace
from deployments.engine.pipeline import result_of
from deployments.engine.preparation import Preparation, compiling
from deployments.engine.row import Row, RowInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.options import Options
    from benchmarks.gpu.workloads import Parts
    from deployments.engine.row import Pixels

Load = Literal["uniform", "mixed"]
_RESULT_TIMEOUT_S = 300


class System:
    """A system that makes pictures of requests.

    Attributes:
        batch: its fastest number of images at a time; runs are multiples of it.
        grouped: the most images that shared a pass.
        shared_bytes: size of its networks that all systems of a workload share.
        prepared_s: what preparing its passes took, where any are.
    """

    batch: int = 1
    grouped: int = 1
    shared_bytes: int = 0
    prepared_s: float | None = None

    def warm_up(self) -> None:
        raise NotImplementedError

    def run(self, items: Sequence[Item]) -> list[Pixels]:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything on the device."""


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


class Stock(System):
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
        *,
        sliced: bool = False,
        upcast: bool = False,
    ) -> None:
        self.batch, self.grouped = batch, batch
        self._parts, self._sliced = parts, sliced
        self._pipe = None if parts.unet is None else stock_pipeline(parts, upcast=upcast)
        held = [parts.network] if self._pipe is None else [self._pipe.unet, self._pipe.vae]
        self.shared_bytes = shared_bytes(parts, held)

    def warm_up(self) -> None:
        for _ in range(2 if self._parts.timed else 1):
            self.run(items(self._parts, "uniform", self.batch))

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
            return apply_network(parts, partial(call_network, parts), parts.dtype, pixels)
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
    components: dict[str, Any] = {"vae": vae, "unet": parts.unet, "scheduler": parts.scheduler()}
    absent = ["text_encoder", "tokenizer"]
    if parts.workload.family == "upscale_diffusion":
        kind: Any = StableDiffusionUpscalePipeline
        components["low_res_scheduler"] = low_res_scheduler()
    elif is_xl(parts.workload.model):
        kind = StableDiffusionXLImg2ImgPipeline
        absent += ["text_encoder_2", "tokenizer_2"]
        components |= {
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": False,
            "add_watermarker": False,
        }
    else:
        kind = StableDiffusionImg2ImgPipeline
        absent += ["safety_checker", "feature_extractor"]
        components["requires_safety_checker"] = False
    pipe = kind(**components, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet() -> None:
    """Keep the libraries' advice out of the output."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def _arguments(parts: Parts, items: Sequence[Item]) -> dict[str, Any]:
    """Arguments of a stock pipeline's call; the items differ in their seeds alone."""
    request, count = items[0].request, len(items)
    positive, negative = parts.conditions
    arguments: dict[str, Any] = {
        "prompt_embeds": positive.text.repeat(count, 1, 1),
        "negative_prompt_embeds": negative.text.repeat(count, 1, 1),
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(item.seed) for item in items],
    }
    if parts.workload.family == "upscale_diffusion":
        return arguments | {"noise_level": request.noise_level}
    if positive.pooled is not None and negative.pooled is not None:
        arguments["pooled_prompt_embeds"] = positive.pooled.repeat(count, 1)
        arguments["negative_pooled_prompt_embeds"] = negative.pooled.repeat(count, 1)
    return arguments | {"strength": request.strength}


class Whole(Pace):
    """Groups as large as the limits allow, even if that gains nothing."""

    def best_size(self, rows: Sequence[Row]) -> int:
        return len(rows)


class Ours(System):
    """Our denoiser and autoencoder behind our engine, with two passes' worth of clients waiting.

    Args:
        options: how it runs.
    """

    def __init__(self, parts: Parts, options: Options = BASE) -> None:
        self._parts, self._options = parts, options
        self.batch = options.group or parts.workload.group
        self._engine: Any = None
        self.pipeline: Any
        if parts.unet is None:
            networks = [speed.apply(parts.network, options)]
            self.pipeline = NetworkBench(parts, *networks, options.dtype or parts.dtype)
        else:
            unet = speed.apply(parts.unet, options)
            networks = [unet, speed.apply_vae(parts.vae, options)]
            self.pipeline = DiffusionBench(parts, *networks, noise=options.noise)
        self.shared_bytes = shared_bytes(parts, networks)

    def warm_up(self) -> None:
        """Prepare passes, run every size on this thread alone, then start the engine."""
        if self._parts.timed:
            self.prepare()
        guided = self._parts.workload.request
        self.run_together([Item(replace(guided, guidance_scale=1.0), 0)])
        for count in dict.fromkeys([*(1 << i for i in range(self.batch.bit_length())), self.batch]):
            self.run_together([Item(guided, i) for i in range(count)])
        limits = GroupLimits(self.batch, exact=self._options.exact)
        pace = Pace() if self._options.group is None else Whole()
        self._engine = Engine(self.pipeline, limits, pace=pace)
        if self._parts.timed:
            # Enough steps for the engine to learn which groups gain.
            self.run(items(self._parts, "uniform", 3 * self.batch))

    def prepare(self) -> None:
        """Compile and record passes, as a replica does before it is ready."""
        start_s = time.perf_counter()
        recorder = None
        if self._options.graphs:
            recorder = CudaGraphs(torch.cuda.get_device_properties(0).total_memory)
        # Forgetting what other systems have compiled would slow them down.
        with compiling() if self._options.mode != "off" else nullcontext():
            self.pipeline.prepare(Preparation(self._options.mode, recorder=recorder), self.batch)
        torch.cuda.synchronize()
        self.prepared_s = time.perf_counter() - start_s

    def begun(self, count: int) -> list[Any]:
        """So many rows with guidance that have begun, with many steps to come."""
        request = replace(self._parts.workload.request, steps=50, strength=1.0, guidance_scale=5.0)
        rows = [self._input(Item(request, seed)) for seed in range(count)]
        return [result_of(self.pipeline.begin(row)) for row in rows]

    def run_together(self, items: Sequence[Item]) -> list[Pixels]:
        """Run items in the same passes, without the engine."""
        return drive(self.pipeline, [self._input(item) for item in items])

    def run(self, items: Sequence[Item]) -> list[Pixels]:
        slots = threading.Semaphore(2 * self.batch)
        rows = [Row(self._input(item)) for item in items]
        for row in rows:
            slots.acquire()
            row.future.add_done_callback(lambda _: slots.release())
            self._engine.put([row])
        pictures = [row.future.result(_RESULT_TIMEOUT_S) for row in rows]
        self.grouped = max(self.grouped, *(row.progress.batch_size for row in rows))
        return pictures

    def _input(self, item: Item) -> RowInput[Any]:
        return RowInput(item.request, self._parts.pixels, item.seed, deadline_s=float("inf"))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self.pipeline = None
