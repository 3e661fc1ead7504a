"""A store that root fills, whatever its umask, serves replicas that run as another user."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deployments.errors import StoreUnwritable
from deployments.settings import ROOT
from deployments.store.folder_bucket import FolderBucket
from tests.store import common

if TYPE_CHECKING:
    from pathlib import Path

REPLICA = """
import os, sys
from pathlib import Path
from tests.store import common
root, name, digest = sys.argv[1:]
os.setgid(65534)
os.setuid(65534)  # after the imports, which may lie in root's home
store = common.store_of(Path(root))
with store.lease(digest):
    store.check(name, digest, "full")
    print("loaded", flush=True)
    sys.stdin.readline()
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """A folder that anybody can reach."""
    for parent in [tmp_path, *tmp_path.parents]:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o055)
    return tmp_path


def test_what_another_user_has_loaded_is_not_removed(open_path: Path) -> None:
    content = common.random_files()
    manifest = common.manifest_of(content)
    source = FolderBucket(f"file://{common.write_files(open_path / 'source', content)}")
    former = os.umask(0o077)
    try:
        store = common.store_of(open_path / "store")
        store.pull(manifest, {path: (source, path) for path in content})
    finally:
        os.umask(former)
    arguments = [str(store.root), manifest.model, manifest.digest]
    with subprocess.Popen(
        [sys.executable, "-c", REPLICA, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as replica:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "loaded\n"
        assert not store.remove(manifest.model, manifest.digest), "it is in use"
        replica.communicate("\n")
    assert replica.returncode == 0
    assert store.remove(manifest.model, manifest.digest)


def test_a_store_that_may_not_be_read_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    with pytest.raises(StoreUnwritable, match="cannot be read by this user"):
        common.store_of(tmp_path).check("m", "0" * 64)
