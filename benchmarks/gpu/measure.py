"""Time, memory, arithmetic and picture differences."""

from __future__ import annotations

import gc
import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.architectures import (
    ARCHITECTURES,
    build_network,
    build_unet,
    build_vae,
    unet_inputs,
)
from benchmarks.gpu.systems import items
from deployments.pipelines.schedules import make_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.gpu.systems import Load, System
    from benchmarks.gpu.workloads import Parts, Request, Workload
    from deployments.engine.row import Pixels

    Values = dict[str, Any]

PEAK_SIZES = (4096, 8192, 12288, 16384)
_SAMPLE_S = 1.5
_MOST_IMAGES = 96


def timed(work: Callable[[], Any]) -> float:
    """Seconds of work, until the device has finished every stream."""
    _synchronize()
    start_s = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start_s


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    parts: Parts,
    runs: Mapping[str, tuple[System, Load]],
    rounds: int,
    enough: Callable[[], bool],
) -> dict[str, list[float]]:
    """Images a second of warm systems in turns, every other round backwards, so that a drift of the
    clocks affects all alike. Stops after a whole round when `enough()` is true.
    """
    counts = {name: _images(parts, *run) for name, run in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            system, kind = runs[name]
            load = items(parts, kind, counts[name])
            rates[name].append(counts[name] / timed(partial(system.run, load)))
        if enough():
            break
    return rates


def _images(parts: Parts, system: System, load: Load) -> int:
    """How many images a run takes: whole batches and whole turns of a mix, for a second or two."""
    least = max(len(parts.workload.mixed), 1) if load == "mixed" else 1
    unit = math.lcm(system.batch, least)
    if not parts.timed:
        return unit
    seconds = timed(lambda: system.run(items(parts, load, unit)))
    # Groups fill up only while further requests wait.
    units = max(_SAMPLE_S / seconds, 3 * system.batch / unit)
    return unit * min(math.ceil(units), max(_MOST_IMAGES // unit, 1))


def summary(
    workload: Workload, name: str, load: Load, rates: Mapping[str, Sequence[float]]
) -> Values:
    """Images a second of a system, UNet rows a second, and how many times the images of others."""
    middle = statistics.median(rates[name])
    return {
        "images_per_s": middle,
        "rows_per_s": middle * _rows_per_image(workload, load),
        "spread": (max(rates[name]) - min(rates[name])) / middle,
        "times": {
            other: _ratio(rates[name], theirs) for other, theirs in rates.items() if other != name
        },
    }


def _rows_per_image(workload: Workload, load: Load) -> float:
    requests = workload.mixed if load == "mixed" else (workload.request,)
    return statistics.fmean(_network_rows(workload, request) for request in requests)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and the lowest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios)


def memory() -> tuple[int, int]:
    """Allocated and reserved bytes, with nothing unused; zeros without a GPU."""
    free_memory()
    if not torch.cuda.is_initialized():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def footprint(work: Callable[[], Any], before: tuple[int, int], shared_bytes: int) -> Values:
    """The most memory that a system takes during work; None without a GPU.

    Args:
        work: of the warm system.
        before: `memory()` before the system was made.
        shared_bytes: networks that were there already.
    """
    free_memory()
    if not torch.cuda.is_initialized():
        work()
        return {"peak_bytes": None, "reserved_bytes": None}
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before[0] + shared_bytes
    reserved = torch.cuda.max_memory_reserved() - before[1] + shared_bytes
    return {"peak_bytes": peak, "reserved_bytes": reserved}


def free_memory() -> None:
    gc.collect()
    _synchronize()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def device_seconds(work: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median seconds of work that one thread gives the device; by CUDA events on a GPU."""
    for _ in range(3 if device == "cuda" else 1):
        work()
    if device != "cuda":
        return timed(work)
    pairs = []
    for _ in range(repeats):
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        work()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def matrix_peak(dtype: torch.dtype, device: str, sizes: Sequence[int]) -> Values:
    """FLOP/s of the best of several square matrix products."""
    rates: dict[int, float] = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[size] = 2 * size**3 / device_seconds(lambda a=a, b=b: a @ b, device)
    best = max(rates, key=rates.__getitem__)
    return {"flops": rates[best], "size": best}


def flops(work: Callable[[], Any]) -> int:
    """Operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def image_flops(workload: Workload, *, tiny: bool = False) -> Values:
    """Operations of one image of the uniform load: the UNet's passes and our autoencoder, without
    the overlap of its tiles. Counted without a device.
    """
    architecture, side = ARCHITECTURES[workload.model], workload.size_px
    where: Values = {"device": "meta", "tiny": tiny}
    if architecture.unet is None:
        network = build_network(workload.model, **where)
        x = torch.zeros(1, 3, side, side, device="meta", dtype=torch.float16)
        return {"row": (row := flops(lambda: network(x))), "rows": 1, "image": row}
    unet = build_unet(workload.model, **where)
    row = flops(lambda: unet(**unet_inputs(workload.model, unet, 1, side, side)))
    vae = _vae_flops(workload, where)
    rows = _network_rows(workload, workload.request)
    found: Values = {"row": row, "rows": rows, "image": row * rows + vae}
    if workload.mixed:
        mean = statistics.fmean(_network_rows(workload, request) for request in workload.mixed)
        found["image_mixed"] = row * mean + vae
    return found


def _network_rows(workload: Workload, request: Request) -> int:
    """UNet rows of a picture over all steps; guidance takes two a step."""
    if workload.scheduler is None:
        return 1
    # Asked of the scheduler, because PNDM takes one step more than the request.
    steps = make_schedule(workload.scheduler(), request.steps, request.skipped).steps
    return steps * (2 if request.guidance_scale > 1 else 1)


def _vae_flops(workload: Workload, where: Values) -> int:
    architecture = ARCHITECTURES[workload.model]
    vae: Any = build_vae(workload.model, **where)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    side = workload.size_px // architecture.latent_px
    tile = min(side, (architecture.vae_tile_px or side * scale) // scale)
    options: Values = {"device": "meta", "dtype": vae.dtype}
    latents = torch.zeros(1, vae.config.latent_channels, tile, tile, **options)
    total = round(flops(lambda: vae.decode(latents)) * (side / tile) ** 2)
    if architecture.family == "img2img":
        picture = torch.zeros(1, 3, workload.size_px, workload.size_px, **options)
        total += flops(lambda: vae.encode(picture))
    return total


def psnr_db(ours: Pixels, theirs: Pixels) -> float:
    """Over the 8-bit levels; infinite if the pictures are equal."""
    power = float(((ours.astype(np.float64) - theirs) ** 2).mean())
    return 10 * math.log10(255**2 / power) if power else math.inf


def levels(ours: Pixels, theirs: Pixels) -> int:
    """The largest difference of two pictures, in 8-bit levels."""
    return int(np.abs(ours.astype(np.int16) - theirs).max())
