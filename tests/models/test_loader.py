"""Every way a model folder can be wrong has an error of its own, and nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from deployments.errors import (
    AttentionUnavailable,
    ConfigError,
    ModelCorrupt,
    ModelNotCached,
    SetupError,
)
from deployments.loader import choose_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline

DIFFUSION = ["sd_ddim", "refiner", "x4"]
NETWORKS = ["isnet", "srvgg", "rrdb"]


def load_tiny(name: str, folder: Path, **changes: Any) -> AnyPipeline:
    return tiny.pipeline(tiny.spec(name, folder, **changes))


def weights(name: str, folder: Path) -> Path:
    """The largest file of the model's own network."""
    if name in NETWORKS:
        return folder / "model.safetensors"
    return folder / "unet/diffusion_pytorch_model.safetensors"


def assert_refused(kind: type[SetupError], name: str, folder: Path, **changes: Any) -> SetupError:
    with pytest.raises(kind) as caught:
        load_tiny(name, folder, **changes)
    assert name.replace("_", "-") in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", list(tiny.FAMILY))
def test_a_whole_folder_loads_without_the_network(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(AssertionError, match="network"), socket.socket() as probe:
        probe.connect(("127.0.0.1", 9))
    load_tiny(name, tiny_folder(name))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("name", [*DIFFUSION, *NETWORKS])
def test_a_missing_or_empty_folder(name: str, tmp_path: Path) -> None:
    assert_refused(ModelNotCached, name, tmp_path / "nowhere")
    error = assert_refused(ModelNotCached, name, tmp_path)
    assert error.remedy


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd_ddim", "model_index.json"),
        ("sd_ddim", "unet/config.json"),
        ("sd_ddim", "unet/diffusion_pytorch_model.safetensors"),
        ("sd_ddim", "vae/diffusion_pytorch_model.safetensors"),
        ("sd_ddim", "text_encoder/model.safetensors"),
        ("sd_ddim", "scheduler/scheduler_config.json"),
        ("refiner", "text_encoder_2/model.safetensors"),
        ("x4", "low_res_scheduler/scheduler_config.json"),
        ("isnet", "config.json"),
        ("isnet", "model.safetensors"),
        ("srvgg", "config.json"),
        ("rrdb", "model.safetensors"),
    ],
)
def test_a_missing_file(name: str, file: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder(name)
    (folder / file).unlink()
    assert_refused(ModelNotCached, name, folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component(component: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder("sd_ddim")
    shutil.rmtree(folder / component)
    assert_refused(ModelNotCached, "sd_ddim", folder)


def test_a_missing_variant(tiny_folder: Callable[[str], Path]) -> None:
    assert_refused(ModelNotCached, "sd_ddim", tiny_folder("sd_ddim"), variant="fp16")


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
@pytest.mark.parametrize("name", [*DIFFUSION, *NETWORKS])
def test_truncated_weights(name: str, length: int, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder(name)
    path = weights(name, folder)
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(ModelCorrupt, name, folder)


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_weights_of_the_other_components(
    file: str, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder("sd_ddim")
    path = folder / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(ModelCorrupt, "sd_ddim", folder)


@pytest.mark.parametrize("name", [*DIFFUSION, *NETWORKS])
def test_weights_of_another_shape(name: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder(name)
    tensors = load_file(weights(name, folder))
    wrong = next(key for key in tensors if tensors[key].ndim == 4)
    tensors[wrong] = torch.zeros(1, 2, 3, 3)
    save_file(tensors, weights(name, folder))
    assert_refused(ModelCorrupt, name, folder)


@pytest.mark.parametrize("name", [*DIFFUSION, *NETWORKS])
def test_weights_that_lack_a_tensor(name: str, own_folder: Callable[[str], Path]) -> None:
    """Else a library fills the gap with random numbers, and says so in a log."""
    folder = own_folder(name)
    tensors = load_file(weights(name, folder))
    del tensors[next(key for key in tensors if tensors[key].ndim == 4)]
    save_file(tensors, weights(name, folder))
    assert_refused(ModelCorrupt, name, folder)


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_the_other_components_lack_a_tensor(file: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder("sd_ddim")
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("weight"))]
    save_file(tensors, path, {"format": "pt"})
    assert_refused(ModelCorrupt, "sd_ddim", folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_fit_is_named_with_its_shape(
    name: str, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder(name)
    tensors = load_file(weights(name, folder))
    first, second, *_, last = tensors
    shapes = {key: tuple(tensors[key].shape) for key in (first, second, last)}
    del tensors[first], tensors[second]
    tensors[last] = torch.zeros(7)
    tensors["head.weight"] = torch.zeros(1, 2)
    save_file(tensors, weights(name, folder))
    text = str(assert_refused(ModelCorrupt, name, folder))
    assert f"{first} {shapes[first]} is missing; " in text
    assert f"{second} {shapes[second]} is missing; " in text
    assert f"{last} is (7,) instead of {shapes[last]}; and 1 more" in text


def test_a_tensor_that_diffusion_lacks_is_named_with_its_shape(
    own_folder: Callable[[str], Path],
) -> None:
    folder = own_folder("sd_ddim")
    path = weights("sd_ddim", folder)
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "(8, 4, 3, 3) is missing" in str(assert_refused(ModelCorrupt, "sd_ddim", folder))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_without_a_config_says_what_one_holds(
    name: str, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder(name)
    (folder / "config.json").unlink()
    remedy = assert_refused(ModelNotCached, name, folder).remedy
    assert '"architecture": "isnet"' in remedy if name == "isnet" else '"rrdb"' in remedy
    assert "Fetch it again" not in remedy


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_a_variant_have_its_name(name: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder(name)
    load_tiny(name, folder)
    assert "model.fp16.safetensors" in str(
        assert_refused(ModelNotCached, name, folder, variant="fp16")
    )
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    load_tiny(name, folder, variant="fp16")


def test_a_key_too_many_in_our_own_networks(own_folder: Callable[[str], Path]) -> None:
    folder = own_folder("isnet")
    tensors = load_file(weights("isnet", folder))
    save_file({**tensors, "stage7.bias": torch.zeros(3)}, weights("isnet", folder))
    assert_refused(ModelCorrupt, "isnet", folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\udcff"])
@pytest.mark.parametrize(
    ("name", "file"), [("sd_ddim", "model_index.json"), ("isnet", "config.json")]
)
def test_a_config_that_is_no_object(
    name: str, file: str, text: str, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder(name)
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(ModelCorrupt, name, folder)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("srvgg", {}),
        ("srvgg", {"architecture": "swin"}),
        ("srvgg", {"architecture": "srvgg"}),
        ("srvgg", {"architecture": "srvgg", "num_feat": "many", "num_conv": 3}),
        ("rrdb", {"architecture": "rrdb", "num_block": None}),
        ("isnet", {"widths": {"head": 3}}),
        ("isnet", {"widths": [1, 2, 3]}),
        ("isnet", {"input_px": "large"}),
    ],
)
def test_a_config_that_describes_no_network(
    name: str, config: dict[str, Any], own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder(name)
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(ModelCorrupt, name, folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd_ddim", "unet/diffusion_pytorch_model"),
        ("sd_ddim", "vae/diffusion_pytorch_model"),
        ("sd_ddim", "text_encoder/model"),
        ("isnet", "model"),
    ],
)
def test_pickled_weights_are_never_read(
    name: str, file: str, own_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_folder(name)
    path = folder / f"{file}.safetensors"
    pickled = "pytorch_model.bin" if file.endswith("/model") else f"{path.stem}.bin"
    torch.save(load_file(path), path.with_name(pickled))
    path.unlink()

    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("A pickle was read.")

    monkeypatch.setattr(torch, "load", unpickle)
    assert_refused(ModelNotCached, name, folder)


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is not None, reason="xformers is installed here"
)
@pytest.mark.parametrize("name", DIFFUSION)
def test_xformers_asked_for_and_absent(name: str, tiny_folder: Callable[[str], Path]) -> None:
    error = assert_refused(AttentionUnavailable, name, tiny_folder(name), attention="xformers")
    assert "not installed" in error.message
    assert "attention: sdpa" in error.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(ConfigError, match="cuda") as caught:
        choose_device("cuda")
    assert "num_gpus" in caught.value.remedy


def test_choice_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert choose_device("auto") == chosen
        assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["sd_ddim", "refiner", "x4"])
def test_half_precision_files_load_as_float32(name: str, own_folder: Callable[[str], Path]) -> None:
    folder = own_folder(name)
    for path in folder.rglob("*.safetensors"):
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(half, path, {"format": "pt"})
    pipeline: Any = load_tiny(name, folder)
    parts = [p for p in pipeline._stock.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 3
    for part in parts:
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_networks_load_as_float32(
    name: str, own_folder: Callable[[str], Path]
) -> None:
    folder = own_folder(name)
    path = weights(name, folder)
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(half, path)
    net = load_tiny(name, folder)._net
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.training


def test_a_tokenizer_without_its_words(own_folder: Callable[[str], Path]) -> None:
    folder = own_folder("sd_ddim")
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    assert_refused(ModelCorrupt, "sd_ddim", folder)
