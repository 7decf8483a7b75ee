"""MEC-B beside uniform quantisers at the same rate, other greedy couplings, and arithmetic-coding
steganography."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np

from sharewell.bench import Progress, Report, Row, environment, interleave, median, values
from sharewell.bench.report import PEER_NOT_INSTALLED
from sharewell.coding import (
    GridWorld,
    LMCarrier,
    MarkovCodingGame,
    ebim,
    entropy,
    min_entropy_coupling,
    mutual_information,
    soft_policy,
)
from sharewell.coding.carrier import TransformersCarrier, integer_distribution
from sharewell.coding.coding_game import play

MESSAGES = 64
ARMS = (
    ("none", 1.0),
    ("ebim", 0.5),
    ("ebim", 0.25),
    ("index", 0.5),
    ("index", 0.25),
    ("index-off", 0.5),
    ("index-off", 0.25),
    ("sorted-off", 0.5),
    ("sorted-off", 0.25),
    ("support-off", 0.5),
    ("support-off", 0.25),
)
QUANTISERS = {
    "index": "index cells, always on (the paper's baseline)",
    "index-off": "index cells, off when not needed",
    "sorted-off": "sorted by belief, off when not needed",
    "support-off": "sorted, only messages still possible",
}


def greedy_by_lists(p: np.ndarray, q: np.ndarray) -> float:
    """The textbook greedy in plain Python: look for both maxima at every step. Returns the joint entropy."""
    a, b, h = p.tolist(), q.tolist(), 0.0
    for _ in range(len(a) + len(b)):
        i, j = max(range(len(a)), key=a.__getitem__), max(range(len(b)), key=b.__getitem__)
        mass = min(a[i], b[j])
        if mass <= 1e-15:
            break
        h -= mass * float(np.log2(mass))
        a[i] -= mass
        b[j] -= mass
    return h


def log_loss_encoder(p: np.ndarray, rate: float) -> float:
    """I(X; T) of the one-shot code under logarithmic loss (Shkel, Raginsky and Verdu 2017): with M =
    floor(2^rate) codes, each symbol in order of mass to the lightest code."""
    codes = np.zeros(max(1, int(2**rate + 1e-9)))
    for mass in np.sort(p)[::-1]:
        codes[codes.argmin()] += mass
    return entropy(codes / codes.sum())


def arithmetic_tokens(
    model: Any, prompt: list[int], message: bytes, top_k: int, bits: int
) -> tuple[int, int]:
    """Arithmetic-coding steganography: the message, followed by pseudo-random bits, is decoded as if it
    were a text under the model. Returns (tokens until the interval fixes the message, tokens whose decoding
    gives it back)."""
    width = 8 * len(message)
    low, high = 0, 1 << 4096
    point = int.from_bytes(message, "big") << (4096 - width) | ((1 << (4096 - width)) * 5 // 7)
    logits, tokens, said = model.start(prompt), 0, []
    while low >> (4096 - width) != (high - 1) >> (4096 - width):
        ids, p = integer_distribution(logits, top_k, bits)
        edges = np.concatenate([[0], np.cumsum(np.rint(p * (1 << bits)).astype(np.int64))]).tolist()
        span = high - low
        cuts = [low + (span * e >> bits) for e in edges]
        at = next(k for k in range(len(ids)) if cuts[k] <= point < cuts[k + 1])
        low, high = cuts[at], cuts[at + 1]
        said.append(int(ids[at]))
        logits = model.step(said[-1])
        tokens += 1
    recovered = low >> (4096 - width) == int.from_bytes(message, "big")
    return tokens, tokens if recovered else 0


def game_rows(episodes: int, seed: int, progress: Progress) -> tuple[list[Row], dict[str, Any]]:
    world = GridWorld()
    rng = np.random.default_rng(seed)
    messages = rng.integers(0, MESSAGES, episodes).tolist()
    prior = np.full(MESSAGES, 1 / MESSAGES)
    found: dict[str, dict[str, Any]] = {}
    start = time.process_time()
    for log_beta in (-6, -5, -4):
        policy = soft_policy(world, log_beta)
        arms = ARMS if log_beta == -6 else ARMS[:3]
        for k, (compressor, rate) in enumerate(arms):
            game = MarkovCodingGame(world.environment(), policy, prior, rate, compressor)  # type: ignore[arg-type]
            accuracy, reward = play(game, messages, seed)
            error = float(np.sqrt(accuracy * (1 - accuracy) / episodes))
            found[f"{log_beta} {compressor} {rate}"] = {
                "accuracy": accuracy,
                "standard_error": error,
                "reward": reward,
            }
            progress(f"game, log beta {log_beta}", k + 1, len(arms))
    cpu_s = time.process_time() - start
    at = {key[3:]: value for key, value in found.items() if key.startswith("-6")}
    rows = []
    for rate, bar, margin in ((0.5, 0.50, 0.03), (0.25, 0.30, 0.10)):
        ours = at[f"ebim {rate}"]
        rows.append(
            Row(
                f"accuracy of EBIM, rate {rate}",
                ours["accuracy"],
                bar,
                "share",
                "higher",
                "goal",
                target=1.0,
                claim=f"at least {bar}",
                note=f"n = {episodes}, standard error {ours['standard_error']:.3f}",
            )
        )
        for name, meaning in QUANTISERS.items():
            theirs = at[f"{name} {rate}"]["accuracy"]
            needed = None
            if name == "support-off":
                needed = (theirs + margin) / theirs if theirs else None
            rows.append(
                Row(
                    f"accuracy at rate {rate}",
                    ours["accuracy"],
                    theirs,
                    "share",
                    "higher",
                    meaning,
                    target=needed,
                    claim=f"{margin} above the fairest quantiser" if needed else "",
                )
            )
    free = at["none 1.0"]
    rows.append(
        Row(
            "accuracy at rate 0.5 against no limit",
            at["ebim 0.5"]["accuracy"],
            free["accuracy"],
            "share",
            "higher",
            "no compression",
            target=(free["accuracy"] - 0.05) / free["accuracy"],
            claim="within 0.05",
        )
    )
    rewards = [value["reward"] for value in at.values()]
    rows.append(
        Row(
            "spread of the reward over all compressors",
            max(rewards) - min(rewards),
            0.03,
            "reward",
            "lower",
            "goal",
            target=1.0,
            claim="the reward is that of the policy, whatever is sent",
        )
    )
    rows.append(
        Row("all games", cpu_s, 60.0, "s of CPU", "lower", "goal", target=1.0, claim="under a minute")
    )
    return rows, found


def coupling_rows(full: bool, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    pairs = rng.random((100, 2, 8))
    pairs /= pairs.sum(2, keepdims=True)
    by_max = float(np.mean([min_entropy_coupling(p, q).entropy for p, q in pairs]))
    by_zero = float(np.mean([min_entropy_coupling(p, q, method="zero").entropy for p, q in pairs]))
    apart = float(np.mean([entropy(p) + entropy(q) for p, q in pairs]))
    rows = [
        Row("joint entropy, 100 pairs of 8, largest masses", by_max, apart, "bits", "lower", "independent"),
        Row(
            "joint entropy, 100 pairs of 8, closest masses",
            by_zero,
            by_max,
            "bits",
            "lower",
            "largest masses",
        ),
    ]
    many = rng.random((1000 if full else 50, 2, 16))
    many /= many.sum(2, keepdims=True)
    worst = max(abs(min_entropy_coupling(p, q).entropy - greedy_by_lists(p, q)) for p, q in many)
    rows.append(
        Row(
            "largest difference from the plain greedy",
            worst,
            1e-9,
            "bits",
            "lower",
            "1e-9",
            target=1.0,
            claim=f"equal entropy on {len(many)} random pairs",
        )
    )
    n = 1024
    p, q = rng.random((2, n))
    p, q = p / p.sum(), q / q.sum()
    min_entropy_coupling(p, q)
    samples = interleave(
        {
            "ours": lambda: [min_entropy_coupling(p, q) for _ in range(50)],
            "plain": lambda: greedy_by_lists(p, q),
        },
        repeats=5 if full else 2,
    )
    ours = [s / 50 for s in values(samples["ours"], "cpu_s")]
    rows.append(
        Row.from_samples(
            "greedy coupling of 1,024 with 1,024",
            ours,
            values(samples["plain"], "cpu_s"),
            "s of CPU",
            "lower",
            "plain Python greedy",
            target=10.0,
            claim="at least 10 times as fast",
        )
    )
    rows += reference_rows(many, p, q, ours)
    if find_spec("dit"):
        import dit.shannon

        joint = min_entropy_coupling(p[:8] / p[:8].sum(), q[:8] / q[:8].sum()).matrix
        cells = {(str(i), str(j)): x for (i, j), x in np.ndenumerate(joint) if x > 0}
        theirs = float(dit.shannon.mutual_information(dit.Distribution(cells), [0], [1]))
        rows.append(
            Row(
                "mutual information of one coupling",
                mutual_information(joint),
                theirs,
                "bits",
                "higher",
                "dit",
            )
        )
    return rows


def reference_rows(pairs: np.ndarray, p: np.ndarray, q: np.ndarray, ours: list[float]) -> list[Row]:
    """``greedy_mec`` of ssokota/mec (MIT), installed by hand from its repository (no package index has it):
    the same entropies on ``pairs`` [n, 2, 16], and its time for ``p`` with ``q``."""
    if not find_spec("mec"):
        note = PEER_NOT_INSTALLED + ": it is on no package index"
        return [
            Row("greedy coupling, 1,024 by 1,024", median(ours), None, "s of CPU", "lower", "", note=note)
        ]
    from mec import greedy_mec  # pyright: ignore[reportMissingImports]

    worst = 0.0
    for a, b in pairs:
        theirs = np.array(list(greedy_mec(a, b, sparse=True).values()), float)
        worst = max(worst, abs(min_entropy_coupling(a, b).entropy - entropy(theirs / theirs.sum())))
    samples = interleave({"theirs": lambda: greedy_mec(p, q, sparse=True)}, repeats=5)
    note = "" if not find_spec("mec_rust") else "with its Rust extension"
    return [
        Row(
            "largest difference from ssokota/mec",
            worst,
            1e-9,
            "bits",
            "lower",
            "1e-9",
            target=1.0,
            claim=f"equal entropy on {len(pairs)} random pairs",
        ),
        Row.from_samples(
            "greedy coupling, 1,024 by 1,024",
            ours,
            values(samples["theirs"], "cpu_s"),
            "s of CPU",
            "lower",
            "ssokota/mec, greedy_mec",
            target=10.0,
            claim="at least 10 times as fast",
            note=note or "its numpy version; the Rust extension is not installed",
        ),
    ]


def encoder_rows(full: bool, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed + 1)
    gaps: dict[str, list[float]] = {"greedy": [], "beam": []}
    shkel, refined, violations, n = 0.0, 0.0, 0, 300 if full else 30
    for _ in range(n):
        p = rng.random(int(rng.integers(3, 8)))
        p /= p.sum()
        rate = float(rng.random() * entropy(p))
        best = ebim(p, rate, "exact", refine=False).info
        for method, gap in gaps.items():
            gap.append(best - ebim(p, rate, method, refine=False).info)  # type: ignore[arg-type]
        second = np.sort(p)[-2]
        violations += gaps["greedy"][-1] > entropy([second, 1 - second]) + 1e-9
        shkel += log_loss_encoder(p, rate) / n
        refined += ebim(p, rate).info / n
    greedy, beam = float(np.mean(gaps["greedy"])), float(np.mean(gaps["beam"]))
    return [
        Row(
            "greedy encoder beyond its theorem",
            violations,
            0,
            "cases",
            "lower",
            "goal",
            target=1.0,
            claim=f"never in {n} distributions",
        ),
        Row(
            "mean gap to the best map, beam",
            beam,
            greedy,
            "bits",
            "lower",
            "greedy",
            target=2.0,
            claim="at most half the greedy's",
        ),
        Row(
            "mean information at the rate", refined, shkel, "bits", "higher", "log-loss code of Shkel et al."
        ),
    ]


def carrier_rows(runs: int, seed: int, progress: Progress) -> list[Row]:
    from transformers import AutoTokenizer

    from sharewell.models import load_transformers, resolve_model

    folder = resolve_model("smollm2", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = TransformersCarrier(load_transformers(folder))
    carrier = LMCarrier(model, tokenizer)
    rng = np.random.default_rng(seed + 2)
    right, tokens, entropies, classic, classic_right = 0, 0, [], 0, 0
    for k in range(runs):
        message, prompt = rng.bytes(8), "The weather today is"
        sent = carrier.encode(message, prompt, seed + k)
        right += carrier.decode(sent, prompt) == message
        tokens += len(sent.tokens)
        entropies.append(sent.entropy_per_token)
        n, whole = arithmetic_tokens(model, tokenizer.encode(prompt), message, 512, 16)
        classic, classic_right = classic + n, classic_right + (whole > 0)
        progress("language model", k + 1, runs)
    ours = 64 * runs / tokens
    return [
        Row(
            "64-bit messages recovered through SmolLM2-135M",
            right,
            runs,
            "messages",
            "higher",
            "sent",
            target=1.0,
            claim="every one, bit by bit",
        ),
        Row(
            "message bits per token",
            ours,
            64 * runs / classic,
            "bits",
            "higher",
            "arithmetic-coding steganography",
            note=f"it recovered {classic_right} of {runs}",
        ),
        Row(
            "message bits per token, of the model's entropy",
            ours,
            float(np.mean(entropies)),
            "bits",
            "higher",
            "entropy of the model (upper bound)",
        ),
    ]


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    rows, found = game_rows(200 if full else 20, seed, progress)
    rows += coupling_rows(full, seed)
    rows += encoder_rows(full, seed)
    rows += carrier_rows(50 if full else 1, seed, progress)
    return Report("mec-b", "full" if full else "smoke", tuple(rows), environment(), seed, {"game": found})
