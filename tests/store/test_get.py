"""`imagen models get` and `add`: one command from a name, or a file, to a model that can be served.

The hub and the web server are those of `benchmarks/servers`; the networks are narrow.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file
from typer.testing import CliRunner, Result

from benchmarks.servers.files import FileServer
from benchmarks.servers.hub import HubServer
from cli.main import app
from deployments.catalogue import load_catalogue
from deployments.pipelines import matting, upscale_gan
from deployments.pipelines.recognise import recognise
from deployments.registry import ModelSpec
from deployments.store.lockfile import load_lock, lock_path

if TYPE_CHECKING:
    from collections.abc import Iterator

RRDB = {"architecture": "rrdb", "num_feat": 8, "num_block": 1, "num_grow_ch": 4, "scale": 4}
SRVGG = {"architecture": "srvgg", "num_feat": 8, "num_conv": 2, "scale": 2}
WIDTHS = {
    "stem": 4,
    "middle": [2, 2, 2, 4, 4, 4],
    "out": [4, 4, 4, 8, 8, 8],
    "decoder_middle": [4, 4, 2, 2, 2],
    "decoder_out": [8, 8, 4, 4, 4],
}
ISNET = {"architecture": "isnet", "widths": WIDTHS}
U2NET = {"architecture": "u2net", "widths": {k: v for k, v in WIDTHS.items() if k != "stem"}}
BIREFNET = {
    "architecture": "birefnet",
    "widths": {"channels": 8, "depths": [1, 2, 3, 1], "heads": [1, 2, 2, 4], "window": 3},
}
MIT: dict[str, Any] = {"summary": "tiny", "licence": "MIT", "commercial": True}


def tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = upscale_gan.build_net(config) or matting.build_net(config)
    return net.state_dict()


class Desk:
    """A registry and a store of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = folder / "mine.yaml"
        self.store = folder / "models"

    def write(self, *models: dict[str, Any], **more: Any) -> None:
        self.registry.write_text(yaml.safe_dump({"models": [MIT | m for m in models], **more}))

    def run(self, *words: object) -> Result:
        places = ["--registry", str(self.registry), "--store", str(self.store)]
        done = CliRunner().invoke(app, ["models", *map(str, words), *places])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    def file(self, name: str) -> Path:
        digest = load_lock(self.registry).models[name].digest
        return self.store / "store" / name / digest[:16] / "model.safetensors"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


HUB_MODEL = {
    "name": "cut-out",
    "task": "background",
    "family": "matting",
    "origins": [
        {"source": "hf://org/cut@unresolved", "files": ["config.json", "model.safetensors"]}
    ],
}


def hub_files() -> dict[str, bytes]:
    return {"config.json": json.dumps(ISNET).encode(), "model.safetensors": save(tensors(ISNET))}


def test_get_says_size_and_licence_then_pulls_and_converts(desk: Desk) -> None:
    web = desk.folder / "web"
    web.mkdir()
    torch.save({"params_ema": tensors(RRDB), "params": {}}, web / "x4.pth")
    content = (web / "x4.pth").read_bytes()
    with FileServer(web) as server:
        convert = {"to": "safetensors", "key": "params_ema", "config": RRDB}
        model = {"name": "x4", "task": "upscale", "family": "upscale_gan", "convert": convert}
        desk.write(model | {"origins": [{"source": server.url, "files": ["x4.pth"]}]})
        unknown = desk.run("get", "x4")
        assert unknown.exit_code == 2
        assert "SHA-256" in unknown.stderr, "which a web server cannot vouch for"
        known = {"path": "x4.pth", "sha256": hashlib.sha256(content).hexdigest()}
        origins = [{"source": server.url, "files": [known | {"size": len(content)}]}]
        lock = {"schema": "imagen.lock/1", "models": {"x4": {"origins": origins}}}
        desk.registry.with_suffix(".lock.json").write_text(json.dumps(lock))
        done = desk.run("get", "x4")
    assert done.exit_code == 0, done.stderr
    said = done.stderr
    assert f"kB from {server.url}" in said
    assert "licence MIT, which allows commercial use" in said
    assert said.index("licence MIT") < said.index("converted") < said.index("x4: ready")
    assert set(load_file(desk.file("x4"))) == set(tensors(RRDB))
    again = desk.run("get", "x4", "--json")
    assert json.loads(again.stdout)["status"] == "present", "without the server"


