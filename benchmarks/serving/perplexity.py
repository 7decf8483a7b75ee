"""Perplexity of the fused decoder's number formats on two texts that every Python ships.

Which matrices int4 passes to twice (``PRECISE_MATRICES``) was chosen on the first, Python's help topics; the
second, docstrings of its standard library, had no part in that choice.

The reference is the same checkpoint in float32: for SmolLM2, the dequantised GGUF. All formats see the same
windows, so the ratios have far less spread than the perplexities.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

from sharewell.bench import Progress, Row, no_progress
from sharewell.kv import PagedForward
from sharewell.models import Checkpoint, FusedDecoder, Tokenizer

FORMATS = ("float32", "bfloat16", "int8", "int4")


def help_topics() -> str:
    """Python's own help topics (``pydoc_data``), in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def docstrings() -> str:
    """The docstrings of the standard library's modules, classes and functions of 200 characters and more, in
    the order of the files' names."""
    found = []
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= 200:
                    found.append(text)
    return "\n\n".join(found)


TEXTS = {"Python's help topics": help_topics, "the standard library's docstrings": docstrings}


def passage(tokenizer: Tokenizer, text: str, n: int) -> np.ndarray:
    """The first ``n`` token ids of ``text``."""
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
    text: str | None = None,
    tokens: int = 8192,
    formats: tuple[str, ...] = FORMATS,
    window: int = 512,
    threads: int = 1,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Perplexity of ``folder`` in each format on the first ``tokens`` tokens of ``text`` (help topics)."""
    ids = passage(Tokenizer(folder), help_topics() if text is None else text, tokens)
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
    claims = {
        "int4": "(c) int4 perplexity within 0.3 % of the dequantised GGUF",
        "int8": "int8 perplexity beside it",
        "bfloat16": "bfloat16 perplexity beside it",
    }
    rows = []
    for name, text in TEXTS.items():
        found = compare(
            folder, text=text(), tokens=tokens, threads=threads or usable_cores(), progress=progress
        )
        rows += [
            Row(
                f"perplexity of {format}, {tokens:,} tokens of {name}",
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
    return rows
