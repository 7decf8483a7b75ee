"""The bandit core: exact against direct solves, exactly once under kills, whole under threads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.bandits import (
    Constant,
    FeedbackError,
    Ledger,
    LedgerInUse,
    LinTS,
    LinUCB,
    PageHinkley,
    Radius,
    RidgeStats,
)
from sharewell.simulation import VirtualClock


def assert_solved(policy: LinUCB, gram: np.ndarray, moment: np.ndarray, arm: int = 0) -> None:
    """theta, inverse and log determinant of an arm equal those of a direct solve."""
    models, A = policy._models, gram + policy.lam * np.eye(len(gram))
    inverse = np.linalg.inv(A)
    assert np.abs(models.inverse[arm] - inverse).max() <= 1e-8 * max(1, np.abs(inverse).max())
    assert np.abs(models.theta[arm] - np.linalg.solve(A, moment)).max() <= 1e-8
    assert models.logdet[arm] == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10, abs=1e-8)


@pytest.mark.parametrize(("dim", "steps"), [(1, 5000), (8, 5000), (64, 5000), (128, 600)])
def test_thousands_of_updates_batches_and_merges_equal_a_direct_solve(dim: int, steps: int):
    rng = np.random.default_rng(dim)
    policy = LinUCB(1, dim, lam=0.7)
    truth = RidgeStats.zeros(dim)
    for step in range(steps):
        n = 1 if step % 50 else int(rng.integers(2, dim + 3))
        X, y, w = rng.normal(size=(n, dim)), rng.normal(size=n), rng.uniform(0, 2, n)
        if step % 97 == 5:
            extra = RidgeStats.zeros(dim).add_batch(X, y, w)
            policy.merge(extra)
        elif step % 211 == 7:  # what was added is taken away again
            extra = RidgeStats.zeros(dim).add_batch(X, y, w)
            policy.merge(extra)
            policy.merge(RidgeStats.zeros(dim) - extra)
            continue
        else:
            policy.update(0, X, y, w)
        truth = truth.add_batch(X, y, w)
    assert_solved(policy, truth.gram, truth.moment)
    assert policy.stats().count == pytest.approx(truth.count)
    assert policy.stats().square == pytest.approx(truth.square)


def test_forgetting_keeps_the_ridge_whole():
    rng, f, d = np.random.default_rng(0), 0.95, 6
    policy, gram, moment = LinUCB(1, d, forget=f), np.zeros((d, d)), np.zeros(d)
    for _ in range(400):
        x, y = rng.normal(size=d), float(rng.normal())
        policy.update(0, x, y)
        gram, moment = f * gram + np.outer(x, x), f * moment + y * x
    assert_solved(policy, gram, moment)
    for _ in range(2000):
        policy.update(0, np.zeros(d), 0.0)
    assert_solved(policy, np.zeros((d, d)), np.zeros(d))


def test_a_window_knows_only_the_newest_rows():
    rng, d = np.random.default_rng(0), 5
    policy, X, y = LinUCB(1, d, window=40), rng.normal(size=(500, d)), rng.normal(size=500)
    for x, reward in zip(X, y, strict=True):
        policy.settle(policy.select(x).id, reward)
    assert_solved(policy, X[-40:].T @ X[-40:], X[-40:].T @ y[-40:])


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_late_feedback_lands_with_the_weight_that_forgetting_left(data: Any):
    """Any order of choices, feedback and forgetting equals sums written out by hand."""
    f = data.draw(st.sampled_from([1.0, 0.9]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    policy, rows = LinUCB(2, 3, forget=f, seed=1), []  # [id, arm, x, weight, y]
    for act in data.draw(st.lists(st.sampled_from("ccs"), min_size=1, max_size=40)):
        waiting = [row for row in rows if row[4] is None]
        if act == "c" or not waiting:
            decision = policy.select(rng.normal(size=3))
            for row in rows:
                row[3] *= f if row[1] == decision.arm else 1.0
            rows.append([decision.id, decision.arm, decision.x, 1.0, None])
        else:
            row = waiting[int(rng.integers(len(waiting)))]
            row[4] = float(rng.normal())
            assert policy.settle(row[0], row[4])
    for arm in (0, 1):
        mine = [row for row in rows if row[1] == arm]
        gram = sum((w * np.outer(x, x) for _, _, x, w, _ in mine), np.zeros((3, 3)))
        moment = sum((w * y * x for _, _, x, w, y in mine if y is not None), np.zeros(3))
        assert_solved(policy, gram, moment, arm)


def test_hybrid_equals_one_ridge_regression_over_all_coefficients():
    K, d, s, lam = 4, 3, 2, 0.5
    rng, policy = np.random.default_rng(3), LinUCB(K, d, "hybrid", Constant(1.0), lam, shared_dim=s)
    size = s + K * d
    A, b = lam * np.eye(size), np.zeros(size)

    def whole(row: np.ndarray, arm: int) -> np.ndarray:
        out = np.zeros(size)
        out[:s] = row[:s]
        out[s + arm * d : s + (arm + 1) * d] = row[s:]
        return out

    for _ in range(120):
        decision = policy.select(rng.normal(size=(K, s + d)))
        reward = float(rng.normal())
        policy.settle(decision.id, reward)
        row = whole(decision.x, decision.arm)
        A, b = A + np.outer(row, row), b + reward * row
    X, theta, inverse = rng.normal(size=(K, s + d)), np.linalg.solve(A, b), np.linalg.inv(A)
    found = policy.estimate(X)
    for arm in range(K):
        row = whole(X[arm], arm)
        assert found.mean[arm] == pytest.approx(row @ theta, abs=1e-9)
        assert found.width[arm] == pytest.approx(np.sqrt(row @ inverse @ row), abs=1e-9)
    assert policy._models.logdet[0] == pytest.approx(np.linalg.slogdet(A)[1])


@pytest.mark.parametrize("kind", ["disjoint", "shared"])
def test_a_batch_is_estimated_as_its_requests_are(kind: Any):
    rng, policy = np.random.default_rng(0), LinUCB(4, 3, kind)
    shape = (3,) if kind == "disjoint" else (4, 3)
    for _ in range(30):
        policy.settle(policy.select(rng.normal(size=shape)).id, float(rng.normal()))
    X = rng.normal(size=(7, *shape))
    batch = policy.estimate(X)
    for i in range(7):
        assert np.allclose(batch.optimistic[i], policy.estimate(X[i]).optimistic, atol=1e-12)


def test_statistics_are_a_commutative_monoid_that_travels():
    rng = np.random.default_rng(0)
    a, b = (RidgeStats.zeros(4).add_batch(rng.normal(size=(9, 4)), rng.normal(size=9)) for _ in "ab")
    assert np.array_equal((a + b).gram, (b + a).gram)
    assert np.allclose((a + b - b).moment, a.moment)
    back = RidgeStats.from_bytes(a.to_bytes())
    assert np.array_equal(back.gram, a.gram) and back.count == a.count and back.square == a.square
    for place in (0, 5, 60, len(a.to_bytes()) - 1):
        damaged = bytearray(a.to_bytes())
        damaged[place] ^= 1
        with pytest.raises(ValueError):
            RidgeStats.from_bytes(bytes(damaged))
    noisy = a.noisy(3.0, rng)
    assert np.array_equal(noisy.gram, noisy.gram.T)
    policy = LinUCB(1, 4)
    policy.set_stats(RidgeStats(np.diag([-50.0, 1, 1, 1]), np.ones(4)))  # noise may do this
    assert np.isfinite(policy.estimate(np.ones(4)).width).all()


def world(seed: int, K: int = 20, d: int = 10) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=d)
    return rng, theta / np.linalg.norm(theta)


def test_regret_stays_below_the_closed_bound_and_the_radius_holds_the_truth():
    d, K, T, inside = 10, 20, 1500, 0
    for seed in range(4):
        rng, theta = world(seed)
        for width in (Constant(1.0), Radius(0.1, 1.0, 0.05)):
            policy, regret, held = LinUCB(K, d, "shared", width, seed=seed), 0.0, True
            for t in range(T):
                X = rng.normal(size=(K, d)) / np.sqrt(d)
                decision, values = policy.select(X), X @ theta
                regret += float(values.max() - values[decision.arm])
                policy.settle(decision.id, float(values[decision.arm] + rng.normal(0, 0.1)))
                if t % 50 == 0:
                    gap = policy.coefficients()[0] - theta
                    A = policy.stats().gram + np.eye(d)
                    logdet = policy._models.logdet
                    held &= bool(np.sqrt(gap @ A @ gap) <= Radius(0.1, 1.0, 0.05).factor(logdet, d, 1.0)[0])
            assert regret / (d * np.sqrt(T)) <= 1.0
            inside += held
    assert inside == 8


def test_a_decision_that_waits_makes_its_arm_less_hoped_for():
    rng = np.random.default_rng(0)
    policy = LinUCB(3, 4, seed=1)
    for arm in range(3):
        policy.update(arm, rng.uniform(0, 1, size=(20, 4)), rng.uniform(1, 2, 20))
    x = rng.uniform(0, 1, size=4)
    for _ in range(20):
        before = policy.estimate(x).optimistic
        arm = policy.select(x).arm
        after = policy.estimate(x).optimistic
        others = np.arange(3) != arm
        assert after[arm] < before[arm] and np.array_equal(after[others], before[others])


def regret_after_a_switch(change: PageHinkley | None) -> float:
    K, d, T, total = 5, 4, 3000, 0.0
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, K, d)) / np.sqrt(d)
    policy = LinUCB(K, d, change=change, seed=1)
    for t in range(T):
        theta, x = (first if t < T // 2 else second), rng.normal(size=d)
        decision, values = policy.select(x), theta @ x
        total += float(values.max() - values[decision.arm]) if t >= T // 2 else 0.0
        policy.settle(decision.id, float(values[decision.arm] + rng.normal(0, 0.1)))
    assert change is None or policy.counters["changes"] >= 1
    return total


def test_a_noticed_change_costs_a_tenth_of_an_unnoticed_one():
    noticed = regret_after_a_switch(PageHinkley(reset="all"))
    assert noticed <= 0.1 * regret_after_a_switch(None)


def test_a_quiet_world_raises_no_alarm():
    rng = np.random.default_rng(0)
    policy = LinUCB(1, 4, change=PageHinkley())
    for x in rng.normal(size=(4000, 4)):
        policy.settle(policy.select(x).id, float(x.sum() + rng.normal()))
    assert policy.counters["changes"] == 0


def test_thompson_draws_have_the_mean_and_covariance_of_the_posterior():
    rng = np.random.default_rng(0)
    policy = LinTS(3, 4, "shared", Constant(0.5), seed=3)
    policy.update(0, rng.normal(size=(20, 4)), rng.normal(size=20))
    X = rng.normal(size=(3, 4))
    estimate, covariance = policy._estimate(X, True)
    scores = []
    for i in range(20_000):
        policy._choices = i
        scores.append(policy._score(estimate, covariance, 0.0, np.ones(3, bool))[0])
    inverse = np.linalg.inv(policy.stats().gram + np.eye(4))
    assert np.allclose(np.mean(scores, axis=0), X @ policy.coefficients()[0], atol=0.02)
    assert np.allclose(np.cov(np.array(scores).T), 0.25 * X @ inverse @ X.T, atol=0.01)


def test_masks_costs_ids_and_propensities():
    policy = LinUCB(3, 2, epsilon=0.3, seed=4)
    mask = np.array([False, True, True])
    decisions = [policy.select(np.ones(2), mask, cost=np.array([0, 5.0, 0])) for _ in range(200)]
    assert {d.arm for d in decisions} == {1, 2}
    assert {round(d.propensity, 6) for d in decisions} == {0.85, 0.15}
    share = np.mean([d.arm == 1 for d in decisions])
    assert 0.08 < share < 0.24
    first = policy.select(np.ones(2), decision_id="request-1")
    assert policy.select(np.zeros(2), decision_id="request-1") is first
    seeds = [LinUCB(50, 2, seed=s).select(np.ones(2)).arm for s in (0, 0, 1, 2)]
    assert seeds[0] == seeds[1] and len(set(seeds)) > 1  # ties are decided by a seeded draw


def test_feedback_counts_once_in_parts_and_chains():
    policy = LinUCB(1, 1)
    one = policy.select([1.0])  # pyright: ignore[reportArgumentType]
    assert policy.settle(one.id, 0.5, final=False, part="a")
    assert not policy.settle(one.id, 0.5, final=False, part="a")
    assert policy.settle(one.id, 1.0)
    assert not policy.settle(one.id, 1.0)
    assert policy.stats().moment[0] == 1.5 and policy.stats().count == 1
    two, three = (policy.select(np.ones(1)) for _ in range(2))
    with pytest.raises(FeedbackError) as error:
        policy.settle_chain([two.id, "never"], 1.0)
    assert error.value.kind == "unknown" and policy.stats().count == 1
    assert policy.settle_chain([two.id, three.id], 2.0, [0.75, 0.25])
    assert policy.stats().moment[0] == 3.5 and policy.waiting == 0


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p.select(np.ones(3)), "X must have shape [2], got [3]"),
        (lambda p: p.select([np.nan, 1]), "X must be finite"),
        (lambda p: p.update(2, [1, 1], 1.0), "arm must be in [0, 1], got 2"),
        (lambda p: p.update(0, [1, 1], np.inf), "y must be finite"),
        (lambda p: p.update(0, [1, 1], 1.0, -1.0), "weights must be at least 0, got -1.0"),
        (lambda p: p.select(np.ones(2), np.zeros(2, bool)), "mask must allow at least one arm"),
        (lambda p: p.select(np.ones(2), cost=[1.0, np.nan]), "cost must be finite"),
        (lambda p: p.settle(p.select(np.ones(2)).id, np.nan), "reward must be finite"),
        (lambda p: p.settle_chain(["a", "b"], 1.0, [0.5, 0.6]), "sum 1"),
        (lambda p: p.merge(RidgeStats.zeros(3)), "stats must have dim 2, got 3"),
        (lambda p: LinUCB(0, 2), "n_arms must be in [1, 100000], got 0"),
        (lambda p: LinUCB(2, 2, "other"), "kind must be disjoint, shared or hybrid"),  # pyright: ignore
        (lambda p: LinUCB(2, 2, forget=0), "forget must be in (0, 1]"),
        (lambda p: LinUCB(2, 2, "hybrid"), "shared_dim must be above 0 for hybrid"),
        (lambda p: Radius(delta=1), "delta must be in (0, 1)"),
        (lambda p: Constant(-1), "alpha must be finite and at least 0"),
        (lambda p: PageHinkley(burn_in=0), "burn_in must be at least 1"),
        (lambda p: p.expire(), "expire needs a ledger with timeout_s"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Any, told: str):
    policy = LinUCB(2, 2)
    policy.update(0, np.ones(2), 1.0)
    before = policy.stats()
    with pytest.raises(ValueError) as error:
        call(policy)
    assert told in str(error.value)
    assert np.array_equal(policy.stats().moment, before.moment)


@pytest.mark.parametrize("on_timeout", [None, -1.0])
def test_a_decision_without_feedback_expires(tmp_path: Path, on_timeout: float | None):
    clock = VirtualClock(unix_start=1e9)
    with Ledger(tmp_path / "l.db", clock, timeout_s=60, on_timeout=on_timeout) as ledger:
        policy = LinUCB(1, 2, ledger=ledger)
        late = policy.select(np.array([1.0, 2.0]))
        clock.advance(61)
        fresh = policy.select(np.array([3.0, 0.0]))
        assert policy.expire() == 1
        with pytest.raises(FeedbackError) as error:
            policy.settle(late.id, 1.0)
        assert error.value.kind == "expired"
        policy.settle(fresh.id, 2.0)
        rows = [(fresh.x, 2.0)] + ([] if on_timeout is None else [(late.x, on_timeout)])
        assert_solved(policy, sum(np.outer(x, x) for x, _ in rows), sum(y * x for x, y in rows))  # pyright: ignore


def same_arrays(a: LinUCB, b: LinUCB) -> bool:
    names = a._models.ARRAYS
    return all(np.array_equal(getattr(a._models, n), getattr(b._models, n)) for n in names)


@pytest.mark.parametrize("option", [{}, {"forget": 0.98}, {"window": 20}, {"change": PageHinkley(burn_in=5)}])
@pytest.mark.parametrize("kind", ["disjoint", "shared", "hybrid"])
def test_a_snapshot_and_the_events_after_it_give_the_same_bits(tmp_path: Path, kind: Any, option: Any):
    shared = 2 if kind == "hybrid" else 0
    shape = (3,) if kind == "disjoint" else (4, 3 + shared)
    options = {"kind": kind, "shared_dim": shared, "seed": 7, **option}
    rng, clock = np.random.default_rng(0), VirtualClock()
    with Ledger(tmp_path / "l.db", clock, timeout_s=5) as ledger:
        policy, open_ids = LinUCB(4, 3, ledger=ledger, **options), []
        for i in range(160):
            open_ids.append(policy.select(rng.normal(size=shape)).id)
            if i % 3:
                policy.settle(open_ids.pop(int(rng.integers(len(open_ids)))), float(rng.normal()))
            if i == 90:
                policy.snapshot(tmp_path / "s.npz")
            clock.advance(0.05)
            if i % 40 == 0:
                policy.expire()
                open_ids = [n for n in open_ids if n in policy._waiting]
    for snapshot in (tmp_path / "s.npz", None):
        with Ledger(tmp_path / "l.db", clock, timeout_s=5) as ledger:
            back = LinUCB(4, 3, ledger=ledger, snapshot=snapshot, **options)
            assert same_arrays(policy, back)
            assert list(back._waiting) == list(policy._waiting) and back.version == policy.version
            x = rng.normal(size=shape)
            assert np.array_equal(back.estimate(x).optimistic, policy.estimate(x).optimistic)
            assert back.counters == policy.counters


def test_a_ledger_has_one_owner_and_one_policy(tmp_path: Path):
    with Ledger(tmp_path / "l.db", VirtualClock()) as ledger:
        LinUCB(2, 2, ledger=ledger)
        with pytest.raises(LedgerInUse):
            Ledger(tmp_path / "l.db", VirtualClock())
    with Ledger(tmp_path / "l.db", VirtualClock()) as ledger, pytest.raises(ValueError, match="settings"):
        LinUCB(3, 2, ledger=ledger)
    (tmp_path / "text").write_text("no ledger at all, but long enough to be read as a header of pages" * 9)
    with pytest.raises(ValueError, match="path must be a ledger"):
        Ledger(tmp_path / "text", VirtualClock())


def test_a_torn_tail_loses_only_the_last_events(tmp_path: Path):
    with Ledger(tmp_path / "l.db", VirtualClock()) as ledger:
        policy = LinUCB(1, 2, ledger=ledger)
        for i in range(20):
            policy.update(0, np.array([1.0, i]), 1.0)
        for name in ("l.db", "l.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"torn{name[1:]}")
    wal = tmp_path / "torn.db-wal"
    os.truncate(wal, wal.stat().st_size - 100)
    with Ledger(tmp_path / "torn.db", VirtualClock()) as ledger:
        count = int(LinUCB(1, 2, ledger=ledger).stats().count)
    assert 15 <= count < 20


WORKER = Path(__file__).with_name("killed_worker.py")


def test_feedback_counts_exactly_once_under_kill_9(tmp_path: Path):
    rounds, rng, done, kills = 300, np.random.default_rng(0), 0, 0
    while done < rounds:
        command = [sys.executable, str(WORKER), str(tmp_path), str(done), str(rounds)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        stop = done + int(rng.integers(20, 90)) if kills < 5 else rounds + 1
        for line in child.stdout:
            done = int(line)
            if done >= stop:
                time.sleep(float(rng.uniform(0, 0.002)))  # anywhere within the next round
                child.send_signal(signal.SIGKILL)
                kills += 1
                break
        rest = [int(word) for word in child.stdout.read().split() if word.isdigit()]
        done = max([done, *rest[:-1]])  # its last number may be cut off; asking again is harmless
        child.stdout.close()
        assert child.wait() in (0, -signal.SIGKILL)
    assert kills == 5
    calm = tmp_path / "calm"
    calm.mkdir()
    subprocess.run(
        [sys.executable, str(WORKER), str(calm), "0", str(rounds)], check=True, capture_output=True
    )
    policies = []
    for folder in (tmp_path, calm):
        with Ledger(folder / "l.db", VirtualClock()) as ledger:
            policies.append(LinUCB(4, 6, seed=3, ledger=ledger, snapshot=folder / "s.npz"))
    killed, calmly = policies
    assert sum(killed.stats(arm).count for arm in range(4)) == rounds and killed.waiting == 0
    assert same_arrays(killed, calmly)


def test_no_reader_sees_half_a_change():
    """Every estimate that a thread got is, to the last bit, that of its version in a lone replay."""
    d, K, X = 16, 6, np.random.default_rng(1).normal(size=16)
    policy, log, seen = LinUCB(K, d), [], []
    stop, guard = threading.Event(), threading.Lock()

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(400):
            arm, x, y = int(rng.integers(K)), rng.normal(size=d), float(rng.normal())
            with guard:  # orders the log, not the readers
                policy.update(arm, x, y)
                log.append((arm, x, y))

    def read() -> None:
        while not stop.is_set():
            seen.append(policy.estimate(X))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        readers = [threading.Thread(target=read) for _ in range(4)]
        writers = [threading.Thread(target=write, args=(s,)) for s in (1, 2)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    alone, versions = LinUCB(K, d), {}
    versions[0] = alone.estimate(X)
    for arm, x, y in log:
        alone.update(arm, x, y)
        versions[alone.version] = alone.estimate(X)
    assert len({e.version for e in seen}) >= 3
    assert all(np.array_equal(e.optimistic, versions[e.version].optimistic) for e in seen)
