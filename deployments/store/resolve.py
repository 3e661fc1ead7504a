"""Looking a registry entry up at its origins: revisions, sizes, hashes, and so its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.store.folder import Hashes
from deployments.store.hub import parse, resolve_revision
from deployments.store.lockfile import (
    LockedFile,
    LockedModel,
    LockedOrigin,
    conversion_of,
    origin_manifest,
)
from deployments.store.provider import open_source
from deployments.store.sources import UNRESOLVED, Transient, WebSource
from deployments.store.transfer import retrying

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.registry import ArtefactSpec, Origin
    from deployments.settings import StoreSettings
    from deployments.store.sources import Remote, Source

    Expected = Mapping[tuple[str, str], LockedFile]

_WEB = ("https://", "http://")


def resolve(
    spec: ArtefactSpec,
    settings: StoreSettings,
    known: LockedModel | None = None,
    *,
    renew: bool = False,
) -> LockedModel:
    """What the lock file is to say of a model. Reads only files whose hash nobody publishes.

    Args:
        settings: how patiently to ask.
        known: the lock file's present entry. What it holds of a source is expected to be true
            still: an upstream that moved, or was tampered with, never replaces it.
        renew: forget `known`, but for the hashes of web files, which come from their authors.

    Returns:
        Every revision, size and hash; and the digest, unless the model is to be converted first.

    Raises:
        ConfigError: an https file whose SHA-256 the lock file does not hold.
        ModelCorrupt: a file differs from what `known` says.
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
    source = open_source(url)
    remotes = retrying(lambda: source.stat(place.files), settings)
    nothing = LockedFile(path="nothing")
    files = tuple(
        _resolve_file(name, source, remote, expected.get((url, remote.path), nothing), settings)
        for remote in remotes
    )
    return LockedOrigin(source=url, files=files)


def _pin(name: str, url: str, held: LockedOrigin | None, settings: StoreSettings) -> str:
    if not url.endswith(f"@{UNRESOLVED}"):
        return url
    repo, _ = parse(url)
    main = f"hf://{repo}@{retrying(lambda: resolve_revision(repo), settings)}"
    if held and held.source.startswith(f"hf://{repo}@") and held.source not in (url, main):
        raise SourceFailed(
            f"The main branch of a source of {name} has moved: expected {held.source},"
            f" actual {main}.",
            remedy="Write the one you want as `source` in the model registry.",
        )
    return main


def _resolve_file(
    name: str, source: Source, remote: Remote, expected: LockedFile, settings: StoreSettings
) -> LockedFile:
    where = f"{source.url.rstrip('/')}/{remote.path}"
    if remote.size < 0:
        raise SourceFailed(
            f"A source of {name} does not tell the size of its file.",
            value=where,
            remedy="Take it from a server that sends Content-Length.",
        )
    _check(name, where, "bytes", expected.size, remote.size)
    if isinstance(source, WebSource) and expected.sha256 == UNRESOLVED:
        raise ConfigError(
            f"The SHA-256 of a file of {name} is unknown, and a web server vouches for nothing.",
            value=where,
            remedy="Write the hash that its project publishes into the lock file.",
        )
    sha256 = remote.sha256 or _hash(source, remote, settings)
    _check(name, where, "sha256", expected.sha256, sha256)
    return LockedFile(path=remote.path, size=remote.size, sha256=sha256)


def _check(name: str, where: str, what: str, expected: int | str, actual: int | str) -> None:
    if expected not in (UNRESOLVED, actual):
        raise ModelCorrupt(
            f"A file of {name} is not what the lock file says: {where}:"
            f" expected {what} {expected}, actual {actual}.",
            remedy="Find out why it changed. To accept it, take the file's values out of the lock"
            " file, and resolve again.",
        )


def _hash(source: Source, remote: Remote, settings: StoreSettings) -> str:
    hashes = Hashes()
    before = 0

    def attempt() -> None:
        nonlocal before
        before = hashes.size
        source.read(remote, before, remote.size, hashes.update)
        if hashes.size < remote.size:
            raise Transient(f"{source.url} {remote.path} ended early")

    retrying(attempt, settings, lambda: hashes.size > before)
    return str(hashes.sha256)
