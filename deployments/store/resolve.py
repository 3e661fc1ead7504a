"""Looking up a registry entry at its origins: revisions, sizes, hashes, and so its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.origins import UNRESOLVED, parse_hub
from deployments.store.bucket import Reader, RemoteFile, Transient
from deployments.store.folder import Hashes
from deployments.store.hub import resolve_revision
from deployments.store.hub_cache import HubCache
from deployments.store.lockfile import (
    LockedFile,
    LockedModel,
    LockedOrigin,
    conversion_of,
    origin_manifest,
)
from deployments.store.provider import open_reader
from deployments.store.transfer import retrying
from deployments.store.web import WebReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.registry import ArtefactSpec, Origin
    from deployments.settings import StoreSettings

    Expected = Mapping[tuple[str, str], LockedFile]

_WEB = ("https://", "http://")


def resolve(
    spec: ArtefactSpec,
    settings: StoreSettings,
    known: LockedModel | None = None,
    *,
    renew: bool = False,
) -> LockedModel:
    """The lock file's new entry of a model. Reads only files whose hash nobody publishes.

    Args:
        spec: of the model.
        settings: attempts and backoff.
        known: the lock file's present entry. Its revisions and hashes are expected to be true
            still: an upstream that moved or was tampered with never replaces them.
        renew: ignore `known`, except for the hashes of web files, which come from their authors.

    Returns:
        Every revision, size and hash; and the digest, unless the model must be converted first.

    Raises:
        ConfigError: an https file whose SHA-256 is not in the lock file.
        ModelCorrupt: a file differs from `known`.
        SourceFailed: `main` moved away from the revision in `known`; a file or repository is
            missing; a source failed for good.
    """
    before = known.origins if known else ()
    trusted = [o for o in before if not renew or o.source.startswith(_WEB)]
    expected = {(o.source, f.path): f for o in trusted for f in o.files}
    held = () if renew else before
    origins = tuple(
        _resolve_origin(spec.name, place, held[i] if i < len(held) else None, expected, settings)
        for i, place in enumerate(spec.origins)
    )
    conversion = conversion_of(spec)
    if not spec.convert:
        digest = origin_manifest(spec, origins).digest
    else:
        same = known and known.origins == origins and known.conversion == conversion
        digest = known.digest if known and same else UNRESOLVED
    return LockedModel(digest=digest, conversion=conversion, origins=origins)


def _resolve_origin(
    name: str,
    place: Origin,
    held: LockedOrigin | None,
    expected: Expected,
    settings: StoreSettings,
) -> LockedOrigin:
    url = _pin(name, place.source, held, settings)
    reader = open_reader(url, settings.hub_cache)
    remotes = retrying(lambda: reader.stat(place.files), settings)
    unknown = LockedFile(path="unknown")
    files = tuple(
        _resolve_file(name, reader, remote, expected.get((url, remote.path), unknown), settings)
        for remote in remotes
    )
    return LockedOrigin(source=url, files=files)


def _pin(name: str, url: str, held: LockedOrigin | None, settings: StoreSettings) -> str:
    if not url.endswith(f"@{UNRESOLVED}"):
        return url
    repo, _ = parse_hub(url)
    cached = HubCache(settings.hub_cache).revision(repo) if settings.hub_cache else None
    main = f"hf://{repo}@{cached or retrying(lambda: resolve_revision(repo), settings)}"
    if held and held.source.startswith(f"hf://{repo}@") and held.source not in (url, main):
        raise SourceFailed(
            f"The main branch of a source of {name} has moved: expected {held.source},"
            f" actual {main}.",
            remedy="Write the revision you want as `source` in the model registry.",
        )
    return main


def _resolve_file(
    name: str, reader: Reader, remote: RemoteFile, expected: LockedFile, settings: StoreSettings
) -> LockedFile:
    where = f"{reader.url.rstrip('/')}/{remote.path}"
    if remote.size < 0:
        raise SourceFailed(
            f"A source of {name} does not state the size of a file.",
            value=where,
            remedy="Take it from a server that sends Content-Length.",
        )
    _check(name, where, "bytes", expected.size, remote.size)
    if isinstance(reader, WebReader) and expected.sha256 == UNRESOLVED:
        raise ConfigError(
            f"The SHA-256 of a file of {name} is unknown, and web servers do not publish one.",
            value=where,
            remedy="Write the hash that the file's project publishes into the lock file.",
        )
    sha256 = remote.sha256 or _hash(reader, remote, settings)
    _check(name, where, "sha256", expected.sha256, sha256)
    return LockedFile(path=remote.path, size=remote.size, sha256=sha256)


def _check(name: str, where: str, what: str, expected: int | str, actual: int | str) -> None:
    if expected not in (UNRESOLVED, actual):
        raise ModelCorrupt(
            f"A file of {name} differs from the lock file: {where}:"
            f" expected {what} {expected}, actual {actual}.",
            remedy="Find out why it changed. To accept it, delete the file's values from the lock"
            " file, and resolve again.",
        )


def _hash(reader: Reader, remote: RemoteFile, settings: StoreSettings) -> str:
    hashes = Hashes()
    before = 0

    def attempt() -> None:
        nonlocal before
        before = hashes.size
        reader.read(remote, before, remote.size, hashes.update)
        if hashes.size < remote.size:
            raise Transient(f"{reader.url} {remote.path} ended early")

    retrying(attempt, settings, lambda: hashes.size > before)
    return str(hashes.sha256)
