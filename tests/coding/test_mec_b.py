"""Couplings and encoders against exhaustive search, the game's marginals, and messages through a carrier."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from sharewell.cli import main
from sharewell.coding import (
    MECB,
    CarrierMismatch,
    DistributionError,
    GridWorld,
    ImpossibleObservation,
    LMCarrier,
    MarkovCodingGame,
    Trajectory,
    ebim,
    entropy,
    min_entropy_coupling,
    mutual_information,
    soft_policy,
)
from sharewell.coding.carrier import StegoText, TransformersCarrier, integer_distribution
from sharewell.coding.coding_game import COMPRESSORS, action_given_message, play
from sharewell.coding.coupling import GREEDY_GAP_BITS
from sharewell.coding.info import binary_entropy


def random_distribution(rng: np.random.Generator, n: Any) -> np.ndarray:
    kind = rng.integers(3)
    p = (
        rng.random(n)
        if kind == 0
        else rng.dirichlet(np.full(n, 0.3))
        if kind == 1
        else rng.integers(1, 5, n) * 1.0
    )
    return p / p.sum()


# ---- information


def test_entropy_and_information_of_known_distributions():
    assert entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5) and entropy([1.0]) == 0
    assert entropy([0.5, 0.5], base=math.e) == pytest.approx(math.log(2))
    assert mutual_information(np.outer([0.3, 0.7], [0.2, 0.8])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.diag([0.5, 0.5])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("p", "told"),
    [
        ([0.5, 0.6], "must sum to 1 within 1e-09, got the sum 1.1"),
        ([1.5, -0.5], r"must have no negative entry, got -0.5 \(sum 1.0\)"),
        ([float("nan"), 1.0], r"must be finite, got entries that are not \(sum nan\)"),
        ([], "must have at least one entry"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_sum(p: list[float], told: str):
    for use in (lambda: entropy(p), lambda: ebim(p, 1.0), lambda: min_entropy_coupling(p, [1.0])):
        with pytest.raises(DistributionError, match=told):
            use()


# ---- couplings


@pytest.mark.parametrize("method", ["max", "zero"])
def test_greedy_coupling_is_within_its_bound_of_the_optimum(method: str):
    rng = np.random.default_rng(1)
    for _ in range(150):
        p, q = random_distribution(rng, rng.integers(1, 5)), random_distribution(rng, rng.integers(1, 5))
        best = min_entropy_coupling(p, q, method="exact")
        found = min_entropy_coupling(p, q, method=method)  # type: ignore[arg-type]
        assert best.entropy - 1e-9 <= found.entropy <= best.entropy + GREEDY_GAP_BITS
        for c in (best, found):
            assert np.abs(c.matrix.sum(1) - p).max() < 1e-12 and np.abs(c.matrix.sum(0) - q).max() < 1e-12
            assert len(c.masses) <= len(p) + len(q) - 1


def test_exact_coupling_equals_the_best_vertex_found_by_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(40):
        n, m = rng.integers(2, 4, 2)
        p, q = random_distribution(rng, n), random_distribution(rng, m)
        cells = list(itertools.product(range(n), range(m)))
        system = np.array(
            [[float(c[0] == i) for c in cells] for i in range(n)]
            + [[float(c[1] == j) for c in cells] for j in range(m)]
        )
        best = math.inf
        for basis in itertools.combinations(range(len(cells)), n + m - 1):
            solution, *_ = np.linalg.lstsq(system[:, basis], np.concatenate([p, q]), rcond=None)
            if (solution >= -1e-12).all() and np.abs(
                system[:, basis] @ solution - np.concatenate([p, q])
            ).max() < 1e-9:
                x = solution[solution > 0]
                best = min(best, float(-(x * np.log2(x)).sum()))
        assert min_entropy_coupling(p, q, method="exact").entropy == pytest.approx(best, abs=1e-9)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_marginals_of_a_coupling_are_exact(n: int, m: int, seed: int):
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, n), random_distribution(rng, m)
    for method in ("max", "zero"):
        c = min_entropy_coupling(p, q, method=method)
        assert np.abs(c.matrix.sum(1) - p).max() < 1e-12 and np.abs(c.matrix.sum(0) - q).max() < 1e-12
        assert (c.masses > 0).all() and len(c.masses) <= n + m - 1
        assert c.entropy >= max(entropy(p), entropy(q)) - 1e-9


def test_couplings_of_uniform_vectors_have_the_entropies_of_the_paper_in_their_order():
    rng = np.random.default_rng(0)
    pairs = rng.random((100, 2, 8))
    pairs /= pairs.sum(2, keepdims=True)
    independent = np.mean([entropy(p) + entropy(q) for p, q in pairs])
    by_max = np.mean([min_entropy_coupling(p, q).entropy for p, q in pairs])
    by_zero = np.mean([min_entropy_coupling(p, q, method="zero").entropy for p, q in pairs])
    assert (independent, by_max, by_zero) == pytest.approx((5.44, 3.10, 3.09), abs=0.03)
    assert 0 < by_max - by_zero < 0.02


def test_three_marginals_are_coupled_too():
    rng = np.random.default_rng(3)
    marginals = [random_distribution(rng, n) for n in (4, 6, 5)]
    c = min_entropy_coupling(*marginals)
    for axis, p in enumerate(marginals):
        others = tuple(a for a in range(3) if a != axis)
        assert np.abs(c.matrix.sum(others) - p).max() < 1e-12


# ---- encoders


def test_greedy_encoder_is_within_the_theorem_of_the_best_map_and_the_beam_halves_its_gap():
    rng = np.random.default_rng(4)
    gaps: dict[str, list[float]] = {"greedy": [], "beam": []}
    for _ in range(60):
        p = random_distribution(rng, rng.integers(3, 8))
        rate = rng.random() * entropy(p)
        best = ebim(p, rate, "exact", refine=False)
        for method, gap in gaps.items():
            found = ebim(p, rate, method, refine=False)  # type: ignore[arg-type]
            assert found.rate <= rate + 1e-9 and found.info == pytest.approx(found.rate)
            gap.append(best.info - found.info)
        assert gaps["greedy"][-1] <= binary_entropy(np.sort(p)[-2]) + 1e-9
    assert min(map(min, gaps.values())) >= -1e-9
    assert np.mean(gaps["beam"]) <= np.mean(gaps["greedy"]) / 2


def best_on_a_grid(p: np.ndarray, rate: float, steps: int) -> float:
    """The most information of all maps to three codes whose probabilities are multiples of 1 / steps."""
    rows = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps
    k = len(rows)
    a, b, c = (x.ravel() for x in np.meshgrid(range(k), range(k), range(k), indexing="ij"))
    columns = p[0] * rows[a] + p[1] * rows[b] + p[2] * rows[c]

    def terms(x: np.ndarray) -> np.ndarray:
        return -(x * np.log2(np.where(x > 0, x, 1))).sum(-1)

    h = terms(columns)
    noise = terms(rows)
    info = h - (p[0] * noise[a] + p[1] * noise[b] + p[2] * noise[c])
    return float(info[h <= rate + 1e-9].max())


def test_refined_encoder_follows_the_curve_of_figure_two():
    p = np.array([0.7, 0.2, 0.1])
    for rate in np.linspace(0.05, 1.15, 12):
        ours = ebim(p, rate, refine=True)
        assert ours.rate == pytest.approx(rate, abs=1e-6)
        assert ours.p_xt.sum(1) == pytest.approx(p, abs=1e-12)
        assert ours.info >= best_on_a_grid(p, rate, 14) - 0.01


def test_no_rate_gives_a_constant_and_all_rate_the_identity():
    p = [0.5, 0.3, 0.2, 0.0]
    assert ebim(p, 0).p_xt.shape == (4, 1) and ebim(p, 0).info == 0
    whole = ebim(p, 9)
    assert whole.info == pytest.approx(entropy(p)) and whole.p_xt.shape == (4, 3)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="rate must be at least 0 bits"):
            ebim(p, bad)
    with pytest.raises(ValueError, match="at most 9 symbols, got 10"):
        ebim(np.full(10, 0.1), 1, "exact")
    with pytest.raises(ValueError, match="method must be one of greedy, beam, exact"):
        ebim(p, 1, "best")  # type: ignore[arg-type]


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0, 6), st.integers(0, 10**6))
@settings(max_examples=80)
def test_what_passes_the_bottleneck_has_both_marginals_and_at_most_its_rate(
    n: int, m: int, rate: float, seed: int
):
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, n), random_distribution(rng, m)
    fitted = MECB(rate).fit(p, q)
    assert np.abs(fitted.joint_.sum(1) - p).max() < 1e-12 and np.abs(fitted.joint_.sum(0) - q).max() < 1e-12
    assert fitted.mutual_information_ <= min(rate, fitted.encoder_.info) + 1e-9


def test_encoder_and_decoder_draw_from_the_joint():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.4])
    fitted = MECB(1.0).fit(p, q)
    rng = np.random.default_rng(6)
    counts = np.zeros((3, 2))
    for x in rng.choice(3, 20_000, p=p):
        counts[x, fitted.decode(fitted.encode(int(x), rng), rng)] += 1
    assert np.abs(counts / counts.sum() - fitted.joint_).max() < 0.015
    with pytest.raises(ValueError, match=r"x must be in \[0, 2\], got 3"):
        fitted.encode(3, rng)


# ---- the game

WORLD = GridWorld()
POLICY = soft_policy(WORLD, -4)
PRIOR = np.full(32, 1 / 32)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_actions_follow_the_policy_exactly_whatever_the_belief(compressor: str):
    rng = np.random.default_rng(7)
    for _ in range(60):
        belief, pi = rng.dirichlet(np.full(32, 0.2)), rng.dirichlet(np.ones(4))
        given = action_given_message(belief, pi, 2.5, compressor)
        assert np.abs(belief @ given - pi).max() < 1e-12
        assert np.abs(given.sum(1) - 1).max() < 1e-9


def test_sampled_actions_are_not_told_from_the_policy_by_a_chi_square_test():
    game = MarkovCodingGame(WORLD.environment(), POLICY, PRIOR, 0.5)
    observed, wanted = np.zeros((64, 4)), np.zeros((64, 4))
    for message in range(32):
        for turn in range(3):
            trajectory = game.send(message, 100 * message + turn)
            for state, action in zip(trajectory.states, trajectory.actions, strict=True):
                observed[state, action] += 1
                wanted[state] += POLICY[state]
    enough = (wanted >= 5).all(1)
    statistic = ((observed[enough] - wanted[enough]) ** 2 / wanted[enough]).sum()
    assert enough.sum() >= 5
    assert chi2.sf(statistic, 3 * enough.sum()) > 0.01


def test_messages_arrive_through_the_actions():
    messages = list(range(0, 32, 2))
    accuracy, reward = play(MarkovCodingGame(WORLD.environment(), POLICY, PRIOR, 0.5), messages, 0)
    assert accuracy == 1.0 and reward > 0
    blind, _ = play(MarkovCodingGame(WORLD.environment(), POLICY, PRIOR, 0.0), messages, 0)
    assert blind <= 2 / 16


def test_sender_and_receiver_hold_the_same_belief_and_a_seed_fixes_the_episode():
    game = MarkovCodingGame(WORLD.environment(), POLICY, PRIOR, 0.25)
    first = game.send(5, 3)
    assert game.send(5, 3) == first and game.send(5, 4) != first
    assert np.array_equal(game.receive(first).probabilities, game.receive(first).probabilities)


def test_a_cut_trajectory_is_told_from_a_whole_one():
    game = MarkovCodingGame(WORLD.environment(), POLICY, PRIOR)
    whole = game.send(9, 1)
    cut = Trajectory(whole.states[:1], whole.actions[:1], whole.rewards[:1], False)
    belief = game.receive(cut)
    assert not belief.complete and belief.entropy > game.receive(whole).entropy
    assert game.receive(whole).complete and game.receive(whole).best == 9


def test_an_impossible_action_is_raised_or_ignored():
    policy = np.tile([0.5, 0.5, 0.0, 0.0], (64, 1))
    seen = Trajectory((0, 0), (0, 3), (0.0, 0.0), True)
    with pytest.raises(ImpossibleObservation, match="never takes action 3 in state 0"):
        MarkovCodingGame(WORLD.environment(), policy, PRIOR).receive(seen)
    ignoring = MarkovCodingGame(WORLD.environment(), policy, PRIOR, on_impossible="ignore")
    first = Trajectory((0,), (0,), (0.0,), True)
    assert np.array_equal(ignoring.receive(seen).probabilities, ignoring.receive(first).probabilities)


def test_wrong_arguments_of_the_carrier_are_named():
    with pytest.raises(ValueError, match=r"rate must be in \[1 / block_bits, 1\] = \[0.125, 1\], got 0.1"):
        LMCarrier(ToyModel(), ToyTokenizer(), rate=0.1)
    with pytest.raises(ValueError, match=r"block_bits must be in \[1, 12\], got 13"):
        LMCarrier(ToyModel(), ToyTokenizer(), block_bits=13)


def test_wrong_arguments_of_the_game_are_named():
    env = WORLD.environment()
    with pytest.raises(ValueError, match="compressor must be one of"):
        MarkovCodingGame(env, POLICY, PRIOR, compressor="zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="message must be a number with prior mass below 32, got 32"):
        MarkovCodingGame(env, POLICY, PRIOR).send(32, 0)
    with pytest.raises(ValueError, match=r"action must be in \[0, 3\], got 4"):
        env.step(4)
    with pytest.raises(ValueError, match=r"slip must be in \[0, 0.5\]"):
        GridWorld(slip=0.6)
    with pytest.raises(ValueError, match="start must be a free cell"):
        GridWorld(start=(3, 3))


def test_soft_policy_solves_its_fixed_point():
    transitions, reward, terminal = WORLD.model()
    assert np.abs(transitions.sum(2) - 1).max() < 1e-12
    pi = soft_policy(WORLD, -3)
    assert np.abs(pi.sum(1) - 1).max() < 1e-12 and terminal.sum() == 2 and reward.sum() == 0
    greedy = soft_policy(WORLD, -9)
    assert greedy[0].argmax() == 1 and greedy[5 * 8 + 4].argmax() in (0, 3)


# ---- the carrier


class ToyModel:
    """Logits that depend on the last two tokens."""

    fingerprint = "toy"

    def __init__(self, vocabulary: int = 50) -> None:
        self.table = np.random.default_rng(8).standard_normal((vocabulary, vocabulary)) * 2
        self.last = 0

    def start(self, token_ids):
        self.last = 0
        return self.step(list(token_ids)[-1])

    def step(self, token_id: int):
        logits = self.table[token_id] + 0.5 * self.table[self.last]
        self.last = token_id
        return logits


class ToyTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 50 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@given(
    st.binary(min_size=1, max_size=12),
    st.integers(0, 10**6),
    st.sampled_from([(1, 1.0), (5, 0.5), (8, 1.0), (8, 0.25)]),
)
@settings(max_examples=25)
def test_any_message_comes_back_from_what_a_model_says(message: bytes, seed: int, size: tuple[int, float]):
    bits, rate = size
    sender, receiver = (LMCarrier(ToyModel(), ToyTokenizer(), None, rate, bits) for _ in range(2))
    sent = StegoText.from_json(sender.encode(message, "hi", seed).to_json())
    assert receiver.decode(sent, "hi") == message


def test_another_model_settings_or_text_is_refused():
    sent = LMCarrier(ToyModel(), ToyTokenizer()).encode(b"secret", "hi", 1)
    other = ToyModel()
    other.fingerprint = "other"
    for receiver in (LMCarrier(other, ToyTokenizer()), LMCarrier(ToyModel(), ToyTokenizer(), rate=0.5)):
        with pytest.raises(CarrierMismatch, match="made with model and settings"):
            receiver.decode(sent, "hi")
    narrow = LMCarrier(ToyModel(), ToyTokenizer(), top_k=4)
    said = narrow.encode(b"secret", "hi", 1)
    with pytest.raises(CarrierMismatch, match="does not say here"):
        narrow.decode(
            StegoText(tuple(49 - t for t in said.tokens), "", 6, said.crc, said.fingerprint, 0, 0), "hi"
        )
    cut = StegoText(sent.tokens[:4], "", 6, sent.crc, sent.fingerprint, 0, 0)
    with pytest.raises(ValueError, match="bits of it are still unknown"):
        LMCarrier(ToyModel(), ToyTokenizer()).decode(cut, "hi")
    with pytest.raises(ValueError, match="max_tokens must allow for the message, 3 did not"):
        LMCarrier(ToyModel(), ToyTokenizer(), max_tokens=3).encode(b"much too long", "hi", 1)


@given(st.text(max_size=60) | st.binary(max_size=40).map(lambda b: b.decode("latin-1")))
@settings(max_examples=200)
def test_no_text_crashes_the_reader_of_documents(text: str):
    with pytest.raises(ValueError, match="must be a sharewell-stego-1 document"):
        StegoText.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 0},
        {"bytes": 10**9},
        {"tokens": [-1]},
        {"tokens": ["a"]},
        {"tokens": 3},
        {"crc": 1.5},
        {"format": "x"},
    ],
)
def test_a_forged_document_is_refused(change: dict):
    fields = json.loads(LMCarrier(ToyModel(), ToyTokenizer()).encode(b"x", "hi", 1).to_json())
    with pytest.raises(ValueError, match="must be a sharewell-stego-1 document"):
        StegoText.from_json(json.dumps({**fields, **change}))


def test_a_changed_token_is_never_returned_as_the_message():
    carrier = LMCarrier(ToyModel(), ToyTokenizer(), None)
    sent = carrier.encode(b"sixteen bytes ok", "hi", 2)
    for at in range(0, len(sent.tokens), 3):
        tokens = list(sent.tokens)
        tokens[at] = (tokens[at] + 1) % 50
        changed = StegoText(tuple(tokens), "", sent.n_bytes, sent.crc, sent.fingerprint, 0, 0)
        try:
            assert carrier.decode(changed, "hi") == b"sixteen bytes ok"
        except ValueError:
            pass


def test_integer_probabilities_sum_to_one_and_keep_their_order():
    logits = np.random.default_rng(9).standard_normal(1000) * 3
    ids, p = integer_distribution(logits, 100, 16)
    assert p.sum() == 1 and np.all(np.diff(ids) > 0) and len(ids) <= 100
    assert np.all(p * 65536 == np.rint(p * 65536)) and ids[p.argmax()] == logits.argmax()


def test_a_message_passes_through_a_real_language_model(smollm2: Path):
    from transformers import AutoTokenizer

    from sharewell.models import load_transformers

    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    carrier = LMCarrier(TransformersCarrier(load_transformers(smollm2)), tokenizer)
    sent = carrier.encode(bytes.fromhex("c0ffee42"), "The weather today is", 0)
    assert carrier.decode(sent, "The weather today is") == bytes.fromhex("c0ffee42")
    assert 0 < sent.bits_per_token <= 1.5 * sent.entropy_per_token


# ---- command line


def test_couple_prints_the_joint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    p, q, bad = (tmp_path / name for name in ("p.json", "q.json", "bad.json"))
    p.write_text("[0.5, 0.25, 0.25]")
    q.write_text("[0.5, 0.5]")
    bad.write_text("[0.5, 0.6]")
    assert main(["mec", "couple", str(p), str(q), "--rate", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mutual_information_bits"] == pytest.approx(1) and np.sum(
        found["joint"], 1
    ) == pytest.approx([0.5, 0.25, 0.25])
    assert main(["mec", "couple", str(p), str(bad)]) == 2 and "got the sum 1.1" in capsys.readouterr().err
    assert main(["mec", "stego", "encode", "--model", str(tmp_path), "--message", "c0"]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert main(["mec", "stego", "encode", "--model", str(tmp_path), "--message", "xyz"]) == 2
