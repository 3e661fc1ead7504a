"""Fetch the training pictures that Debian packages, and scale them for training.

`python -m starter_models.training.collections` needs a Debian system with `apt-get` and `dpkg`. It
writes into `starter_models/build/collections`, from which training reads:

    stamps/    cut-outs of real things, with alpha (tuxpaint-stamps-default)
    drawings/  cut-outs that are drawn or rendered, with alpha (tuxpaint-stamps-default,
               openclipart-png, sweethome3d-furniture)
    scenes/    photographs and art without a subject, to lay cut-outs on
    textures/  planks, grass, stone and the like, to lay cut-outs on (supertuxkart-data)
    photos/    photographs in large, for restoration and upscaling
    names.json the package and file that each came from

and those kept-out pictures that are missing into `starter_models/judging`; nothing else of any
package is committed. `starter_models/README.md` has the licences.
"""

from __future__ import annotations

import io
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from scipy import ndimage

from starter_models.training import game_pictures
from starter_models.training.data import TRAINING, photo_bytes
from starter_models.training.kept_out import kept_out, refuse_kept_out

STAMPS, CLIP_ART = "tuxpaint-stamps-default", "openclipart-png"
MATE, PLASMA = "mate-backgrounds", "plasma-workspace-wallpapers"
PACKAGES = (STAMPS, CLIP_ART, MATE, PLASMA, *game_pictures.PACKAGES)
_ROOTS = {
    STAMPS: "usr/share/tuxpaint/stamps",
    CLIP_ART: "usr/share/openclipart/png",
    MATE: "usr/share/backgrounds/mate",
    PLASMA: "usr/share/wallpapers",
}
_LEFT_OUT = ("symbols/", "town/flags/", "town/houses/", "town/roadsigns/", "naturalforces/")
"""Folders of stamps: letters, signs, smoke and lightning."""
_DRAWN = ("cartoon", "clothes", "medical/tooth", "seasonal/easter", "hanukkah", "football_helmet")
_CLIP_ART = (
    "animals", "food", "people", "plants", "recreation", "tools", "transportation", "office",
    "electronics", "containers", "education", "science",
)  # fmt: skip
_CLIP_ART_COUNT = 700
SCENES = (
    *(f"{MATE}:nature/{n}.jpg" for n in ("Blinds", "GreenMeadow", "Storm", "Wood", "RainDrops")),
    f"{MATE}:abstract/Elephants.jpg",
    f"{MATE}:desktop/Ubuntu-Mate-Cold-no-logo.png",
    f"{MATE}:desktop/Ubuntu-Mate-Warm-no-logo.png",
    *(f"{PLASMA}:{n}" for n in (
        "Altai", "Autumn", "Canopee", "Cascade", "Cluster", "ColdRipple", "ColorfulCups",
        "DarkestHour", "EveningGlow", "Flow", "Grey", "Honeywave", "IceCold", "Kokkini",
        "MilkyWay", "OneStandsOut", "Opal", "PastelHills", "Patak", "Shell", "Volna", "summer_1am",
    )),
    *(f"skimage:{n}" for n in (
        "brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "page.png",
        "motorcycle_left.png",
    )),
)  # fmt: skip
PHOTOS = (
    *(f"{MATE}:nature/{n}.jpg" for n in (
        "Blinds", "GreenMeadow", "Storm", "Wood", "RainDrops", "Aqua", "FreshFlower",
    )),
    *(f"{PLASMA}:{n}" for n in (
        "Autumn", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey",
        "OneStandsOut", "Volna", "summer_1am", "SafeLanding", "Altai",
    )),
    *(n for n in TRAINING if n not in ("skimage:page.png", "skimage:moon.png")),
)  # fmt: skip
STAMP_PX, SCENE_PX, TEXTURE_PX, PHOTO_PX, JUDGING_PX = 448, 1024, 640, 1600, 512


def main(
    out: Path = Path("starter_models/build/collections"),
    judging: Path = Path("starter_models/judging"),
    unpacked: Path | None = None,
) -> None:
    """Write both folders; `unpacked` is a root with the packages in it, to fetch none."""
    with tempfile.TemporaryDirectory() as scratch:
        root = unpacked or _fetch(Path(scratch))
        names: dict[str, str] = {}
        _write_stamps(root, out, names)
        _write_clip_art(root, out, names)
        for name, picture in game_pictures.furniture(root):
            if max(picture.size) >= 96 and _is_cut_out(picture):
                _save_cut_out(picture, out / "drawings", name, names)
        for name, picture in game_pictures.photographs(root):
            _save_photo(picture, name, out / "scenes", SCENE_PX, names)
        for name, picture in game_pictures.textures(root):
            _save_photo(picture, name, out / "textures", TEXTURE_PX, names)
        for kind, chosen, size in (("scenes", SCENES, SCENE_PX), ("photos", PHOTOS, PHOTO_PX)):
            for name in chosen:
                _save_photo(_photo(root, name), name, out / kind, size, names)
        refuse_kept_out(list(names.values()))
        out.joinpath("names.json").write_text(json.dumps(names, indent=1) + "\n")
        _write_judging(root, judging)


