"""From logits to a token. Stateless: every draw is a function of (seed, choice, position).

Whole-vocabulary work is a handful of vector operations (sorting or partitioning 50,000 numbers takes longer
than a small model's layer), so filters first find the few candidates that can survive them."""

from __future__ import annotations

import numpy as np

from .messages import SamplingParams, TokenLogprob

_MASK = 2**64 - 1
_STREAM = 0x5A17  # second word of the Philox key: keeps our draws apart from other users of the same seed
_LANES = 64
_CHUNK = 256
_FLOORS = (*(np.float32(2.0**-i) for i in (3, 6, 9, 12, 16, 24, 48, 126)), np.float32(0))


def uniform(seed: int, choice: int, position: int) -> float:
    """One uniform draw in [0, 1): Philox4x64-10 (Salmon et al., SC 2011) at counter (position, choice), key
    seed."""
    a, b, c, d = position, choice, 0, 0
    k0, k1 = seed, _STREAM
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & _MASK, (left >> 64) ^ d ^ k1, left & _MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return (a >> 11) * 2.0**-53


def penalize(
    logits: np.ndarray, params: SamplingParams, counts: dict[int, int], output_counts: dict[int, int]
) -> None:
    """In place: repetition penalty over prompt and output (CTRL, 1909.05858), presence and frequency over the
    output."""
    if params.repetition_penalty != 1 and counts:
        seen = np.fromiter(counts, np.int64, len(counts))
        values = logits[seen]
        logits[seen] = np.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if (params.presence_penalty or params.frequency_penalty) and output_counts:
        seen = np.fromiter(output_counts, np.int64, len(output_counts))
        number = np.fromiter(output_counts.values(), np.float32, len(output_counts))
        logits[seen] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * number


def bias(logits: np.ndarray, params: SamplingParams) -> None:
    """In place: ``logit_bias``; ids beyond the vocabulary are ignored."""
    for token, value in params.logit_bias.items():
        if 0 <= token < len(logits):
            logits[token] += np.float32(value)


