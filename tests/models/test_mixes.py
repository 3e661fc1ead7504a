"""Rows that differ in everything share steps without a trace: parity, seeds, passes saved."""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from fakes import wait_for
from gathering import Together, until
from stock import SCHEDULERS, apart, as_row, call_stock, scheduler_like, with_scheduler

from deployments.contract import BackgroundRequest, ComicRequest, GenerateRequest, UpscaleRequest
from deployments.engine.engine import Engine
from deployments.engine.grouping import GroupLimits
from deployments.errors import ModelFailed, TooLarge, TooLate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Row
    from deployments.images import Picture

# diffusers calls NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TOLERANCE = 1e-4
MIXES = [4, pytest.param(20, marks=pytest.mark.slow)]
COMPANIES = [8, pytest.param(20, marks=pytest.mark.slow)]
FAMILIES = ["sd_ddim", "sd_v", "refiner", "x4"]
TEXT_TO_IMAGE = ("txt_sd", "txt_lcm", "txt_xl")
WORDS = ["", "red", "comic book drawing", "old photograph of a cat", "blurry", "a b c d e f g"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    ("ddim", {"clip_sample": True}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}),
    ("dpm", {"use_karras_sigmas": True}),
    ("dpm", {"solver_type": "heun", "lower_order_final": False}),
    ("dpm", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1}),
    ("dpm", {"timestep_spacing": "trailing", "euler_at_final": True, "solver_type": "heun"}),
    ("dpm", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("dpm", {"solver_order": 3}),
    ("pndm", {"skip_prk_steps": False}),
    ("pndm", {"timestep_spacing": "trailing"}),
    ("pndm", {"set_alpha_to_one": True, "timestep_spacing": "linspace"}),
    ("euler_a", {"timestep_spacing": "trailing"}),
    ("lcm", {"timestep_scaling": 1.0, "original_inference_steps": 100}),
]


@dataclass(frozen=True)
class Case:
    """A request, and what the stock pipeline makes of it."""

    request: Any
    picture: Picture | None
    expected: np.ndarray


def draw_request(name: str, rng: random.Random, steps: int) -> Any:
    values: dict[str, Any] = {
        "prompt": rng.choice(WORDS),
        "negative_prompt": rng.choice(WORDS),
        "guidance_scale": rng.choice([1.0, 1.5, rng.uniform(1, 9)]),
        "steps": steps,
        "seed": rng.randrange(2**32),
    }
    if name == "x4":
        return UpscaleRequest(noise_level=rng.randint(0, 350), **values)
    if name in TEXT_TO_IMAGE:
        return GenerateRequest(width=64, height=64, **values)
    strength = rng.choice([1.0, rng.uniform(1 / steps, 1)])
    return ComicRequest(strength=strength if int(steps * strength) else 1.0, **values)


def draw_case(name: str, stock: Any, rng: random.Random, steps: int) -> Case:
    side_px = 16 if name == "x4" else 64
    request, picture = draw_request(name, rng, steps), None
    if name not in TEXT_TO_IMAGE:
        picture = tiny.picture(rng.randrange(9), side_px, side_px)
    return Case(request, picture, call_stock(stock, request, picture))


def run_mix(
    pipeline: AnyPipeline,
    cases: Sequence[Case],
    arrivals: Sequence[int],
    run_together: Callable[..., Any],
) -> tuple[float, list[list[Row]]]:
    """How far the rows are from the stock pipeline's pictures, and the groups they stepped in."""
    rows = [as_row(pipeline, case.request, case.picture) for case in cases]
    groups = run_together(pipeline, rows, 8, arrivals=arrivals)
    assert sum(map(len, groups)) == sum(row.progress.steps for row in rows)
    return apart(pipeline, rows, [case.expected for case in cases]), groups


# --- parity ---


