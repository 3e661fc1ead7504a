"""GPU memory on a machine without a GPU: counting tensors, the cap, and the profile's dry run."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.gpu import profile as profile_gpu
from benchmarks.gpu.architectures import (
    ARCHITECTURES,
    build_network,
    build_text_encoder,
    build_unet,
    build_vae,
    unet_inputs,
    weights_bytes,
)
from deployments.engine.device import is_fatal
from deployments.errors import GpuTooSmall
from deployments.gpu import cap as cap_module
from deployments.gpu.cap import cap_device, enforce_share
from deployments.gpu.profiles import context_reserve_bytes, load_profiles
from deployments.settings import ROOT
from tests.fake_gpu import FakeDeviceMemory

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
DIFFUSION = [name for name, architecture in ARCHITECTURES.items() if architecture.unet]
PARAMETERS = {
    "upscale-sd-x4": (473_398_020, 55_325_927, 340_387_840),
    "enhance-sdxl-refiner": (2_259_526_660, 83_653_863, 694_659_840),
    "comic-ghibli": (859_520_964, 83_653_863, 123_060_480),
    "aged-sd21": (865_910_724, 83_653_863, 340_387_840),
    "generate-sdxl-base": (2_567_463_684, 83_653_863, 694_659_840),
    "generate-sd21": (865_910_724, 83_653_863, 340_387_840),
    # Stable Diffusion 1.5, and the guidance's 256 values into 320 channels.
    "generate-lcm-dreamshaper7": (859_520_964 + 256 * 320, 83_653_863, 123_060_480),
}
"""UNet, autoencoder, text encoder; as the published files hold."""


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------ the meter


def test_live_tensors_are_counted_while_they_live_and_once() -> None:
    memory = FakeDeviceMemory(GIB)
    with profile_gpu.LiveTensors(memory):
        first = torch.zeros(256)  # 1 KiB
        view = first[:10].view(2, 5)
        assert memory.allocated_bytes() == 1024
        second = first + 1
        assert memory.allocated_bytes() == 2048
        del first
        assert memory.allocated_bytes() == 2048  # the view keeps it
        del view
        assert memory.allocated_bytes() == 1024
        memory.reset_peak()
        second.add_(1)  # in place
        third = second * 2 * 2
        del third, second
    assert memory.peak_bytes() == 3 * 1024
    assert memory.allocated_bytes() == 0


def test_attention_is_counted_as_the_fused_kernels_have_it() -> None:
    memory = FakeDeviceMemory(GIB)
    query = torch.empty(1, 8, 4096, 64, device="meta", dtype=torch.float16)
    with profile_gpu.LiveTensors(memory), profile_gpu.FusedAttention(), torch.no_grad():
        result = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert result.shape == query.shape
    assert memory.peak_bytes() == query.numel() * 2  # and not 8 x 4096 x 4096


def test_a_forward_pass_beyond_the_cap_runs_out_of_memory_as_on_a_gpu() -> None:
    weights = weights_bytes(build_unet("comic-ghibli", "meta", torch.float32, tiny=True))
    memory = FakeDeviceMemory(GIB)
    # Weights and 3 MiB: one row fits, eight do not.
    share = (weights + 3 * 2**20 + 2**26) / GIB
    cap = enforce_share(share, memory, weights_bytes=weights, context_bytes=2**26)
    with profile_gpu.LiveTensors(memory), torch.no_grad():
        unet = build_unet("comic-ghibli", "cpu", torch.float32, tiny=True)
        held = memory.allocated_bytes()
        assert held == weights
        unet(**unet_inputs("comic-ghibli", unet, 1, 128, 128))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            unet(**unet_inputs("comic-ghibli", unet, 8, 128, 128))
        assert not is_fatal(caught.value)
        assert weights < memory.peak_bytes() <= cap
        del caught
        gc.collect()  # the error's traceback goes round in circles
        assert memory.allocated_bytes() == held


# -------------------------------------------------------------------------------------- the cap


class FakeCuda(FakeDeviceMemory):
    """What `cap_device` finds on a machine with a GPU."""

    made: FakeCuda

    def __init__(self, device: str) -> None:
        super().__init__(int(22 * GIB))
        assert device.startswith("cuda")
        self.device_name = "NVIDIA L4"
        FakeCuda.made = self


def test_a_replica_is_capped_by_its_share_and_its_models_profile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cap_module, "CudaMemory", FakeCuda)
    context = context_reserve_bytes(load_profiles(), "l4")
    cap = cap_device(0.5, "cuda", "enhance-sdxl-refiner")
    assert cap == 11 * GIB - context
    FakeCuda.made.reserve(cap - 2**20)
    with pytest.raises(torch.OutOfMemoryError):
        FakeCuda.made.reserve(2**21)
    with pytest.raises(GpuTooSmall, match=r"weights alone take 5\.66 GiB"):
        cap_device(0.25, "cuda:0", "enhance-sdxl-refiner")
    assert cap_device(0.25, "cuda", "nobody-knows-it") == 5.5 * GIB - context


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_allocator_is_held_to_its_cap() -> None:
    code = (
        "import torch\n"
        "from deployments.gpu.cap import cap_device, CudaMemory\n"
        "cap = cap_device(0.1, 'cuda')\n"
        "inside = torch.empty(int(cap * 0.9), dtype=torch.uint8, device='cuda')\n"
        "try:\n"
        "    torch.empty(int(cap * 0.2), dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError:\n"
        "    memory = CudaMemory()\n"
        "    print(memory.reserved_bytes() <= cap, memory.peak_bytes() == inside.numel())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


# -------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_architectures_have_as_many_parameters_as_the_published_files(name: str) -> None:
    parts = [build(name, "meta") for build in (build_unet, build_vae, build_text_encoder)]
    assert tuple(map(count, parts)) == PARAMETERS[name]


def test_the_networks_have_as_many_parameters_as_the_published_files() -> None:
    assert count(build_network("background-rmbg14", "meta")) == 44_046_790
    assert count(build_network("upscale-realesrgan-x4plus", "meta")) == 16_697_987
    assert count(build_network("upscale-realesrgan-general-x4v3", "meta")) == 1_213_296
    assert count(build_network("background-u2net", "meta")) == 44_009_869
    assert count(build_network("background-birefnet", "meta")) == 220_176_498


@pytest.mark.parametrize("name", DIFFUSION)
def test_random_weights_give_finite_output_for_every_row(name: str) -> None:
    unet = build_unet(name, "cpu", torch.float32, tiny=True)
    text = build_text_encoder(name, "cpu", torch.float32, tiny=True)
    with torch.inference_mode():
        output = unet(**unet_inputs(name, unet, 3, 128, 192)).sample
        latent_px = ARCHITECTURES[name].latent_px
        assert output.shape == (3, 4, 192 // latent_px, 128 // latent_px)
        assert output.isfinite().all()
        assert output.std() > 0
        assert text(torch.arange(77)[None] % 64)[0].isfinite().all()


# ------------------------------------------------------------------------------------- profiles


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("profile") / "profiles.json"
    args = ["--device", "cpu", "--tiny", "--out", str(out)]
    names = ["comic-ghibli", "enhance-sdxl-refiner", "background-rmbg14"]
    profile_gpu.main([*args, "--models", *names])
    return json.loads(out.read_text())["profiles"][0]


def test_the_dry_run_measures_every_part_of_every_model(dry_run: dict[str, Any]) -> None:
    assert dry_run["source"] == "dry run"
    assert set(dry_run["models"]) == {"comic-ghibli", "enhance-sdxl-refiner", "background-rmbg14"}
    for name, entry in dry_run["models"].items():
        assert entry["weights_bytes"] > 0
        assert entry["base_peak_bytes"] > entry["per_row_bytes"] / 2 > 0
        assert (entry["vae_peak_bytes"] > 0) == (name in DIFFUSION)
        peaks = [p["peak_bytes"] for p in entry["passes"]]
        assert peaks == sorted(peaks)
        assert [p["network_rows"] for p in entry["passes"]] == [1, 2, 4, 8]


def test_the_fitted_line_is_above_every_measured_pass() -> None:
    passes = [
        {"network_rows": rows, "peak_bytes": peak}
        for rows, peak in ((1, 100), (2, 150), (4, 290), (8, 300), (16, None))
    ]
    line = profile_gpu.fit(passes)
    assert line == {"base_peak_bytes": 100, "per_row_bytes": 64}
    for entry in passes[:-1]:
        assert 100 + 64 * (entry["network_rows"] - 1) >= entry["peak_bytes"]
    # One point tells no slope.
    assert profile_gpu.fit(passes[:1])["per_row_bytes"] == 100
    with pytest.raises(SystemExit, match="One row"):
        profile_gpu.fit([{"network_rows": 1, "peak_bytes": None}])


def test_a_pass_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_gpu, "NETWORK_ROWS", (1, 2))
    memory = FakeDeviceMemory(GIB)
    bench = profile_gpu.Bench("cpu", memory, tiny=True)
    with profile_gpu.LiveTensors(memory):
        free = bench.profile("background-rmbg14")
        memory.set_cap((memory.allocated_bytes() + 1.5 * free["base_peak_bytes"]) / GIB)
        tight = bench.profile("background-rmbg14")
    assert [p["peak_bytes"] for p in tight["passes"]] == [free["base_peak_bytes"], None]


def test_the_committed_estimate_is_what_the_code_counts(tmp_path: Path) -> None:
    out = tmp_path / "profiles.json"
    profile_gpu.main(["--device", "meta", "--out", str(out), "--models", "aged-sd21"])
    (counted,) = load_profiles(out)
    (committed,) = (p for p in load_profiles() if p.model == "aged-sd21" and p.source == "estimate")
    assert counted.weights_bytes == committed.weights_bytes
    for field in ("base_peak_bytes", "per_row_bytes", "vae_peak_bytes"):
        assert getattr(counted, field) == pytest.approx(getattr(committed, field), rel=0.02)


def test_a_new_measurement_replaces_the_devices_own_and_nothing_else(tmp_path: Path) -> None:
    def section(source: str, gpu: str | None, **models: int) -> dict[str, Any]:
        entries = {name: {"passes": [{"n": amount}]} for name, amount in models.items()}
        return {"source": source, "gpu": gpu, "models": entries}

    out = tmp_path / "profiles.json"
    profile_gpu.write(section("estimate", None, a=1, b=1), out)
    profile_gpu.write(section("measured", "l4", a=2, b=2), out)
    profile_gpu.write(section("measured", "l4", b=3), out)
    profiles = json.loads(out.read_text())["profiles"]
    assert [(p["source"], p["gpu"]) for p in profiles] == [("estimate", None), ("measured", "l4")]
    assert profiles[0]["models"]["b"]["passes"] == [{"n": 1}]
    assert profiles[1]["models"] == {"a": {"passes": [{"n": 2}]}, "b": {"passes": [{"n": 3}]}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_nothing_is_measured_or_written(tmp_path: Path) -> None:
    out = tmp_path / "profiles.json"
    with pytest.raises(SystemExit, match="no CUDA device"):
        profile_gpu.main(["--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("args", [["--tiny", "--device", "cpu"], ["--device", "cpu"]])
def test_a_dry_run_cannot_reach_the_committed_file(args: list[str]) -> None:
    with pytest.raises(SystemExit):
        profile_gpu.parse(args)


def test_profiling_needs_torch_and_the_networks_alone() -> None:
    code = "import benchmarks.gpu.profile, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"ray", "fastapi", "crc32c"}
    ours = {name for name in loaded if name.startswith(("deployments.", "serve_app"))}
    assert {name for name in ours if not name.startswith("deployments.pipelines")} == {
        "deployments.errors",
        "deployments.gpu",
        "deployments.gpu.cap",
        "deployments.gpu.profiles",
    }
