"""From logits to a token. Stateless: every draw is a function of (seed, choice, position)."""

from __future__ import annotations

import numpy as np

from .messages import SamplingParams, TokenLogprob

NEGATIVE = np.float32(-np.inf)


def uniform(seed: int, choice: int, position: int) -> float:
    """One uniform draw in [0, 1) from Philox4x64 with the counter (position, choice) and the key seed."""
    bits = np.random.Philox(key=[seed, 0x5A17], counter=[position, choice, 0, 0]).random_raw()
    return float(bits >> 11) * 2.0**-53


def penalize(
    logits: np.ndarray, params: SamplingParams, counts: dict[int, int], output_counts: dict[int, int]
) -> None:
    """In place: repetition penalty over prompt and output (CTRL, 1909.05858), presence and frequency over the output."""
    if params.repetition_penalty != 1 and counts:
        seen = np.fromiter(counts, np.int64, len(counts))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and output_counts:
        seen = np.fromiter(output_counts, np.int64, len(output_counts))
        number = np.fromiter(output_counts.values(), np.float32, len(output_counts))
        logits[seen] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * number


def bias(logits: np.ndarray, params: SamplingParams) -> None:
    """In place: ``logit_bias``; ids beyond the vocabulary are ignored."""
    for token, value in params.logit_bias.items():
        if 0 <= token < len(logits):
            logits[token] += np.float32(value)


def filtered(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and probabilities (float64, sum 1) left by temperature, top_k, top_p and min_p, in that order.

    top_k keeps ties of the k-th; top_p keeps the smallest set of most probable tokens whose mass reaches it; min_p those
    with at least that share of the best one's probability.
    """
    scaled = logits / np.float32(params.temperature)
    ids: np.ndarray | None = None
    if 0 < params.top_k < len(scaled):
        border = np.partition(scaled, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scaled >= border)
    else:
        # nothing 30 nats below the best can matter: e^-30 * vocabulary < 1e-8
        ids = np.flatnonzero(scaled > scaled.max() - 30)
    kept = scaled[ids].astype(np.float64)
    p = np.exp(kept - kept.max())
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        below = np.cumsum(p[order]) - p[order] < params.top_p
        chosen = np.sort(order[below])
        ids, p = ids[chosen], p[chosen]
    if params.min_p > 0:
        strong = p >= params.min_p * p.max()
        ids, p = ids[strong], p[strong]
    return ids, p / p.sum()


def draw(logits: np.ndarray, params: SamplingParams, choice: int, position: int) -> int:
    """One token by inverse distribution over the ids in ascending order."""
    ids, p = filtered(logits, params)
    cumulative = np.cumsum(p)
    at = int(np.searchsorted(cumulative, uniform(params.seed, choice, position) * cumulative[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])


def logprob(logits: np.ndarray, token: int, best: int) -> TokenLogprob:
    """Log-softmax of the raw logits (before temperature, penalties and filters) at ``token``, with the ``best`` largest."""
    top = float(logits.max())
    normalizer = top + float(np.log(np.exp(logits - np.float32(top), dtype=np.float32).sum(dtype=np.float64)))
    leaders: tuple[tuple[int, float], ...] = ()
    if best:
        ids = np.argpartition(logits, -best)[-best:]
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        leaders = tuple((int(i), float(logits[i]) - normalizer) for i in ids)
    return TokenLogprob(token, float(logits[token]) - normalizer, leaders)