@pytest.mark.parametrize("mixes", MIXES)
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *itertools.product(FAMILIES, SCHEDULERS),
        ("sd_lcm", "lcm"),
        ("txt_sd", "dpm"),
        ("txt_lcm", "lcm"),
        ("txt_xl", "euler"),
    ],
)
def test_every_mix_equals_the_stock_calls_one_by_one(
    name: str,
    scheduler: str,
    mixes: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    """Also where rows come while others are at their third step."""
    course = scheduler_like(stock(name), scheduler)
    ours, theirs = (with_scheduler(p(name), course) for p in (tiny_pipeline, stock))
    rng = random.Random(f"{name} {scheduler}")
    most = 2 if name == "x4" else 4
    pool = [draw_case(name, theirs, rng, 1 + i % most) for i in range(8)]
    found, shared, late = [], 0, 0
    for _ in range(mixes):
        cases = rng.sample(pool, rng.randint(2, 6))
        arrivals = [0, *(rng.choice([0, 0, 1, 2, 3]) for _ in cases[1:])]
        far, groups = run_mix(ours, cases, arrivals, run_together)
        found.append(far)
        shared += sum(len(group) > 1 for group in groups)
        late += any(set(now) - set(before) for before, now in itertools.pairwise(groups))
    print(
        f"parity of {name}, {scheduler}: {max(found):.1e} at most, {statistics.median(found):.1e}"
        f" as a rule, over {mixes} mixes; {shared} shared steps, {late} mixes with late rows"
    )
    assert max(found) <= TOLERANCE
    assert shared >= mixes
    assert late >= mixes // 4


@pytest.mark.parametrize(
    ("scheduler", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
def test_every_way_a_scheduler_may_be_set_up(
    scheduler: str,
    options: dict[str, Any],
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    """With 1, 2, 3 and 16 steps in one mix: DPM++ ends differently from 15 on."""
    name = "sd_v" if "solver_type" in options else "sd_ddim"
    course = scheduler_like(stock(name), scheduler, **options)
    ours, theirs = (with_scheduler(p(name), course) for p in (tiny_pipeline, stock))
    rng = random.Random(scheduler)
    few = [4, 5, 6] if options.get("skip_prk_steps") is False else [1, 2, 3]
    cases = [draw_case(name, theirs, rng, steps) for steps in (*few, 16)]
    far, _ = run_mix(ours, cases, [0, 0, 1, 0], run_together)
    print(f"parity of {scheduler} with {options}: {far:.1e}")
    assert far <= TOLERANCE


@pytest.mark.parametrize("scheduler", ["euler", "dpm", "pndm", "euler_a", "lcm"])
def test_a_models_own_files_choose_the_scheduler(
    scheduler: str,
    own_folder: Callable[[str], Path],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    folder = own_folder("sd_ddim")
    course = scheduler_like(stock("sd_ddim"), scheduler)
    course.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(course).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = tiny.pipeline(tiny.spec("sd_ddim", folder))
    theirs = tiny.STOCK["sd_ddim"].from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs.scheduler) is type(course)
    rng = random.Random(1)
    cases = [draw_case("sd_ddim", theirs, rng, steps) for steps in (3, 4)]
    far, _ = run_mix(ours, cases, [0, 1], run_together)
    assert far <= TOLERANCE


# --- the seed contract ---


def company(name: str, rng: random.Random) -> tuple[Any, Picture]:
    """Somebody else's request, of the kind that may share a step."""
    if name == "isnet":
        return BackgroundRequest(), tiny.picture(rng.randrange(99), rng.randint(1, 99), 70)
    if name == "srvgg":
        height_px, width_px = rng.choice([(32, 32), (64, 64), (48, 64), (33, 70)])
        return UpscaleRequest(), tiny.picture(rng.randrange(99), height_px, width_px)
    side_px = 16 if name == "x4" else 64
    request = draw_request(name, rng, rng.randint(1, 2 if name == "x4" else 4))
    return request, tiny.picture(rng.randrange(99), side_px, side_px)


@pytest.mark.parametrize("companies", COMPANIES)
@pytest.mark.parametrize("exact", [False, True], ids=["by default", "exact"])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *((name, None) for name in ("sd_ddim", "sd_lcm", "refiner", "x4", "srvgg", "isnet")),
        *(("sd_ddim", scheduler) for scheduler in ("pndm", "euler_a", "lcm")),
        ("x4", "euler_a"),
    ],
)
def test_the_same_request_gives_the_same_picture_in_any_company(
    name: str,
    scheduler: str | None,
    exact: bool,
    companies: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    """One level of 255 apart at most, or not at all, while others come and go."""
    pipeline: Any = tiny_pipeline(name, **({"tile_px": 32} if name == "srvgg" else {}))
    if scheduler:
        pipeline = with_scheduler(pipeline, scheduler_like(stock(name), scheduler))
    if name in ("srvgg", "isnet"):
        request: Any = UpscaleRequest() if name == "srvgg" else BackgroundRequest()
        picture = tiny.picture(5, 64, 64)
    else:
        rng = random.Random(6)
        request = draw_request(name, rng, 2 if name == "x4" else 3)
        request = request.model_copy(update={"guidance_scale": 5.0})
        side_px = 16 if name == "x4" else 64
        picture = tiny.picture(5, side_px, side_px)

    def ask(others: Sequence[Row], arrivals: Sequence[int]) -> tuple[np.ndarray, int]:
        """The picture, and the rows of the largest pass it took."""
        row = as_row(pipeline, request, picture)
        groups = run_together(pipeline, [row, *others], 8, arrivals=arrivals, exact=exact)
        largest = max(len(group) for group in groups if row in group)
        return row.future.result().astype(int), largest

    alone, size = ask([], [0])
    assert size == 1
    rng, worst, sizes = random.Random(name), 0, set()
    for _ in range(companies):
        others = [as_row(pipeline, *company(name, rng)) for _ in range(rng.randint(1, 5))]
        latest = 1 if name == "isnet" else 3
        arrivals = [rng.randint(0, 1), *(rng.randint(0, latest) for _ in others)]
        pixels, size = ask(others, [a - min(arrivals) for a in arrivals])
        sizes.add(size)
        worst = max(worst, int(np.abs(pixels - alone).max()))
    print(f"{name}: {worst} of 255 apart in {companies} companies, in groups of {sorted(sizes)}")
    if exact:
        assert sizes == {1}
        assert worst == 0
    else:
        assert max(sizes) >= 3
        assert worst <= 1


# --- passes saved ---


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_eight_mixed_rows_take_little_more_than_half_the_passes(
    seed: int,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
) -> None:
    pipeline: Any = tiny_pipeline("sd_ddim")
    rng = random.Random(seed)
    requests = [
        ComicRequest(
            steps=rng.randint(10, 40),
            strength=rng.uniform(0.2, 0.9),
            guidance_scale=rng.choice([1.0, rng.uniform(1, 9)]),
            seed=i,
            prompt=WORDS[i % 6],
        )
        for i in range(8)
    ]
    passes: list[int] = []
    hook = pipeline.denoiser.unet.register_forward_hook(
        lambda _module, inputs, _output: passes.append(inputs[0].shape[0])
    )
    try:
        rows = [as_row(pipeline, request, tiny.picture(0)) for request in requests]
        run_together(pipeline, rows, 8, arrivals=[2 * i for i in range(8)])
    finally:
        hook.remove()
    serial = sum(int(request.steps * request.strength) for request in requests)
    print(f"{len(passes)} passes for {serial}: {len(passes) / serial:.0%}")
    assert all(row.future.exception() is None for row in rows)
    assert len(passes) <= 0.55 * serial


# --- after a failure ---


@pytest.mark.parametrize("failing", [{1}, {3}, {1, 2, 5}], ids=str)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_step_that_failed_leaves_no_trace(
    scheduler: str,
    failing: set[int],
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A repeated scheduler step would spoil DPM++ and PNDM, which remember the last one."""
    course = scheduler_like(stock("sd_ddim"), scheduler)
    ours, theirs = (with_scheduler(p("sd_ddim"), course) for p in (tiny_pipeline, stock))
    cases = []
    for i, steps in enumerate((4, 5, 5, 6)):
        guidance_scale = 1.0 if i == 2 else 5.0
        request = ComicRequest(
            prompt=WORDS[i], steps=steps, strength=1.0, guidance_scale=guidance_scale, seed=i
        )
        picture = tiny.picture(i)
        cases.append(Case(request, picture, call_stock(theirs, request, picture)))
    unet, calls = ours.denoiser.unet, []
    whole = unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        output = whole(*args, **kwargs)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    monkeypatch.setattr(unet, "forward", forward)
    far, _ = run_mix(ours, cases, [0] * 4, run_together)
    assert len(calls) > max(failing)
    assert far <= TOLERANCE


@pytest.mark.parametrize("name", ["srvgg", "isnet"])
def test_a_network_that_failed_once_leaves_no_trace(
    name: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    run_together: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline: Any = tiny_pipeline(name, **({"tile_px": 32} if name == "srvgg" else {}))
    request: Any = UpscaleRequest() if name == "srvgg" else BackgroundRequest()

    def run() -> list[np.ndarray]:
        rows = [as_row(pipeline, request, tiny.picture(i, 64, 64)) for i in range(4)]
        run_together(pipeline, rows)
        return [row.future.result().astype(int) for row in rows]

    expected, calls, whole = run(), [], pipeline._net.forward

    def forward(x: torch.Tensor, **options: Any) -> Any:
        calls.append(None)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(x, **options)

    monkeypatch.setattr(pipeline._net, "forward", forward)
    for ours, image in zip(run(), expected, strict=True):
        assert np.abs(ours - image).max() <= 1


class FailingNetworks:
    """Makes a pipeline's UNet or encoder fail as `fate` says, and rows leave."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fate = ""
        self.rows: list[Row] = []
        self.ahead_s = 0.0
        unet, encoder = pipeline.denoiser.unet, pipeline.autoencoder.vae.encoder
        self._unet, self._encoder = unet.forward, encoder.forward
        monkeypatch.setattr(unet, "forward", self._step)
        monkeypatch.setattr(encoder, "forward", self._encode)

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        (output,) = self._unet(*args, **kwargs)
        if self.fate == "NaN":
            return (output * float("nan"),)
        if self.fate == "cancelled":
            self.rows[0].cancel()
        if self.fate == "too late":
            self.ahead_s = 1000.0
        self._fail("out of memory", "error")
        return (output,)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        output = self._encoder(x)
        self._fail("out of memory for a picture", "bad picture")
        return output

    def _fail(self, out_of_memory: str, error: str) -> None:
        if self.fate == out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.fate == error:
            raise ValueError("no")


FATES: dict[str, type[Exception] | None] = {
    "fine": None,
    "out of memory": ModelFailed,
    "error": ModelFailed,
    "NaN": ModelFailed,
    "bad picture": ModelFailed,
    "out of memory for a picture": ModelFailed,
    "too late": TooLate,
    "cancelled": None,
    "too large": TooLarge,
}


def live_tensors() -> int:
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def test_memory_returns_to_its_level_however_rows_end(
    tiny_pipeline: Callable[..., AnyPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, for which a device's memory cannot wait."""
    pipeline: Any = tiny_pipeline("sd_ddim")
    networks = FailingNetworks(pipeline, monkeypatch)
    engine = Engine(pipeline, pace=Together(), clock=networks.clock)
    request = ComicRequest(steps=2, strength=1.0, seed=1, prompt="red")

    def run(fate: str) -> None:
        networks.fate, networks.ahead_s = fate, 0.0
        engine.limits = GroupLimits(4, 64 * 64 if fate == "too large" else None)
        rows = networks.rows = [as_row(pipeline, request, tiny.picture(i)) for i in (1, 2)]
        engine.put(rows)
        wait_for(*rows)
        if fate != "cancelled":
            assert type(rows[0].future.exception()) is (FATES[fate] or type(None))
        networks.rows = []

    for fate in FATES:
        run(fate)
    gc.collect()
    gc.disable()
    try:
        level = live_tensors()
        for fate in FATES:
            run(fate)
            run(fate)
            until(lambda: live_tensors() <= level, 3)
    finally:
        gc.enable()
        engine.close()
    assert engine.fatal is None
