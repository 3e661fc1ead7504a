"""From a registry entry and a digest to a folder in the store: which bytes, and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.store.cache import Store
from deployments.store.events import ignore
from deployments.store.lockfile import load_lock, locked_digest, locked_origins, origin_manifest
from deployments.store.manifest import MANIFEST, SHORT, decode
from deployments.store.sources import NOT_THERE, UNRESOLVED, LocalSource, WebSource
from deployments.store.transfer import retrying

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.registry import ArtefactSpec
    from deployments.settings import StoreSettings
    from deployments.store.cache import Places
    from deployments.store.events import Listener
    from deployments.store.folder import Verify
    from deployments.store.lockfile import LockedOrigin
    from deployments.store.manifest import Manifest
    from deployments.store.sources import Source


def open_source(url: str) -> Source:
    """The source of a URL.

    Raises:
        ConfigError: an unknown scheme, or a URL that does not pin what it names.
    """
    # Client libraries are imported where they are used: each costs most of a second.
    match urlsplit(url).scheme:
        case "file":
            return LocalSource(url)
        case "https" | "http":
            return WebSource(url)
        case "hf":
            from deployments.store.hub import HubSource

            return HubSource(url)
        case "gs":
            from deployments.store.gcs import BucketSource

            return BucketSource(url)
        case scheme:
            raise ConfigError(
                f"Models cannot come from {scheme or 'a place without a scheme'}.",
                value=url,
                remedy="Use file://, hf://, gs:// or https://.",
            )


class Provider:
    """Brings models of a registry into the store of this node.

    A model in the store needs no source and no network. Otherwise it comes from the mirror, if
    there is one, else from its origins.

    Args:
        registry: its YAML file; the lock file lies beside it.
        settings: of the store.
        listener: hears of everything.
    """

    def __init__(
        self, registry: Path, settings: StoreSettings, listener: Listener = ignore
    ) -> None:
        self.store = Store(settings, listener)
        self._settings = settings
        self._lock = load_lock(registry)

    def digest(self, spec: ArtefactSpec) -> str:
        """The lock file's digest of a model.

        Raises:
            ConfigError: it is unresolved.
        """
        return locked_digest(self._lock, spec)

    @property
    def locked_digests(self) -> set[str]:
        """Every digest of the lock file."""
        return {model.digest for model in self._lock.models.values()} - {UNRESOLVED}

    def ensure(
        self, spec: ArtefactSpec, digest: str | None = None, verify: Verify = "quick"
    ) -> Path:
        """The folder of a model, pulled if it is not there.

        Args:
            digest: which content; None takes the lock file's.
            verify: how well to look at a folder that is already there.

        Raises:
            ConfigError: unresolved, or to be converted first.
            SourceFailed, ModelCorrupt, StoreUnwritable, LockTimeout: see `Store.pull`.
        """
        digest = digest or self.digest(spec)
        found = self.store.find(spec.name, digest, verify)
        return found or self.store.pull(*self.plan(spec, digest))

    def plan(self, spec: ArtefactSpec, digest: str | None = None) -> tuple[Manifest, Places]:
        """What a pull would fetch, and from where; fetches a manifest at most.

        Raises:
            ConfigError, SourceFailed, ModelCorrupt: as `ensure`.
        """
        digest = digest or self.digest(spec)
        if self._settings.mirror:
            return self._from_mirror(spec, digest, self._settings.mirror)
        return self._from_origins(spec, digest)

    def _from_mirror(self, spec: ArtefactSpec, digest: str, url: str) -> tuple[Manifest, Places]:
        source = open_source(mirror_url(url, spec.name, digest))
        remedy = f"Run `imagen models publish {spec.name} {url}`, or correct store.mirror."
        try:
            content = retrying(lambda: _read_small(source, MANIFEST), self._settings)
        except SourceFailed as error:
            if error.remedy != NOT_THERE:
                raise
            raise SourceFailed(error.message, value=error.value, remedy=remedy) from error
        try:
            manifest = decode(content, source.url)
        except ModelCorrupt as error:
            raise ModelCorrupt(
                error.message, value=source.url, remedy=f"Remove the manifest there. {remedy}"
            ) from error
        if manifest.model != spec.name or not manifest.digest.startswith(digest):
            raise ModelCorrupt(
                f"The mirror holds another model under this digest: expected"
                f" {spec.name}@{digest[:SHORT]}, actual {manifest.model}@{manifest.short}.",
                value=source.url,
                remedy="Publish the model again.",
            )
        return manifest, {f.path: (source, f.path) for f in manifest.files}

    def _from_origins(self, spec: ArtefactSpec, digest: str) -> tuple[Manifest, Places]:
        if spec.convert:
            raise ConfigError(
                f"{spec.name} is made by a conversion; its origins do not hold it as it is served.",
                remedy=f"Run `imagen models convert {spec.name}` here, or set store.mirror to where"
                " it was published.",
            )
        origins = locked_origins(spec, self._lock)
        manifest = origin_manifest(spec, origins)
        if not manifest.digest.startswith(digest):
            raise SourceFailed(
                f"The origins of {spec.name} do not hold the digest wanted: expected"
                f" {digest[:SHORT]}, they give {manifest.short}.",
                remedy="Set store.mirror to where it was published, or correct the digest.",
            )
        return manifest, origin_places(spec, origins)


def origin_places(spec: ArtefactSpec, origins: tuple[LockedOrigin, ...]) -> Places:
    """Where each file of an entry's folder comes from; raises as `open_source`."""
    return {
        place.target(file.path): (source, file.path)
        for place, origin in zip(spec.origins, origins, strict=True)
        for source in [open_source(origin.source)]
        for file in origin.files
    }


def mirror_url(mirror: str, model: str, digest: str) -> str:
    """Where a mirror keeps a model."""
    return f"{mirror.rstrip('/')}/{model}/{digest[:SHORT]}"


def _read_small(source: Source, path: str) -> bytes:
    file = source.stat([path])[0]
    content = bytearray()
    source.read(file, 0, file.size, content.extend)
    return bytes(content)
