"""Compiled artefacts: published, pulled and used where they fit; elsewhere refused, harmlessly."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.s3 import S3Server
from deployments.catalogue import load_catalogue
from deployments.errors import ConfigError, ModelCorrupt, StoreUnwritable
from deployments.gpu.target import Target, this_target
from deployments.settings import ROOT
from deployments.store import compiled
from deployments.store.cache import Store
from deployments.store.compiled import CompiledKey
from deployments.store.events import Event
from deployments.store.folder import read_manifest
from deployments.store.gc import collect
from deployments.store.lockfile import (
    Lock,
    LockedArtefact,
    load_lock,
    lock_path,
    update_lock,
)
from deployments.store.provider import Provider, compiled_url
from deployments.store.publish import Upload, publish_compiled
from deployments.store.resolve import resolve
from tests.store.common import KIB, NAME, served, settings_of
from tests.store.test_cli import IMAGEN, Operator
from tests.store.test_publish import Bench

HERE = Target("h100-sm90", "2.13.0+cu130", "3.4.0", "x86_64")
BLOB = bytes(range(256)) * 4 * KIB
"""Larger than a range of a pull."""


class Makers(Bench):
    """A model in a store and at a mirror, and who compiles it."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.mirror = f"file://{tmp_path / 'mirror'}"
        self.publish(self.mirror)
        self.events: list[Event] = []

    @property
    def store(self) -> Store:
        return Store(self.settings, self.events.append)

    @property
    def lock(self) -> Lock:
        return load_lock(self.registry)

    @property
    def outcomes(self) -> list[str]:
        return [event.stage for event in self.events if event.kind == "compiled"]

    def key(self, target: Target = HERE, **changes: Any) -> CompiledKey:
        return replace(CompiledKey(NAME, self.digest, target, "full", "1024x1024:1,2"), **changes)

    def compile(self, key: CompiledKey, blob: bytes = BLOB) -> LockedArtefact:
        """What `imagen models compile` does, with any bytes."""
        artefact = compiled.add(self.store, key, blob)
        update_lock(self.registry, lambda lock: lock.with_artefact(NAME, self.digest, artefact))
        return artefact

    def send(self) -> dict[str, Upload]:
        locked = self.lock.models[NAME]
        return publish_compiled(NAME, locked, self.store, self.mirror, self.settings)

    def published(self, artefact: LockedArtefact) -> Path:
        folder = compiled_url(self.mirror, NAME, self.digest).removeprefix("file://")
        return Path(folder, compiled.published_name(artefact))

    def node(self, tmp_path: Path) -> Provider:
        """Another node, which has pulled the model."""
        settings = settings_of(tmp_path / "node", mirror=self.mirror, attempts=2)
        provider = Provider(load_lock(self.registry), settings, self.events.append)
        provider.ensure(self.spec)
        return provider


@pytest.fixture
def makers(tmp_path: Path) -> Makers:
    return Makers(tmp_path)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


# From a compiler to another node


def test_what_one_node_compiled_is_found_on_another(makers: Makers, tmp_path: Path) -> None:
    artefact = makers.compile(makers.key())
    assert makers.send() == {artefact.id: "published"}
    node = makers.node(tmp_path)
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "pulled"}
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "present"}
    assert compiled.find(node.store, makers.lock, makers.key()) == BLOB
    path = compiled.place(node.store, NAME, makers.digest, artefact)
    assert path == node.store.root / "compiled" / NAME / makers.digest[:16] / f"{artefact.id}.bin"
    assert not list((node.store.root / ".staging").iterdir())
    assert node.store.check(NAME, makers.digest, "full"), "the model's own folder is as before"


@pytest.mark.parametrize("server", [GcsServer, S3Server])
def test_a_bucket_is_a_mirror_too(
    makers: Makers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any
) -> None:
    artefact = makers.compile(makers.key())
    with served(server(), monkeypatch):
        makers.mirror = f"{'gs' if server is GcsServer else 's3'}://models/mirror"
        makers.publish(makers.mirror)
        assert makers.send() == {artefact.id: "published"}
        assert makers.send() == {artefact.id: "present"}
        node = makers.node(tmp_path)
        assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "pulled"}
    assert compiled.find(node.store, makers.lock, makers.key()) == BLOB


