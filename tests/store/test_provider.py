"""From a registry entry to a folder: the store first, then the mirror, else the origins."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.origins import MANIFEST
from deployments.registry import ArtefactSpec, Origin
from deployments.settings import StoreSettings
from deployments.store.lockfile import (
    Lock,
    LockedFile,
    LockedModel,
    LockedOrigin,
    load_lock,
    save_lock,
)
from deployments.store.provider import Provider, mirror_url
from tests.store import common
from tests.store.common import LARGE, NAME

if TYPE_CHECKING:
    from pathlib import Path

FILES = common.random_files()
REST = sorted(set(FILES) - {LARGE})


class Place:
    """A registry with one model of two origins, and where everything lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = folder / "models.yaml"
        common.write_files(folder / "a", {path: FILES[path] for path in REST})
        common.write_files(folder / "b", {"weights.safetensors": FILES[LARGE]})
        self.spec = ArtefactSpec(
            name=NAME,
            summary="a model of two places",
            licence="MIT",
            commercial=True,
            origins=(
                Origin(source=f"file://{folder}/a", files=tuple(REST)),
                Origin(source=f"file://{folder}/b", files=("weights.safetensors",), into="unet"),
            ),
        )
        sources = tuple(o.source for o in self.spec.origins)
        self.manifest = common.manifest_of(FILES, sources=sources)
        self.lock(self.manifest.digest)

    def lock(self, digest: str, **changes: Any) -> None:
        by_path = {f.path: f for f in self.manifest.files}
        origins = tuple(
            LockedOrigin(
                source=origin.source,
                files=tuple(
                    LockedFile(
                        path=path,
                        size=by_path[origin.target(path)].size,
                        sha256=by_path[origin.target(path)].sha256,
                    )
                    for path in origin.files
                ),
            )
            for origin in self.spec.origins
        )
        model = LockedModel(digest=digest, origins=origins)
        save_lock(self.registry, Lock().with_model(NAME, model.model_copy(update=changes)))

    def provider(self, **changes: Any) -> Provider:
        settings: StoreSettings = common.settings_of(self.folder / "root", **changes)
        return Provider(load_lock(self.registry), settings)

    def forget_origins(self) -> None:
        for name in ("a", "b"):
            shutil.rmtree(self.folder / name)

    def mirror(self) -> Path:
        """A mirror with the model in it, and no origins any more."""
        folder = self.provider().ensure(self.spec)
        mirror = self.folder / "mirror"
        shutil.copytree(folder, mirror_url(str(mirror), NAME, self.manifest.digest))
        shutil.rmtree(self.folder / "root")
        self.forget_origins()
        return mirror


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_model_comes_from_all_of_its_origins(place: Place) -> None:
    provider = place.provider()
    folder = provider.ensure(place.spec)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert provider.store.check(NAME, place.manifest.digest, "full").digest == place.manifest.digest


def test_what_is_in_the_store_needs_no_source(place: Place) -> None:
    folder = place.provider().ensure(place.spec)
    place.forget_origins()
    assert place.provider(mirror="gs://nowhere/at-all").ensure(place.spec) == folder
    assert place.provider().ensure(place.spec, verify="crc32c") == folder


def test_a_mirror_comes_before_the_origins(place: Place) -> None:
    mirror = place.mirror()
    provider = place.provider(mirror=f"file://{mirror}")
    folder = provider.ensure(place.spec)
    assert (folder / LARGE).read_bytes() == FILES[LARGE]


def test_a_mirror_gives_a_digest_the_origins_no_longer_hold(place: Place) -> None:
    mirror = place.mirror()
    place.lock("f" * 64)
    provider = place.provider(mirror=f"file://{mirror}")
    assert provider.ensure(place.spec, place.manifest.digest[:16]).name == place.manifest.short
    with pytest.raises(SourceFailed):
        provider.ensure(place.spec)


@pytest.mark.parametrize("path", [MANIFEST, LARGE])
def test_a_damaged_mirror_is_refused(place: Place, path: str) -> None:
    mirror = place.mirror()
    damaged = mirror / NAME / place.manifest.short / path
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(data)
    provider = place.provider(mirror=f"file://{mirror}")
    with pytest.raises(ModelCorrupt):
        provider.ensure(place.spec)
    assert provider.store.models() == []


def test_a_mirror_with_another_model_is_refused(place: Place) -> None:
    mirror = place.mirror()
    wrong = "0" * 16
    (mirror / NAME / place.manifest.short).rename(mirror / NAME / wrong)
    with pytest.raises(ModelCorrupt, match="another model"):
        place.provider(mirror=f"file://{mirror}").ensure(place.spec, wrong)


def test_a_digest_the_origins_do_not_give_is_refused(place: Place) -> None:
    with pytest.raises(SourceFailed, match="do not hold this digest") as caught:
        place.provider().ensure(place.spec, "0" * 16)
    assert "store.mirror" in caught.value.remedy


def test_an_origin_that_changed_is_refused(place: Place) -> None:
    (place.folder / "a/model_index.json").write_bytes(b'{"a": 2}\n')
    with pytest.raises(ModelCorrupt, match=r"model_index\.json.*expected sha256"):
        place.provider().ensure(place.spec)
    assert place.provider().store.models() == []


def test_a_model_without_a_digest_is_unresolved(place: Place) -> None:
    place.lock("unresolved")
    with pytest.raises(ConfigError, match="unresolved") as caught:
        place.provider().ensure(place.spec)
    assert "imagen models resolve" in caught.value.remedy
    (place.folder / "models.lock.json").unlink()
    with pytest.raises(ConfigError, match="unresolved"):
        place.provider().ensure(place.spec)


def test_a_registry_that_changed_since_is_refused(place: Place) -> None:
    origin = Origin(source=f"file://{place.folder}/c", files=tuple(REST))
    changed = place.spec.model_copy(update={"origins": (origin,)})
    with pytest.raises(ConfigError, match="has changed since it was resolved"):
        place.provider().ensure(changed)
