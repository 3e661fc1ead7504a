"""Long prompts and weights: parity with web UI's chunks and compel's weights.

The reference is written again here for one text. Chunks: `FrozenCLIPEmbedderWithCustomWords` of
AUTOMATIC1111's web UI (modules/sd_hijack_clip.py) with `comma_padding_backtrack=0`, 75 tokens
between a start and an end, encoded one by one and put side by side. Weights: `EmbeddingsProvider`
of compel 2 (compel/embeddings_provider.py), which is also ComfyUI's `encode_token_weights`: from
the embedding of the empty text towards that of the token and beyond. What it gives goes into stock
pipelines as `prompt_embeds`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from stock import apart, as_row, call_stock

from deployments.contract import ComicRequest, UpscaleRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.pipeline import AnyPipeline
    from deployments.images import Picture

TOLERANCE = 2e-5
LONG = "old photograph of a cat on a red roof, comic book drawing, " * 8
NAMES = ["sd_ddim", "refiner", "x4"]


def reference(
    stock: Any, pieces: list[tuple[str, float]], chunks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of a text in so many chunks, and pooled ones of the first."""
    is_xl = hasattr(stock, "text_encoder_2")
    tokenizer = stock.tokenizer_2 if is_xl else stock.tokenizer
    encoder = stock.text_encoder_2 if is_xl else stock.text_encoder
    tokens, weights = [], []
    for text, weight in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        weights += [weight] * len(ids)

    def encode(part: list[int]) -> Any:
        ids = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        with torch.no_grad():
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
        return output.hidden_states[-2] if is_xl else output.last_hidden_state, output

    empty, _ = encode([])
    parts, pooled = [], None
    for i in range(chunks):
        here = slice(i * 75, i * 75 + 75)
        z, output = encode(tokens[here])
        pooled = output.text_embeds if is_xl and pooled is None else pooled
        for j, weight in enumerate(weights[here], start=1):
            z[0, j] = empty[0, j] + (z[0, j] - empty[0, j]) * weight
        parts.append(z)
    return torch.hstack(parts), pooled