def test_an_artefact_is_handed_to_its_loader_and_counted(makers: Makers) -> None:
    makers.compile(makers.key())
    given: list[bytes] = []

    def into(data: bytes) -> bool:
        given.append(data)
        return True

    assert compiled.load(makers.store, makers.lock, makers.key(), into)
    assert (given, makers.outcomes) == ([BLOB], ["loaded"])


def fail(_: bytes) -> bool:
    raise ValueError("not of this version")


@pytest.mark.parametrize("into", [fail, lambda _: None], ids=["raises", "gives None"])
def test_an_artefact_that_its_loader_refuses_is_no_failure(makers: Makers, into: Any) -> None:
    makers.compile(makers.key())
    assert not compiled.load(makers.store, makers.lock, makers.key(), into)
    assert makers.outcomes == ["foreign"]


def test_an_artefact_compiled_again_is_published_beside_the_former(
    makers: Makers, tmp_path: Path
) -> None:
    former = makers.compile(makers.key())
    makers.send()
    again = makers.compile(makers.key(), b"other bytes")
    assert again.id == former.id
    assert makers.lock.models[NAME].compiled == (again,)
    assert makers.send() == {again.id: "published"}
    assert makers.send() == {again.id: "present"}
    assert makers.published(former).read_bytes() == BLOB, "nothing is overwritten"
    node = makers.node(tmp_path)
    node.ensure_compiled(makers.spec, makers.digest, HERE)
    assert compiled.find(node.store, makers.lock, makers.key()) == b"other bytes"


def test_each_machine_publishes_what_it_compiled(makers: Makers) -> None:
    ours, theirs = makers.compile(makers.key()), makers.compile(makers.key(mode="blocks"))
    compiled.place(makers.store, NAME, makers.digest, theirs).unlink()
    assert makers.send() == {ours.id: "published", theirs.id: "absent"}


# What does not fit


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, device="l4-sm89"),
        replace(HERE, torch="2.11.0"),
        replace(HERE, triton="3.3.0"),
        replace(HERE, machine="aarch64"),
        replace(HERE, device="cpu", machine="x86_64-avx2"),
    ],
    ids=lambda target: "-".join((target.device, target.torch, target.triton, target.machine)),
)
def test_what_was_compiled_for_something_else_is_neither_pulled_nor_used(
    makers: Makers, tmp_path: Path, other: Target, caplog: pytest.LogCaptureFixture
) -> None:
    makers.compile(makers.key())
    makers.send()
    node = makers.node(tmp_path)
    assert node.ensure_compiled(makers.spec, makers.digest, other) == {}
    assert not node.store.compiled_folder(NAME, makers.digest).exists()
    with caplog.at_level(logging.WARNING):
        assert compiled.find(node.store, makers.lock, makers.key(other)) is None
    assert makers.outcomes == ["foreign"]
    assert HERE.device in caplog.text, "says for what there is one"


@pytest.mark.parametrize("change", [{"mode": "blocks"}, {"shapes": "512x512:1"}])
def test_other_modes_and_shapes_have_artefacts_of_their_own(
    makers: Makers, change: dict[str, str]
) -> None:
    makers.compile(makers.key())
    assert compiled.find(makers.store, makers.lock, makers.key(**change)) is None
    makers.compile(makers.key(**change), b"another")
    assert compiled.find(makers.store, makers.lock, makers.key(**change)) == b"another"
    assert compiled.find(makers.store, makers.lock, makers.key()) == BLOB


def test_another_content_of_the_model_has_none(makers: Makers) -> None:
    makers.compile(makers.key())
    assert compiled.find(makers.store, makers.lock, makers.key(digest="0" * 64)) is None
    assert compiled.find(makers.store, makers.lock, makers.key(digest=makers.digest[:16])) == BLOB
    assert makers.outcomes == ["missing"]