def leaders(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids, ascending, of every finite logit that is at least the ``k``-th greatest (ties of the k-th
    included)."""
    whole = len(logits) // _LANES * _LANES
    tops = np.concatenate((logits[:whole].reshape(_LANES, -1).max(axis=0, initial=-np.inf), logits[whole:]))
    if k < len(tops):
        # k lanes hold a value of at least the k-th greatest lane maximum, so the k greatest are all among
        # these
        ids = (logits >= np.partition(tops, -k)[-k]).nonzero()[0]
    else:
        ids = (logits > -np.inf).nonzero()[0]
    if len(ids) > k:
        values = logits[ids]
        ids = ids[values >= np.partition(values, -k)[-k]]
    return ids[logits[ids] > -np.inf]


def filtered(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (ascending) and probabilities (float64, sum 1) left by temperature, top_k, top_p and min_p,
    in that order.

    top_k keeps ties of the k-th; top_p keeps the smallest set of most probable tokens whose mass reaches it
    (of equally probable ones the lower ids); min_p those with at least that share of the best one's
    probability."""
    top = float(logits.max())
    if 0 < params.top_k < len(logits):
        ids = leaders(logits, params.top_k)
        p = _weights(logits, ids, top, params.temperature)
        if params.top_p < 1:
            ids, p = _nucleus(ids, p, params.top_p * p.sum())
    elif params.top_p < 1:
        e = _exponentials(logits, top, params.temperature)
        mass = params.top_p * float(_chunks(e).sum())
        ids = p = np.zeros(0)
        for floor in _FLOORS:  # few candidates when few hold the mass
            ids = (e[: len(logits)] >= floor).nonzero()[0] if floor else (logits > -np.inf).nonzero()[0]
            p = _weights(logits, ids, top, params.temperature)
            if p.sum() >= mass:
                break
        ids, p = _nucleus(ids, p, mass)
    else:
        floor = -np.inf
        if params.min_p > 0:  # the test below decides; this only spares it the tail
            floor = top + params.temperature * (np.log(params.min_p) - 1e-3) - 1e-3 * abs(top)
        ids = ((logits >= floor) & (logits > -np.inf)).nonzero()[0]
        p = _weights(logits, ids, top, params.temperature)
    if params.min_p > 0:
        strong = p >= params.min_p * p.max()
        ids, p = ids[strong], p[strong]
    return ids, p / p.sum()


def _weights(logits: np.ndarray, ids: np.ndarray, top: float, temperature: float) -> np.ndarray:
    return np.exp((logits[ids].astype(np.float64) - top) / temperature)


def _nucleus(ids: np.ndarray, p: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest set of heaviest weights that reaches ``mass``, ids ascending."""
    ordered = np.sort(p)[::-1]  # values only: many times faster than their order
    kept = np.count_nonzero(np.cumsum(ordered) - ordered < mass)
    border = ordered[kept - 1]
    chosen = p > border
    ties = (p == border).nonzero()[0]
    chosen[ties[: kept - np.count_nonzero(chosen)]] = True
    return ids[chosen], p[chosen]


def _exponentials(logits: np.ndarray, top: float, temperature: float) -> np.ndarray:
    """exp((logits - top) / temperature) in float32, padded with zeros to whole chunks."""
    n = len(logits)
    e = np.empty(-(-n // _CHUNK) * _CHUNK, np.float32)
    e[n:] = 0
    values = e[:n]
    # subtracted first: at a low temperature the scaled logits could overflow
    np.subtract(logits, np.float32(top), out=values)
    if temperature != 1:
        values *= np.float32(min(1 / temperature, 1e30))  # may become -inf, whose exponential is 0
    np.exp(values, out=values)
    return e


def _chunks(e: np.ndarray) -> np.ndarray:
    """Float64 sums of the chunks."""
    return np.einsum("ij->i", e.reshape(-1, _CHUNK)).astype(np.float64)  # twice as fast as sum


def draw(logits: np.ndarray, params: SamplingParams, choice: int, position: int) -> int:
    """One token by inverse distribution function over the ids in ascending order."""
    u = uniform(params.seed, choice, position)
    if params.top_k or params.top_p < 1 or params.min_p:
        ids, p = filtered(logits, params)
        return int(ids[_invert(np.cumsum(p), u)])
    e = _exponentials(logits, float(logits.max()), params.temperature)
    sums = _chunks(e).cumsum()
    chunk = _invert(sums, u)
    below = float(sums[chunk - 1]) if chunk else 0.0
    inside = e[chunk * _CHUNK : (chunk + 1) * _CHUNK].cumsum(dtype=np.float64)
    # as a share of the chunk: its sum was rounded otherwise than this one
    share = (u * float(sums[-1]) - below) / (float(sums[chunk]) - below)
    return chunk * _CHUNK + _invert(inside, min(max(share, 0.0), 1.0))


def _invert(cumulative: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight is above ``u`` of the total; never one without weight of its
    own."""
    total = cumulative[-1]
    at = int(cumulative.searchsorted(u * total, side="right"))
    # u near 1 may round up to the total: that is the last with weight
    return at if at < len(cumulative) else int(cumulative.searchsorted(total))


def logprob(logits: np.ndarray, token: int, best: int) -> TokenLogprob:
    """Log-softmax of the raw logits (before temperature, penalties and filters) at ``token``, with the
    ``best`` largest.

    Raw, as OpenAI's API and vLLM's default report them: they do not depend on how the token was chosen.
    """
    top = float(logits.max())
    normalizer = top + float(np.log(_chunks(_exponentials(logits, top, 1.0)).sum()))
    ranked: tuple[tuple[int, float], ...] = ()
    if best:
        ids = leaders(logits, best)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:best]
        ranked = tuple(zip(ids.tolist(), (logits[ids].astype(np.float64) - normalizer).tolist(), strict=True))
    return TokenLogprob(token, float(logits[token]) - normalizer, ranked)
