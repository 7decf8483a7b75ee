"""The process that the test kills: rounds ``first`` to ``last``, each printed when it is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sharewell.bandits import Ledger, LinUCB
from sharewell.simulation import WallClock


def main(folder: Path, first: int, last: int) -> None:
    with Ledger(folder / "l.db", WallClock()) as ledger:
        policy = LinUCB(4, 6, seed=3, ledger=ledger, snapshot=folder / "s.npz")
        for i in range(first, last):
            rng = np.random.default_rng(i)
            x, reward, name = rng.normal(size=6), float(rng.normal()), f"round-{i}"
            # Was it counted before the kill? Then settling again says so, and nothing is chosen anew.
            if ledger.end_of(name) is None:
                policy.select(x, decision_id=name)
            policy.settle(name, reward)
            if i % 50 == 25:
                policy.snapshot(folder / "s.npz")
            print(i + 1, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
