"""The training of the starter models: what it may read, and what it makes of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deployments.catalogue import load_registry
from deployments.pipelines.nets.cutout import CutoutNet, CutoutWidths, Encoder
from deployments.tasks import Task
from starter_models.measures import flat_share, off_tint
from starter_models.training import (
    backbone,
    diffusion,
    game_pictures,
    perceptual,
    styles,
    upscaler,
)
from starter_models.training.bank import CutOuts, cut_outs
from starter_models.training.damage import jpeg
from starter_models.training.diffusion import Trainee
from starter_models.training.judged import JUDGED_PHOTOS, JUDGING, judged_scenes, outlined_photos
from starter_models.training.kept_out import kept_out
from starter_models.training.matting import ScenePool, save
from starter_models.training.recipes import RECIPES
from starter_models.training.scenes import Odds, Scenes

STARTER = Path("starter_models")


def test_training_refuses_a_picture_that_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "stamps").mkdir()
    Image.new("RGBA", (8, 8)).save(tmp_path / "stamps/innocent.webp")
    name = sorted(kept_out())[0]
    (tmp_path / "names.json").write_text(json.dumps({"stamps/innocent.webp": name}))
    with pytest.raises(ValueError, match="Kept out of training"):
        cut_outs(tmp_path, "stamps", "cpu", size=8)


def test_every_kept_out_cut_out_is_judged() -> None:
    listed = [n for n in kept_out() if n.startswith("tuxpaint-stamps-default:")]
    held = {p.stem for p in (JUDGING / "stamps").iterdir()}
    assert {n.split(":")[1].removesuffix(".png").replace("/", "-") for n in listed} == held
    x, alpha = judged_scenes(size=32)
    assert len(x) == len(held) + 9
    assert (alpha[: len(held)].amax((1, 2, 3)) > 0.5).all()
    assert alpha[len(held) :].max() == 0


def test_what_training_saves_loads_strictly(tmp_path: Path) -> None:
    save(CutoutNet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    net = CutoutNet(CutoutWidths(**config["widths"]))
    net.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_a_run_that_broke_does_not_replace_what_it_saved(tmp_path: Path) -> None:
    net = CutoutNet()
    torch.nn.init.constant_(net.answer.bias, float("nan"))
    save(net, tmp_path)
    assert not list(tmp_path.iterdir())

    trainee = Trainee("comic", STARTER / "comic")
    diffusion.save(trainee, tmp_path / "comic")
    saved = (tmp_path / "comic/unet/diffusion_pytorch_model.safetensors").read_bytes()
    torch.nn.init.constant_(trainee.unet.conv_out.weight, float("nan"))
    diffusion.save(trainee, tmp_path / "comic")
    assert (tmp_path / "comic/unet/diffusion_pytorch_model.safetensors").read_bytes() == saved


def published_encoder() -> dict[str, torch.Tensor]:
    """Random weights by the published names of EfficientNet-Lite0, batch norms included."""
    state = dict[str, torch.Tensor]()
    blocks = [block for stage in Encoder().stages for block in stage]
    for number, block in enumerate([None, *blocks]):
        start = f"_blocks.{number - 1}." if block else ""
        kinds = (
            (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"),
             ("project", "_project_conv", "_bn2"))
            if block else (("stem", "_conv_stem", "_bn0"),)
        )  # fmt: skip
        for ours, convolution, norm in kinds:
            layer = getattr(block or Encoder(), ours)
            if layer is None:
                continue
            state[f"{start}{convolution}.weight"] = torch.randn_like(layer.weight)
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"{start}{norm}.{name}"] = torch.rand(len(layer.weight)) + 0.1
    return state


def test_a_published_encoder_computes_the_same_without_batch_norms() -> None:
    torch.manual_seed(0)
    published, encoder = published_encoder(), Encoder()
    encoder.load_state_dict(backbone.folded(published), strict=True)
    x = torch.randn(1, 3, 64, 64)

    def normed(x: torch.Tensor, layer: torch.nn.Conv2d, convolution: str, norm: str):
        y = torch.nn.functional.conv2d(
            x,
            published[f"{convolution}.weight"],
            None,
            layer.stride,
            layer.padding,
            1,
            layer.groups,
        )
        n = [published[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(y, *n, eps=1e-3)

    stem = torch.nn.functional.relu6(normed(x, encoder.stem, "_conv_stem", "_bn0"))
    block = encoder.stages[0][0]
    first = torch.nn.functional.relu6(
        normed(stem, block.depthwise, "_blocks.0._depthwise_conv", "_blocks.0._bn1")
    )
    first = normed(first, block.project, "_blocks.0._project_conv", "_blocks.0._bn2")
    features = encoder(x)
    assert torch.allclose(features[0], first, rtol=1e-4, atol=1e-4)
    assert [f.shape[2] for f in features] == [32, 16, 8, 4, 2]
    assert tuple(f.shape[1] for f in features) == Encoder.CHANNELS == (16, 24, 40, 112, 320)


def test_a_comic_is_flat_with_whole_ink_lines() -> None:
    rng = np.random.default_rng(0)
    picture = np.full((96, 96, 3), 0.7, np.float32)
    picture[:, 48:] = 0.2
    picture = np.clip(picture + rng.normal(0, 0.03, picture.shape), 0, 1).astype(np.float32)
    drawn = styles.comic(picture)
    assert flat_share(drawn) > 0.8 > 0.2 > flat_share(picture)
    ink = drawn.max(2) < 0.1
    assert ink[:, 46:52].any(1).all(), "along all of the edge"
    assert not ink[:, :40].any()
    assert not ink[:, 60:].any()


@pytest.mark.parametrize(("steps", "passes"), [(4, 3), (4, 4), (8, 1), (3, 2)])
def test_img2img_is_trained_on_the_timesteps_of_a_request(steps: int, passes: int) -> None:
    trainee = Trainee("comic", STARTER / "comic")
    trainee.scheduler.set_timesteps(steps)
    assert trainee.times(steps, passes) == trainee.scheduler.timesteps[-passes:].tolist()


@pytest.mark.parametrize("task", [Task.COMIC, Task.AGED])
def test_img2img_is_trained_most_on_the_default_request(task: Task) -> None:
    recipe, usual = RECIPES[task], load_registry(Path("configs/models/starter.yaml"))[task].defaults
    assert recipe.steps == usual["steps"]
    assert recipe.passes == int(usual["steps"] * usual["strength"])


def test_the_loss_of_img2img_is_of_what_a_request_makes() -> None:
    trainee = Trainee("comic", STARTER / "comic")
    pipeline, pixels = trainee.pipeline(), torch.rand(1, 3, 64, 64)
    made = pipeline(
        prompt="comic style",
        image=pixels,
        strength=0.75,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    noise = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(3))
    finished = trainee.finished(pixels * 2 - 1, ["comic style"], [501, 251, 1], noise).pixels
    assert torch.allclose(finished.clamp(-1, 1) / 2 + 0.5, made, atol=1e-4)


def test_a_deeper_upscaler_starts_as_the_one_it_came_from(tmp_path: Path) -> None:
    shallow, deep = upscaler.load(STARTER / "upscale"), perceptual.deepened(STARTER / "upscale")
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 24, 20)
    assert len(deep.body) > len(shallow.body)
    assert torch.allclose(deep(pixels), shallow(pixels), atol=1e-5)
    upscaler.save(deep, tmp_path)
    assert torch.allclose(upscaler.load(tmp_path)(pixels), deep(pixels), atol=1e-3)


def test_an_aged_print_has_tones_and_grain_of_one_colour() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    picture = rng.random((64, 64, 3)).astype(np.float32)
    printed = styles.aged(picture)
    assert off_tint(printed) < 0.2 * off_tint(picture)
    trainee = Trainee("aged", STARTER / "aged")
    z0 = trainee.vae.encoder(torch.from_numpy(printed).permute(2, 0, 1)[None] * 2 - 1)
    grain = trainee._grain(z0, torch.randn_like(z0))[0]
    tones = torch.from_numpy(styles.PAPER - styles.BLACK).view(3, 1, 1)
    assert torch.allclose(grain / tones, (grain / tones)[:1].expand_as(grain), atol=1e-5)
    assert 2 < 127.5 * grain.std() < 10


@pytest.mark.parametrize("quality", [20, 60, 90])
def test_compression_on_the_device_is_that_of_jpeg(quality: int) -> None:
    source = Image.open(JUDGING / "photos/nature-Garden.jpg").crop((128, 64, 384, 256))
    buffer = io.BytesIO()
    source.save(buffer, "JPEG", quality=quality)
    expected = np.asarray(Image.open(buffer), np.float32) / 255
    pixels = torch.from_numpy(np.asarray(source, np.float32) / 255).permute(2, 0, 1)[None]
    ours = jpeg(pixels, torch.tensor([float(quality)]))[0].permute(1, 2, 0).numpy()
    error = ((ours - expected) ** 2).mean()
    damage = ((expected - np.asarray(source, np.float32) / 255) ** 2).mean()
    assert error < 0.2 * damage


def red_and_green() -> tuple[CutOuts, torch.Tensor]:
    """A red square as a cut-out, and green as a background."""
    levels = tuple(
        torch.tensor([255, 0, 0, 255], dtype=torch.uint8).view(1, 4, 1, 1).repeat(1, 1, size, size)
        for size in (64, 32, 16)
    )
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    return CutOuts(levels, torch.tensor([64.0])), green


def test_a_scene_shows_its_cut_out_where_its_mask_says() -> None:
    torch.manual_seed(0)
    red, green = red_and_green()
    odds = Odds(
        empty=0, more=0, tiny=0, textured=0, shadow=0, plain=0, distant=0, clouds=0, blades=0
    )
    picture, alpha = Scenes(red, red, green, odds=odds).batch(6, 64, damaged=False)
    redder = picture[:, :1] > picture[:, 1:2]
    assert (alpha.amax((1, 2, 3)) > 0.9).all()
    assert (redder == (alpha > 0.5)).float().mean() > 0.97
    empty = Scenes(red, red, green, odds=Odds(empty=1)).batch(2, 64)[1]
    assert empty.max() == 0


def test_floors_clouds_and_blades_are_background() -> None:
    torch.manual_seed(0)
    red, green = red_and_green()
    odds = Odds(empty=1, plain=0, distant=0, floor=1, receding=1, clouds=1, blades=1)
    scenes = Scenes(red, red, green, textures=255 - green, odds=odds)
    picture, alpha = scenes.batch(4, 64, damaged=False)
    assert alpha.max() == 0
    assert picture.isfinite().all()
    assert 0 <= picture.min() < picture.max() <= 1
    # Neither the green of the background nor the violet of the floor alone.
    assert picture.std((2, 3)).min() > 0.01


def test_a_pool_of_scenes_renews_itself_as_often_as_asked() -> None:
    torch.manual_seed(0)
    red, green = red_and_green()
    pool = ScenePool(Scenes(red, red, green), 48, 32, uses=2)
    before = pool.stored.clone()
    picture, alpha = pool.batch(47, 16)
    assert picture.shape == (47, 3, 16, 16)
    assert alpha.shape == (47, 1, 16, 16)
    assert (pool.stored == before).all()
    pool.batch(1, 32)
    changed = (pool.stored != before).flatten(1).any(1)
    assert changed.sum() == 24


def test_subjects_are_outlined_where_they_are() -> None:
    photos = outlined_photos()
    assert set(photos) <= set(JUDGED_PHOTOS)
    cat = photos["skimage:chelsea.png"][1]
    assert cat.shape == (300, 451)
    assert cat[150, 200]
    assert not cat[50, 10]
    flower = photos["judging:nature-YellowFlower.jpg"][1]
    assert flower[280, 450]
    assert not flower[130, 366], "the gap between two petals"


def test_pictures_are_found_inside_the_files_of_games(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def drawn(size: tuple[int, int]) -> Image.Image:
        spots = Image.fromarray(rng.integers(20, 200, (16, 16, 3), dtype=np.uint8)).resize(size)
        grain = rng.integers(0, 50, (*reversed(size), 3), dtype=np.uint8)
        return Image.fromarray(np.asarray(spots) + grain)

    rcc = tmp_path / "usr/share/gcompris-qt/rcc"
    rcc.mkdir(parents=True)
    data = b"qres\0\0"
    for size in ((400, 300), (300, 400)):
        buffer = io.BytesIO()
        drawn(size).save(buffer, "WEBP")
        data += b"\0RIFFxx" + buffer.getvalue()
    (rcc / "explore_monuments.rcc").write_bytes(data)
    (rcc / "clickgame.rcc").write_bytes(b"")
    (found,) = game_pictures.photographs(tmp_path)
    assert found[1].size == (400, 300), "and no picture in portrait format"

    tracks = tmp_path / "usr/share/games/supertuxkart/data/tracks"
    tracks.mkdir(parents=True)
    stone = drawn((512, 512))
    for name in ("stone.png", "same.png", "stone_normal.png"):
        stone.save(tracks / name)
    parts = Image.new("RGB", (512, 512))
    parts.paste(stone.crop((0, 0, 400, 400)))
    parts.save(tracks / "parts.png")
    assert [name for name, _ in game_pictures.textures(tmp_path)] == [
        "supertuxkart-data:tracks/same.png"
    ]
