"""MOHAF against brute force, its own flat scan, and what a second-price auction must charge."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from sharewell.allocation import (
    AuctionStream,
    BestFit,
    DamagedFile,
    DamagedLog,
    FirstPriceAuction,
    GreedyAuction,
    LPBound,
    Mohaf,
    MohafConfig,
    Objective,
    Problem,
    ProblemError,
    RandomAuction,
    Request,
    Resource,
    check_allocation,
    explain,
    jain,
    metrics,
    objective_value,
    read_tables,
)
from sharewell.allocation.core import Allocation

STILL = MohafConfig(price_eta=0.0)  # prices do not move: F is a function of the set of pairs alone


def small(rng: np.random.Generator, unit: bool) -> Problem:
    n, m = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    dims = 1 if unit else 2
    return Problem(
        demand=np.ones((n, 1)) if unit else rng.lognormal(-0.5, 0.7, (n, dims)),
        budget=rng.uniform(1, 8, n),
        group=rng.integers(0, 3, n),
        min_reliability=rng.uniform(0, 0.8, n),
        min_availability=rng.uniform(0, 0.8, n),
        max_latency_ms=rng.uniform(20, 150, n),
        request_location=rng.uniform(0, 100, (n, 2)),
        capacity=np.ones((m, 1)) if unit else rng.uniform(0.4, 3, (m, dims)),
        cost=rng.uniform(0.5, 3, m),
        reliability=rng.uniform(0.5, 1, m),
        availability=rng.uniform(0.5, 1, m),
        energy=rng.uniform(0.1, 1, m),
        resource_location=rng.uniform(0, 100, (m, 2)),
    )


def optimum(problem: Problem) -> float:
    """max F over all assignments that keep capacities, floors and budgets, at list cost."""
    objective, n = Objective(), len(problem.budget)
    allowed = [np.flatnonzero(problem.allowed(i, problem.cost)) for i in range(n)]
    utility = [problem.utilities(i, problem.cost * problem.size[i], objective) for i in range(n)]
    share, best = problem.size / problem.size.mean(), 0.0
    most = [float(utility[i][allowed[i]].max(initial=0.0)) for i in range(n)]
    ahead = [sum(most[i:]) for i in range(n + 1)]
    groups = len(problem.group_size)
    left = [np.bincount(problem.group[i:], share[i:], groups) for i in range(n + 1)]

    def go(i: int, room: np.ndarray, total: float, served: np.ndarray) -> None:
        nonlocal best
        fair = float(np.sqrt(problem.group_size * (served + left[i])).sum())
        if total + ahead[i] + objective.w_fair * fair <= best:
            return  # not even all the others at their best
        if i == n:
            best = max(best, total + objective.w_fair * float(np.sqrt(problem.group_size * served).sum()))
            return
        go(i + 1, room, total, served)
        for j in allowed[i]:
            if (problem.demand[i] <= room[j]).all():
                after, got = room.copy(), served.copy()
                after[j] -= problem.demand[i]
                got[problem.group[i]] += share[i]
                go(i + 1, after, total + float(utility[i][j]), got)

    go(0, problem.capacity.copy(), 0.0, np.zeros(len(problem.group_size)))
    return best


def test_greedy_is_near_the_optimum_and_never_below_half_with_unit_capacities():
    rng = np.random.default_rng(0)
    ratios = {True: [], False: []}
    for k in range(500):
        unit = k % 2 == 0
        problem = small(rng, unit)
        allocation = Mohaf(STILL).solve(problem)
        check_allocation(problem, allocation)
        best = optimum(problem)
        if best == 0:
            assert (allocation.assign < 0).all()
            continue
        ratios[unit].append(objective_value(problem, allocation, Objective()) / best)
        assert ratios[unit][-1] <= 1 + 1e-9
    assert min(ratios[True]) >= 0.5
    assert np.mean(ratios[True]) >= 0.9 and np.mean(ratios[False]) >= 0.9
    assert len(ratios[True]) > 150 and len(ratios[False]) > 150


def test_enumeration_keeps_its_guarantee_on_a_knapsack():
    rng = np.random.default_rng(1)
    greedy, enumerated = [], []
    for _ in range(25):
        base = small(rng, unit=False)
        problem = replace(
            base, demand=base.demand[:, :1], capacity=base.capacity[:1, :1], cost=base.cost[:1],
            reliability=base.reliability[:1], availability=base.availability[:1], energy=base.energy[:1],
            resource_location=base.resource_location[:1],
        )  # fmt: skip
        best = optimum(problem)
        if best > 0:
            for config, out in ((STILL, greedy), (replace(STILL, guarantee="enumerate"), enumerated)):
                out.append(objective_value(problem, Mohaf(config).solve(problem), Objective()) / best)
    assert min(enumerated) >= 1 - 1 / np.e and min(greedy) >= (1 - 1 / np.e) / 2
    assert np.mean(enumerated) >= np.mean(greedy)
    with pytest.raises(ValueError, match="at most 60 requests"):
        Mohaf(replace(STILL, guarantee="enumerate")).solve(Problem.synthetic(61, 8))


def test_the_hierarchy_changes_nothing_but_the_work():
    for seed in range(50):
        problem = Problem.synthetic(500, 200, 0.28 if seed % 2 else 0.6, seed)
        tree, flat = (Mohaf(MohafConfig(hierarchy=h)).solve(problem) for h in (True, False))
        assert tree.stats["clusters"] > 1 and flat.stats["clusters"] == 0
        np.testing.assert_array_equal(tree.assign, flat.assign)
        np.testing.assert_array_equal(tree.payment, flat.payment)
        np.testing.assert_array_equal(tree.price, flat.price)
        assert tree.stats["pairs"] < flat.stats["pairs"]
        if seed < 3:
            check_allocation(problem, tree)


def test_equal_resources_are_clustered_and_ties_go_to_the_lowest():
    problem = Problem.from_arrays(
        demand=np.ones((40, 1)), budget=np.full(40, 9.0), capacity=np.full((150, 1), 1.0), cost=np.ones(150)
    )
    tree, flat = (Mohaf(MohafConfig(hierarchy=h, leaf=8)).solve(problem) for h in (True, False))
    np.testing.assert_array_equal(tree.assign, flat.assign)
    assert sorted(tree.assign) == list(range(40)) and tree.stats["clusters"] > 1


def test_the_critical_payment_is_the_second_price():
    for bids in ([7.0, 4.0], [3.0, 5.0, 4.5], [2.0, 9.0, 2.5, 8.0]):
        problem = Problem.from_arrays(
            demand=np.ones((len(bids), 1)),
            budget=np.array(bids),
            capacity=np.ones((1, 1)),
            cost=np.array([1.0]),
        )
        allocation = Mohaf(MohafConfig(payment="critical", price_eta=0.0)).solve(problem)
        winner = int(np.argmax(bids))
        assert allocation.assign[winner] == 0 and (allocation.assign >= 0).sum() == 1
        # In one group, of one size, the greater budget has the greater gain: the runner-up's bid is critical.
        assert allocation.payment[winner] == pytest.approx(sorted(bids)[-2], rel=1e-8)
    alone = Problem.from_arrays(
        demand=np.ones((1, 1)), budget=np.array([5.0]), capacity=np.ones((1, 1)), cost=np.array([2.0])
    )
    assert Mohaf(MohafConfig(payment="critical", price_eta=0.0)).solve(alone).payment[0] == pytest.approx(2.0)


def test_bidding_less_than_the_truth_never_helps_under_critical_payments():
    config = MohafConfig(payment="critical", price_eta=0.0)
    problem = Problem.synthetic(14, 3, 0.3, seed=4)
    honest = Mohaf(config).solve(problem)
    for i in range(14):
        for factor in (0.3, 0.7, 0.95, 1.5):
            budget = problem.budget.copy()
            budget[i] *= factor
            lied = Mohaf(config).solve(replace(problem, budget=budget))
            gain = problem.budget[i] - lied.payment[i] if lied.assign[i] >= 0 else 0.0
            truth = problem.budget[i] - honest.payment[i] if honest.assign[i] >= 0 else 0.0
            assert gain <= truth + 1e-6 * problem.budget[i]


def test_prices_follow_load_within_their_clip_and_winners_pay_at_most_their_budget():
    config = MohafConfig()
    problem = Problem.synthetic(600, 150, 0.2, seed=2)
    allocation = Mohaf(config).solve(problem)
    used = np.zeros_like(problem.capacity)
    np.add.at(used, allocation.assign[allocation.assign >= 0], problem.demand[allocation.assign >= 0])
    load = (used / problem.capacity).max(axis=1)
    expected = problem.cost * np.clip(1 + 0.5 * (load - 0.7), 0.5, 2)
    np.testing.assert_allclose(allocation.price, expected, rtol=1e-9)
    won = allocation.assign >= 0
    assert (allocation.payment[won] <= problem.budget[won]).all() and (allocation.payment[won] > 0).all()
    assert not allocation.payment[~won].any() and not allocation.utility[~won].any()
    first = Mohaf(MohafConfig(payment="first")).solve(problem)
    np.testing.assert_array_equal(first.payment[won], problem.budget[won])


def test_the_bound_is_above_the_optimum_and_above_every_mechanism():
    """The goal of 0.8 of the bound is for 3553 x 888, which the benchmark measures; 300 x 80 is coarser, and
    its seeds give 0.7997 to 0.803."""
    rng = np.random.default_rng(3)
    for _ in range(25):
        problem = small(rng, unit=False)
        bound = LPBound().solve(problem)
        assert bound.upper >= optimum(problem) - 1e-9
        # Tangents lie above the square root: the relaxation may pass the bound by what they add, no more.
        assert bound.relaxed <= bound.upper * 1.02
    problem = Problem.synthetic(300, 80, 0.28, seed=1)
    bound = LPBound(price_factor=0.65).solve(problem)
    values = []
    for mechanism in (Mohaf(), GreedyAuction(), FirstPriceAuction(), RandomAuction(1), BestFit()):
        allocation = mechanism.solve(problem)
        check_allocation(problem, allocation)
        values.append(objective_value(problem, allocation, Objective()))
    assert max(values) == values[0] <= bound.upper and values[0] >= 0.79 * bound.upper


def test_losers_count_in_the_metrics():
    problem = Problem.from_arrays(
        demand=np.ones((4, 1)), budget=np.full(4, 2.0), group=np.array([0, 0, 1, 1]),
        capacity=np.array([[2.0]]), cost=np.array([1.0]),
    )  # fmt: skip
    one_side = Allocation(np.array([0, 0, -1, -1]), problem.cost, np.array([1.0, 1, 0, 0]), np.zeros(4))
    each = Allocation(np.array([0, -1, 0, -1]), problem.cost, np.array([1.0, 0, 1, 0]), np.zeros(4))
    a, b = metrics(problem, one_side), metrics(problem, each)
    assert a["satisfied"] == b["satisfied"] == 0.5
    assert (a["jain_groups"], b["jain_groups"]) == (0.5, 1.0)
    assert a["jain_all"] == b["jain_all"] == pytest.approx(0.5)  # two of four have nothing
    assert a["utility_ratio"] == b["utility_ratio"] == pytest.approx(0.5)
    assert b["welfare"] > a["welfare"]  # fairness is concave
    assert a["revenue"] == 2.0 and a["utilisation"] == 1.0
    assert jain(np.array([1.0, 0, 0, 0])) == 0.25 and jain(np.zeros(3)) == 1.0


def test_unplaced_requests_say_why():
    problem = Problem.from_arrays(
        demand=np.array([[1.0], [5.0], [1.0], [1.0], [1.0]]),
        budget=np.array([9.0, 99.0, 0.1, 9.0, 9.0]),
        min_reliability=np.array([0, 0, 0, 0.99, 0]),
        max_latency_ms=np.array([10.0, 10, 10, 10, 10]),
        request_location=np.array([[0.0, 0], [0, 0], [0, 0], [0, 0], [500, 0]]),
        capacity=np.array([[1.0]]), cost=np.array([1.0]), reliability=np.array([0.9]),
    )  # fmt: skip
    allocation = Mohaf().solve(problem)
    assert allocation.assign.tolist() == [0, -1, -1, -1, -1]
    reasons = explain(problem, allocation)
    assert "capacity" in reasons[1] and "budget" in reasons[2]
    assert "reliability" in reasons[3] and "latency" in reasons[4]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("demand", [[1.0], [-1.0], [1.0]], "demand must be at least 0, not all 0; row 1"),
        ("demand", [[1.0], [np.nan], [1.0]], "demand .* row 1"),
        ("budget", [0.0, 1.0, 0.0], "budget must be positive; row 0, 2"),
        ("group", [0, -1, 0], "group must be a whole number from 0; row 1"),
        ("capacity", [[-1.0]], "capacity must be at least 0; row 0"),
        ("reliability", [1.5], r"reliability must be in \[0, 1\]; row 0"),
        ("cost", [np.inf], "cost must be positive; row 0"),
        ("cost", [1.0, 2.0], r"cost must have shape \(1,\)"),
        ("colour", [1.0], "unknown columns: colour"),
    ],
)
def test_a_bad_problem_names_column_and_rows(column: str, value: list, message: str):
    arrays = {
        "demand": np.ones((3, 1)),
        "budget": np.ones(3),
        "capacity": np.ones((1, 1)),
        "cost": np.ones(1),
    }
    with pytest.raises(ProblemError, match=message):
        Problem.from_arrays(**{**arrays, column: np.array(value)})


@pytest.mark.parametrize(
    "setting",
    [{"w_cost": -1}, {"leaf": 0}, {"price_eta": -0.1}, {"price_target": 2}, {"price_low": 0},
     {"payment": "none"}, {"guarantee": "all"}, {"w_cost": 0, "w_qos": 0, "w_energy": 0, "w_fair": 0}],
)  # fmt: skip
def test_bad_settings_are_named(setting: dict):
    with pytest.raises(ValueError, match=next(iter(setting)) if len(setting) == 1 else "weights"):
        MohafConfig(**setting)


# --- the stream ---


def machines(m: int, seed: int = 0) -> list[Resource]:
    p = Problem.synthetic(5, m, 0.5, seed)
    return [
        Resource(p.capacity[j].tolist(), float(p.cost[j]), 0.99, 0.99, float(p.energy[j]), (0.0, 0.0))
        for j in range(m)
    ]


def state(stream: AuctionStream) -> tuple:
    return (stream.placed, stream.waiting, stream.level.tolist(), stream.used.tolist(), stream.up.tolist())


def drive(stream: AuctionStream, events: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for k in range(events):
        kind = rng.random()
        if kind < 0.6:
            stream.submit(
                f"r{k}", Request(rng.uniform(0.02, 0.3, 2).tolist(), float(rng.uniform(0.5, 3))), now=k
            )
        elif kind < 0.75 and stream.placed:
            stream.release(str(rng.choice(list(stream.placed))), now=k)
        elif kind < 0.8:
            stream.fail(int(rng.integers(len(stream.resources))), now=k)
        elif kind < 0.85:
            stream.restore(int(rng.integers(len(stream.resources))), now=k)
        else:
            stream.epoch(now=k)
        assert not set(stream.placed) & set(stream.waiting)  # never both, never twice
        load = np.zeros_like(stream.used)
        for name, (j, _) in stream.placed.items():
            assert stream.up[j]
            load[j] += stream._requests[name].demand
        np.testing.assert_allclose(load, stream.used, atol=1e-9)
        assert (stream.used <= stream.capacity + 1e-9).all()
        assert (stream.level > 0).all()


def test_a_replayed_log_gives_the_same_state(tmp_path):
    stream = AuctionStream(machines(12), log=tmp_path / "events.db")
    drive(stream, 150, seed=1)
    assert stream.placed
    before = state(stream)
    stream.close()
    assert state(AuctionStream(machines(12), log=tmp_path / "events.db")) == before
    with pytest.raises(DamagedLog, match="other resources"):
        AuctionStream(machines(11), log=tmp_path / "events.db")


def test_a_killed_auction_replays_to_what_it_had_written(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_mohaf_auction import *\n"
        "stream = AuctionStream(machines(6), log=sys.argv[1])\n"
        "drive(stream, 60, seed=5)\n"
        "print(repr(state(stream)), flush=True)\n"
        "stream._log._db.execute('BEGIN'); stream._log._db.execute('DELETE FROM rows')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "e.db"), folder],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    assert repr(state(AuctionStream(machines(6), log=tmp_path / "e.db"))) == done.stdout.strip()


def test_a_failed_resource_returns_its_requests_and_an_id_is_placed_once():
    stream = AuctionStream([Resource([1.0], 1.0), Resource([1.0], 2.0)])
    assert stream.submit("a", Request([0.8], 9.0)) and not stream.submit("a", Request([0.1], 9.0))
    first = stream.epoch()
    assert list(first) == ["a"] and stream.epoch() == {}
    j = first["a"][0]
    assert stream.fail(j) == ["a"] and "a" in stream.waiting
    assert stream.epoch()["a"][0] == 1 - j
    assert stream.release("a") and not stream.release("a") and not stream.used.any()
    with pytest.raises(ProblemError, match="budget"):
        stream.submit("b", Request([0.1], -1.0))


# --- files ---

# In the format of the 2011 trace; made up, as the trace cannot be fetched.
TASKS = "".join(
    f"{600 * k},,{3418309 + k // 3},{k % 3},,{event},user{k % 5}=,2,{priority},{cpu},{memory},0.0004,0\n"
    for k, (event, priority, cpu, memory) in enumerate(
        [(0, 0, 0.0125, 0.0159), (0, 9, 0.0625, 0.0636), (1, 9, 0.0625, 0.0636), (0, 4, 0.125, 0.0747),
         (0, 2, 0.0063, 0.0003), (0, 11, 0.5, 0.25), (0, 1, "", ""), (4, 2, 0.1, 0.1), (0, 8, 0.02, 0.04)]
    )
)  # fmt: skip
MACHINES = (
    "0,5,0,HofLGzk1Or,0.5,0.2493\n0,6,0,HofLGzk1Or,0.5,0.4995\n0,7,0,JQ1tVQBMHB,1,1\n900,6,1,HofLGzk1Or,,\n"
)


def test_a_google_trace_becomes_requests_and_machines(tmp_path):
    tasks, machine_file = tmp_path / "part-0.csv.gz", tmp_path / "machines.csv"
    tasks.write_bytes(gzip.compress(TASKS.encode()))
    machine_file.write_text(MACHINES)
    problem = Problem.from_google_trace(tasks, machine_file)
    np.testing.assert_array_equal(problem.capacity, [[0.5, 0.2493], [1, 1]])  # machine 6 was removed
    np.testing.assert_array_equal(problem.demand[:, 0], [0.0125, 0.0625, 0.125, 0.0063, 0.5, 0.02])
    assert problem.group.tolist() == [0, 2, 1, 1, 2, 1]
    split = Problem.from_google_trace(tasks, split=0.5, seed=1)
    assert len(split.demand) == 3 and len(split.capacity) == 3
    check_allocation(problem, Mohaf().solve(problem))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASKS.replace("0.0636", "636"), r"line 2: memory request must be in \[0, 1\]"),
        (TASKS.replace(",,3418309,", ",3418309,", 1), "line 1 has 12 columns"),
        (TASKS.replace(",2,9,", ",2,x,"), "line 2: priority must be a whole number"),
        ("", "holds no submitted tasks"),
    ],
)
def test_a_bad_trace_names_the_line(text: str, message: str, tmp_path):
    file = tmp_path / "tasks.csv"
    file.write_text(text)
    with pytest.raises(DamagedFile, match=message):
        Problem.from_google_trace(file)


def test_tables_are_read_and_allocations_written(tmp_path):
    (tmp_path / "r.csv").write_text(
        "cpu,memory,budget,group,min_reliability,min_availability,max_latency_ms,x_ms,y_ms\n"
        "1,1,9,0,0,0,50,0,0\n"
    )
    (tmp_path / "m.csv").write_text(
        "cpu,memory,cost,reliability,availability,energy,x_ms,y_ms\n2,2,1,1,1,1,3,4\n"
    )
    problem = read_tables(tmp_path / "r.csv", tmp_path / "m.csv")
    assert problem.latency_ms(0)[0] == 5.0 and Mohaf().solve(problem).assign[0] == 0
    (tmp_path / "m.csv").write_text("cpu,memory\n2,2\n")
    with pytest.raises(DamagedFile, match="columns"):
        read_tables(tmp_path / "r.csv", tmp_path / "m.csv")


def test_instances_have_the_asked_tightness_and_tails():
    problem = Problem.synthetic(3553, 888, 0.28, seed=0)
    np.testing.assert_allclose(problem.capacity.sum(axis=0) / problem.demand.sum(axis=0), 0.28)
    size = np.sort(problem.size)
    assert size[-355:].sum() > 0.3 * size.sum()  # the top tenth asks for a third and more
    for a, b in itertools.pairwise([Problem.synthetic(20, 5, seed=3), Problem.synthetic(20, 5, seed=3)]):
        np.testing.assert_array_equal(a.demand, b.demand)
