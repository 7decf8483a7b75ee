"""Perplexity of the fused decoder's number formats on a text that every Python ships.

The reference is the same checkpoint in float32: for SmolLM2, the dequantised GGUF. All formats see the same
windows, so the ratios have far less spread than the perplexities.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sharewell.bench import Progress, Row, no_progress
from sharewell.kv import PagedForward
from sharewell.models import Checkpoint, FusedDecoder, Tokenizer

FORMATS = ("float32", "bfloat16", "int8", "int4")


def passage(tokenizer: Tokenizer, n: int) -> np.ndarray:
    """The first ``n`` token ids of Python's own help topics (``pydoc_data``), in the order of their names."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = []
    for start in range(0, len(text), 20_000):
        if len(ids) >= n:
            break
        ids += tokenizer.encode(text[start : start + 20_000])
    return np.array(ids[:n], np.int64)


def perplexity(
    folder: Path, format: str, ids: np.ndarray, *, window: int = 512, threads: int = 1, chunk: int = 128
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window of ``window``
    tokens.

    Tokens are passed ``chunk`` at a time through pages, as the engine does.
    """
    size = 16
    decoder = FusedDecoder(Checkpoint(folder), format, max_length=window, threads=threads)
    forward = PagedForward(decoder, -(-window // size), size)
    table = np.arange(-(-window // size), dtype=np.int32)[None]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        for first in range(0, len(part), chunk):
            end = min(first + chunk, len(part))
            where = np.arange(first, end)
            starts, length = np.array([0, end - first], np.int32), np.array([end], np.int32)
            logits = forward(part[first:end], where, where, starts, length, table, np.arange(end - first))
            following = torch.from_numpy(part[first + 1 : end + 1])
            chosen = torch.log_softmax(logits[: len(following)].double(), -1)
            total -= float(chosen.gather(1, following[:, None]).sum())
            count += len(following)
    decoder.close()
    return float(np.exp(total / count))


def compare(
    folder: Path,
    *,
    tokens: int = 8192,
    formats: tuple[str, ...] = FORMATS,
    window: int = 512,
    threads: int = 1,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Perplexity of ``folder`` in each format on the first ``tokens`` tokens of the passage."""
    ids = passage(Tokenizer(folder), tokens)
    found = {}
    for done, format in enumerate(formats):
        progress("perplexity", done, len(formats))
        found[format] = perplexity(folder, format, ids, window=window, threads=threads)
    progress("perplexity", len(formats), len(formats))
    return found


def perplexity_rows(
    scale: str = "full", *, threads: int | None = None, progress: Progress = no_progress
) -> list[Row]:
    """Rows of the engine's report: each format's perplexity beside the float32 reference's."""
    from sharewell.models import resolve_model
    from sharewell.serving.core.cores import usable_cores

    tokens = 16_384 if scale == "full" else 1_024
    folder = resolve_model("smollm2", progress=False)
    found = compare(folder, tokens=tokens, threads=threads or usable_cores(), progress=progress)
    claims = {
        "int4": "(c) int4 perplexity within 0.3 % of the dequantised GGUF",
        "int8": "int8 perplexity beside it",
        "bfloat16": "bfloat16 perplexity beside it",
    }
    return [
        Row(
            f"perplexity of {format}, {tokens:,} tokens of Python's help topics",
            found[format],
            found["float32"],
            "",
            "lower",
            "dequantised GGUF in float32",
            claim=claim,
            target=1 / 1.003 if format == "int4" else None,
        )
        for format, claim in claims.items()
    ]