def test_get_looks_up_what_is_unresolved(desk: Desk, hub: HubServer) -> None:
    hub.add_repo("org/cut", hub_files())
    desk.write(HUB_MODEL)
    done = desk.run("get", "background", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "ready"
    assert "looking up" in done.stderr
    assert desk.file("cut-out").read_bytes() == hub_files()["model.safetensors"]


def test_get_fetches_nothing_whose_licence_is_not_accepted(desk: Desk, hub: HubServer) -> None:
    hub.add_repo("org/cut", hub_files())
    desk.write(HUB_MODEL | {"licence": "non-commercial", "commercial": False})
    done = desk.run("get", "cut-out")
    assert done.exit_code == 8
    assert "accept_noncommercial: [cut-out]" in done.stderr
    assert not hub.faults.requests


# A Hugging Face cache


def fill_cache(folder: Path, files: dict[str, bytes], commit: str) -> Path:
    """As Hugging Face's library lays it out: blobs by their hash, and links to them."""
    place = folder / "hub" / "models--org--cut"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (place / part).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            blob = hashlib.sha256(content).hexdigest()
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (place / "blobs" / blob).write_bytes(content)
        (place / "snapshots" / commit / name).symlink_to(Path("../../blobs") / blob)
    return folder


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hugging_face_cache_is_a_source_without_a_network(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cache = fill_cache(desk.folder / "cache", hub_files(), COMMIT)
    desk.write(HUB_MODEL)
    done = desk.run("get", "cut-out", "--hub-cache", cache)
    assert done.exit_code == 0, done.stderr
    assert desk.file("cut-out").read_bytes() == hub_files()["model.safetensors"]
    assert not desk.file("cut-out").is_symlink()
    (origin,) = load_lock(desk.registry).models["cut-out"].origins
    assert origin.source == f"hf://org/cut@{COMMIT}"


def test_pull_reads_a_filled_cache_of_from_pretrained(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `cache_dir` is the folder of models--… itself, such as /models on a volume."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    volume = fill_cache(desk.folder / "cache", hub_files(), COMMIT) / "hub"
    desk.write(HUB_MODEL)
    assert desk.run("resolve", "cut-out", "--hub-cache", volume).exit_code == 0
    done = desk.run("pull", "cut-out", "--hub-cache", volume)
    assert done.exit_code == 0, done.stderr
    assert desk.file("cut-out").read_bytes() == hub_files()["model.safetensors"]
    assert desk.run("pull", "cut-out").exit_code == 0  # and needs the volume no more


def test_a_damaged_cache_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cache = fill_cache(desk.folder / "cache", hub_files(), COMMIT)
    link = cache / f"hub/models--org--cut/snapshots/{COMMIT}/model.safetensors"
    whole = bytearray(link.read_bytes())
    whole[-1] ^= 1
    link.resolve().write_bytes(whole)
    desk.write(HUB_MODEL)
    done = desk.run("get", "cut-out", "--hub-cache", cache / "hub")
    assert done.exit_code == 4
    assert "sha256" in done.stderr
    assert not list((desk.store / "store").glob("*/*"))


def test_what_the_cache_lacks_comes_from_the_hub(desk: Desk, hub: HubServer) -> None:
    commit = hub.add_repo("org/cut", hub_files())
    cache = fill_cache(desk.folder / "cache", hub_files(), commit)
    link = cache / f"hub/models--org--cut/snapshots/{commit}/config.json"
    link.resolve().unlink()
    desk.write(HUB_MODEL)
    assert desk.run("get", "cut-out", "--hub-cache", cache).exit_code == 0
    assert not [path for path in hub.faults.requests if "model.safetensors" in path]
    assert [path for path in hub.faults.requests if path.endswith("config.json")]


def test_a_folder_that_is_no_cache_is_refused(desk: Desk) -> None:
    desk.write(HUB_MODEL)
    done = desk.run("get", "cut-out", "--hub-cache", desk.folder)
    assert done.exit_code == 2
    assert "models--" in done.stderr


# A file of one's own


def test_add_makes_a_model_of_a_checkpoint(desk: Desk) -> None:
    torch.save({"params": tensors(SRVGG)}, desk.folder / "My 2x_Net.pth")
    desk.registry.write_text("# Ours.\nmodels: [] # none yet\naccept_noncommercial: []\n")
    done = desk.run("add", desk.folder / "My 2x_Net.pth", "--task", "upscale")
    assert done.exit_code == 0, done.stderr
    assert "SRVGGNetCompact (Real-ESRGAN, compact), 2 times" in done.stderr
    assert "not known: whether the licence (unresolved) allows commercial use" in done.stderr
    assert desk.registry.read_text().startswith("# Ours.\nmodels:\n  - name: my-2x-net\n")
    (entry,) = load_catalogue(desk.registry).models
    assert (entry.scale, entry.family, entry.commercial) == (2, "upscale_gan", False)
    assert desk.file("my-2x-net").is_file()
    assert desk.run("verify", "my-2x-net", "--full").exit_code == 0
    again = desk.run("add", desk.folder / "My 2x_Net.pth", "--task", "upscale")
    assert again.exit_code == 2
    assert "--name" in again.stderr


def test_add_takes_safetensors_and_what_the_command_line_says(desk: Desk) -> None:
    save_file(tensors(ISNET), desk.folder / "any.safetensors")
    desk.write(HUB_MODEL)
    words = ("--task", "background", "--name", "own", "--licence", "MIT", "--commercial", "--json")
    done = desk.run("add", desk.folder / "any.safetensors", *words)
    assert done.exit_code == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["config"] == ISNET
    assert values["missing"] == [
        "input_px, for which 1024 is assumed",
        "stretch, for which True is assumed",
    ]
    names = [model.name for model in load_catalogue(desk.registry).models]
    assert names == ["own", "cut-out"]
    added = load_catalogue(desk.registry).find("own")
    assert isinstance(added, ModelSpec)
    assert (added.licence, added.commercial) == ("MIT", True)


def test_add_names_the_nearest_network_of_a_wrong_file(desk: Desk) -> None:
    wrong = tensors(RRDB)
    del wrong["body.0.rdb2.conv1.bias"]
    wrong["conv_last.weight"] = torch.zeros(3, 8, 1, 1)
    torch.save(wrong, desk.folder / "wrong.pth")
    done = desk.run("add", desk.folder / "wrong.pth", "--task", "upscale")
    assert done.exit_code == 4
    assert "The nearest is RRDBNet (Real-ESRGAN), of which 2 tensors differ" in done.stderr
    assert "body.0.rdb2.conv1.bias (4,) is missing" in done.stderr
    assert "conv_last.weight is (3, 8, 1, 1) instead of (3, 8, 3, 3)" in done.stderr
    assert not desk.registry.exists()


def test_add_refuses_another_task_and_code_in_a_file(desk: Desk) -> None:
    torch.save(tensors(SRVGG), desk.folder / "net.pth")
    done = desk.run("add", desk.folder / "net.pth", "--task", "background")
    assert done.exit_code == 2
    assert "Give --task upscale" in done.stderr

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(desk.folder / "ran"),)

    (desk.folder / "evil.pth").write_bytes(pickle.dumps(Evil()))
    done = desk.run("add", desk.folder / "evil.pth", "--task", "upscale")
    assert done.exit_code == 4
    assert not (desk.folder / "ran").exists()
    assert desk.run("add", desk.folder / "none.pth", "--task", "upscale").exit_code == 2


def test_add_refuses_a_name_that_imagen_s_own_registries_have(desk: Desk) -> None:
    torch.save(tensors(SRVGG), desk.folder / "upscale-starter.pth")
    done = desk.run("add", desk.folder / "upscale-starter.pth", "--task", "upscale")
    assert done.exit_code == 2
    assert "starter.yaml has a model of this name" in done.stderr
    assert not desk.registry.exists()


def test_add_names_no_model_as_a_task(desk: Desk) -> None:
    torch.save(tensors(SRVGG), desk.folder / "upscale.pth")
    words = ("add", desk.folder / "upscale.pth", "--task", "upscale")
    done = desk.run(*words, "--name", "comic")
    assert done.exit_code == 2
    assert "comic is the name of a task" in done.stderr
    assert not desk.registry.exists()
    done = desk.run(*words)
    assert done.exit_code == 0, done.stderr
    (entry,) = load_catalogue(desk.registry).models
    assert entry.name == "upscale-own"


@pytest.mark.parametrize("is_new", [True, False])
def test_add_that_fails_leaves_registry_and_lock_as_they_were(is_new: bool, desk: Desk) -> None:
    torch.save(tensors(SRVGG), desk.folder / "first.pth")
    if not is_new:
        assert desk.run("add", desk.folder / "first.pth", "--task", "upscale").exit_code == 0
        desk.store.rename(desk.folder / "moved")
    files = (desk.registry, lock_path(desk.registry))
    before = [file.read_bytes() if file.exists() else None for file in files]
    desk.store.write_text("No folder, so that nothing can be stored in it.")
    torch.save(tensors(RRDB), desk.folder / "second.pth")
    done = desk.run("add", desk.folder / "second.pth", "--task", "upscale")
    assert done.exit_code == 5, done.stderr
    assert [file.read_bytes() if file.exists() else None for file in files] == before
    assert not list(desk.folder.glob("*.new"))


def test_add_leaves_a_registry_that_it_does_not_understand(desk: Desk) -> None:
    torch.save(tensors(SRVGG), desk.folder / "net.pth")
    text = "models: &all []\n"
    desk.registry.write_text(text)
    done = desk.run("add", desk.folder / "net.pth", "--task", "upscale")
    assert done.exit_code == 2
    assert desk.registry.read_text() == text


@pytest.mark.parametrize(
    "config",
    [
        RRDB,
        RRDB | {"scale": 2, "num_block": 3, "num_feat": 12},
        SRVGG | {"scale": 3, "num_conv": 5},
        ISNET,
        U2NET,
        BIREFNET,
    ],
)
def test_shapes_alone_tell_a_network(config: dict[str, Any]) -> None:
    found = recognise({key: tuple(value.shape) for key, value in tensors(config).items()})
    assert found.config == config
    assert not found.differences


def test_a_file_with_absurd_numbers_costs_nothing() -> None:
    shapes = {f"body.{10**9}.rdb1.conv1.weight": (4, 8, 3, 3), "conv_first.weight": (8, 3, 3, 3)}
    assert recognise(shapes).differences
    assert recognise({"a": ()}).differences
