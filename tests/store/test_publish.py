"""Publishing: whole, the manifest last, nothing overwritten; and pulled from there again."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.s3 import S3Server
from deployments.catalogue import load_catalogue
from deployments.errors import (
    ConfigError,
    ModelCorrupt,
    ModelNotCached,
    SourceFailed,
    StoreUnwritable,
)
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import ROOT, StoreSettings
from deployments.store import smoke
from deployments.store.cache import Store
from deployments.store.folder import list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.lockfile import Lock, load_lock, save_lock
from deployments.store.provider import Provider, open_bucket
from deployments.store.publish import Published, publish
from deployments.store.resolve import resolve
from tests.store import common
from tests.store.common import NAME, random_files, settings_of, write_files

STARTER = Path("configs/models/starter.yaml")


class Bench:
    """A model in a store, and whatever it is published with."""

    def __init__(self, tmp_path: Path) -> None:
        self.files = random_files()
        origin = write_files(tmp_path / "origin", self.files)
        self.settings = settings_of(tmp_path / "models")
        self.spec = ArtefactSpec.model_validate(
            {
                "name": NAME,
                "summary": "random",
                "licence": "MIT",
                "commercial": True,
                "origins": [{"source": f"file://{origin}", "files": sorted(self.files)}],
            }
        )
        self.registry = tmp_path / "registry.yaml"
        found = resolve(self.spec, self.settings, None)
        save_lock(self.registry, Lock().with_model(NAME, found))
        self.digest = found.digest
        self.provider = Provider(load_lock(self.registry), self.settings)
        self.provider.ensure(self.spec)

    @property
    def folder(self) -> Path:
        return self.provider.store.folder(NAME, self.digest)

    def publish(self, url: str, **options: Any) -> Published:
        return publish(self.spec, self.digest, self.provider.store, url, self.settings, **options)

    def pull_from(self, url: str, root: Path) -> Path:
        """The model, pulled by another node from where it was published."""
        other = settings_of(root, mirror=url)
        return Provider(load_lock(self.registry), other).ensure(self.spec)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    with common.served(GcsServer(), monkeypatch) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with common.served(S3Server(), monkeypatch) as server:
        yield server


@pytest.fixture(params=["file", "gs", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'mirror'}"
    request.getfixturevalue("server" if request.param == "gs" else "s3")
    return f"{request.param}://models/mirror/v1"


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in list_files(folder)}


def test_what_was_published_is_pulled_again_byte_for_byte(
    bench: Bench, target: str, tmp_path: Path
) -> None:
    done = bench.publish(target)
    assert done.url == f"{target}/{NAME}/{bench.digest[:16]}"
    assert done.files == len(bench.files) + 1
    pulled = bench.pull_from(target, tmp_path / "node")
    assert contents(pulled) == contents(bench.folder)


def test_publishing_twice_uploads_nothing(bench: Bench, target: str) -> None:
    bench.publish(target)
    assert bench.publish(target) == Published(f"{target}/{NAME}/{bench.digest[:16]}", 0, 0)


def test_the_manifest_comes_last(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    upload = FolderBucket.put

    def slow_upload(target: FolderBucket, path: str, local: Path) -> bool:
        done = upload(target, path, local)
        order.append(path)
        return done

    monkeypatch.setattr(FolderBucket, "put", slow_upload)
    bench.publish(f"file://{tmp_path / 'mirror'}")
    assert order[-1] == "manifest.json"
    assert sorted(order[:-1]) == sorted(bench.files)


def test_a_half_published_model_is_not_seen_and_is_completed_later(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path / 'mirror'}"
    upload = FolderBucket.put

    def fail(target: FolderBucket, path: str, local: Path) -> bool:
        if path == "vae/weights.safetensors":
            raise OSError("the cable is cut")
        return upload(target, path, local)

    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "put", fail)
        with pytest.raises(OSError, match="cable"):
            bench.publish(url)
    with pytest.raises(SourceFailed, match="cannot be read"):
        bench.pull_from(url, tmp_path / "node")
    assert 0 < bench.publish(url).files <= len(bench.files) + 1
    assert contents(bench.pull_from(url, tmp_path / "node")) == contents(bench.folder)


def test_other_bytes_at_the_target_are_refused_and_left_alone(bench: Bench, tmp_path: Path) -> None:
    there = tmp_path / "mirror" / NAME / bench.digest[:16] / "model_index.json"
    write_files(there.parent, {there.name: b"something else"})
    with pytest.raises(ModelCorrupt, match=r"model_index\.json.*expected 9 bytes.*actual 14"):
        bench.publish(f"file://{tmp_path / 'mirror'}")
    assert there.read_bytes() == b"something else"
    assert not (there.parent / "manifest.json").exists()


def test_an_object_with_other_bytes_is_refused_and_left_alone(
    bench: Bench, server: GcsServer
) -> None:
    name = f"m/{NAME}/{bench.digest[:16]}/model_index.json"
    generation = server.put(name, b'{"a": 2}\n')
    with pytest.raises(ModelCorrupt, match=r"model_index\.json.*crc32c"):
        bench.publish("gs://models/m")
    assert server.generation(name) == generation
    assert not server.generation(f"m/{NAME}/{bench.digest[:16]}/manifest.json")


@pytest.mark.parametrize("same", [True, False])
def test_a_simultaneous_upload_is_compared_and_never_overwritten(
    bench: Bench, server: GcsServer, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    from deployments.store.gcs import GcsBucket

    name = f"m/{NAME}/{bench.digest[:16]}/model_index.json"
    upload = GcsBucket.put

    def late(source: GcsBucket, path: str, local: Path) -> bool:
        if path == "model_index.json" and not server.generation(name):
            server.put(name, bench.files[path] if same else b'{"a": 2}\n')
        return upload(source, path, local)

    monkeypatch.setattr(GcsBucket, "put", late)
    if same:
        assert bench.publish("gs://models/m").files == len(bench.files)
    else:
        with pytest.raises(ModelCorrupt, match=r"model_index\.json"):
            bench.publish("gs://models/m")


def test_a_bucket_that_stumbles_is_asked_again(bench: Bench, server: GcsServer) -> None:
    server.faults.add("503", method="GET", times=2)
    server.faults.add("503", method="POST", times=2)
    bench.publish("gs://models/m")
    assert not server.faults.pending()


def test_a_bucket_that_stays_broken_fails_the_publication(bench: Bench, server: GcsServer) -> None:
    server.faults.add("503", method="GET", times=math.inf)
    with pytest.raises(SourceFailed, match="times in a row"):
        bench.publish("gs://models/m")


def test_a_bucket_that_is_not_there_fails_the_publication(bench: Bench, server: GcsServer) -> None:
    with pytest.raises(SourceFailed, match="There is no such bucket"):
        bench.publish("gs://no-such-bucket/m")
    with pytest.raises(SourceFailed, match="There is no such bucket"):
        open_bucket("gs://no-such-bucket/m", bench.settings)


def test_a_target_that_cannot_be_written_is_a_clear_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, where a folder should be")
    with pytest.raises(StoreUnwritable, match="target folder cannot be written"):
        bench.publish(f"file://{tmp_path / 'file'}")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/m",
        "hf://org/repo@main",
        "somewhere",
        "file:/somewhere",
        "FILE:///somewhere",
        "file://",
        "gs://",
        "gs:/models/m",
    ],
)
def test_only_buckets_and_folders_are_targets(bench: Bench, url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written to this URL"):
        bench.publish(url)


def test_what_is_not_in_the_store_is_not_published(bench: Bench, tmp_path: Path) -> None:
    bench.provider.store.remove(NAME, bench.digest)
    with pytest.raises(ModelNotCached):
        bench.publish(f"file://{tmp_path / 'mirror'}")


def test_what_is_damaged_is_not_published(bench: Bench, tmp_path: Path) -> None:
    path = bench.folder / "model_index.json"
    path.chmod(0o644)
    path.write_bytes(b'{"a": 2}\n')
    with pytest.raises(ModelCorrupt, match=r"model_index\.json"):
        bench.publish(f"file://{tmp_path / 'mirror'}")
    assert not (tmp_path / "mirror").exists()


def test_no_part_of_an_upload_stays_beside_the_models(bench: Bench, tmp_path: Path) -> None:
    bench.publish(f"file://{tmp_path / 'mirror'}")
    assert [p.name for p in (tmp_path / "mirror").iterdir()] == [NAME]


def test_progress_is_reported(bench: Bench, tmp_path: Path) -> None:
    events: list[tuple[str, float]] = []
    bench.publish(
        f"file://{tmp_path / 'mirror'}", listener=lambda e: events.append((e.kind, e.amount))
    )
    assert events[0] == ("miss", sum(map(len, bench.files.values())))
    assert sum(amount for kind, amount in events if kind == "bytes") > events[0][1], (
        "and a manifest"
    )
    assert events[-1] == ("done", 0)


def starter(tmp_path: Path, **changes: Any) -> tuple[ModelSpec, str, Store, StoreSettings]:
    """The smallest starter model, in a store of its own."""
    entry = load_catalogue(STARTER).find("upscale-starter")
    assert isinstance(entry, ModelSpec)
    settings = settings_of(tmp_path / "models")
    registry = tmp_path / "registry.yaml"
    spec = entry.model_copy(update=changes)
    found = resolve(spec, settings, load_lock(STARTER).models[spec.name])
    save_lock(registry, Lock().with_model(spec.name, found))
    provider = Provider(load_lock(registry), settings)
    provider.ensure(spec)
    return spec, found.digest, provider.store, settings


def test_a_model_is_loaded_before_it_is_published(tmp_path: Path) -> None:
    spec, digest, store, settings = starter(tmp_path)
    done = publish(spec, digest, store, f"file://{tmp_path / 'mirror'}", settings)
    assert done.files == 3


def test_a_model_that_does_not_load_is_not_published(tmp_path: Path) -> None:
    spec, digest, store, settings = starter(tmp_path, family="matting")
    url = f"file://{tmp_path / 'mirror'}"
    with pytest.raises(ModelCorrupt, match="does not load, so it is not published: "):
        publish(spec, digest, store, url, settings)
    assert not (tmp_path / "mirror").exists()
    assert publish(spec, digest, store, url, settings, smoke=False).files == 3


def test_the_smoke_load_cannot_reach_the_network() -> None:
    script = (
        "import sys, socket\n"
        "from deployments.smoke_load import _refuse_network\n"
        "sys.addaudithook(_refuse_network)\n"
        "for address in [('127.0.0.1', 9), ('localhost', 9)]:\n"
        "    try:\n"
        "        socket.create_connection(address)\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert done.stdout.count("no network during a smoke load") == 2


def test_a_smoke_load_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, digest, store, _ = starter(tmp_path)
    monkeypatch.setattr(smoke, "_TIMEOUT_S", 0.01)
    with pytest.raises(ModelCorrupt, match=r"is not published: not finished after 0\.01 s"):
        smoke.smoke_load(spec, store.folder(spec.name, digest), "is not published")


def test_published_files_are_whole_even_where_links_are_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreUnwritable, match="hard links"):
        bench.publish(f"file://{tmp_path / 'mirror'}")
    assert not list((tmp_path / "mirror").rglob("*.json"))


def test_a_mirror_is_for_others_to_read(bench: Bench, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        bench.publish(f"file://{tmp_path / 'shared' / 'mirror'}")
    finally:
        os.umask(before)
    made = [tmp_path / "shared", *(tmp_path / "shared").rglob("*")]
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in made}
    assert modes == {(True, 0o755), (False, 0o644)}


def test_what_a_mirror_lacks_is_to_be_published(bench: Bench, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'mirror'}"
    with pytest.raises(SourceFailed, match="cannot be read") as missing:
        bench.pull_from(url, tmp_path / "node")
    bench.publish(url)
    manifest = tmp_path / "mirror" / NAME / bench.digest[:16] / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(ModelCorrupt) as damaged:
        bench.pull_from(url, tmp_path / "node")
    for caught in (missing, damaged):
        assert f"`imagen models publish {NAME} {url}`" in caught.value.remedy
        assert "store.mirror" in caught.value.remedy


def test_what_a_bucket_lacks_is_to_be_published(
    bench: Bench, server: GcsServer, tmp_path: Path
) -> None:
    with pytest.raises(SourceFailed) as caught:
        bench.pull_from(f"gs://{server.bucket}/m", tmp_path / "node")
    assert "imagen models publish" in caught.value.remedy
