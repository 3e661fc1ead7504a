"""Models out of the store: checked to the last byte, and kept while they are in use."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import tiny

from deployments.errors import ModelCorrupt, ModelNotCached
from deployments.loader import Loaded, load
from deployments.origins import MANIFEST
from deployments.settings import Settings, StoreSettings
from deployments.store.cache import Store
from deployments.store.folder import hash_file, list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.lockfile import build_manifest
from deployments.store.manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.registry import ModelSpec


class TinyStore:
    """A store with one tiny model in it."""

    def __init__(self, root: Path, name: str, folder: Path) -> None:
        self.spec: ModelSpec = tiny.spec(name, folder)
        self.settings = Settings(device="cpu", store=StoreSettings(root=root))
        self.store = Store(self.settings.store)
        hashed = [(path, hash_file(folder / path)) for path in list_files(folder)]
        files = [FileEntry(path=p, size=h.size, sha256=str(h.sha256)) for p, h in hashed]
        manifest = build_manifest(self.spec, (f"file://{folder}",), files)
        source = FolderBucket(f"file://{folder}")
        self.digest = manifest.digest
        self.folder = self.store.pull(manifest, {f.path: (source, f.path) for f in files})

    def load(self) -> Loaded:
        return load(self.spec, self.digest, self.store, self.settings)


@pytest.fixture
def in_store(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], TinyStore]:
    return lambda name: TinyStore(tmp_path / "models", name, tiny_folder(name))


@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4", "isnet", "srvgg"])
def test_a_model_loads_out_of_the_store(name: str, in_store: Callable[[str], TinyStore]) -> None:
    held = in_store(name)
    loaded = held.load()
    assert loaded.digest == held.digest[:16]
    assert not held.store.remove(held.spec.name, held.digest), "it is in use"
    loaded.lease.close()
    assert held.store.remove(held.spec.name, held.digest)
    with pytest.raises(ModelNotCached, match=held.spec.name):
        held.load()


def test_one_byte_flipped_anywhere_is_refused(in_store: Callable[[str], TinyStore]) -> None:
    held = in_store("sd_ddim")
    chance = random.Random(7)
    for path in [*list_files(held.folder)] * 3:
        file = held.folder / path
        content = file.read_bytes()
        place = chance.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        file.chmod(0o644)
        file.write_bytes(changed)
        with pytest.raises((ModelCorrupt, ModelNotCached)) as caught:
            held.load()
        if path != MANIFEST:
            assert path in str(caught.value)
            assert "expected" in caught.value.message
        file.write_bytes(content)
    held.load().lease.close()


def test_a_digest_of_another_family_is_refused(in_store: Callable[[str], TinyStore]) -> None:
    held = in_store("isnet")
    spec = held.spec.model_copy(update={"family": "upscale_gan"})
    with pytest.raises(ModelCorrupt, match="family"):
        load(spec, held.digest, held.store, held.settings)
