"""Problems from files and generators: Google's 2011 cluster data, CSV tables, and instances of its shape."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .archive import DamagedFile
from .core import Allocation, Problem, ProblemError

# Machine shapes of Google's 2011 trace and how many there were (Reiss, Tumanov et al. 2012, table 1), in
# units of the largest machine.
_MACHINES = (
    (0.50, 0.50, 6732), (0.50, 0.25, 3863), (0.50, 0.75, 1001), (1.00, 1.00, 795), (0.25, 0.25, 126),
    (0.50, 0.12, 52), (0.50, 0.03, 5), (0.50, 0.97, 5), (1.00, 0.50, 3), (0.50, 0.06, 1),
)  # fmt: skip
# Priority bands: free (0-1), other (2-8), production and monitoring (9-11).
_BANDS = (0.28, 0.60, 0.12)
_TASK_COLUMNS, _MACHINE_COLUMNS = 13, 6
_SUBMIT, _ADD, _REMOVE, _UPDATE = 0, 0, 1, 2
# A plane of 100 ms on a side with sites where machines and users gather.
_SIDE_MS, _SITES = 100.0, 12


def synthetic(n: int = 3553, m: int = 888, tightness: float = 0.28, seed: int = 0) -> Problem:
    """An instance with the heavy tails of the trace, whose capacity is ``tightness`` times its demand.

    Machine shapes as counted in the 2011 trace, lognormal task sizes with correlated CPU and memory, three
    priority bands. Costs, floors and places are not in any trace and are drawn.
    """
    if n < 1 or m < 1:
        raise ValueError(f"n and m must be at least 1, got {n}, {m}")
    if not tightness > 0:
        raise ValueError(f"tightness must be positive, got {tightness}")
    rng = np.random.default_rng(seed)
    shapes = np.array([s[:2] for s in _MACHINES])
    counts = np.array([s[2] for s in _MACHINES], float)
    capacity = shapes[rng.choice(len(shapes), m, p=counts / counts.sum())]
    logs = rng.multivariate_normal([0, 0], [[1.0, 0.6], [0.6, 1.0]], n)
    demand = np.exp(logs)
    demand *= capacity.sum(axis=0) / tightness / demand.sum(axis=0)
    group = rng.choice(3, n, p=_BANDS)
    return _market(demand, capacity, group, rng)


def _market(demand: np.ndarray, capacity: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> Problem:
    """Adds what no trace has: costs, quality, budgets, floors and places."""
    n, m = len(demand), len(capacity)
    sites = rng.uniform(0, _SIDE_MS, (_SITES, 2))
    reliability = 1 - rng.beta(1.2, 12, m)
    availability = 1 - rng.beta(1.2, 15, m)
    # Better machines cost more; energy is the hardware's own.
    cost = rng.lognormal(0, 0.3, m) * (0.6 + 0.4 * reliability / reliability.mean())
    size = demand.sum(axis=1)
    # What a request can pay: more in higher bands, about twice the usual cost in the middle.
    budget = size * rng.lognormal(np.log(1.6), 0.5, n) * (1 + 0.35 * group)
    return Problem(
        demand=demand,
        budget=budget,
        group=group,
        min_reliability=np.clip(rng.normal(0.72 + 0.05 * group, 0.08), 0, 0.97),
        min_availability=np.clip(rng.normal(0.75 + 0.05 * group, 0.08), 0, 0.97),
        max_latency_ms=rng.uniform(25, 120, n),
        request_location=sites[rng.integers(_SITES, size=n)] + rng.normal(0, 6, (n, 2)),
        capacity=capacity,
        cost=cost,
        reliability=reliability,
        availability=availability,
        energy=rng.uniform(0.4, 1.0, m),
        resource_location=sites[rng.integers(_SITES, size=m)] + rng.normal(0, 4, (m, 2)),
    )


def from_google_trace(
    path: str | Path, machines: str | Path | None = None, split: float = 0.8, seed: int = 0
) -> Problem:
    """A problem from Google cluster data of 2011 (version 2): ``task_events`` part files, gzipped or plain.

    Requests are the tasks submitted in ``path``; resources the machines of ``machines``
    (``machine_events``). Without it the rows of ``path`` are split, ``split`` of them requests and the others
    resources of the size that they ask for, which is what the paper's figures look like. Costs, floors and
    places are not in the trace and are drawn with ``seed``. Raises DamagedFile for a file that is cut or not
    in this format, with the row.
    """
    if not 0 < split < 1:
        raise ValueError(f"split must be in (0, 1), got {split}")
    path = Path(path)
    rng = np.random.default_rng(seed)
    tasks: dict[tuple[str, str], tuple[float, float, int]] = {}
    for row, cells in _rows(path, _TASK_COLUMNS, "task_events of 2011"):
        if _whole(cells[5], path, row, "event type") != _SUBMIT or not cells[9] or not cells[10]:
            continue
        cpu, memory = _unit(cells[9], path, row, "CPU request"), _unit(cells[10], path, row, "memory request")
        priority = _whole(cells[8], path, row, "priority")
        if cpu + memory > 0:
            tasks.setdefault(
                (cells[2], cells[3]), (cpu, memory, 0 if priority < 2 else 1 if priority < 9 else 2)
            )
    if len(tasks) < 2:
        raise DamagedFile(f"{path.name}: holds no submitted tasks with requests")
    table = np.array(list(tasks.values()))
    if machines is None:
        table = table[rng.permutation(len(table))]
        cut = min(max(1, round(split * len(table))), len(table) - 1)
        return _market(table[:cut, :2], table[cut:, :2], table[:cut, 2].astype(int), rng)
    machines = Path(machines)
    present: dict[str, tuple[float, float]] = {}
    for row, cells in _rows(machines, _MACHINE_COLUMNS, "machine_events of 2011"):
        event = _whole(cells[2], machines, row, "event type")
        if event == _REMOVE:
            present.pop(cells[1], None)
        elif event in (_ADD, _UPDATE) and cells[4] and cells[5]:
            present[cells[1]] = (
                _unit(cells[4], machines, row, "CPUs"),
                _unit(cells[5], machines, row, "memory"),
            )
    if not present:
        raise DamagedFile(f"{machines.name}: no machine is left at its end")
    return _market(table[:, :2], np.array(list(present.values())), table[:, 2].astype(int), rng)


def _rows(path: Path, columns: int, what: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a CSV file; gzip is checked to its last byte before anything is made of the rows."""
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz" else raw).decode(
            "ascii"
        )
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path.name}: damaged or no text ({error})") from None
    for row, cells in enumerate(csv.reader(text.splitlines()), start=1):
        if len(cells) != columns:
            raise DamagedFile(f"{path.name}: line {row} has {len(cells)} columns, {what} has {columns}")
        yield row, cells


