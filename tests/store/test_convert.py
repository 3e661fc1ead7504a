"""Conversion: the same bytes every time, all or nothing, and no pickle ever runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deployments.errors import ConfigError, ModelCorrupt, StoreUnwritable
from deployments.loader import build
from deployments.pipelines.upscale_gan import build_net
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import Settings
from deployments.store.cache import Store
from deployments.store.convert import convert
from deployments.store.folder import list_files
from deployments.store.lockfile import Lock, load_lock, origin_manifest, save_lock
from deployments.store.resolve import resolve
from tests.store.common import settings_of, staged

NAME = "tiny"


class Workshop:
    """A registry of one model, its origin folder, and a store."""

    def __init__(
        self, tmp_path: Path, model: dict[str, Any] | None = None, **conversion: Any
    ) -> None:
        self.origin = tmp_path / "origin"
        self.origin.mkdir()
        self.registry = tmp_path / "registry.yaml"
        self.settings = settings_of(tmp_path / "models")
        self.store = Store(self.settings)
        self._conversion = conversion
        self._model = model
        """What makes a model of the entry: task, family and more. None: an artefact."""

    def lock(self) -> ArtefactSpec:
        """Resolve whatever is in the origin folder."""
        kind = ModelSpec if self._model else ArtefactSpec
        spec = kind.model_validate(
            {
                **(self._model or {}),
                "name": NAME,
                "summary": "tiny",
                "licence": "MIT",
                "commercial": True,
                "origins": [{"source": f"file://{self.origin}", "files": list_files(self.origin)}],
                "convert": self._conversion or None,
            }
        )
        found = resolve(spec, self.settings, None)
        save_lock(self.registry, Lock().with_model(NAME, found))
        return spec

    def convert(self) -> Path:
        manifest = convert(self.lock(), self.registry, self.store)
        return self.store.folder(NAME, manifest.digest)

    def refused(self, kind: type[Exception], match: str) -> None:
        spec = self.lock()
        before = load_lock(self.registry)
        with pytest.raises(kind, match=match):
            convert(spec, self.registry, self.store)
        assert self.store.models() == []
        assert staged(self.store.root) == []
        assert load_lock(self.registry) == before


@pytest.fixture
def half(tmp_path: Path) -> Workshop:
    shop = Workshop(tmp_path, to="fp16")
    (shop.origin / "unet").mkdir()
    (shop.origin / "model_index.json").write_text("{}")
    (shop.origin / "unet" / "config.json").write_text('{"a": 1}')
    return shop


@pytest.fixture
def pth(tmp_path: Path) -> Workshop:
    return Workshop(
        tmp_path, to="safetensors", key="params", config={"b": 1, "architecture": "srvgg"}
    )


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.weight": torch.randn(64, 8, generator=generator),
        "a.bias": torch.tensor([65504.0, -1.5, 1e-9]),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "position_ids": torch.arange(77),
        "mask": torch.tensor([True, False]),
    }


def test_float32_becomes_float16_and_everything_else_stays(half: Workshop) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors", metadata={"format": "pt"})
    save_file({"x": torch.ones(2).half()}, half.origin / "vae.fp16.safetensors")
    ready = (half.origin / "vae.fp16.safetensors").read_bytes()
    folder = half.convert()
    assert list_files(folder) == [
        "manifest.json",
        "model_index.json",
        "unet/config.json",
        "unet/w.fp16.safetensors",
        "vae.fp16.safetensors",
    ]
    assert (folder / "vae.fp16.safetensors").read_bytes() == ready
    assert (folder / "unet" / "config.json").read_text() == '{"a": 1}'
    with safe_open(folder / "unet" / "w.fp16.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(folder / "unet" / "w.fp16.safetensors")
    for name, tensor in weights().items():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_the_result_is_published_whole_and_its_digest_locked(half: Workshop) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")
    folder = half.convert()
    digest = load_lock(half.registry).models[NAME].digest
    assert half.store.folder(NAME, digest) == folder
    manifest = half.store.check(NAME, digest, "full")
    assert manifest.converted == "fp16"
    assert manifest.sources == (f"file://{half.origin}",)
    assert all(file.crc32c for file in manifest.files)
    assert half.store.refs() == {NAME: digest}
    assert staged(half.store.root) == []


def test_the_same_input_gives_the_same_bytes(half: Workshop, tmp_path: Path) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")
    spec = half.lock()
    first = convert(spec, half.registry, half.store)
    other = Store(settings_of(tmp_path / "other"))
    assert convert(spec, half.registry, other).encode() == first.encode()
    assert convert(spec, half.registry, half.store) == first, "and again over itself"
    assert len(half.store.models()) == 1


def test_a_damaged_result_is_replaced_by_converting_again(half: Workshop) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")
    folder = half.convert()
    (folder / "model_index.json").chmod(0o644)
    (folder / "model_index.json").write_text("[]")
    assert half.convert() == folder
    half.store.check(NAME, folder.name, "full")
    assert len(list((half.store.root / ".quarantine").iterdir())) == 1


def test_a_number_too_large_for_float16_is_refused_by_name(half: Workshop) -> None:
    tensors = {"fine": torch.ones(2), "deep.weight": torch.tensor([1.0, -70000.0])}
    save_file(tensors, half.origin / "unet" / "w.safetensors")
    half.refused(ModelCorrupt, r"w\.safetensors: deep\.weight holds 70000")


def test_infinities_that_were_there_before_are_not_an_overflow(half: Workshop) -> None:
    save_file({"w": torch.tensor([float("-inf"), 1.0])}, half.origin / "unet" / "w.safetensors")
    folder = half.convert()
    assert load_file(folder / "unet" / "w.fp16.safetensors")["w"][0] == float("-inf")


def test_weights_that_are_no_safetensors_are_refused(half: Workshop) -> None:
    (half.origin / "unet" / "w.safetensors").write_bytes(pickle.dumps({"a": 1}))
    half.refused(ModelCorrupt, r"w\.safetensors cannot be read")


def test_a_file_in_both_precisions_is_refused(half: Workshop) -> None:
    for name in ("w.safetensors", "w.fp16.safetensors"):
        save_file(weights(), half.origin / name)
    half.refused(ConfigError, "both as float32 and as float16")


def test_weights_in_pieces_are_refused(half: Workshop) -> None:
    (half.origin / "unet" / "w.safetensors.index.json").write_text("{}")
    half.refused(ConfigError, "several pieces")


def test_origins_that_changed_since_they_were_locked_are_refused(half: Workshop) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")
    spec = half.lock()
    save_file({"x": torch.ones(9)}, half.origin / "unet" / "w.safetensors")
    with pytest.raises(ModelCorrupt, match=r"w\.safetensors"):
        convert(spec, half.registry, half.store)
    assert half.store.models() == []


def test_what_a_killed_conversion_fetched_is_taken_over(half: Workshop) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")
    spec = half.lock()
    raw = origin_manifest(spec, load_lock(half.registry).models[NAME].origins)
    old = half.store.root / ".staging" / f"{raw.short}.host.uuid"
    shutil.copytree(half.origin, old)
    (old.with_name(f"{old.name}.made") / "unet").mkdir(parents=True)
    events: list[str] = []
    convert(spec, half.registry, Store(half.settings, lambda event: events.append(event.kind)))
    assert events.count("adopted") == len(raw.files)
    assert "bytes" not in events
    assert staged(half.store.root) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(
    half: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights(), half.origin / "unet" / "w.safetensors")

    def full(*_: object, **__: object) -> None:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    half.refused(StoreUnwritable, "No space left")


def test_a_model_that_needs_no_conversion_is_refused(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    (shop.origin / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="nothing to convert"):
        convert(shop.lock(), shop.registry, shop.store)


def test_an_unresolved_model_is_refused(half: Workshop) -> None:
    spec = half.lock()
    save_lock(half.registry, Lock())
    with pytest.raises(ConfigError, match="unresolved"):
        convert(spec, half.registry, half.store)


def test_a_checkpoint_becomes_safetensors_and_a_config(pth: Workshop) -> None:
    shared = torch.arange(12.0)
    params = {"w": shared.reshape(3, 4).t(), "tied": shared, "n": torch.tensor(3)}
    torch.save({"params": params, "params_ema": {}, "step": 5}, pth.origin / "net.pth")
    folder = pth.convert()
    assert list_files(folder) == ["config.json", "manifest.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == {"architecture": "srvgg", "b": 1}
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(params)
    assert all(torch.equal(found[name], tensor) for name, tensor in params.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_checkpoint_are_read(pth: Workshop, zipped: bool) -> None:
    torch.save(
        {"params": {"w": torch.ones(2)}},
        pth.origin / "net.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert load_file(pth.convert() / "model.safetensors")["w"].tolist() == [1, 1]


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(
    pth: Workshop, form: str, tmp_path: Path
) -> None:
    trace, path = tmp_path / "it ran", pth.origin / "net.pth"
    content = {"params": {"w": torch.ones(2), "evil": Malicious(trace)}}
    if form == "bare":
        path.write_bytes(pickle.dumps(content["params"]["evil"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    pth.refused(ModelCorrupt, "holds code or objects|cannot be read")
    assert not trace.exists()
    if form == "bare":
        with path.open("rb") as file:
            pickle.load(file)
        assert trace.exists(), "so the test would have noticed"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"other": {}}, "no entry params"),
        ([1, 2], "no entry params"),
        ({"params": {}}, "a dict instead of a dictionary of tensors"),
        ({"params": 5}, "an? int instead of a dictionary of tensors"),
        ({"params": {"w": torch.ones(1), "n": 5}}, "n is a int, no dense tensor"),
        ({"params": {"w": torch.ones(1).to_sparse()}}, "w is a Tensor, no dense tensor"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    pth: Workshop, content: object, match: str
) -> None:
    torch.save(content, pth.origin / "net.pth")
    pth.refused(ModelCorrupt, match)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04junk", b"\x80\x02."])
def test_a_damaged_checkpoint_is_refused(pth: Workshop, data: bytes) -> None:
    (pth.origin / "net.pth").write_bytes(data)
    pth.refused(ModelCorrupt, r"net\.pth (cannot be read|holds code)")


def test_a_truncated_checkpoint_is_refused(pth: Workshop) -> None:
    torch.save({"params": {"w": torch.ones(3000)}}, pth.origin / "net.pth")
    data = (pth.origin / "net.pth").read_bytes()
    (pth.origin / "net.pth").write_bytes(data[: len(data) // 2])
    pth.refused(ModelCorrupt, r"net\.pth cannot be read")


def test_two_checkpoints_are_refused(pth: Workshop) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save({"params": {}}, pth.origin / name)
    pth.refused(ConfigError, "its origins name 2")


SMALL = {"architecture": "srvgg", "num_feat": 4, "num_conv": 1}


def small_net() -> dict[str, torch.Tensor]:
    net = build_net(SMALL)
    assert net is not None
    return net.state_dict()


def test_a_halved_upscaler_has_the_name_that_loading_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"task": "upscale", "family": "upscale_gan", "dtype": "float16"}
    shop = Workshop(tmp_path, model, to="fp16")
    (shop.origin / "config.json").write_text(json.dumps(SMALL))
    save_file(small_net(), shop.origin / "model.safetensors")
    folder = shop.convert()
    assert list_files(folder) == ["config.json", "manifest.json", "model.safetensors"]
    half = load_file(folder / "model.safetensors")["body.0.weight"]
    assert half.dtype == torch.float16
    monkeypatch.setattr("deployments.loader.enforce_offline", lambda _: None)
    spec = shop.lock()
    assert isinstance(spec, ModelSpec)
    build(spec, folder, Settings(device="cpu"))


def test_weights_that_do_not_fit_their_config_are_refused_before_they_are_kept(
    tmp_path: Path,
) -> None:
    model = {"task": "upscale", "family": "upscale_gan"}
    config = SMALL | {"num_feat": 5}
    shop = Workshop(tmp_path, model, to="safetensors", key="params", config=config)
    torch.save({"params": small_net()}, shop.origin / "net.pth")
    wrong = r"does not load, so it is not kept: .*body\.0\.weight is \(4, 3, 3, 3\) instead of \(5,"
    shop.refused(ModelCorrupt, wrong)


def test_a_safetensors_file_of_any_name_gets_a_config(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, to="safetensors", config=SMALL)
    save_file(small_net(), shop.origin / "mine.safetensors")
    folder = shop.convert()
    assert list_files(folder) == ["config.json", "manifest.json", "model.safetensors"]
    assert set(load_file(folder / "model.safetensors")) == set(small_net())


def test_a_safetensors_file_has_no_entries_to_name(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, to="safetensors", key="params", config=SMALL)
    save_file(small_net(), shop.origin / "mine.safetensors")
    shop.refused(ModelCorrupt, "no entry params")