def test_an_artefact_that_nobody_published_is_missing(makers: Makers, tmp_path: Path) -> None:
    artefact = makers.compile(makers.key())
    node = makers.node(tmp_path)
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "absent"}
    assert compiled.find(node.store, makers.lock, makers.key()) is None
    assert makers.outcomes == ["missing"]


def test_a_mirror_that_is_gone_is_no_failure(makers: Makers, tmp_path: Path) -> None:
    artefact = makers.compile(makers.key())
    node = makers.node(tmp_path)
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").write_text("no folder")
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "absent"}
    assert node.ensure(makers.spec) == node.store.folder(NAME, makers.digest)


# Damage


def test_a_damaged_artefact_of_the_mirror_is_refused_and_the_model_is_there(
    makers: Makers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artefact = makers.compile(makers.key())
    makers.send()
    damage(makers.published(artefact))
    node = makers.node(tmp_path)
    with caplog.at_level(logging.WARNING):
        done = node.ensure_compiled(makers.spec, makers.digest, HERE)
    assert done == {artefact.id: "absent"}
    assert f"expected sha256 {artefact.sha256}" in caplog.text
    assert compiled.find(node.store, makers.lock, makers.key()) is None
    assert node.store.check(NAME, makers.digest, "full")


@pytest.mark.parametrize("harm", ["a bit", "longer", "shorter"])
def test_a_damaged_artefact_of_the_store_is_set_aside_and_pulled_anew(
    makers: Makers, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    artefact = makers.compile(makers.key())
    makers.send()
    node = makers.node(tmp_path)
    node.ensure_compiled(makers.spec, makers.digest, HERE)
    path = compiled.place(node.store, NAME, makers.digest, artefact)
    damage(path)
    path.write_bytes({"a bit": path.read_bytes(), "longer": BLOB + b"x", "shorter": b""}[harm])
    given: list[bytes] = []
    with caplog.at_level(logging.WARNING):
        assert not compiled.load(node.store, makers.lock, makers.key(), given.append)
    assert (given, makers.outcomes) == ([], ["damaged"])
    assert "damaged" in caplog.text
    assert not path.exists()
    assert list((node.store.root / ".quarantine").iterdir()), "kept, to be looked at"
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "pulled"}
    assert compiled.find(node.store, makers.lock, makers.key()) == BLOB


def test_a_pull_replaces_a_damaged_artefact(makers: Makers, tmp_path: Path) -> None:
    artefact = makers.compile(makers.key())
    makers.send()
    node = makers.node(tmp_path)
    node.ensure_compiled(makers.spec, makers.digest, HERE)
    damage(compiled.place(node.store, NAME, makers.digest, artefact))
    assert node.ensure_compiled(makers.spec, makers.digest, HERE) == {artefact.id: "pulled"}
    assert compiled.find(node.store, makers.lock, makers.key()) == BLOB


def test_a_damaged_artefact_is_not_published(makers: Makers) -> None:
    artefact = makers.compile(makers.key())
    damage(compiled.place(makers.store, NAME, makers.digest, artefact))
    with pytest.raises(ModelCorrupt, match="expected sha256"):
        makers.send()
    assert not makers.published(artefact).exists()


def test_other_bytes_at_the_mirror_are_not_taken_for_ours(makers: Makers) -> None:
    artefact = makers.compile(makers.key())
    makers.published(artefact).parent.mkdir(parents=True)
    makers.published(artefact).write_bytes(b"something else")
    with pytest.raises(ModelCorrupt, match="holds another file"):
        makers.send()
    assert makers.published(artefact).read_bytes() == b"something else"


def test_a_disk_that_is_full_leaves_no_half_artefact(
    makers: Makers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled, "sync_path", full)
    with pytest.raises(StoreUnwritable):
        compiled.add(makers.store, makers.key(), BLOB)
    assert not list((makers.store.root / ".staging").iterdir())
    assert not makers.store.compiled_folder(NAME, makers.digest).exists()


# Room


def test_artefacts_take_room_and_go_with_their_model(makers: Makers) -> None:
    store, before = makers.store, makers.store.used_bytes
    makers.compile(makers.key())
    assert store.used_bytes >= before + len(BLOB)
    model_bytes = read_manifest(makers.folder, NAME).total_bytes
    (store.root / "refs" / f"{NAME}.json").unlink()
    with store.lease(makers.digest):
        assert collect(store, [], makers.settings, now=True) == [], "in use"
        assert compiled.find(store, makers.lock, makers.key()) == BLOB
    assert collect(store, [makers.digest], makers.settings, now=True) == [], "locked"
    (removed,) = collect(store, [], makers.settings, now=True)
    assert removed.bytes >= model_bytes + len(BLOB)
    assert not store.compiled_folder(NAME, makers.digest).exists()
    assert store.models() == []


def test_artefacts_of_a_model_that_is_gone_are_removed(makers: Makers) -> None:
    makers.compile(makers.key())
    makers.store.quarantine(NAME, makers.digest)
    (makers.store.root / "refs" / f"{NAME}.json").unlink()
    (removed,) = collect(makers.store, [], makers.settings, now=True)
    assert (removed.kind, removed.bytes) == ("model", len(BLOB))
    assert makers.store.removable() == []


# The lock file


def test_the_lock_file_knows_artefacts_until_the_content_changes(makers: Makers) -> None:
    second, first = makers.compile(makers.key()), makers.compile(makers.key(mode="blocks"))
    both = tuple(sorted([first, second], key=lambda one: one.id))
    assert makers.lock.models[NAME].compiled == both
    update_lock(
        makers.registry, lambda lock: lock.with_model(NAME, resolve(makers.spec, makers.settings))
    )
    assert makers.lock.models[NAME].compiled == both, "the same digest"
    other = makers.lock.models[NAME].model_copy(update={"digest": "0" * 64})
    update_lock(makers.registry, lambda lock: lock.with_model(NAME, other))
    assert makers.lock.models[NAME].compiled == (), "another content"
    with pytest.raises(ConfigError, match="names another content"):
        makers.lock.with_artefact(NAME, makers.digest, first)


def test_a_lock_file_without_artefacts_is_as_it_always_was(makers: Makers) -> None:
    before = json.loads(lock_path(makers.registry).read_bytes())
    assert set(before["models"][NAME]) == {"digest", "origins"}
    update_lock(makers.registry, lambda lock: lock)
    assert json.loads(lock_path(makers.registry).read_bytes()) == before
    artefact = makers.compile(makers.key())
    (row,) = json.loads(lock_path(makers.registry).read_bytes())["models"][NAME]["compiled"]
    assert row == {
        "id": artefact.id,
        "device": HERE.device,
        "torch": HERE.torch,
        "mode": "full",
        "shapes": "1024x1024:1,2",
        "bytes": len(BLOB),
        "sha256": artefact.sha256,
    }


def test_an_id_is_the_same_in_every_release(makers: Makers) -> None:
    key = CompiledKey(NAME, "ab" * 32, HERE, "full", "1024x1024:1,2")
    assert key.id == "359151e402423a41", "or every published artefact becomes foreign"


# Commands


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    made = Operator(tmp_path)
    made.resolve()
    made("pull", "first", "second")
    return made


def compile_first(operator: Operator, target: Target) -> LockedArtefact:
    digest = operator.digest("first")
    artefact = compiled.add(operator.store, CompiledKey("first", digest, target, "full", "x"), BLOB)
    update_lock(operator.registry, lambda lock: lock.with_artefact("first", digest, artefact))
    return artefact


def test_publish_and_pull_take_artefacts_along(operator: Operator, tmp_path: Path) -> None:
    ours = compile_first(operator, this_target("auto"))
    theirs = compile_first(operator, HERE)
    mirror = f"file://{tmp_path / 'mirror'}"
    done = operator.json("publish", "first", mirror, "--no-smoke")
    assert done["compiled"] == {ours.id: "published", theirs.id: "published"}
    operator("clear", "first")
    assert not operator.store.compiled_folder("first", operator.digest("first")).exists()
    (row,) = operator.json("pull", "first", "--mirror", mirror)["models"]
    assert row["compiled"] == {ours.id: "pulled"}
    assert operator("verify", "first").exit_code == 0
    damage(compiled.place(operator.store, "first", operator.digest("first"), ours))
    assert operator("verify", "first").exit_code == ModelCorrupt.exit_code
    (row,) = operator.json("pull", "first", "--mirror", mirror)["models"]
    assert (row["status"], row["compiled"]) == ("present", {ours.id: "pulled"})


def test_list_and_info_show_artefacts(operator: Operator) -> None:
    artefact = compile_first(operator, HERE)
    rows = {row["name"]: row for row in operator.json("list")["models"]}
    assert rows["first"]["compiled_bytes"] == len(BLOB)
    assert rows["second"]["compiled_bytes"] == 0
    (shown,) = operator.json("info", "first")["compiled"]
    assert shown == artefact.model_dump() | {"in_store": True}
    assert artefact.id in operator("info", "first").stdout


def test_resolving_again_keeps_artefacts(operator: Operator) -> None:
    artefact = compile_first(operator, HERE)
    assert operator.json("resolve", "first")["models"][0]["status"] == "unchanged"
    assert load_lock(operator.registry).models["first"].compiled == (artefact,)


def test_only_models_are_compiled(operator: Operator) -> None:
    outcome = operator("compile", "second")
    assert outcome.exit_code == ConfigError.exit_code
    assert "Only models are compiled" in outcome.stderr


# With the real compiler

_USE = """
import sys, torch
from pathlib import Path
from torch._dynamo.utils import counters

def work(x):
    return torch.nn.functional.gelu(x @ x.T).softmax(-1) + 1

blob = Path(sys.argv[1])
if blob.exists():
    assert torch.compiler.load_cache_artifacts(blob.read_bytes()) is not None
x = torch.linspace(-1, 1, 4096).reshape(64, 64)
with torch.inference_mode():
    torch.testing.assert_close(torch.compile(work, dynamic=False)(x), work(x))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
if not blob.exists():
    blob.write_bytes(torch.compiler.save_cache_artifacts()[0])
"""


def use(blob: Path, cache: Path) -> str:
    """Hits and misses of a new process whose cache is empty."""
    command = [sys.executable, "-c", _USE, str(blob)]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")


@pytest.mark.slow
@COMPILER
def test_a_real_artefact_spares_another_process_the_compiling(
    makers: Makers, tmp_path: Path
) -> None:
    blob = tmp_path / "blob"
    assert use(blob, tmp_path / "cache1") == "0 1", "compiled"
    key = makers.key(this_target("cpu"))
    makers.compile(key, blob.read_bytes())
    makers.send()
    node = makers.node(tmp_path)
    node.ensure_compiled(makers.spec, makers.digest, this_target("cpu"))
    found = compiled.find(node.store, makers.lock, key)
    assert found is not None
    (tmp_path / "found").write_bytes(found)
    assert use(tmp_path / "found", tmp_path / "cache2") == "1 0", "taken from the artefact"


@pytest.mark.slow
@COMPILER
def test_the_command_compiles_a_model_of_the_store(tmp_path: Path) -> None:
    registry = tmp_path / "starter.yaml"
    text = (ROOT / "configs/models/starter.yaml").read_text()
    # Every size of a batch is compiled, and one takes a minute.
    registry.write_text(text.replace("max_batch_size: 4", "max_batch_size: 1"))
    shutil.copy(ROOT / "configs/models/starter.lock.json", tmp_path)
    settings = settings_of(tmp_path / "models")
    provider, spec = Provider(load_lock(registry), settings), load_catalogue(registry).find("comic")
    provider.ensure(spec)
    options = ["--mode", "blocks", "--device", "cpu", "--registry", str(registry), "--json"]
    command = [*IMAGEN, "models", "compile", "comic", "--store", str(tmp_path / "models"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row, digest = json.loads(done.stdout), provider.digest(spec)
    key = CompiledKey(spec.name, digest, this_target("cpu"), "blocks", row["shapes"])
    blob = compiled.find(provider.store, load_lock(registry), key)
    assert blob is not None
    assert (row["id"], row["bytes"], row["device"]) == (key.id, len(blob), "cpu")
    assert provider.store.check(spec.name, digest, "full"), "the model itself is as it was"
