"""The production networks with random weights: the cost of a forward pass does not depend on their
values.

Needs torch, diffusers and transformers only. Names are those of the model registry. Parameter
counts equal those of the published files (tests/models/test_device_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from deployments.pipelines.nets.birefnet import BiRefNet, BiRefNetWidths
from deployments.pipelines.nets.isnet import ISNet, ISNetWidths
from deployments.pipelines.nets.rrdb import RRDBNet
from deployments.pipelines.nets.srvgg import SRVGGNetCompact
from deployments.pipelines.nets.u2net import U2Net, U2NetWidths

Family = Literal["img2img", "text2img", "upscale_diffusion", "upscale_gan", "matting"]
Values = dict[str, Any]
TEXT_TOKENS = 77


@dataclass(frozen=True, slots=True)
class Architecture:
    """One production model.

    Attributes:
        family: the pipeline family that runs it.
        size_px: width and height of its largest pass: the largest bucket of the registry; the tile
            with its overlap, of a GAN; the largest input, of the diffusion upscaler.
        latent_px: working pixels that a latent stands for, in each direction; the x4 upscaler's
            latents are as large as its input.
        unet, vae, text: configurations; empty for the families without.
        first_text: configuration of SDXL base's other text encoder, which comes first.
        vae_tile_px: edge of the tiles it decodes in, output px; None decodes whole.
        network: creates a GAN or a matting network.
    """

    family: Family
    size_px: tuple[int, int]
    latent_px: int = 1
    unet: Values | None = None
    vae: Values | None = None
    text: Values | None = None
    first_text: Values | None = None
    vae_tile_px: int | None = None
    network: Callable[[], nn.Module] | None = None


_SD_VAE: Values = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    # Only the upscaler and SDXL cast theirs to float32.
    "force_upcast": False,
}


def _text(width: int, layers: int, heads: int, projection: int, act: str = "gelu") -> Values:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "hidden_act": act,
    }


_SD1_TEXT = _text(768, 12, 12, 768, "quick_gelu")
_SD2_TEXT = _text(1024, 23, 16, 512)
_SD21_UNET = {
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
# A tile of 512 px with the largest overlap of our 4x networks on each side.
_TILE_PX = (512 + 2 * 64, 512 + 2 * 64)

ARCHITECTURES: dict[str, Architecture] = {
    "upscale-sd-x4": Architecture(
        "upscale_diffusion",
        (512, 512),
        unet={
            "sample_size": 128,
            "in_channels": 7,
            "out_channels": 4,
            "attention_head_dim": 8,
            "block_out_channels": (256, 512, 512, 1024),
            "cross_attention_dim": 1024,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            "num_class_embeds": 1000,
            "only_cross_attention": (True, True, True, False),
            "use_linear_projection": True,
        },
        vae={
            **_SD_VAE,
            "block_out_channels": (128, 256, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "sample_size": 256,
            "scaling_factor": 0.08333,
            "force_upcast": True,
        },
        text=_SD2_TEXT,
        vae_tile_px=256,
    ),
    "enhance-sdxl-refiner": Architecture(
        "img2img",
        (1024, 1024),
        latent_px=8,
        unet={
            "sample_size": 128,
            "attention_head_dim": (6, 12, 24, 24),
            "block_out_channels": (384, 768, 1536, 1536),
            "cross_attention_dim": 1280,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": 4,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        vae={**_SD_VAE, "sample_size": 1024},
        text=_text(1280, 32, 20, 1280),
    ),
    "comic-ghibli": Architecture(
        "img2img",
        (640, 640),
        latent_px=8,
        unet={"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        vae=_SD_VAE,
        text=_SD1_TEXT,
    ),
    "aged-sd21": Architecture(
        "img2img",
        (768, 768),
        latent_px=8,
        unet=_SD21_UNET,
        vae={**_SD_VAE, "sample_size": 768},
        text=_SD2_TEXT,
    ),
    "generate-sdxl-base": Architecture(
        "text2img",
        (1024, 1024),
        latent_px=8,
        unet={
            "sample_size": 128,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_SD_VAE, "sample_size": 1024},
        text=_text(1280, 32, 20, 1280),
        first_text=_SD1_TEXT,
    ),
    "generate-sd21": Architecture(
        "text2img",
        (768, 768),
        latent_px=8,
        unet=_SD21_UNET,
        vae={**_SD_VAE, "sample_size": 768},
        text=_SD2_TEXT,
    ),
    "generate-lcm-dreamshaper7": Architecture(
        "text2img",
        (768, 768),
        latent_px=8,
        unet={
            "sample_size": 96,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "time_cond_proj_dim": 256,
        },
        vae={**_SD_VAE, "sample_size": 768},
        text=_SD1_TEXT,
    ),
    "background-rmbg14": Architecture("matting", (1024, 1024), network=ISNet),
    "background-isnet-general": Architecture("matting", (1024, 1024), network=ISNet),
    "background-u2net": Architecture("matting", (320, 320), network=U2Net),
    "background-birefnet": Architecture("matting", (1024, 1024), network=BiRefNet),
    "upscale-realesrgan-x4plus": Architecture("upscale_gan", _TILE_PX, network=RRDBNet),
    "upscale-realesrgan-x4plus-anime": Architecture(
        "upscale_gan", _TILE_PX, network=lambda: RRDBNet(num_block=6)
    ),
    "upscale-realesrgan-general-x4v3": Architecture(
        "upscale_gan", _TILE_PX, network=SRVGGNetCompact
    ),
}


def _tiny_isnet() -> nn.Module:
    return ISNet(ISNetWidths(4, (4,) * 6, (8,) * 6, (4,) * 5, (8,) * 5))


def _tiny_birefnet() -> nn.Module:
    return BiRefNet(BiRefNetWidths(8, (1, 1, 1, 1), (1, 1, 2, 2), 4))


def _tiny_rrdb() -> nn.Module:
    return RRDBNet(num_feat=8, num_block=1, num_grow_ch=4)


_TINY_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "background-rmbg14": _tiny_isnet,
    "background-isnet-general": _tiny_isnet,
    "background-u2net": lambda: U2Net(U2NetWidths((4,) * 6, (8,) * 6, (4,) * 5, (8,) * 5)),
    "background-birefnet": _tiny_birefnet,
    "upscale-realesrgan-x4plus": _tiny_rrdb,
    "upscale-realesrgan-x4plus-anime": _tiny_rrdb,
    "upscale-realesrgan-general-x4v3": lambda: SRVGGNetCompact(num_feat=8, num_conv=2),
}


def build_unet(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.float16, *, tiny: bool = False
) -> nn.Module:
    """The UNet of a diffusion model, ready to infer."""
    config = dict(ARCHITECTURES[name].unet or {})
    if tiny:
        config |= _tiny_unet(config)
    return _fill(lambda: UNet2DConditionModel(**config), device, dtype)


def build_vae(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.float16, *, tiny: bool = False
) -> nn.Module:
    """The autoencoder of a diffusion model; in float32 where float16 may overflow."""
    config = dict(ARCHITECTURES[name].vae or {})
    if tiny:
        config["block_out_channels"] = tuple(32 for _ in config["block_out_channels"])
        config["layers_per_block"] = 1
    if dtype == torch.float16 and config.get("force_upcast", True):
        dtype = torch.float32
    return _fill(lambda: AutoencoderKL(**config), device, dtype)


def build_text_encoder(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.float16, *, tiny: bool = False
) -> nn.Module:
    """The text encoder of a diffusion model; SDXL's projects what it pools."""
    config = dict(ARCHITECTURES[name].text or {})
    if tiny:
        config = _text(32, 1, 2, 32) | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    kind = CLIPTextModelWithProjection if is_xl(name) else CLIPTextModel
    settings = CLIPTextConfig(max_position_embeddings=TEXT_TOKENS, **config)
    return _fill(lambda: kind(settings), device, dtype)


