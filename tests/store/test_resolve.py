"""Resolving finds revisions, sizes and hashes, and refuses an upstream that changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.servers.files import FileServer
from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.hub import HubServer
from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.origins import UNRESOLVED
from deployments.registry import ArtefactSpec, Conversion, ModelSpec
from deployments.settings import StoreSettings
from deployments.store.lockfile import (
    Lock,
    LockedFile,
    LockedModel,
    LockedOrigin,
    load_lock,
    locked_digest,
    origin_manifest,
    save_lock,
)
from deployments.store.resolve import resolve

REPO = "org/model"
CONFIG = b'{"a": 1}\n'
WEIGHTS = b"weights" * 1000
SETTINGS = StoreSettings(attempts=3, backoff_s=0.001)
BRANCH = f"hf://{REPO}@{UNRESOLVED}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def revision(hub: HubServer) -> str:
    return hub.add_repo(REPO, {"config.json": CONFIG, "model.safetensors": WEIGHTS})


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "net.pth").write_bytes(WEIGHTS)
    with FileServer(tmp_path / "web") as server:
        yield server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def artefact(source: str, *files: str, **more: Any) -> ArtefactSpec:
    origin = {"source": source, "files": files or ("config.json", "model.safetensors")}
    values = {"name": "x", "summary": "", "licence": "MIT", "commercial": True} | more
    return ArtefactSpec.model_validate(values | {"origins": more.get("origins", [origin])})


def known(source: str, *files: LockedFile, digest: str = UNRESOLVED) -> LockedModel:
    return LockedModel(digest=digest, origins=(LockedOrigin(source=source, files=files),))


def asked(server: HubServer | FileServer, name: str) -> int:
    return sum(count for path, count in server.faults.bytes_sent.items() if path.endswith(name))


def test_an_unresolved_revision_becomes_the_commit_of_main(hub: HubServer, revision: str) -> None:
    spec = artefact(BRANCH)
    found = resolve(spec, SETTINGS)
    assert found.origins == (
        LockedOrigin(
            source=f"hf://{REPO}@{revision}",
            files=(
                LockedFile(path="config.json", size=len(CONFIG), sha256=sha256(CONFIG)),
                LockedFile(path="model.safetensors", size=len(WEIGHTS), sha256=sha256(WEIGHTS)),
            ),
        ),
    )
    assert found.digest == origin_manifest(spec, found.origins).digest
    assert resolve(spec, SETTINGS, found) == found


def test_of_the_hub_only_files_without_a_published_hash_are_read(
    hub: HubServer, revision: str
) -> None:
    resolve(artefact(f"hf://{REPO}@{revision}"), SETTINGS)
    assert asked(hub, "/config.json") == len(CONFIG)
    assert asked(hub, "/model.safetensors") == 0


def test_a_branch_that_moved_is_refused_with_both_commits(hub: HubServer, revision: str) -> None:
    before = resolve(artefact(BRANCH), SETTINGS)
    moved = hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    with pytest.raises(SourceFailed, match=f"expected hf://{REPO}@{revision}, actual .*{moved}"):
        resolve(artefact(BRANCH), SETTINGS, before)
    # Written down by a person, it is taken.
    after = resolve(artefact(f"hf://{REPO}@{moved}"), SETTINGS, before)
    assert after.origins[0].files[0].sha256 == sha256(b"{}")
    assert after.digest != before.digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_changed_at_its_revision_is_refused(
    hub: HubServer, revision: str, name: str
) -> None:
    spec = artefact(f"hf://{REPO}@{revision}")
    before = resolve(spec, SETTINGS)
    path = hub.root / REPO / revision / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"X")
    expected, actual = sha256(content), sha256(content[:-1] + b"X")
    with pytest.raises(ModelCorrupt, match=f"{name}: expected sha256 {expected}, actual {actual}"):
        resolve(spec, SETTINGS, before)
    path.write_bytes(content + b"X")
    with pytest.raises(ModelCorrupt, match=f"bytes {len(content)}, actual {len(content) + 1}"):
        resolve(spec, SETTINGS, before)


def test_a_hash_known_beforehand_is_held_against_the_hub(hub: HubServer, revision: str) -> None:
    source = f"hf://{REPO}@{revision}"
    right = LockedFile(path="model.safetensors", sha256=sha256(WEIGHTS))
    found = resolve(artefact(source), SETTINGS, known(source, right))
    assert found.origins[0].files[1].size == len(WEIGHTS)
    wrong = right.model_copy(update={"sha256": sha256(b"other")})
    with pytest.raises(ModelCorrupt, match=sha256(b"other")):
        resolve(artefact(source), SETTINGS, known(source, wrong))
    # What another revision held proves nothing.
    other = known(f"hf://{REPO}@{'0' * 40}", wrong)
    assert resolve(artefact(source), SETTINGS, other) == found


def test_failures_that_pass_are_tried_again(hub: HubServer, revision: str) -> None:
    hub.faults.add("503", "/resolve/")
    hub.faults.add("truncate", "config.json", after_bytes=3)
    found = resolve(artefact(BRANCH), SETTINGS)
    assert found.origins[0].files[0].sha256 == sha256(CONFIG)
    assert not hub.faults.pending()


@pytest.mark.parametrize(
    ("source", "files"),
    [(BRANCH, ["absent.json"]), ("hf://org/none@unresolved", []), (f"hf://{REPO}@{'0' * 40}", [])],
)
def test_what_the_hub_does_not_hold_is_refused(
    hub: HubServer, revision: str, source: str, files: list[str]
) -> None:
    with pytest.raises(SourceFailed):
        resolve(artefact(source, *files), SETTINGS)


def test_a_folder_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"")
    spec = artefact(f"file://{tmp_path}")
    found = resolve(spec, SETTINGS)
    assert [f.sha256 for f in found.origins[0].files] == [sha256(CONFIG), sha256(b"")]
    (tmp_path / "config.json").write_bytes(CONFIG.replace(b"1", b"2"))
    with pytest.raises(ModelCorrupt, match="expected sha256"):
        resolve(spec, SETTINGS, found)


def test_a_bucket_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    with GcsServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.put("m/config.json", CONFIG)
        found = resolve(artefact(f"gs://{server.bucket}/m", "config.json"), SETTINGS)
    assert found.origins[0].files[0].sha256 == sha256(CONFIG)


def test_of_a_web_server_the_hash_must_be_known(web: FileServer) -> None:
    source = web.url
    spec = artefact(source, "net.pth", convert={"to": "safetensors"})
    with pytest.raises(ConfigError, match="SHA-256 of a file of x is unknown"):
        resolve(spec, SETTINGS)
    assert asked(web, "net.pth") == 0
    right = LockedFile(path="net.pth", sha256=sha256(WEIGHTS))
    found = resolve(spec, SETTINGS, known(source, right))
    assert found.origins[0].files == (right.model_copy(update={"size": len(WEIGHTS)}),)
    wrong = right.model_copy(update={"sha256": sha256(b"other")})
    with pytest.raises(ModelCorrupt, match=f"{sha256(b'other')}, actual {sha256(WEIGHTS)}"):
        resolve(spec, SETTINGS, known(source, wrong))


def test_a_converted_model_keeps_its_digest_while_its_origins_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    spec = artefact(f"file://{tmp_path}", "model.safetensors", convert={"to": "fp16"})
    first = resolve(spec, SETTINGS)
    assert first.digest == UNRESOLVED
    published = first.model_copy(update={"digest": "a" * 64})
    assert resolve(spec, SETTINGS, published) == published
    (tmp_path / "config.json").write_bytes(CONFIG)
    more = artefact(f"file://{tmp_path}", "model.safetensors", "config.json", convert=spec.convert)
    assert resolve(more, SETTINGS, published).digest == UNRESOLVED


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"hf://{REPO}@main", "branches and tags move"),
        (f"hf://{REPO}@{'0' * 39}", "not pinned"),
        (f"hf://{REPO}", "written hf://org/repo@revision"),
        ("hf://model@unresolved", "written hf://org/repo@revision"),
        ("ftp://host/folder", "not a file://"),
        ("starter_models/upscale", "not a file://"),
        ("gs://", "not a file://"),
    ],
)
def test_a_source_that_pins_nothing_is_refused_in_the_registry(source: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        artefact(source)


def spec_of(kind: type[ArtefactSpec], file: str, **more: Any) -> ArtefactSpec:
    values = artefact("file://x", "config.json").model_dump() | more
    values["origins"] = [{"source": "file://x", "files": ["config.json", file]}]
    if kind is ModelSpec:
        values |= {"task": "upscale", "family": "upscale_gan"}
    return kind.model_validate(values)


@pytest.mark.parametrize("file", ["a.pth", "a.pt", "A.CKPT", "b/a.pkl"])
@pytest.mark.parametrize("kind", [ArtefactSpec, ModelSpec])
def test_a_pickle_is_refused_unless_it_is_converted(kind: type[ArtefactSpec], file: str) -> None:
    for convert in (None, {"to": "fp16"}):
        with pytest.raises(ValidationError, match=f"{file} is a pickle"):
            spec_of(kind, file, convert=convert)
    assert spec_of(kind, file, convert={"to": "safetensors"})


def test_bin_is_a_pickle_of_a_model_and_ctranslate2s_of_an_artefact() -> None:
    with pytest.raises(ValidationError, match=r"model.bin is a pickle"):
        spec_of(ModelSpec, "model.bin")
    assert spec_of(ArtefactSpec, "model.bin")


def test_two_files_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(ValidationError, match="two origins give the same file"):
        spec_of(ArtefactSpec, "CONFIG.json")


@pytest.mark.parametrize("file", ["sub/x", "SUB/x/y"])
def test_one_path_is_no_file_and_folder(file: str) -> None:
    with pytest.raises(ValidationError, match="sub is both a file and a folder"):
        artefact("file://x", "sub", file)


def test_a_negative_size_in_the_lock_file_is_refused(tmp_path: Path) -> None:
    lock = Lock().with_model("x", known("file://x", LockedFile(path="a", size=77)))
    save_lock(tmp_path / "x.yaml", lock)
    path = tmp_path / "x.lock.json"
    path.write_text(path.read_text().replace("77", "-77"))
    with pytest.raises(ConfigError, match="lock file cannot be read"):
        load_lock(tmp_path / "x.yaml")


def test_a_changed_registry_needs_a_new_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "more.json").write_bytes(CONFIG)
    spec = artefact(f"file://{tmp_path}", "config.json")
    lock = Lock().with_model("x", resolve(spec, SETTINGS))
    assert locked_digest(lock, spec)
    with pytest.raises(ConfigError, match="has changed since it was resolved") as caught:
        locked_digest(lock, artefact(f"file://{tmp_path}", "config.json", "more.json"))
    assert "imagen models resolve x" in caught.value.remedy


def test_renew_accepts_what_changed_and_keeps_an_authors_hash(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    values = {"source": f"file://{tmp_path}", "files": ["config.json"]}
    spec = ArtefactSpec.model_validate(
        {"name": "a", "summary": "", "licence": "x", "commercial": True, "origins": [values]}
    )
    known = resolve(spec, StoreSettings())
    (tmp_path / "config.json").write_bytes(b"[]")
    with pytest.raises(ModelCorrupt):
        resolve(spec, StoreSettings(), known)
    assert resolve(spec, StoreSettings(), known, renew=True).digest != known.digest


def test_a_changed_conversion_needs_a_new_digest(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    values: dict[str, Any] = {
        "name": "a",
        "summary": "",
        "licence": "x",
        "commercial": True,
        "origins": [{"source": f"file://{tmp_path}", "files": ["w.pth"]}],
        "convert": {"to": "safetensors", "key": "params"},
    }
    spec = ArtefactSpec.model_validate(values)
    converted = resolve(spec, StoreSettings()).model_copy(update={"digest": "a" * 64})
    assert resolve(spec, StoreSettings(), converted).digest == "a" * 64
    lock = Lock().with_model("a", converted)
    assert locked_digest(lock, spec) == "a" * 64
    changed = spec.model_copy(update={"convert": Conversion(to="safetensors", key="params_ema")})
    assert resolve(changed, StoreSettings(), converted).digest == "unresolved"
    with pytest.raises(ConfigError, match="another conversion"):
        locked_digest(lock, changed)
