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

from deployments.pipelines.nets.cutout import CutoutNet, CutoutWidths
from starter_models.training.bank import CutOuts, cut_outs
from starter_models.training.damage import jpeg
from starter_models.training.judged import JUDGING, judged_scenes
from starter_models.training.kept_out import kept_out
from starter_models.training.matting import folded, save
from starter_models.training.scenes import Odds, Scenes

SMALL = CutoutWidths(channels=(8, 8, 8, 8, 16), blocks=(1, 1, 1, 1), attention=1)


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


def test_folding_the_batch_norms_changes_no_answer() -> None:
    torch.manual_seed(0)
    net = CutoutNet(SMALL, norm=True)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    x = torch.rand(1, 3, 64, 96) - 0.5
    with torch.no_grad():
        expected, (answer,) = net.eval()(x)[0], folded(net)(x, sides=1)
    assert answer.shape == (1, 1, 64, 96)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)


def test_what_training_saves_loads_strictly(tmp_path: Path) -> None:
    save(CutoutNet(norm=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    net = CutoutNet(CutoutWidths(**config["widths"]))
    net.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_a_run_that_broke_does_not_replace_what_it_saved(tmp_path: Path) -> None:
    net = CutoutNet(norm=True)
    torch.nn.init.constant_(net.answer.bias, float("nan"))
    save(net, tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_a_scene_shows_its_cut_out_where_its_mask_says() -> None:
    torch.manual_seed(0)
    levels = tuple(
        torch.tensor([255, 0, 0, 255], dtype=torch.uint8).view(1, 4, 1, 1).repeat(1, 1, size, size)
        for size in (64, 32, 16)
    )
    red = CutOuts(levels, torch.tensor([64.0]))
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    odds = Odds(empty=0, more=0, textured=0, shadow=0, plain=0, distant=0)
    picture, alpha = Scenes(red, red, green, odds).batch(6, 64, damaged=False)
    redder = picture[:, :1] > picture[:, 1:2]
    assert (alpha.amax((1, 2, 3)) > 0.9).all()
    assert (redder == (alpha > 0.5)).float().mean() > 0.97
    empty = Scenes(red, red, green, Odds(empty=1)).batch(2, 64)[1]
    assert empty.max() == 0