def build_first_text_encoder(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.float16
) -> nn.Module | None:
    """SDXL base's first text encoder, whose output is not projected; None for other models."""
    config = ARCHITECTURES[name].first_text
    if config is None:
        return None
    settings = CLIPTextConfig(max_position_embeddings=TEXT_TOKENS, **config)
    return _fill(lambda: CLIPTextModel(settings), device, dtype)


def build_network(
    name: str, device: str = "cuda", dtype: torch.dtype = torch.float16, *, tiny: bool = False
) -> nn.Module:
    """The network of a GAN upscaler or a matting model."""
    make = _TINY_NETWORKS[name] if tiny else ARCHITECTURES[name].network
    return _fill(make, device, dtype)


def unet_inputs(
    name: str, unet: Any, network_rows: int, width_px: int, height_px: int
) -> dict[str, Any]:
    """Arguments of one forward pass of `build_unet`'s network, on its device and in its dtype.

    Args:
        network_rows: two for each picture with guidance.
    """
    config, weight = unet.config, next(unet.parameters())
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    rows = network_rows
    latent_px = ARCHITECTURES[name].latent_px
    size = (height_px // latent_px, width_px // latent_px)
    inputs: dict[str, Any] = {
        "sample": torch.zeros(rows, config.in_channels, *size, **options),
        "timestep": torch.full((rows,), 500, device=weight.device),
        "encoder_hidden_states": torch.zeros(
            rows, TEXT_TOKENS, config.cross_attention_dim, **options
        ),
    }
    if config.num_class_embeds:
        inputs["class_labels"] = torch.full((rows,), 20, device=weight.device)
    if config.addition_embed_type == "text_time":
        ids = 5
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(rows, pooled, **options),
            "time_ids": torch.full((rows, ids), 512.0, **options),
        }
    return inputs


def weights_bytes(module: nn.Module) -> int:
    """Parameters and buffers, in bytes."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_xl(name: str) -> bool:
    """Whether the model conditions on sizes and a pooled text, as SDXL does."""
    return "addition_embed_type" in (ARCHITECTURES[name].unet or {})


def _tiny_unet(config: Values) -> Values:
    """The same network with few channels: 32, because of its group norms."""
    blocks = len(config.get("block_out_channels", (0, 0, 0, 0)))
    tiny: Values = {
        "block_out_channels": (32,) * blocks,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    if "addition_embed_type" in config:
        tiny |= {
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 5 * 8 + 32,
            "transformer_layers_per_block": 1,
        }
    return tiny


def _fill(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Build on the meta device, then allocate on the device in the final dtype, without a copy."""
    with torch.device("meta"):
        # The libraries' own `to` warns of layers that these networks do not have.
        module = nn.Module.to(make(), dtype)
    if device != "meta":
        module = module.to_empty(device=device)
        with torch.no_grad():
            for part in module.modules():
                reset = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()
            for buffer_name, buffer in module.named_buffers():
                if buffer_name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=device))
    return module.requires_grad_(False).eval()
