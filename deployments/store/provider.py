"""From a registry entry and a digest to a folder in the store: which files, and from where."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from deployments.errors import ConfigError, Missing, ModelCorrupt, SetupError, SourceFailed
from deployments.origins import MANIFEST, UNRESOLVED
from deployments.store import compiled
from deployments.store.bucket import find, read_whole
from deployments.store.cache import Store
from deployments.store.events import Listener, ignore
from deployments.store.folder_bucket import FolderBucket
from deployments.store.hub import HubReader
from deployments.store.hub_cache import CachedHubReader, HubCache
from deployments.store.lockfile import (
    LockedArtefact,
    LockedOrigin,
    locked_digest,
    locked_origins,
    origin_manifest,
)
from deployments.store.manifest import SHORT, Manifest, decode
from deployments.store.transfer import retrying
from deployments.store.web import WebReader

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.gpu.target import Target
    from deployments.registry import ArtefactSpec
    from deployments.settings import StoreSettings
    from deployments.store.bucket import Bucket, Reader
    from deployments.store.folder import Verify
    from deployments.store.lockfile import Lock
    from deployments.store.staging import Places

_COMPILED_ATTEMPTS = 2
logger = logging.getLogger("ray.serve.imagen.store")


def open_reader(url: str, hub_cache: Path | None = None) -> Reader:
    """The reader of a URL; makes no request yet.

    Args:
        hub_cache: where files of hf:// are looked for first.

    Raises:
        ConfigError: an unknown scheme, or a URL without a pinned revision.
    """
    match urlsplit(url).scheme:
        case "file" | "gs" | "s3":
            return make_bucket(url)
        case "https" | "http":
            return WebReader(url)
        case "hf":
            return CachedHubReader(url, HubCache(hub_cache)) if hub_cache else HubReader(url)
        case scheme:
            raise ConfigError(
                f"Models cannot come from {scheme or 'a place without a scheme'}.",
                value=url,
                remedy="Use file://, hf://, gs://, s3:// or https://.",
            )


def open_bucket(url: str, settings: StoreSettings) -> Bucket:
    """The bucket of a URL. It is listed once, so that a wrong name is noticed early.

    Raises:
        ConfigError: the URL is neither gs://, s3:// nor file://.
        SourceFailed: there is no such bucket, or no access to it.
    """
    bucket = make_bucket(url)
    retrying(lambda: next(iter(bucket.list()), None), settings)
    return bucket


def make_bucket(url: str) -> Bucket:
    """The bucket of a URL; makes no request yet.

    Raises:
        ConfigError: the URL is neither gs://, s3:// nor file://.
    """
    scheme, _, place = url.partition("://")
    match scheme if place else "":
        case "gs":
            # Here, because the import takes most of a second.
            from deployments.store.gcs import GcsBucket

            return GcsBucket(url)
        case "s3":
            from deployments.store.s3 import S3Bucket

            return S3Bucket(url)
        case "file":
            return FolderBucket(url)
        case _:
            raise ConfigError(
                "Files cannot be written to this URL.",
                value=url,
                remedy="Use gs://bucket/prefix, s3://bucket/prefix or file:///folder.",
            )


class Provider:
    """Brings models of a registry into the store of this node.

    A model that is in the store needs neither source nor network. Otherwise it comes from the
    mirror, if there is one, else from its origins.

    Args:
        lock: of the registries.
        settings: of the store.
        listener: receives every event.
    """

    def __init__(self, lock: Lock, settings: StoreSettings, listener: Listener = ignore) -> None:
        self.store = Store(settings, listener)
        self._settings = settings
        self.lock = lock

    def digest(self, spec: ArtefactSpec) -> str:
        """The lock file's digest of a model.

        Raises:
            ConfigError: the digest is unresolved.
        """
        return locked_digest(self.lock, spec)

    @property
    def locked_digests(self) -> set[str]:
        """Every digest of the lock file."""
        return {model.digest for model in self.lock.models.values()} - {UNRESOLVED}

    def ensure(
        self, spec: ArtefactSpec, digest: str | None = None, verify: Verify = "quick"
    ) -> Path:
        """The folder of a model, pulled if it is not in the store.

        Args:
            spec: of the model.
            digest: which content; None takes the lock file's.
            verify: how to check a folder that is already there.

        Raises:
            ConfigError: the model is unresolved, or must be converted first.
            SourceFailed, ModelCorrupt, StoreUnwritable, LockTimeout: see `Store.pull`.
        """
        digest = digest or self.digest(spec)
        folder = self.store.find(spec.name, digest, verify)
        return folder or self.store.pull(*self.plan(spec, digest))

    def ensure_compiled(
        self, spec: ArtefactSpec, digest: str, target: Target
    ) -> dict[str, Literal["present", "pulled", "absent"]]:
        """Pull what the lock file knows to be compiled for a model and a kind of device.

        Never raises for an artefact that the mirror lacks or holds with other bytes, and for a
        mirror or a store that fails: the model is served without it, and the log says why.

        Returns:
            What became of each artefact, by id.
        """
        done: dict[str, Literal["present", "pulled", "absent"]] = {}
        for artefact in compiled.matching(self.lock, spec.name, digest, target):
            if compiled.holds(self.store, spec.name, digest, artefact):
                done[artefact.id] = "present"
                continue
            try:
                pulled = self._pull_compiled(spec, digest, artefact)
            except SetupError as error:
                logger.warning("A compiled artefact of %s was not pulled: %s", spec.name, error)
                pulled = False
            done[artefact.id] = "pulled" if pulled else "absent"
        return done

    def holds_compiled(self, name: str, digest: str, target: Target) -> bool:
        """Whether everything that `ensure_compiled` could pull is in the store, by sizes."""
        if not self._settings.mirror:
            return True
        return all(
            compiled.holds(self.store, name, digest, artefact, "quick")
            for artefact in compiled.matching(self.lock, name, digest, target)
        )

    def _pull_compiled(self, spec: ArtefactSpec, digest: str, artefact: LockedArtefact) -> bool:
        if not self._settings.mirror:
            return False
        reader = open_reader(compiled_url(self._settings.mirror, spec.name, digest))
        path = compiled.published_name(artefact)
        # Few attempts, because the model can be served without it.
        settings = self._settings.model_copy(update={"attempts": _COMPILED_ATTEMPTS})
        if retrying(lambda: find(reader, path), settings) is None:
            logger.warning("The mirror has no compiled artefact %s of %s.", path, spec.name)
            return False
        compiled.pull(self.store, spec, digest, artefact, reader)
        return True

    def plan(self, spec: ArtefactSpec, digest: str | None = None) -> tuple[Manifest, Places]:
        """What a pull would fetch, and from where; fetches at most a manifest.

        Raises:
            ConfigError, SourceFailed, ModelCorrupt: as `ensure`.
        """
        digest = digest or self.digest(spec)
        if self._settings.mirror:
            return self._from_mirror(spec, digest, self._settings.mirror)
        return self._from_origins(spec, digest)

    def _from_mirror(self, spec: ArtefactSpec, digest: str, url: str) -> tuple[Manifest, Places]:
        mirror = open_reader(mirror_url(url, spec.name, digest))
        try:
            content = retrying(lambda: read_whole(mirror, MANIFEST), self._settings)
            manifest = decode(content, mirror.url)
        except (Missing, ModelCorrupt) as error:
            raise type(error)(
                error.message,
                value=error.value,
                remedy=f"Remove any manifest there. Run `imagen models publish {spec.name} {url}`,"
                " or correct store.mirror.",
            ) from error
        if manifest.model != spec.name or not manifest.digest.startswith(digest):
            raise ModelCorrupt(
                f"The mirror holds another model under this digest: expected"
                f" {spec.name}@{digest[:SHORT]}, actual {manifest.model}@{manifest.short}.",
                value=mirror.url,
                remedy="Publish the model again.",
            )
        return manifest, {f.path: (mirror, f.path) for f in manifest.files}

    def _from_origins(self, spec: ArtefactSpec, digest: str) -> tuple[Manifest, Places]:
        if spec.convert:
            raise ConfigError(
                f"{spec.name} is made by a conversion; its origins do not hold the served files.",
                remedy=f"Run `imagen models convert {spec.name}` here, or set store.mirror to where"
                " the model is published.",
            )
        origins = locked_origins(spec, self.lock)
        manifest = origin_manifest(spec, origins)
        if not manifest.digest.startswith(digest):
            raise SourceFailed(
                f"The origins of {spec.name} do not hold this digest: expected"
                f" {digest[:SHORT]}, actual {manifest.short}.",
                remedy="Set store.mirror to where it is published, or correct the digest.",
            )
        return manifest, origin_places(spec, origins, self._settings.hub_cache)


def origin_places(
    spec: ArtefactSpec, origins: tuple[LockedOrigin, ...], hub_cache: Path | None
) -> Places:
    """Where each file of an entry's folder comes from; raises as `open_reader`."""
    return {
        place.target(file.path): (reader, file.path)
        for place, origin in zip(spec.origins, origins, strict=True)
        for reader in [open_reader(origin.source, hub_cache)]
        for file in origin.files
    }


def mirror_url(mirror: str, model: str, digest: str) -> str:
    """The URL below which a mirror keeps a model."""
    return f"{mirror.rstrip('/')}/{model}/{digest[:SHORT]}"


def compiled_url(mirror: str, model: str, digest: str) -> str:
    """The URL below which a mirror keeps the compiled artefacts of a model."""
    return mirror_url(f"{mirror.rstrip('/')}/compiled", model, digest)
