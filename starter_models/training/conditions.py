"""Encode enhance's prompts once, so that its training needs no text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ("high quality, sharp, detailed photo", "", "a photo")


@torch.no_grad()
def main(
    model: Path = Path("starter_models/enhance"),
    out: Path = Path("starter_models/build/conditions.safetensors"),
) -> None:
    """Write `embeds` (P, 77, C) and `pooled` (P, C), as the stock pipeline computes them."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer_2")
    encoder = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2").float()
    ids = tokenizer(
        list(PROMPTS), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    encoded = encoder(ids, output_hidden_states=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"embeds": encoded.hidden_states[-2].contiguous(), "pooled": encoded[0].contiguous()}, out
    )


if __name__ == "__main__":
    main()
