"""G-Rank in simulated networks with and without attacks, and over 100 real peers; its cost on a large log."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from sharewell.allocation import (
    ClickLog,
    GRank,
    GRankConfig,
    Identity,
    Peer,
    SimConfig,
    Simulation,
    ndcg,
)
from sharewell.allocation.wire import decode, encode
from sharewell.bench import Progress, Report, Row, environment, median


def identity(n: int) -> Identity:
    return Identity(n.to_bytes(32, "big"))


def other_rankers(network: Simulation) -> dict[str, tuple[float, float]]:
    """(top-1 agreement, nDCG@10) of rankers that see no gossip, on the same network at its end."""
    rng = random.Random(0)
    orders: dict[str, Any] = {}
    own: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(network.honest)]
    for node in range(network.honest):
        for row in network.rows[node]:
            own[node][row.query][row.clicked] += 1
    orders["random order"] = lambda _n, t: rng.sample(network.by_term[t], len(network.by_term[t]))
    orders["own clicks only"] = lambda n, t: sorted(own[n][t], key=lambda i: (-own[n][t][i], i))
    orders["global popularity"] = lambda _n, t: network.popular(t)
    try:
        import bm25s

        corpus = [" ".join((network.catalogue[i].title, *network.catalogue[i].tags)) for i in network.items]
        searcher = bm25s.BM25()
        searcher.index(bm25s.tokenize(corpus, stopwords=[], show_progress=False), show_progress=False)
        found = {}
        for t in network.terms:
            hits, _ = searcher.retrieve(
                bm25s.tokenize(t, stopwords=[], show_progress=False), k=10, show_progress=False
            )
            found[t] = [network.items[int(h)] for h in hits[0]]
        orders["BM25 (bm25s)"] = lambda _n, t: found[t]
    except ImportError:
        pass
    out = {}
    for name, order in orders.items():
        first, gain, total = 0.0, 0.0, 0
        for term in network.terms:
            popular = network.popular(term)
            for node in range(network.honest):
                ranked = order(node, term)[:10]
                first += bool(ranked) and ranked[0] == popular[0]
                gain += ndcg(ranked, network.votes[term])
                total += 1
        out[name] = (first / total, gain / total)
    return out


# --- real peers ---


def _host(first: int, count: int, clicks: list[list[tuple[str, str]]], pipe: Any) -> None:
    """A process with ``count`` peers: tells their addresses, pulls when asked, and reports hashes."""

    async def work() -> None:
        rng = random.Random(first)
        logs = [ClickLog(identity=identity(first + k + 1)) for k in range(count)]
        ranks = [GRank(log) for log in logs]
        for log, own in zip(logs, clicks, strict=True):
            for term, item in own:
                log.append(term, (item,), item, (term,))
        peers = [Peer(log.gossip, timeout_s=120, on_merge=log.follow) for log in logs]
        pipe.send([await peer.serve() for peer in peers])
        loop = asyncio.get_running_loop()
        while True:
            kind, body = await loop.run_in_executor(None, pipe.recv)
            if kind == "pull":
                for peer in peers:
                    await peer.pull(*rng.choice(body))
                pipe.send([log.gossip.hash() for log in logs])
            elif kind == "rank":
                pipe.send([[[r.item for r in rank.rank(term)] for term in body] for rank in ranks])
            else:
                break
        for peer in peers:
            await peer.close()

    asyncio.run(work())


def real_network(peers: int, processes: int, clicks_each: int, seed: int) -> dict[str, float]:
    """Peers in a few processes, each with its own socket; rounds until all logs are equal."""
    rng = random.Random(seed)
    clicks = [
        [
            (f"term{rng.randrange(10)}", f"item{min(int(rng.paretovariate(1)), 60)}")
            for _ in range(clicks_each)
        ]
        for _ in range(peers)
    ]
    context = multiprocessing.get_context("spawn")
    each, children = peers // processes, []
    for p in range(processes):
        here, there = context.Pipe()
        child = context.Process(
            target=_host, args=(p * each, each, clicks[p * each : (p + 1) * each], there), daemon=True
        )
        child.start()
        children.append((child, here))
    addresses = [a for _, pipe in children for a in pipe.recv()]
    assert len(set(addresses)) == peers
    start, rounds, hashes = time.perf_counter(), 0, []
    while len(set(hashes)) != 1 and rounds < 40:
        for _, pipe in children:
            pipe.send(("pull", addresses))
        hashes = [h for _, pipe in children for h in pipe.recv()]
        rounds += 1
    took = time.perf_counter() - start
    terms = [f"term{t}" for t in range(10)]
    for _, pipe in children:
        pipe.send(("rank", terms))
    ranked = [r for _, pipe in children for r in pipe.recv()]
    for child, pipe in children:
        pipe.send(("end", None))
        child.join(30)
    # The same rows in one place, asked as the first peer: what the network should answer.
    whole = ClickLog(identity=identity(1))
    alone = GRank(whole)
    for n, own in enumerate(clicks):
        log = whole if n == 0 else ClickLog(identity=identity(n + 1))
        for term, item in own:
            log.append(term, (item,), item, (term,))
        if n:
            whole.merge(log.delta({}))
    expected = [[r.item for r in alone.rank(term)] for term in terms]
    return {
        "peers": peers,
        "rounds": rounds,
        "seconds": took,
        "different logs": len(set(hashes)),
        "same as one log": float(ranked[0] == expected and whole.gossip.hash() == hashes[0]),
    }


# --- cost ---


def cost(rows: int, authors: int, terms: int) -> dict[str, float]:
    """rank() and merge() on a log of that many rows, and the size of rows on the wire."""
    rng = random.Random(1)

    def click_of() -> tuple[str, tuple[str, ...], str, tuple[str, ...]]:
        term = f"term{min(int(rng.paretovariate(0.7)), terms):04d}"
        shown = tuple(f"item{rng.randrange(2600):04d}" for _ in range(10))
        return term, shown, rng.choice(shown), (term, f"tag{rng.randrange(39)}", "song")

    big = ClickLog(identity=identity(1), config=GRankConfig(max_rows=10**6, max_rows_per_author=10**6))
    rank = GRank(big)
    for n in range(authors):
        source = ClickLog(identity=identity(n + 2), config=GRankConfig(max_rows_per_author=10**6))
        # One signature at the end vouches for all: what a peer of long standing would send.
        with_rows(source, [click_of() for _ in range(rows // authors)])
        big.merge(source.delta({}))
        source.close()
    for _ in range(200):
        term, shown, item, tags = click_of()
        big.append(term, shown, item, tags)
    ranks, merges = [], []
    names = [f"term{t:04d}" for t in range(1, 200)]
    for k in range(400):
        start = time.process_time()
        rank.rank(names[k % len(names)])
        ranks.append(time.process_time() - start)
    plain = packed = 0
    for n in range(10):
        source = ClickLog(identity=identity(10_000 + n))
        writers = [ClickLog(identity=identity(20_000 + 100 * n + k)) for k in range(20)]
        for writer in writers:
            with_rows(writer, [click_of() for _ in range(50)])
            source.merge(writer.delta({}))
        message = source.delta({})
        plain += len(encode(decode(message), compress=False))
        packed += len(message)
        start = time.process_time()
        assert len(big.merge(message).added) == 1000
        merges.append(time.process_time() - start)
        start = time.process_time()
        rank.rank(names[n])  # settles 20 new authors
        ranks.append(time.process_time() - start)
    return {
        "rows": len(big.gossip),
        "rank_p95_s": float(np.percentile(ranks, 95)),
        "merge_s": median(merges),
        "bytes": plain / 10_000,
        "bytes_packed": packed / 10_000,
    }


def with_rows(log: ClickLog, clicks: list[tuple[str, tuple[str, ...], str, tuple[str, ...]]]) -> None:
    """Append many clicks in one transaction each, as an author does over months."""
    log.gossip._db.execute("PRAGMA synchronous=OFF")
    for term, shown, item, tags in clicks:
        log.append(term, shown, item, tags)


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    rows: list[Row] = []
    extra: dict[str, Any] = {}
    seeds = range(5) if full else range(1)
    size: dict[str, Any] = {} if full else {"nodes": 20, "items": 60, "terms": 10}
    half, end = (4000, 8000) if full else (300, 600)

    def bar(
        metric: str, values: list[float], limit: float, claim: str, unit: str = "share", note: str = ""
    ) -> None:
        rows.append(
            Row.from_samples(
                metric,
                values,
                [limit] * len(values),
                unit,
                "higher",
                f"bar of {limit}",
                claim=claim if full else "",
                target=1.0 if full else None,
                note=note,
            )
        )

    top, gain, step_s = defaultdict(list), defaultdict(list), []
    baselines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    clean: dict[float, list[float]] = defaultdict(list)
    quarter = half + half // 2
    for s in seeds:
        for isolation in (0.0, 1.0):
            last = end if isolation == 0 else quarter
            config = SimConfig(
                isolation=isolation, steps=last, measure_at=tuple({half, quarter, last}), **size
            )
            network = Simulation(config, None, s)
            start = time.process_time()
            for frame in network.run().frames:
                top[isolation, frame.step].append(frame.top1)
                gain[isolation, frame.step].append(frame.ndcg)
            step_s.append((time.process_time() - start) / last)
            clean[isolation].append(gain[isolation, quarter][-1])
            if isolation == 0:
                for name, pair in other_rankers(network).items():
                    baselines[name].append(pair)
        progress("networks", s + 1, len(seeds))
    bar(
        f"first result agrees with popularity, F = 0, step {half}",
        top[0.0, half],
        0.80,
        "learns who is popular",
    )
    bar(f"first result agrees with popularity, F = 0, step {end}", top[0.0, end], 0.97, "as good as a server")
    bar(f"nDCG@10, F = 0, step {half}", gain[0.0, half], 0.98, "as good as a server")
    bar(
        f"first result agrees with popularity, F = 1, step {half}",
        top[1.0, half],
        0.97,
        "as good as a server",
    )
    bar(f"nDCG@10, F = 1, step {half}", gain[1.0, half], 0.99, "as good as a server")
    for name, pairs in baselines.items():
        rows.append(
            Row.from_samples(
                f"first result agrees with popularity, F = 0, step {end}",
                top[0.0, end],
                [p[0] for p in pairs],
                "share",
                "higher",
                name,
                note="the ceiling" if name == "global popularity" else "",
            )
        )
        rows.append(
            Row.from_samples(
                f"nDCG@10, F = 0, step {end}", gain[0.0, end], [p[1] for p in pairs], "share", "higher", name
            )
        )
    if "BM25 (bm25s)" not in baselines:
        rows.append(
            Row.from_samples(
                f"nDCG@10, F = 0, step {end}",
                gain[0.0, end],
                None,
                "share",
                "higher",
                note="peer not installed",
            )
        )
    lead = [a - p[0] for a, p in zip(top[0.0, end], baselines["own clicks only"], strict=True)]
    bar(f"lead in agreement over own clicks only, step {end}", lead, 0.3, "gossip is what makes it work")
    rows.append(
        Row.from_samples(
            "CPU time a step, 100 nodes" if full else "CPU time a step",
            step_s,
            [0.004] * len(step_s),
            "s",
            "lower",
            "limit of 4 ms",
            claim="faster than the notebook's 30 ms and more" if full else "",
            target=1.0 if full else None,
        )
    )

    # Attacks, against the clean run of the same seed at the same step.
    times = {"attack_joins_at": end * 5 // 16, "attack_at": end * 5 // 8}
    for attack in ("targeted", "inflation", "push", "epic"):
        for isolation in (0.0, 1.0) if attack == "targeted" else (0.0,):
            lost = []
            for s in seeds if attack == "targeted" else list(seeds)[:1]:
                config = SimConfig(isolation=isolation, steps=quarter, measure_at=(quarter,), **times, **size)
                (frame,) = Simulation(config, attack, s).run().frames  # pyright: ignore[reportArgumentType]
                lost.append(clean[isolation][s] - frame.ndcg)
            extra[f"nDCG@10 lost, {attack}, F = {isolation:g}"] = lost
            claimed = attack == "targeted" and isolation == 0 and full
            rows.append(
                Row.from_samples(
                    f"nDCG@10 lost to the {attack} attack, F = {isolation:g}",
                    lost,
                    [0.005] * len(lost) if claimed else None,
                    "nDCG",
                    "lower",
                    "bar of 0.005" if claimed else "",
                    note="" if attack == "targeted" else "report only, one seed",
                )
            )
        progress("attacks", 1 + ("targeted", "inflation", "push", "epic").index(attack), 4)

    # Offline nodes and communities.
    drift = []
    for s in seeds:
        config = SimConfig(steps=end, measure_at=(end,), offline=5 if full else 2, offline_at=half, **size)
        result = Simulation(config, None, s).run()
        assert result.offline_ndcg_when_cut is not None and result.frames[0].offline_ndcg is not None
        drift.append(abs(result.frames[0].offline_ndcg - result.offline_ndcg_when_cut))
    rows.append(
        Row.from_samples(
            "nDCG@10 of nodes cut off half way: change until the end",
            drift,
            [0.02] * len(drift),
            "nDCG",
            "lower",
            "bar of 0.02",
            claim="works offline" if full else "",
            target=1.0 if full else None,
        )
    )
    for majority in (0.8, None):
        ahead, best = [], []
        for s in seeds:
            config = SimConfig(steps=half, measure_at=(half,), communities=2, majority=majority, **size)
            (frame,) = Simulation(config, None, s).run().frames
            assert frame.community_ndcg is not None and frame.community_ndcg_popular is not None
            ahead.append(frame.community_ndcg - frame.community_ndcg_popular)
            best.append(1 - frame.community_ndcg_popular)
        split = "80 and 20 % of nodes" if majority else "equal halves"
        bar(
            f"lead over global popularity in one's own community, {split}",
            ahead,
            0.2,
            "personalises",
            "nDCG@10",
            note=f"a perfect ranking would lead by {median(best):.3f}",
        )
        rows.append(
            Row.from_samples(
                f"lead over global popularity in one's own community, {split}",
                ahead,
                best,
                "nDCG@10",
                "higher",
                "the most that is possible",
            )
        )

    # Real sockets.
    network_figures = real_network(100, 4, 20, seed) if full else real_network(12, 2, 5, seed)
    extra["real peers"] = network_figures
    rows.append(
        Row(
            f"logs that differ among {network_figures['peers']} real peers over loopback",
            network_figures["different logs"],
            1,
            "logs",
            "lower",
            "one log",
            claim="all peers end with one log",
            target=1.0,
            note=f"{network_figures['rounds']} rounds of pulls, {network_figures['seconds']:.1f} s",
        )
    )
    rows.append(
        Row(
            "real peers rank as one log would",
            network_figures["same as one log"],
            1.0,
            "true",
            "higher",
            "one log",
            claim="the network changes nothing",
            target=1.0,
        )
    )

    # Cost.
    figures = cost(200_000, 200, 2000) if full else cost(4000, 20, 200)
    extra["cost"] = figures
    label = f"log of {figures['rows']:,.0f} rows"
    limits = (
        ("rank_p95_s", f"rank(), p95 of CPU time, {label}", 0.005, "s"),
        ("merge_s", f"merge of 1,000 rows, CPU time, {label}", 0.050, "s"),
        ("bytes", "a row on the wire, uncompressed", 120.0, "bytes"),
    )
    for key, metric, limit, unit in limits:
        rows.append(
            Row(
                metric,
                figures[key],
                limit,
                unit,
                "lower",
                f"limit of {limit:g} {unit}",
                claim="cheap enough for every query" if full else "",
                target=1.0 if full else None,
            )
        )
    rows.append(
        Row(
            "a row on the wire, compressed",
            figures["bytes_packed"],
            figures["bytes"],
            "bytes",
            "lower",
            "uncompressed",
        )
    )
    return Report("g-rank", scale, tuple(rows), environment(), seed, extra)  # pyright: ignore[reportArgumentType]