def _whole(cell: str, path: Path, row: int, name: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise DamagedFile(f"{path.name}: line {row}: {name} must be a whole number, got {cell!r}") from None


def _unit(cell: str, path: Path, row: int, name: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not 0 <= value <= 1:
        raise DamagedFile(
            f"{path.name}: line {row}: {name} must be in [0, 1], of the largest machine, got {cell!r}"
        )
    return value


REQUEST_COLUMNS = (
    "cpu", "memory", "budget", "group", "min_reliability", "min_availability", "max_latency_ms",
    "x_ms", "y_ms",
)  # fmt: skip
RESOURCE_COLUMNS = ("cpu", "memory", "cost", "reliability", "availability", "energy", "x_ms", "y_ms")


def read_tables(requests: str | Path, resources: str | Path) -> Problem:
    """A problem from two CSV files (``.gz`` for a checksum) with the headers REQUEST_COLUMNS and
    RESOURCE_COLUMNS. Raises DamagedFile, or ProblemError with the rows."""
    r = _table(Path(requests), REQUEST_COLUMNS)
    s = _table(Path(resources), RESOURCE_COLUMNS)
    if (r[:, 3] != np.round(r[:, 3])).any():
        raise ProblemError(
            f"group must be a whole number; row {int(np.argmax(r[:, 3] != np.round(r[:, 3])))}"
        )
    return Problem(
        demand=r[:, :2], budget=r[:, 2], group=r[:, 3].astype(int), min_reliability=r[:, 4],
        min_availability=r[:, 5], max_latency_ms=r[:, 6], request_location=r[:, 7:],
        capacity=s[:, :2], cost=s[:, 2], reliability=s[:, 3], availability=s[:, 4], energy=s[:, 5],
        resource_location=s[:, 6:],
    )  # fmt: skip


def _table(path: Path, header: Sequence[str]) -> np.ndarray:
    rows = list(_rows(path, len(header), "its header"))
    if not rows or tuple(rows[0][1]) != tuple(header):
        raise DamagedFile(f"{path.name}: the first line must be {','.join(header)}")
    out = np.empty((len(rows) - 1, len(header)))
    for k, (line, cells) in enumerate(rows[1:]):
        for c, cell in enumerate(cells):
            try:
                out[k, c] = float(cell)
            except ValueError:
                raise DamagedFile(
                    f"{path.name}: line {line}: {header[c]} must be a number, got {cell!r}"
                ) from None
    return out


def write_allocation(
    path: str | Path, problem: Problem, allocation: Allocation, reasons: dict[int, str]
) -> Path:
    """One line a request: resource (empty for none), payment, utility and why it was not placed."""
    path = Path(path)
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(("request", "resource", "payment", "utility", "reason"))
        for i, j in enumerate(allocation.assign.tolist()):
            paid, u = float(allocation.payment[i]), float(allocation.utility[i])
            writer.writerow((i, j if j >= 0 else "", f"{paid:.9g}", f"{u:.9g}", reasons.get(i, "")))
    return path
