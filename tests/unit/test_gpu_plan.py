"""GPU shares: what a plan promises, whatever the models take; and what a replica is held to."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cli.config import settings_of
from deployments.catalogue import Catalogue, load_catalogue, load_registry
from deployments.errors import ConfigError, GpuTooSmall
from deployments.gpu.cap import cap_device, enforce_share
from deployments.gpu.choice import choose_fitting
from deployments.gpu.plan import ESTIMATE_MARGIN, TILE_OVERLAP_PX, plan
from deployments.gpu.profiles import (
    CONTEXT_BYTES,
    GPUS,
    Gpu,
    MemoryProfile,
    choose_profile,
    context_reserve_bytes,
    gpu_name,
    load_profiles,
)
from deployments.registry import ModelSpec
from deployments.settings import ROOT, SEATS
from deployments.tasks import Task
from tests.fake_gpu import FakeDeviceMemory

GIB, MIB = 2**30, 2**20
PRODUCTION = Path("configs/models/production.yaml")


def five() -> list[ModelSpec]:
    """The production models; the non-commercial one, too."""
    catalogue = load_catalogue(PRODUCTION)
    names = tuple(model.name for model in catalogue.models)
    return list(catalogue.model_copy(update={"accept_noncommercial": names}).served().values())


def least_gpus(gpu: Any) -> int:
    """How many GPUs hold the five at one row each; with what profiles say today."""
    for gpus in range(1, 9):
        with suppress(GpuTooSmall):
            return plan(five(), gpu, gpus).gpus
    raise AssertionError("not even eight")


def model(name: str = "a", rows: int = 4, **changes: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": name,
            "task": Task.COMIC,
            "family": "img2img",
            "dtype": "float16",
            "buckets": ((512, 512), (640, 384)),
            "origins": [{"source": "file://x", "files": ["config.json"]}],
            "summary": "-",
            "licence": "-",
            "commercial": True,
            "max_batch_size": rows,
        }
        | changes
    )


def profile(name: str = "a", gpu: str = "", **changes: Any) -> MemoryProfile:
    values: dict[str, Any] = {
        "model": name,
        "gpu": gpu,
        "source": "measured" if gpu else "estimate",
        "measured_at": "2026-01-01",
        "context_bytes": 700 * MIB if gpu else 0,
        "size_px": (512, 512),
        "vae_size_px": (512, 512),
        "weights_bytes": 2 * GIB,
        "base_peak_bytes": 200 * MIB,
        "per_row_bytes": 100 * MIB,
        "vae_peak_bytes": 500 * MIB,
    }
    return MemoryProfile(**(values | changes))


# ------------------------------------------------------------------------------------ formulas


def test_the_need_of_a_measured_model_is_the_documented_sum() -> None:
    placed = plan([model(rows=4)], "l4", profiles=[profile(gpu="l4")]).placed[0]
    peak = (200 + 7 * 100) * MIB  # four pictures with guidance are eight network rows
    assert placed.demand.peak_bytes(4) == peak
    need = 700 * MIB + 2 * GIB * 1.02 + (2 * peak + 500 * MIB) * 1.1  # passes, and their graphs
    assert placed.demand.need_bytes(4) == pytest.approx(need, abs=4)
    plain = plan([model(rows=4, graphs=False)], "l4", profiles=[profile(gpu="l4")]).placed[0]
    assert plain.demand.need_bytes(4) == pytest.approx(need - peak * 1.1, abs=4)
    assert placed.percent == -(-100 * placed.demand.need_bytes(4) // GPUS["l4"].total_bytes)
    assert placed.budget_px == 4 * 2 * 512 * 512
    assert placed.demand.measured


def test_a_profile_of_another_gpu_or_size_is_an_estimate_with_a_margin() -> None:
    measured = plan([model()], "l4", profiles=[profile(gpu="l4")]).placed[0].demand
    for other, spec in (
        ([profile(gpu="h200")], model()),
        ([profile()], model()),
    ):
        demand = plan([spec], "l4", profiles=other).placed[0].demand
        assert not demand.measured
        assert demand.peak_bytes(4) == pytest.approx(
            measured.peak_bytes(4) * (1 + ESTIMATE_MARGIN), abs=2
        )
        assert demand.context_bytes == CONTEXT_BYTES  # another GPU's context says nothing
    larger = model(buckets=((1024, 512),))
    demand = plan([larger], "l4", profiles=[profile(gpu="l4")]).placed[0].demand
    assert not demand.measured
    assert demand.peak_bytes(1) == (200 + 3 * 100) * MIB * (1 + ESTIMATE_MARGIN)


def test_the_profile_of_this_gpu_comes_first_then_the_largest_of_others() -> None:
    small, large = profile(gpu="h100"), profile(gpu="h200", base_peak_bytes=9 * GIB)
    own, estimate = profile(gpu="l4"), profile(base_peak_bytes=99 * GIB)
    everything = [small, large, own, estimate]
    assert choose_profile(everything, "a", "l4") is own
    assert choose_profile(everything, "a", "t4") is large
    assert choose_profile([estimate], "a", "t4") is estimate
    with pytest.raises(ConfigError, match="No GPU profile"):
        choose_profile(everything, "b", "l4")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "nvidia-l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_device_is_known_by_its_name(device: str, name: str) -> None:
    assert gpu_name(device) == name


def test_larger_tiles_of_a_diffusion_upscaler_cost_more() -> None:
    upscaler = {"task": Task.UPSCALE, "family": "upscale_diffusion", "buckets": ()}
    known = [profile(gpu="l4", vae_size_px=(256, 256))]
    small = plan([model(tile_px=256, **upscaler)], "l4", profiles=known).placed[0].demand
    large = plan([model(tile_px=512, **upscaler)], "l4", profiles=known).placed[0].demand
    assert (small.measured, large.measured) == (True, False)
    assert large.vae_peak_bytes == small.vae_peak_bytes * 4 * (1 + ESTIMATE_MARGIN)
    assert large.row_px == small.row_px == 512 * 512


# ------------------------------------------------------------------------- the committed profile


def test_a_model_in_float32_takes_twice_as_much() -> None:
    half, full = (
        plan([one], "h200", profiles=[profile()]).placed[0].demand.need_bytes(4)
        for one in (model(), model(dtype="float32"))
    )
    assert full - CONTEXT_BYTES == pytest.approx(2 * (half - CONTEXT_BYTES), abs=8)


def test_no_batch_is_larger_than_a_replica_takes_in() -> None:
    made = plan(five(), "h200", 3)
    assert max(one.rows for one in made.placed) <= SEATS


def test_the_committed_profiles_cover_every_production_model() -> None:
    profiles = load_profiles()
    for spec in load_catalogue(PRODUCTION).models:
        found = choose_profile(profiles, spec.name, "l4")
        assert found.weights_bytes > 0
        if spec.buckets:
            largest_px = max(width * height for width, height in spec.buckets)
            assert found.px == found.vae_px == largest_px, spec.name
        elif spec.family == "upscale_gan":
            assert found.px == (spec.tile_px + 2 * TILE_OVERLAP_PX) ** 2
        elif spec.family == "upscale_diffusion":
            assert found.vae_px == spec.tile_px**2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"profiles": [{}]}',
        '{"profiles": [{"source": "dry run", "models": {"a": {}}}]}',
        b"\xff",
    ],
)
def test_a_broken_profile_file_is_a_config_error(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "profiles.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profiles(path)


def test_figures_of_a_dry_run_are_refused(tmp_path: Path) -> None:
    committed = json.loads(Path("configs/gpu_profiles.json").read_text())
    committed["profiles"][0]["source"] = "dry run"
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(committed))
    with pytest.raises(ConfigError, match="dry run"):
        load_profiles(path)


# --------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("gpu", ["l4", "t4", "h200"])
def test_the_five_fit_the_gpus_that_a_plan_says(gpu: Any) -> None:
    specs = five()
    made = plan(specs, gpu)
    check(made)
    assert [placed.name for placed in made.placed] == [spec.name for spec in specs]
    for placed in made.placed:
        assert placed.reduced or placed.rows == placed.demand.spec.max_batch_size
    # Smaller batches never need more.
    assert least_gpus(gpu) <= made.gpus


def test_a_larger_gpu_holds_what_two_smaller_ones_do() -> None:
    assert plan(five(), "h200").gpus == 1
    assert plan(five(), "t4").gpus > plan(five(), "a100-40").gpus


def test_too_few_gpus_are_refused_with_how_many_are_needed() -> None:
    # 12.7 GB of weights and five contexts are more than a T4, whatever the peaks are.
    with pytest.raises(GpuTooSmall) as caught:
        plan(five(), "t4", 1)
    assert caught.value.exit_code == 9
    needed = re.search(r"Give --gpus (\d+), use --gpu [\w-]+,", caught.value.remedy)
    assert needed
    assert int(needed[1]) == least_gpus("t4")


def test_a_model_that_fits_no_gpu_of_the_type_is_refused_with_one_that_does() -> None:
    with pytest.raises(GpuTooSmall) as caught:
        plan([model("small"), model("big")], "t4", profiles=[
            profile("small"), profile("big", base_peak_bytes=12 * GIB)
        ])  # fmt: skip
    assert "big does not fit one T4" in caught.value.message
    assert "--gpu a100-40" in caught.value.remedy
    assert "buckets" in caught.value.remedy


def test_nothing_in_the_table_is_large_enough() -> None:
    with pytest.raises(GpuTooSmall, match="no GPU in the table"):
        plan([model()], "t4", profiles=[profile(weights_bytes=999 * GIB)])


def test_a_batch_that_one_gpu_cannot_hold_is_reduced_and_said_to_be() -> None:
    placed = plan([model(rows=64)], "t4", profiles=[profile()]).placed[0]
    assert 1 <= placed.rows < 64
    assert placed.reduced
    assert placed.demand.percent(placed.rows) <= 100 < placed.demand.percent(placed.rows + 1)


@pytest.mark.parametrize("gpu", ["t4", "l4", "h200"])
def test_more_gpus_never_make_a_batch_smaller(gpu: Any) -> None:
    rows: list[int] = [0] * 5
    for gpus in range(least_gpus(gpu), 7):
        made = plan(five(), gpu, gpus)
        check(made)
        now = [placed.rows for placed in made.placed]
        assert all(new >= old for new, old in zip(now, rows, strict=True))
        rows = now


def test_the_batches_on_given_gpus_are_the_largest() -> None:
    made = plan(five(), "l4", least_gpus("l4"))
    free = [100] * made.gpus
    for placed in made.placed:
        free[placed.gpu_index] -= placed.percent
    for placed in made.placed:  # no model can grow where it is
        more = placed.demand.percent(placed.rows + 1)
        assert more - placed.percent > free[placed.gpu_index]


def test_two_models_of_equal_need_grow_alike() -> None:
    specs, profiles = [model("a"), model("b")], [profile("a"), profile("b")]
    rows = [placed.rows for placed in plan(specs, "l4", 1, profiles).placed]
    assert max(rows) - min(rows) <= 1


models = st.lists(
    st.tuples(
        st.integers(0, 12 * GIB),  # weights
        st.integers(0, 4 * GIB),  # of one row
        st.integers(0, 2 * GIB),  # of each further row
        st.integers(0, 3 * GIB),  # of the autoencoder
        st.integers(1, 16),  # rows
        st.booleans(),  # measured here
        st.sampled_from([(512, 512), (768, 512), (1024, 1024)]),
    ),
    min_size=1,
    max_size=6,
)


@given(models, st.sampled_from(list(GPUS)), st.none() | st.integers(1, 4))
def test_every_plan_holds_whatever_the_models_take(
    drawn: list[tuple[Any, ...]], gpu: Any, gpus: int | None
) -> None:
    specs = [model(f"m{i}", rows=m[4], buckets=(m[6],)) for i, m in enumerate(drawn)]
    profiles = [
        profile(
            f"m{i}",
            gpu if m[5] else "",
            weights_bytes=m[0],
            base_peak_bytes=m[1],
            per_row_bytes=m[2],
            vae_peak_bytes=m[3],
        )
        for i, m in enumerate(drawn)
    ]
    try:
        made = plan(specs, gpu, gpus, profiles)
    except GpuTooSmall:
        return
    check(made)
    if gpus is None:
        assert all(placed.rows <= placed.demand.spec.max_batch_size for placed in made.placed)
    else:
        more = plan(specs, gpu, gpus + 1, profiles)
        assert all(a.rows <= b.rows for a, b in zip(made.placed, more.placed, strict=True))


def check(made: Any) -> None:
    """What every plan promises."""
    used = [0] * made.gpus
    for placed in made.placed:
        used[placed.gpu_index] += placed.percent
        share = placed.num_gpus
        assert 0 < share <= 1
        assert share * 10_000 == pytest.approx(round(share * 10_000))  # Ray's resolution
        # The cap of the replica holds what it is counted with.
        memory = FakeDeviceMemory(made.gpu.total_bytes)
        demand = placed.demand
        cap = enforce_share(
            share,
            memory,
            weights_bytes=demand.profile.weights_bytes,
            context_bytes=made.context_bytes,
        )
        peaks = demand.profile.peak_bytes(placed.budget_px) + demand.profile.vae_peak_bytes
        assert cap >= demand.profile.weights_bytes + peaks
    assert max(used) <= 100


# ----------------------------------------------------------------------------------------- caps


def test_the_cap_is_the_share_less_the_context() -> None:
    memory = FakeDeviceMemory(20 * GIB)
    cap = enforce_share(0.25, memory, weights_bytes=2 * GIB, context_bytes=GIB)
    assert cap == 4 * GIB
    memory.reserve(4 * GIB - 1024)
    assert memory.reserved_bytes() == memory.peak_bytes() == 4 * GIB - 1024


@pytest.mark.parametrize("share", [1, 1.0, 2.0, 0.0])
def test_a_whole_gpu_or_no_share_is_not_capped(share: float) -> None:
    memory = FakeDeviceMemory(20 * GIB)
    enforce_share(share, memory, weights_bytes=19 * GIB, context_bytes=2 * GIB)
    memory.reserve(20 * GIB)


@pytest.mark.parametrize(("share", "weights"), [(0.25, 5 * GIB), (0.01, 0)])
def test_a_share_below_the_weights_is_refused_before_anything_is_capped(
    share: float, weights: int
) -> None:
    memory = FakeDeviceMemory(20 * GIB)
    with pytest.raises(GpuTooSmall) as caught:
        enforce_share(share, memory, weights_bytes=weights, context_bytes=GIB)
    assert "num_gpus" in caught.value.remedy
    memory.reserve(20 * GIB)


def test_the_context_is_the_measured_one_where_there_is_one() -> None:
    profiles = [profile(gpu="l4"), replace(profile(gpu="l4"), context_bytes=900 * MIB), profile()]
    assert context_reserve_bytes(profiles, "l4") == 900 * MIB
    assert context_reserve_bytes(profiles, "t4") == CONTEXT_BYTES


def test_on_a_cpu_nothing_is_capped() -> None:
    assert cap_device(0.2, "cpu", "comic-ghibli") is None


def everything() -> Catalogue:
    catalogue = load_catalogue(PRODUCTION)
    names = tuple(entry.name for entry in catalogue.entries)
    return catalogue.model_copy(update={"accept_noncommercial": names})


@pytest.mark.parametrize("total_gib", [7, 12, 16, 22, 24])
def test_what_fits_a_card_is_planned_and_smaller_models_stand_in(total_gib: int) -> None:
    card = Gpu("my-card", "My card", total_gib * 2**30, "")
    catalogue = everything()
    wanted = list(catalogue.served().values())
    chosen, given_up = choose_fitting(wanted, catalogue.models, card, 1)
    assert plan(chosen, card, 1).gpus == 1
    tasks = {spec.task for spec in chosen}
    assert len(tasks) == len(chosen), "one of each task"
    for model, instead in given_up:
        assert model in wanted
        assert (instead in chosen) if instead else (model.task not in tasks)
    # A task is left out only where none of its models is smaller.
    assert "upscale" in tasks
    assert "background" in tasks
    assert (len(chosen) == 5) == (total_gib >= 22)


def test_a_card_that_holds_everything_gives_nothing_up() -> None:
    catalogue = everything()
    wanted = list(catalogue.served().values())
    assert choose_fitting(wanted, catalogue.models, GPUS["h100"], 1) == (wanted, [])


def test_the_workstations_config_is_the_plan_of_a_card_of_24_gb() -> None:
    path = ROOT / "configs/gpu.yaml"
    settings = settings_of(path)
    registry = load_registry(*settings.models, serve=settings.serve)  # accepts no licence by name
    application = yaml.safe_load(path.read_text())["applications"][0]
    options = {entry["name"]: entry for entry in application["deployments"]}
    made = plan(registry.models, "l4", 1)
    assert {str(placed.demand.spec.task) for placed in made.placed} == set(settings.serve)
    for placed in made.placed:
        entry = options[registry.deployment(placed.demand.spec)]
        assert entry["ray_actor_options"]["num_gpus"] == placed.num_gpus
        assert entry["user_config"] == {
            "max_batch_size": placed.rows,
            "budget_px": placed.budget_px,
        }
