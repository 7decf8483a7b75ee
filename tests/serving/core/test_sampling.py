"""Sampling against the definition, against transformers' logits processors, and its noise against numpy's
Philox."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sharewell.serving.core.messages import SamplingParams
from sharewell.serving.core.sampling import bias, draw, filtered, leaders, logprob, penalize, uniform


def logits_of(seed: int, n: int = 500, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


@given(st.integers(0, 2**64 - 1), st.integers(0, 127), st.integers(1, 2**40))
def test_noise_is_philox(seed: int, choice: int, position: int) -> None:
    # numpy steps its counter before it generates
    counter = np.array([position - 1, choice, 0, 0], np.uint64)
    raw = np.random.Philox(key=np.array([seed, 0x5A17], np.uint64), counter=counter).random_raw()
    assert uniform(seed, choice, position) == (int(raw) >> 11) * 2.0**-53


def test_noise_is_uniform_over_positions_choices_and_seeds() -> None:
    n = 4000
    for values in (
        [uniform(1, 0, i) for i in range(n)],
        [uniform(i, 0, 0) for i in range(n)],
        [uniform(2**64 - 1 - i, i % 128, 5) for i in range(n)],
    ):
        ordered = np.sort(values)
        distance = np.abs(ordered - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov, p about 0.001


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 20},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 1.3},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_have_the_exact_distribution(params: dict[str, float]) -> None:
    logits = logits_of(1, 300, 1.5)  # not a whole number of chunks or lanes
    sampling = SamplingParams(seed=11, **params)  # pyright: ignore[reportArgumentType]
    n = 20_000
    counts = np.bincount([draw(logits, sampling, 0, i) for i in range(n)], minlength=300)
    scaled = logits.astype(np.float64) / sampling.temperature
    p = softmax(scaled)
    if sampling.top_k:
        p[p < np.sort(p)[-sampling.top_k]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p)
        last = int(np.searchsorted(np.cumsum(p[order]), sampling.top_p))
        p[order[last + 1 :]] = 0
        p /= p.sum()
    if sampling.min_p:
        p[p < sampling.min_p * p.max()] = 0
        p /= p.sum()
    assert counts[p == 0].sum() == 0
    expected = p * n
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    # Wilson and Hilferty's approximation of chi-square's quantile at p = 1e-4
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


@given(
    hnp.arrays(np.float32, st.integers(2, 400), elements=st.floats(-30, 30, width=32)),
    st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    st.sampled_from([0, 1, 3, 50, 1000]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
@settings(max_examples=200)
def test_filters_keep_what_transformers_keeps(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    prompt: Any = torch.zeros(1, 1, dtype=torch.long)
    scores = chain(prompt, torch.from_numpy(logits.astype(np.float64))[None])
    oracle = torch.softmax(scores, -1)[0].numpy()
    ids, p = filtered(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert p.sum() == pytest.approx(1) and np.all(np.diff(ids) > 0)
    ours = np.zeros(len(logits))
    ours[ids] = p
    # Of equally probable tokens either may be the one that is cut off, and a mass that equals top_p to the
    # last bit may round to either side: compare the kept probabilities as sets, and allow the border token.
    a, b = np.sort(oracle)[::-1], np.sort(ours)[::-1]
    if (a > 0).sum() != (b > 0).sum():
        assert top_p < 1 and abs(int((a > 0).sum()) - int((b > 0).sum())) == 1
        kept = min((a > 0).sum(), (b > 0).sum())
        a, b = a[:kept] / a[:kept].sum(), b[:kept] / b[:kept].sum()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


@given(
    hnp.arrays(np.float32, st.integers(1, 700), elements=st.floats(-5, 5, width=16)),
    st.integers(1, 800),
    st.integers(0, 2),
)
def test_leaders_are_all_that_reach_the_kth_greatest(logits: np.ndarray, k: int, forbidden: int) -> None:
    logits[:forbidden] = -np.inf
    border = np.sort(logits)[-min(k, len(logits))]
    expected = np.flatnonzero((logits >= border) & (logits > -np.inf))
    assert leaders(logits, k).tolist() == expected.tolist()


def test_penalties_and_bias_equal_transformers_and_openai() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4]
    logits = logits_of(2, 20)
    counts = {t: (prompt + output).count(t) for t in prompt + output}
    output_counts = {t: output.count(t) for t in output}
    ours = logits.copy()
    penalize(ours, SamplingParams(repetition_penalty=1.3), counts, output_counts)
    seen: Any = torch.tensor([prompt + output])
    scores: Any = torch.from_numpy(logits.copy())[None]
    oracle = RepetitionPenaltyLogitsProcessor(1.3)(seen, scores)
    np.testing.assert_allclose(ours, oracle[0].numpy(), rtol=1e-6)
    ours = logits.copy()
    penalize(ours, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), counts, output_counts)
    for token in range(20):  # OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence
        number = output.count(token)
        assert ours[token] == pytest.approx(logits[token] - 0.25 * number - 0.5 * (number > 0), abs=1e-6)
    biased = logits.copy()
    bias(biased, SamplingParams(logit_bias={3: 2.5, 7: -100.0, 10_000: 5.0}))
    assert (biased[3], biased[7]) == pytest.approx((logits[3] + 2.5, logits[7] - 100.0))


def test_a_seed_fixes_the_answer_and_choices_differ() -> None:
    logits = logits_of(3, 5000, 1.0)
    for params in (SamplingParams(seed=5), SamplingParams(seed=5, top_p=0.9)):
        first = [draw(logits, params, 0, i) for i in range(20)]
        assert first == [draw(logits, params, 0, i) for i in range(20)]
        assert first != [draw(logits, params, 1, i) for i in range(20)]
    assert first != [draw(logits, SamplingParams(seed=6, top_p=0.9), 0, i) for i in range(20)]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 400, 999]] = [0.0, -2.0, -1.0]
    for params in ({}, {"top_p": 0.99}, {"top_k": 500}, {"min_p": 0.001}):
        sampling = SamplingParams(temperature=2.0, **params)  # pyright: ignore[reportArgumentType]
        assert {draw(logits, sampling, 0, i) for i in range(300)} == {3, 400, 999}


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(4, 3000) * 1000
    for extra in ({}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3}):
        sampling = SamplingParams(temperature=temperature, **extra)  # pyright: ignore[reportArgumentType]
        assert {draw(logits, sampling, 0, i) for i in range(5)} == {int(logits.argmax())}


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    import torch

    logits = logits_of(5, 49152)
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    score = logprob(logits, 77, 20)
    assert score.logprob == pytest.approx(exact[77], abs=1e-5)
    order = np.argsort(-exact)[:20]
    assert [t for t, _ in score.top] == order.tolist()
    np.testing.assert_allclose([v for _, v in score.top], exact[order], atol=1e-5)
    assert logprob(logits, 77, 0).top == ()