def _fetch(scratch: Path) -> Path:
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, check=True)
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, scratch / "root"], check=True)
    return scratch / "root"


def _write_stamps(root: Path, out: Path, names: dict[str, str]) -> None:
    folder, forbidden = root / _ROOTS[STAMPS], kept_out()
    for path in sorted(folder.rglob("*.png")):
        file = path.relative_to(folder).as_posix()
        twin = file.replace("_mirror", "")
        if file.startswith(_LEFT_OUT) or f"{STAMPS}:{twin}" in forbidden:
            continue
        picture = Image.open(path).convert("RGBA")
        if max(picture.size) >= 96 and _is_cut_out(picture):
            kind = "drawings" if any(part in file for part in _DRAWN) else "stamps"
            _save_cut_out(picture, out / kind, f"{STAMPS}:{file}", names)


def _write_clip_art(root: Path, out: Path, names: dict[str, str]) -> None:
    folder = root / _ROOTS[CLIP_ART]
    paths = [p for kind in _CLIP_ART for p in sorted((folder / kind).rglob("*.png"))]
    order = np.random.default_rng(0).permutation(len(paths))
    taken = 0
    for path in (paths[i] for i in order):
        # A few files are posters of hundreds of megapixels, which Pillow refuses to open.
        if path.is_symlink() or path.stat().st_size > 1_000_000 or taken == _CLIP_ART_COUNT:
            continue
        picture = Image.open(path)
        if 160 <= max(picture.size) <= 1200 and _is_cut_out(picture := picture.convert("RGBA")):
            name = f"{CLIP_ART}:{path.relative_to(folder).as_posix()}"
            _save_cut_out(picture, out / "drawings", name, names)
            taken += 1


def _is_cut_out(picture: Image.Image) -> bool:
    """Whether the alpha is a solid thing: neither nothing, all, glass, nor lines with holes."""
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
    box = picture.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 40:
        return False
    inside = alpha > 0.5
    share = inside.mean()
    solid = ndimage.binary_fill_holes(inside).sum()
    return bool(
        0.04 < share < 0.95
        and inside.sum() > 0.85 * solid
        and ((alpha > 0.1) & (alpha < 0.9)).sum() < 0.2 * inside.sum()
    )


def _save_cut_out(
    picture: Image.Image, folder: Path, name: str, names: dict[str, str], quality: int = 88
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((STAMP_PX, STAMP_PX), Image.Resampling.LANCZOS)
    path = folder / (_label(name) + ".webp")
    picture.save(path, quality=quality, alpha_quality=95, method=4)
    names[f"{folder.name}/{path.name}"] = name
    return path


def _save_photo(
    picture: Image.Image, name: str, folder: Path, size: int, names: dict[str, str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = picture.convert("RGB")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    path = folder / (_label(name) + ".jpg")
    picture.save(path, quality=95 if folder.name == "photos" else 90, subsampling=0)
    names[f"{folder.name}/{path.name}"] = name


def _photo(root: Path, name: str) -> Image.Image:
    package, file = name.split(":")
    if package not in _ROOTS:
        return Image.open(io.BytesIO(photo_bytes(name)))
    path = root / _ROOTS[package] / file
    pictures = sorted(path.glob("contents/images/*.*"), key=lambda p: -p.stat().st_size)
    return Image.open(pictures[0] if path.is_dir() else path)


def _write_judging(root: Path, out: Path) -> None:
    """The kept-out pictures of the packages, scaled to `JUDGING_PX`, where they are missing.

    Those that are there stay: another version of Pillow would write other bytes, and `make quality`
    would measure on other pictures.
    """
    there = {path.stem for path in out.glob("*/*")}
    for name in sorted(kept_out()):
        package, file = name.split(":")
        if _label(name) in there:
            continue
        if package == STAMPS:
            picture = Image.open(root / _ROOTS[STAMPS] / file).convert("RGBA")
            _save_cut_out(picture, out / "stamps", name, {}, quality=85)
        elif package in _ROOTS:
            _save_photo(_photo(root, name), name, out / "photos", JUDGING_PX, {})


def _label(name: str) -> str:
    stem = name.split(":")[1].removesuffix(".png").removesuffix(".jpg")
    return stem.replace("/", "-")


if __name__ == "__main__":
    typer.run(main)