def call_with_embeddings(
    stock: Any,
    request: Any,
    picture: Picture,
    pieces: list[tuple[str, float]],
    negative: list[tuple[str, float]],
    chunks: int,
) -> np.ndarray:
    """The stock pipeline's picture for embeddings of the reference."""
    wanted, pooled = reference(stock, pieces, chunks)
    unwanted, negative_pooled = reference(stock, negative, chunks)
    embeds = {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted}
    if pooled is not None:
        embeds |= {
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
    return stock(
        image=Image.fromarray(picture.rgb),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **{n: getattr(request, n) for n in ("strength", "noise_level") if hasattr(request, n)},
        **embeds,
    ).images[0]


def asked(name: str, **fields: Any) -> Any:
    kind = UpscaleRequest if name == "x4" else ComicRequest
    return kind(**({"steps": 3, "seed": 1} | fields))


def tokens_of(pipeline: Any, text: str) -> int:
    return len(pipeline._tokenizers[-1](text, add_special_tokens=False).input_ids)


def picture_of(name: str) -> Picture:
    side_px = 32 if name == "x4" else 64
    return tiny.picture(3, side_px, side_px)


CASES: list[tuple[dict[str, Any], list[tuple[str, float]], list[tuple[str, float]]]] = [
    (
        {"prompt": LONG, "negative_prompt": "blue", "long_prompt": "chunk"},
        [(LONG, 1)],
        [("blue", 1)],
    ),
    (
        {"prompt": "red", "negative_prompt": LONG, "long_prompt": "chunk"},
        [("red", 1)],
        [(LONG, 1)],
    ),
    (
        {"prompt": "a (red:1.5) [cat]", "negative_prompt": "(blurry)", "prompt_weights": True},
        [("a ", 1), ("red", 1.5), (" ", 1), ("cat", 1 / 1.1)],
        [("blurry", 1.1)],
    ),
    (
        {"prompt": f"(red:0.5) {LONG}", "long_prompt": "chunk", "prompt_weights": True},
        [("red", 0.5), (f" {LONG}", 1)],
        [("", 1)],
    ),
    (
        {"prompt": f"(red:2) {LONG}", "prompt_weights": True},
        [("red", 2), (f" {LONG}", 1)],
        [("", 1)],
    ),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("fields", "pieces", "negative"), CASES)
def test_chunks_and_weights_equal_the_reference(
    name: str,
    fields: dict[str, Any],
    pieces: list[tuple[str, float]],
    negative: list[tuple[str, float]],
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    ours, picture = tiny_pipeline(name), picture_of(name)
    longest = max(tokens_of(ours, "".join(t for t, _ in texts)) for texts in (pieces, negative))
    chunks = -(-longest // 75) if "long_prompt" in fields else 1
    assert chunks > 1 or "long_prompt" not in fields
    request = asked(name, **fields)
    row = as_row(ours, request, picture)
    run_together(ours, [row])
    expected = call_with_embeddings(stock(name), request, picture, pieces, negative, chunks)
    found = apart(ours, [row], [expected])
    print(f"parity of {name}, {chunks} chunks: {found:.1e}")
    assert found <= TOLERANCE
    plain = call_stock(stock(name), asked(name, prompt=fields["prompt"]), picture)
    assert np.abs(plain - expected).max() > 10 * TOLERANCE, "else the option would do nothing"


@pytest.mark.parametrize("name", NAMES)
def test_a_short_prompt_without_weights_is_the_same_either_way(
    name: str,
    tiny_pipeline: Callable[..., AnyPipeline],
    stock: Callable[[str], Any],
    run_together: Callable[..., Any],
) -> None:
    ours, picture = tiny_pipeline(name), picture_of(name)
    options = [{}, {"long_prompt": "chunk"}, {"prompt_weights": True}]
    requests = [asked(name, prompt="a red cat", negative_prompt="", **one) for one in options]
    rows = [as_row(ours, request, picture) for request in requests]
    run_together(ours, rows)
    assert [row.progress.batch_size for row in rows] == [3] * 3, "and they share passes"
    expected = call_stock(stock(name), requests[0], picture)
    assert apart(ours, rows, [expected] * 3) <= TOLERANCE


def test_rows_share_passes_with_those_of_as_many_chunks(
    tiny_pipeline: Callable[..., AnyPipeline], run_together: Callable[..., Any]
) -> None:
    ours = tiny_pipeline("sd_ddim")
    long = asked("sd_ddim", prompt=LONG, long_prompt="chunk")
    other = asked("sd_ddim", negative_prompt=LONG, long_prompt="chunk", guidance_scale=3.0)
    short = asked("sd_ddim", prompt="red")
    alone = [as_row(ours, request, picture_of("")) for request in (long, short, other, short)]
    for row in alone:
        run_together(ours, [row])
    rows = [as_row(ours, request, picture_of("")) for request in (long, short, other, short)]
    groups = run_together(ours, rows)
    assert {frozenset(map(rows.index, group)) for group in groups} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
    }
    for one, row in zip(alone, rows, strict=True):
        assert np.abs(one.future.result().astype(int) - row.future.result()).max() <= 1


def test_texts_of_many_chunks_take_no_more_of_the_cache(
    tiny_pipeline: Callable[..., AnyPipeline],
) -> None:
    ours: Any = tiny_pipeline("sd_ddim")
    ours._texts.clear()
    for i in range(40):
        request = asked("sd_ddim", prompt=f"{i} {LONG}", long_prompt="chunk", guidance_scale=1.0)
        next(ours.begin(as_row(ours, request, picture_of("")).input))
    kept = sum(text.shape[1] for text, _ in ours._texts._known.values())
    assert kept <= 64 * 77
    assert len(ours._texts._known) > 1
