"""The bandit core beside MABWiser, river and re-inverting: choices, time, regret, delay, kills, threads."""

from __future__ import annotations

import csv
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sharewell.bandits import Constant, Ledger, LinUCB, PageHinkley, Radius
from sharewell.bench import PEER_NOT_INSTALLED, Progress, Report, Row, environment, interleave, values
from sharewell.simulation import WallClock

WORKER = Path(__file__).parents[2] / "tests" / "bandits" / "killed_worker.py"

try:
    from mabwiser.mab import MAB, LearningPolicy
except ImportError:
    MAB = LearningPolicy = None
if not hasattr(csv.DictReader, "__class_getitem__"):  # river 0.26 subscripts it
    csv.DictReader.__class_getitem__ = classmethod(lambda cls, item: cls)  # pyright: ignore
try:
    from river.bandit import LinUCBDisjoint
except ImportError:
    LinUCBDisjoint = None


def named(x: np.ndarray) -> dict[int, float]:
    return dict(enumerate(x.tolist()))


def mabwiser(X: np.ndarray, y: np.ndarray, K: int) -> Any:
    peer = MAB(list(range(K)), LearningPolicy.LinUCB(alpha=1.0, l2_lambda=1.0))  # pyright: ignore
    peer.fit(list(range(K)), y.tolist(), X)
    return peer


def same_choices(rounds: int, seed: int) -> list[Row]:
    """Both learn from the same arms, contexts and rewards; in each round both are asked."""
    d, K, rows = 8, 5, []
    for name, there in (("MABWiser LinUCB", MAB), ("river LinUCBDisjoint", LinUCBDisjoint)):
        metric = f"same choice as {name}, of {rounds}"
        if there is None:
            rows.append(Row(metric, 0, None, "rounds", "higher", note=PEER_NOT_INSTALLED))
            continue
        rng = np.random.default_rng(seed)
        theta, X, y = rng.normal(size=(K, d)), rng.normal(size=(K, d)), rng.normal(size=K)
        ours = LinUCB(K, d, width=Constant(1.0))
        peer: Any = mabwiser(X, y, K) if there is MAB else LinUCBDisjoint(1.0, 1.0)  # pyright: ignore
        for arm in range(K):
            ours.update(arm, X[arm], y[arm])
            if there is not MAB:
                peer.update(arm, named(X[arm]), y[arm])
        same = 0
        for _ in range(rounds):
            x = rng.normal(size=d)
            found = ours.estimate(x)
            if there is MAB:
                arm, theirs = int(found.optimistic.argmax()), peer.predict(x[None])
            else:  # river's width is that of a predicted reward, noise of deviation 1 included
                arm = int((found.mean + np.sqrt(1 + found.width**2)).argmax())
                theirs = peer.pull(list(range(K)), named(x))
            same += int(theirs) == arm
            reward = float(theta[arm] @ x + rng.normal(0, 0.1))
            ours.update(arm, x, reward)
            if there is MAB:
                peer.partial_fit([arm], [reward], x[None])
            else:
                peer.update(arm, named(x), reward)
        rows.append(
            Row(metric, same, rounds, "rounds", "higher", "all of them", target=1.0,
                claim=f"the same choices as {name}")
        )  # fmt: skip
    return rows


