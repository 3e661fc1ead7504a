"""A replica's model is exchanged whole, or not at all."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import yaml
from safetensors.torch import load_file, save_file

from deployments.contract import complete
from deployments.engine.row import Row, RowInput
from deployments.errors import ModelCorrupt, NotReady
from deployments.hosting import Host
from deployments.images import Picture
from deployments.settings import Settings, StoreSettings
from deployments.store.cache import Store
from deployments.store.folder import hash_file, list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.lockfile import (
    Lock,
    LockedFile,
    LockedModel,
    LockedOrigin,
    build_manifest,
    save_lock,
)
from deployments.store.manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.hosting import Served


class Bench:
    """A store with several contents of one tiny model, and a host for it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self.spec = tiny.spec("sd_ddim", folder)
        registry = root / "models.yaml"
        registry.write_text(yaml.safe_dump({"models": [self.spec.model_dump(mode="json")]}))
        store = StoreSettings(root=root / "store", prefetch=())
        self.settings = Settings(models=(registry,), device="cpu", store=store)
        self.locked = self.add("locked", 1.0)
        files = tuple(LockedFile(path=path) for path in self.spec.origins[0].files)
        origins = (LockedOrigin(source=self.spec.origins[0].source, files=files),)
        entry = LockedModel(digest=self.locked, origins=origins)
        save_lock(registry, Lock().with_model(self.spec.name, entry))
        self.host = Host(self.spec, self.settings)

    def add(self, name: str, factor: float) -> str:
        """Put the model with scaled weights into the store; its digest."""
        folder = shutil.copytree(self._folder, self._root / name)
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        save_file({k: v * factor for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        hashed = [(path, hash_file(folder / path)) for path in list_files(folder)]
        files = [FileEntry(path=p, size=h.size, sha256=str(h.sha256)) for p, h in hashed]
        manifest = build_manifest(self.spec, (f"file://{name}",), files)
        source = FolderBucket(f"file://{folder}")
        places = {f.path: (source, f.path) for f in files}
        Store(self.settings.store).pull(manifest, places)
        return manifest.digest

    def row(self, served: Served) -> Row:
        request: Any = complete(self.spec.task.request(), {}, self.spec.parameters)
        picture = Picture(np.full((64, 64, 3), 90, np.uint8), None)
        pixels = served.pipeline.fit(picture, request)
        return Row(RowInput(request, pixels, 1, time.monotonic() + 60))

    async def ask(self) -> tuple[str, bytes]:
        """What serves a request, and its picture."""
        async with self.host.use() as served:
            row = self.row(served)
            served.engine.put([row])
            pixels = await asyncio.wrap_future(row.future)
            return served.loaded.digest, pixels.tobytes()

    async def settled(self) -> dict[str, str]:
        task = self.host._swapping
        assert task is not None
        await asyncio.wait_for(task, 60)
        return dict(self.host.status)


@pytest.fixture
def bench(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Bench:
    return Bench(tmp_path, tiny_folder("sd_ddim"))


async def test_content_is_exchanged_between_requests_and_back(bench: Bench) -> None:
    other = bench.add("other", 1.5)
    bench.host.start(None)
    first = await bench.ask()
    bench.host.switch_to(other)
    assert (await bench.settled())["error"] == ""
    second = await bench.ask()
    bench.host.switch_to(None)
    await bench.settled()
    third = await bench.ask()
    assert [answer[0] for answer in (first, second, third)] == [
        bench.locked[:16],
        other[:16],
        bench.locked[:16],
    ]
    assert first == third
    assert first[1] != second[1]
    bench.host.close()


async def test_a_request_inside_finishes_on_the_model_it_began_with(bench: Bench) -> None:
    other = bench.add("other", 1.5)
    bench.host.start(None)
    async with bench.host.use() as served:
        bench.host.switch_to(other)
        async with asyncio.timeout(60):
            while bench.host._gate._open.is_set():  # until the new content waits for the request
                await asyncio.sleep(0.01)
        assert bench.host.status["serving"] == bench.locked[:16]
        waiting = asyncio.create_task(bench.ask())
        row = bench.row(served)
        served.engine.put([row])
        await asyncio.wrap_future(row.future)
    assert (await waiting)[0] == other[:16], (
        "a request that came meanwhile waited for the new content"
    )
    bench.host.close()


@pytest.mark.parametrize("factor", [float("nan")])
async def test_weights_that_fail_their_warm_up_are_not_served(bench: Bench, factor: float) -> None:
    bad = bench.add("bad", factor)
    bench.host.start(None)
    before = await bench.ask()
    bench.host.switch_to(bad)
    status = await bench.settled()
    assert status["serving"] == bench.locked[:16]
    assert status["wanted"] == bad[:16]
    assert "NaN" in status["error"]
    assert await bench.ask() == before
    bench.host.check()
    assert Store(bench.settings.store).remove(bench.spec.name, bad), "its lease has ended"
    bench.host.close()


async def test_a_start_with_bad_weights_falls_back_to_the_lock_file(bench: Bench) -> None:
    bad = bench.add("bad", float("nan"))
    bench.host.start(bad)
    assert bench.host.status["serving"] == bench.locked[:16]
    assert bench.host.status["wanted"] == bad[:16]
    assert "NaN" in bench.host.status["error"]
    bench.host.close()


async def test_nothing_to_fall_back_to_stops_the_start(bench: Bench) -> None:
    store = Store(bench.settings.store)
    weights = store.folder(bench.spec.name, bench.locked) / "vae/config.json"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(ModelCorrupt, match=r"vae/config\.json"):
        bench.host.start(None)
    with pytest.raises(NotReady):
        bench.host.check()


class Device(Exception):
    """A scripted failure of a device."""


@pytest.mark.parametrize(("fails", "broken"), [("old leaves", False), ("old returns", True)])
async def test_an_exchange_that_fails_on_the_device_is_undone_or_reported(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fails: str, broken: bool
) -> None:
    bad = bench.add("bad", float("nan"))
    bench.host.start(None)
    moves: list[str] = []

    def to(device: str) -> None:
        moves.append(device)
        if len(moves) == (1 if fails == "old leaves" else 2):
            raise Device(fails)

    monkeypatch.setattr(bench.host._ready().pipeline, "to", to)
    bench.host.switch_to(bad)
    status = await bench.settled()
    assert status["serving"] == bench.locked[:16]
    assert Store(bench.settings.store).remove(bench.spec.name, bad), "its lease has ended"
    if broken:
        with pytest.raises(NotReady, match="could not be restored"):
            bench.host.check()
    else:
        assert moves == ["cpu", "cpu"], "it was brought back"
        bench.host.check()
        await bench.ask()
    bench.host.close()
