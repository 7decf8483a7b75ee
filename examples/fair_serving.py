"""Place 200 serving requests on unequal replicas, and share a token budget among tenants.

Two decisions of a serving system, each beside what is usually done:
- which replica takes which request: the MOHAF auction, beside first come first served;
- how a token-rate budget is split among tenants whose traffic slows each other down: water-filling, beside
  equal shares.

Run: python examples/fair_serving.py
"""

from __future__ import annotations

import numpy as np

from sharewell.allocation import (
    FirstComeFirstServed,
    InterferenceGame,
    Mohaf,
    Objective,
    Problem,
    Request,
    Resource,
    jain,
    metrics,
    waterfill,
)

TENANTS = ("batch", "standard", "premium")


def requests_and_replicas(seed: int) -> Problem:
    """200 requests of three tenants for compute and KV memory, and 24 replicas of three kinds."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(200):
        tenant = int(rng.choice(3, p=(0.45, 0.4, 0.15)))
        prompt, output = rng.lognormal(6.5, 0.8), rng.lognormal(5.0, 0.7)  # tokens
        compute, memory = (prompt + 8 * output) / 4000, (prompt + output) / 2500
        requests.append(
            Request(
                demand=(compute, memory),
                budget=(compute + memory) * (1.6 + 0.8 * tenant) * rng.uniform(0.7, 1.5),
                group=tenant,
                min_reliability=(0.9, 0.95, 0.97)[tenant],
                max_latency_ms=(400.0, 150.0, 80.0)[tenant],
                location=tuple(rng.uniform(0, 60, 2)),
            )
        )
    kinds = (
        (4.0, 6.0, 1.6, 0.995),
        (2.5, 2.0, 1.0, 0.98),
        (1.2, 3.0, 0.7, 0.96),
    )  # compute, memory, cost, up
    replicas = []
    for k in range(24):
        compute, memory, cost, up = kinds[k % 3]
        replicas.append(
            Resource(
                capacity=(compute, memory),
                cost=cost * rng.uniform(0.9, 1.1),
                reliability=up,
                availability=up,
                energy=cost * rng.uniform(0.8, 1.2),
                location=tuple(rng.uniform(0, 60, 2)),
            )
        )
    return Problem.from_records(requests, replicas)


def tenants_and_replica_groups(seed: int) -> InterferenceGame:
    """8 tenants split their token rate over 6 replica groups; traffic on a group slows the others there.

    The "gain" is how well a group suits a tenant (its prefixes are cached there, say), the "noise" what
    runs on it already, and cross gains say how much others' tokens disturb.
    """
    rng = np.random.default_rng(seed)
    suits = rng.lognormal(0.0, 0.7, (8, 1, 6))
    disturbs = 0.09 * rng.uniform(0.5, 1.5, (8, 8, 6)) * suits.min(axis=2, keepdims=True)
    diagonal = np.arange(8)
    disturbs[diagonal, diagonal] = suits[:, 0]
    return InterferenceGame(disturbs, rng.uniform(0.2, 1.0, (8, 6)), power=rng.uniform(2.0, 6.0, 8))


def row(rule: str, fairness: float, utility: float, remark: str) -> str:
    return f"{rule:<34}{fairness:>10.3f}{utility:>12.3f}   {remark}"


def main() -> None:
    problem = requests_and_replicas(seed=0)
    print(f"{'':<34}{'fairness':>10}{'utility':>12}")
    print("200 requests on 24 replicas         (Jain over tenants' served share; of the best utility)")
    for name, mechanism in (
        ("first come first served", FirstComeFirstServed()),
        ("auction (MOHAF)", Mohaf()),
    ):
        figures = metrics(problem, mechanism.solve(problem), Objective())
        remark = f"{figures['satisfied']:.0%} served, utilisation {figures['utilisation']:.0%}"
        print(row("  " + name, figures["jain_groups"], figures["utility_ratio"], remark))

    game = tenants_and_replica_groups(seed=0)
    certificate = game.certificate()
    equal = np.repeat(game.power[:, None] / 6, 6, axis=1)
    alone = waterfill(game.noise / np.einsum("qqk->qk", game.H), game.power)
    result = game.solve("asynchronous")
    assert result.converged
    ideal = game.rates(result.p).sum()
    print("token rate of 8 tenants over 6 groups (Jain over rates; rate relative to water-filling)")
    for name, p, remark in (
        ("equal shares", equal, ""),
        ("each alone, deaf to the others", alone, ""),
        (
            "water-filling",
            result.p,
            f"{result.iterations} asynchronous ticks; rho {certificate.rho:.2f}: "
            f"{'certain' if certificate.unique else 'not certain'} to converge",
        ),
    ):
        rates = game.rates(p)
        print(row("  " + name, jain(rates), float(rates.sum() / ideal), remark))


if __name__ == "__main__":
    main()
