"""A model's manifest: exactly what its folder holds.

The digest is the SHA-256 of the canonical JSON of everything but the CRC32Cs. A hub does not state
those, so without them a model's digest is known before its first byte is fetched.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from deployments.errors import ModelCorrupt
from deployments.origins import SafePath
from deployments.settings import Strict

SHORT = 16
"""How many hex digits of a digest name a folder."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Crc32c = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class FileEntry(Strict):
    """One file of a model.

    Attributes:
        path: relative, POSIX.
        size: bytes.
        sha256: of the content, hex.
        crc32c: of the content, hex; None until the file has been read.
    """

    path: SafePath
    size: int = Field(ge=0)
    sha256: Sha256
    crc32c: Crc32c | None = None


class Licence(Strict):
    """A model's licence: SPDX id or name, and whether it allows commercial use."""

    id: str
    commercial: bool


class Manifest(Strict):
    """The content of a model folder.

    Attributes:
        model: name in the registry.
        sources: where its files came from, revisions pinned.
        converted: the conversion that made the files; None if they are the sources' unchanged.
        licence: of the weights.
        family: of the pipeline that loads it; None for an artefact of another service.
        variant: file variant, such as fp16.
        files: sorted by path.
    """

    schema_: Literal["imagen.model/1"] = Field(default="imagen.model/1", alias="schema")
    model: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    sources: tuple[str, ...]
    converted: str | None = None
    licence: Licence
    family: str | None = None
    variant: str | None = None
    files: tuple[FileEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sorted_once(self) -> Manifest:
        paths = [f.path for f in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files must be sorted by path, each once")
        folded = [p.casefold() for p in paths]
        if len(set(folded)) != len(folded):
            raise ValueError("two paths differ in case only")
        parents = {str(parent) for p in folded for parent in PurePosixPath(p).parents}
        if found := parents & set(folded):
            raise ValueError(f"{min(found)!r} is a file and a folder")
        return self

    @property
    def digest(self) -> str:
        """64 hex digits."""
        values = self.model_dump(mode="json", by_alias=True)
        values["files"] = [{k: f[k] for k in ("path", "size", "sha256")} for f in values["files"]]
        return hashlib.sha256(_canonical(values)).hexdigest()

    @property
    def short(self) -> str:
        """The first 16 digits of the digest, which name the folder."""
        return self.digest[:SHORT]

    @property
    def total_bytes(self) -> int:
        return sum(f.size for f in self.files)

    def encode(self) -> bytes:
        """The only byte sequence that `decode` accepts for this manifest."""
        return _canonical(self.model_dump(mode="json", by_alias=True))


def decode(data: bytes, where: object) -> Manifest:
    """Read a manifest.

    Raises:
        ModelCorrupt: the bytes are not exactly what `Manifest.encode` writes.
    """
    reason = "it is not in its canonical form"
    try:
        manifest = Manifest.model_validate_json(data)
        if manifest.encode() == data:
            return manifest
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise ModelCorrupt(f"The manifest is wrong: {reason}.", value=where, remedy="Pull it again.")


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
