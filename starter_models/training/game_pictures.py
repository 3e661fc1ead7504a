"""Backgrounds and rendered objects inside the data files of games and of an interior planner.

Every function takes the root that Debian's packages were unpacked into and yields pairs of a name,
`package:file`, and a picture.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

GCOMPRIS, KART, FURNITURE = "gcompris-qt-data", "supertuxkart-data", "sweethome3d-furniture"
PACKAGES = (GCOMPRIS, KART, FURNITURE)
_NO_TEXTURE = (
    "normal", "_n.", "nm.", "gloss", "_spec", "mask", "lightmap", "uv", "splat",
    "screenshot", "flag", "icon", "logo", "sign",
)  # fmt: skip
"""Parts of names of what is not looked at: slopes, gloss, light, and of what shows letters."""


def photographs(root: Path) -> Iterator[tuple[str, Image.Image]]:
    """Some 45 photographs of buildings, ruins and sea beds: those of GCompris in landscape format.

    Those in portrait format are mostly of statues, which are subjects.
    """
    for file in ("explore_monuments.rcc", "clickgame.rcc"):
        data = root.joinpath("usr/share/gcompris-qt/rcc", file).read_bytes()
        for i, picture in enumerate(_webp_pictures(data)):
            if picture.mode == "RGB" and picture.height >= 300 and picture.width > picture.height:
                yield f"{GCOMPRIS}:{file}-{i}", picture


def _webp_pictures(data: bytes) -> Iterator[Image.Image]:
    """The WebP files within a Qt resource file, which stores them as they are."""
    start = data.find(b"RIFF")
    while start >= 0:
        end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
        if data[start + 8 : start + 12] == b"WEBP":
            yield Image.open(io.BytesIO(data[start:end]))
        start = data.find(b"RIFF", start + 4)


def textures(root: Path) -> Iterator[tuple[str, Image.Image]]:
    """Some 250 pictures that fill the frame: SuperTuxKart's planks, grass, stone, skies, roads."""
    data = root / "usr/share/games/supertuxkart/data"
    seen: set[bytes] = set()
    for folder in ("textures", "library", "tracks"):
        for path in sorted((data / folder).rglob("*.*g")):
            if any(part in path.name.lower() for part in _NO_TEXTURE):
                continue
            if path.suffix not in {".jpg", ".png"} or path.stat().st_size < 60_000:
                continue
            picture = Image.open(path)
            if picture.mode != "RGB" or min(picture.size) < 512:
                continue
            small = np.asarray(picture.resize((64, 64), Image.Resampling.BOX), np.float32)
            # Tracks share textures: the same one again, lighter by a shade, adds nothing.
            looks = (small.reshape(8, 8, 8, 8, 3).mean((1, 3)) / 16).astype(np.uint8).tobytes()
            if _fills_its_frame(small) and looks not in seen:
                seen.add(looks)
                yield f"{KART}:{path.relative_to(data).as_posix()}", picture


def _fills_its_frame(small: NDArray[np.float32]) -> bool:
    """False for a picture that is plain, dark, a map of slopes, or parts on black or white."""
    red, green, blue = small.mean((0, 1))
    slopes = blue > red + 60 and abs(red - green) < 12
    ends = ((small.max(2) < 6) | (small.min(2) > 249)).mean()
    return bool(small.std() >= 12 and small.mean() >= 25 and not slopes and ends < 0.06)


def furniture(root: Path) -> Iterator[tuple[str, Image.Image]]:
    """Some 800 rendered objects with alpha, mostly 128 px, out of Sweet Home 3D's catalogues."""
    for path in sorted((root / "usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(path) as catalogue:
            listed = catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")
            icons = [s.split("=", 1)[1].strip() for s in listed.splitlines() if s[:5] == "icon#"]
            for icon in icons:
                with Image.open(io.BytesIO(catalogue.read(icon.lstrip("/")))) as picture:
                    yield f"{FURNITURE}:{path.stem}{icon}", picture.convert("RGBA")