def speed(d: int, K: int, repeats: int, targets: bool, seed: int, progress: Progress) -> list[Row]:
    """One choice and one update, CPU time, each contender in a state that has seen the same rows."""
    rng = np.random.default_rng(seed)
    X, y, arms = rng.normal(size=(2000, d)), rng.normal(size=2000), rng.integers(0, K, 2000)
    ours = LinUCB(K, d, width=Constant(1.0))
    A, b = np.repeat(np.eye(d)[None], K, axis=0), np.zeros((K, d))

    def choose_ours(x: np.ndarray, arm: int, reward: float) -> None:
        ours.settle(ours.select(x).id, reward)

    def choose_by_inverting(x: np.ndarray, arm: int, reward: float) -> None:
        inverse = np.linalg.inv(A)
        z = inverse @ x
        score = np.einsum("kd,kd->k", z, b) + np.sqrt(z @ x)
        k = int(score.argmax())
        A[k] += np.outer(x, x)
        b[k] += reward * x

    contenders: dict[str, tuple[Callable[[np.ndarray, int, float], None], int]] = {
        "ours": (choose_ours, 500),
        "re-inverting every arm": (choose_by_inverting, 30),
    }
    if MAB is not None:
        first = mabwiser(X[:K], y[:K], K)

        def choose_mabwiser(x: np.ndarray, arm: int, reward: float) -> None:
            first.partial_fit([first.predict(x[None])], [reward], x[None])

        contenders["MABWiser LinUCB"] = (choose_mabwiser, 10)
    if LinUCBDisjoint is not None:
        other = LinUCBDisjoint(1.0, 1.0)
        for i in range(K):
            other.update(i, named(X[i]), y[i])

        def choose_river(x: np.ndarray, arm: int, reward: float) -> None:
            context = named(x)
            other.update(other.pull(list(range(K)), context), context, reward)

        contenders["river LinUCBDisjoint"] = (choose_river, 10)

    def repeated(choose: Callable[[np.ndarray, int, float], None], n: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(n):
                choose(X[i], int(arms[i]), float(y[i]))

        return run

    runs = {name: repeated(*what) for name, what in contenders.items()}
    samples = interleave(runs, repeats, progress=progress)
    taken = {
        name: [v * 1e6 / contenders[name][1] for v in values(samples[name], "cpu_s")] for name in samples
    }
    rows, needs = [], {"MABWiser LinUCB": 20, "re-inverting every arm": 10, "river LinUCBDisjoint": 10}
    for name, least in needs.items():
        if name in taken:
            rows.append(
                Row.from_samples(
                    f"one choice and its update, dim {d}, {K} arms, CPU time", taken["ours"], taken[name],
                    "us", "lower", name, target=least if targets else None,
                    claim=f"at least {least} times as fast as {name}" if targets else "",
                )
            )  # fmt: skip
        else:
            rows.append(
                Row(f"one choice and its update, dim {d}, {K} arms, beside {name}",
                    float(np.median(taken["ours"])), None, "us", "lower", note=PEER_NOT_INSTALLED)
            )  # fmt: skip
    return rows


def batch(repeats: int) -> Row:
    policy, X = LinUCB(20, 64), np.random.default_rng(0).normal(size=(1024, 64))
    taken = values(interleave({"ours": lambda: policy.estimate(X)}, repeats)["ours"], "cpu_s")
    per = [t * 1e6 / 1024 for t in taken]
    return Row.from_samples(
        "estimating 1,024 contexts x 20 arms, dim 64, CPU time a context", per, [60.0] * len(per), "us",
        "lower", "bound of the card", claim="at most 60 us a context", target=1.0,
    )  # fmt: skip


def regret(seeds: int, T: int) -> list[Row]:
    d, K, curves = 10, 20, []
    marks = np.unique(np.geomspace(T // 20, T, 12).astype(int))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        theta = rng.normal(size=d)
        theta /= np.linalg.norm(theta)
        policy, lost = LinUCB(K, d, "shared", Constant(1.0), seed=seed), np.zeros(T)
        for t in range(T):
            X = rng.normal(size=(K, d)) / math.sqrt(d)
            decision, mean = policy.select(X), X @ theta
            lost[t] = mean.max() - mean[decision.arm]
            policy.settle(decision.id, float(mean[decision.arm] + rng.normal(0, 0.1)))
        curves.append(np.cumsum(lost))
    last = [float(curve[-1]) / (d * math.sqrt(T)) for curve in curves]
    slopes = [float(np.polyfit(np.log(marks), np.log(c[marks - 1]), 1)[0]) for c in curves]
    return [
        Row.from_samples(
            f"regret / (d sqrt(T)), shared, d 10, 20 arms, T {T:,}, {seeds} seeds", last, [1.0] * seeds, "",
            "lower", "bound of the card", claim="at most d sqrt(T)", target=1.0,
        ),
        Row.from_samples(
            f"log-log slope of regret, {seeds} seeds", slopes, [0.65] * seeds, "", "lower",
            "bound of the card", claim="regret is sub-linear", target=1.0,
        ),
    ]  # fmt: skip


def coverage(runs: int, T: int) -> Row:
    d, K, held = 5, 10, 0
    width = Radius(0.1, 1.0, 0.1)
    for seed in range(runs):
        rng = np.random.default_rng(10_000 + seed)
        theta = rng.normal(size=d)
        theta /= np.linalg.norm(theta)
        policy, inside = LinUCB(K, d, "shared", width, seed=seed), True
        for t in range(T):
            X = rng.normal(size=(K, d)) / math.sqrt(d)
            decision = policy.select(X)
            policy.settle(decision.id, float(decision.x @ theta + rng.normal(0, 0.1)))
            if t % 10 == 0:
                A, gap = policy.stats().gram + np.eye(d), policy.coefficients()[0] - theta
                allowed = width.factor(np.array(np.linalg.slogdet(A)[1]), d, 1.0)
                inside &= bool(math.sqrt(gap @ A @ gap) <= allowed)
        held += inside
    z, p = 1.96, held / runs
    middle, half = p + z * z / (2 * runs), z * math.sqrt(p * (1 - p) / runs + z * z / (4 * runs * runs))
    low, high = ((middle + s * half) / (1 + z * z / runs) for s in (-1, 1))
    return Row(
        "runs whose confidence set held the truth throughout", p, 0.9, "", "higher", "1 - delta", target=1.0,
        claim="Radius covers", note=f"{held} of {runs}, 95 % interval [{low:.3f}, {high:.3f}]", samples=runs,
    )  # fmt: skip


def stream(seed: int, T: int, delay: float, lost: float) -> tuple[float, float]:
    """Regret, and the mean distance of a random arm from the best, under late and lost feedback."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng(seed + 77)
    theta, policy = rng.uniform(0, 1, size=(10, 5)), LinUCB(10, 5, seed=seed)
    due: dict[int, list[tuple[str, float]]] = {}
    total = gap = 0.0
    for t in range(T):
        for name, reward in due.pop(t, []):
            policy.settle(name, reward)
        x = rng.uniform(0, 1, size=5)
        mean, decision = theta @ x, policy.select(x)
        total += float(mean.max() - mean[decision.arm])
        gap += float(mean.max() - mean.mean()) / T
        reward = float(mean[decision.arm] + noise.normal(0, 0.1))
        if delay == 0:
            policy.settle(decision.id, reward)
        elif noise.random() >= lost:
            due.setdefault(t + int(noise.geometric(1 / delay)), []).append((decision.id, reward))
    return total, gap


def late(seeds: int, T: int) -> list[Row]:
    calm = [stream(s, T, 0, 0) for s in range(seeds)]
    slow = [stream(s, T, 50, 0.1) for s in range(seeds)]
    bound = [r + 150 * gap for r, gap in calm]
    shares = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        theta, policy = rng.uniform(0, 1, size=(10, 5)), LinUCB(10, 5, seed=seed)
        for _ in range(300):
            x = rng.uniform(0, 1, size=5)
            decision = policy.select(x)
            policy.settle(decision.id, float(theta[decision.arm] @ x))
        x = rng.uniform(0, 1, size=5)
        shares.append(float(np.bincount([policy.select(x).arm for _ in range(100)]).max()) / 100)
    return [
        Row.from_samples(
            f"regret, feedback 50 rounds late on average and 10 % lost, T {T:,}", [r for r, _ in slow], bound,
            "", "lower", "regret without delay + 150 mean gaps", target=1.0,
            claim="delay costs at most a constant",
        ),
        Row.from_samples(
            "largest share of one arm in a burst of 100 equal requests", shares, [0.7] * seeds, "", "lower",
            "70 % of what a policy without pending rows gives (1.0)", target=1.0,
            claim="waiting decisions spread a burst",
        ),
    ]  # fmt: skip


def switched(seed: int, T: int, change: PageHinkley | None, restart: bool) -> float:
    rng, total = np.random.default_rng(seed), 0.0
    both = rng.normal(size=(2, 5, 4)) / 2
    policy = LinUCB(5, 4, change=change, seed=seed)
    for t in range(T):
        if restart and t == T // 2:
            policy = LinUCB(5, 4, seed=seed)
        x = rng.normal(size=4)
        mean, decision = both[int(t >= T // 2)] @ x, policy.select(x)
        total += float(mean.max() - mean[decision.arm]) if t >= T // 2 else 0.0
        policy.settle(decision.id, float(mean[decision.arm] + rng.normal(0, 0.1)))
    return total


def changes(seeds: int, T: int) -> list[Row]:
    oracle = [1.5 * switched(s, T, None, True) for s in range(seeds)]
    noticed = [switched(s, T, PageHinkley(reset="all"), False) for s in range(seeds)]
    blind = [switched(s, T, None, False) for s in range(seeds)]
    name = f"regret after all coefficients changed, T {T:,}"
    return [
        Row.from_samples(
            f"{name}, Page-Hinkley", noticed, oracle, "", "lower", "1.5 x an oracle's restart", target=1.0,
            claim="a noticed change costs at most 1.5 x an oracle's restart",
        ),
        Row.from_samples(f"{name}, without a test", blind, oracle, "", "lower", "1.5 x an oracle's restart"),
    ]  # fmt: skip


def killed(kills: int, seed: int, progress: Progress) -> Row:
    """A worker killed with signal 9 again and again, beside one that nobody disturbs."""
    rng, done, struck, rounds = np.random.default_rng(seed), 0, 0, kills * 25
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("killed", "calm")]
        for folder in folders:
            folder.mkdir()
        while done < rounds:
            stop = done + int(rng.integers(1, 30)) if struck < kills else rounds
            child = subprocess.Popen(
                [sys.executable, str(WORKER), str(folders[0]), str(done), str(rounds)],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert child.stdout is not None
            for line in child.stdout:
                done = int(line)
                if done >= stop and struck < kills:
                    time.sleep(float(rng.uniform(0, 0.002)))
                    child.send_signal(signal.SIGKILL)
                    struck += 1
                    break
            child.stdout.close()
            if child.wait() not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the worker ended with {child.returncode}")
            progress("kill -9", struck, kills)
        subprocess.run(
            [sys.executable, str(WORKER), str(folders[1]), "0", str(rounds)], check=True, capture_output=True
        )
        policies = []
        for folder in folders:
            with Ledger(folder / "l.db", WallClock()) as ledger:
                policies.append(LinUCB(4, 6, seed=3, ledger=ledger, snapshot=folder / "s.npz"))
    one, other = policies
    wrong = int(abs(sum(one.stats(k).count for k in range(4)) - rounds)) + one.waiting
    equal = all(
        np.array_equal(getattr(one._models, n), getattr(other._models, n)) for n in one._models.ARRAYS
    )
    return Row(
        f"feedback lost or counted twice, {struck} kills in {rounds:,} rounds", wrong + (not equal), 0, "",
        "lower", "none", claim="every feedback counts once, the arrays are the same to the bit", target=1.0,
        note="arrays equal to the bit" if equal else "ARRAYS DIFFER",
    )  # fmt: skip


def threads(seconds: float) -> list[Row]:
    """8 choosing and 2 writing; then 8 reading and 2 writing, whose every version is replayed."""
    K, d = 20, 32

    def together(policy: LinUCB, act: Callable[[list[Any]], None]) -> tuple[list[Any], list[Any]]:
        stop, guard, log = threading.Event(), threading.Lock(), []
        found: list[list[Any]] = [[] for _ in range(8)]

        def write(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while not stop.is_set():
                change = int(rng.integers(K)), rng.normal(size=d), float(rng.normal())
                with guard:
                    policy.update(*change)
                    log.append(change)
                time.sleep(0.002)

        def repeat(mine: list[Any]) -> None:
            while not stop.is_set():
                act(mine)

        team = [threading.Thread(target=repeat, args=(mine,)) for mine in found]
        team += [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
        for thread in team:
            thread.start()
        time.sleep(seconds / 2)
        stop.set()
        for thread in team:
            thread.join()
        return [x for mine in found for x in mine], log

    x = np.random.default_rng(0).normal(size=d)
    choosing = LinUCB(K, d)

    def choose(mine: list[Any]) -> None:
        begun = time.thread_time()
        decision = choosing.select(x)
        mine.append(time.thread_time() - begun)
        choosing.settle(decision.id, 1.0)

    taken, _ = together(choosing, choose)
    policy, tick = LinUCB(K, d), [0]

    def read(mine: list[Any]) -> None:
        estimate = policy.estimate(x)
        tick[0] += 1
        if tick[0] % 20 == 0:  # kept: enough to compare, little enough to hold
            mine.append((estimate.version, estimate.optimistic))

    seen, log = together(policy, read)
    wanted: dict[int, list[np.ndarray]] = {}
    for version, optimistic in seen:
        wanted.setdefault(version, []).append(optimistic)
    alone, torn = LinUCB(K, d), 0
    for change in (None, *log):
        if change is not None:
            alone.update(*change)
        if alone.version in wanted:
            truth = alone.estimate(x).optimistic
            torn += sum(not np.array_equal(truth, o) for o in wanted[alone.version])
    return [
        Row(
            "CPU time of a choice, 99th percentile, 8 choosing threads and 2 writing, dim 32, 20 arms",
            float(np.percentile(taken, 99)) * 1e3, 1.0, "ms", "lower", "bound of the card", target=1.0,
            claim="under 1 ms of CPU time", samples=len(taken),
        ),
        Row(
            f"torn reads, {len(seen):,} estimates of {len(wanted):,} versions checked", torn, 0, "", "lower",
            "none", claim="no reader sees half a change", target=1.0, samples=max(1, len(seen)),
        ),
    ]  # fmt: skip


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    rows = same_choices(400 if full else 50, seed)
    rows += speed(32, 20, 9 if full else 2, True, seed, progress)
    if full:
        rows += speed(64, 100, 3, False, seed, progress)
    rows.append(batch(15 if full else 3))
    rows += regret(20 if full else 2, 10_000 if full else 600)
    rows.append(coverage(100 if full else 5, 400 if full else 60))
    rows += late(10 if full else 2, 4_000 if full else 500)
    rows += changes(10 if full else 2, 4_000 if full else 1_500)
    rows.append(killed(200 if full else 2, seed, progress))
    rows += threads(60.0 if full else 1.0)
    return Report("bandit-core", "full" if full else "smoke", tuple(rows), environment(), seed)
