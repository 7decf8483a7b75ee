"""The core budget: who computes where, and the watch on other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess, stream

from sharewell.serving.core.cores import CompetitionMonitor, CoreBudget, thread_environment, usable_cores


def test_a_small_machine_is_shared_and_a_large_one_leaves_a_core_to_the_api() -> None:
    assert CoreBudget.of([0, 1], 2) == CoreBudget((0, 1), (0, 1), 2)
    assert CoreBudget.of(range(7), 7).threads == 7
    assert CoreBudget.of(range(8), 8) == CoreBudget(tuple(range(7)), (7,), 7)
    assert CoreBudget.of([3, 5, *range(8, 14)], 8).api == (13,)


def test_a_quota_below_the_cores_bounds_the_threads_and_pins_nobody() -> None:
    assert CoreBudget.of(range(64), 16) == CoreBudget(tuple(range(64)), tuple(range(64)), 16)
    assert CoreBudget.of(range(64), 1).threads == 1


def test_threads_that_the_user_set_are_taken() -> None:
    assert CoreBudget.of([0, 1], 2, threads=1).threads == 1
    assert CoreBudget.of(range(8), 8, threads=8) == CoreBudget(tuple(range(8)), tuple(range(8)), 8)
    assert CoreBudget.of(range(8), 8, threads=4) == CoreBudget(tuple(range(7)), (7,), 4)


def test_no_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="usable must be at least 1, got 0"):
        CoreBudget.of([0, 1], 0)


def test_the_budget_of_this_process_follows_its_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from sharewell.serving.core.cores import CoreBudget; print(CoreBudget.here().threads)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    mine = tuple(sorted(os.sched_getaffinity(0)))
    assert CoreBudget.here().engine[: len(mine) - 1] == mine[: len(mine) - 1]
    assert CoreBudget.here().threads <= usable_cores()


def test_every_thread_pool_gets_the_budget_and_waits_passively() -> None:
    environment = thread_environment(3)
    assert {environment[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")} == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_competing_process_is_seen_and_our_own_work_is_not() -> None:
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watching, counting_it_as_ours = (
            CompetitionMonitor((os.getpid(),)),
            CompetitionMonitor((os.getpid(), rival.pid)),
        )
        for monitor in (watching, counting_it_as_ours):
            monitor.sample()
        deadline = time.monotonic() + 30
        while watching.cores - counting_it_as_ours.cores < 0.1 and time.monotonic() < deadline:
            sum(range(100_000))
            for monitor in (watching, counting_it_as_ours):
                monitor.sample()
        assert watching.cores - counting_it_as_ours.cores >= 0.1
        known = watching.cores
        assert watching.sample() == known, "too soon to measure"
    finally:
        rival.kill()
        rival.wait()
    assert CompetitionMonitor((rival.pid,)).sample() == 0.0


class Watched(CompetitionMonitor):
    """Competition as scripted; what is decided on it is the real thing."""

    def __init__(self, cores: list[float]) -> None:
        super().__init__(())
        self._script = iter(cores)

    def sample(self) -> float:
        return next(self._script)


@pytest.mark.parametrize(
    ("cores", "working", "begins", "ends"),
    [
        ([0.9, 0.9, 0.9, 0.9], True, [1], []),
        ([0.9, 0.1, 0.9, 0.1], True, [], []),  # bursts
        ([0.9] * 4, False, [], []),  # nothing of ours is held up
        ([0.9, 0.9, 0.4, 0.4, 0.1, 0.3, 0.1, 0.1, 0.1], True, [1], [7]),
        ([0.9, 0.9, 0.0, 0.0, 0.9, 0.9], True, [1, 5], [3]),
    ],
)
def test_competition_is_told_once_when_it_begins_and_once_when_it_ends(
    cores: list[float], working: bool, begins: list[int], ends: list[int]
) -> None:
    monitor = Watched(cores)
    notices = [monitor.watch(working) for _ in cores]
    assert [i for i, n in enumerate(notices) if n and "other processes use 0.9" in n] == begins
    assert [i for i, n in enumerate(notices) if n and "any more" in n] == ends


def seconds_of_threads(pid: int) -> dict[str, float]:
    """CPU seconds of every thread of a process."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        seconds[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def test_all_processes_of_a_server_keep_to_the_budget_under_load_and_sleep_without(
    server: ServerProcess,
) -> None:
    budget = CoreBudget.here()
    assert server.stats()["info"]["threads"] == budget.threads
    processes = {"api": psutil.Process(server.pid), "engine": psutil.Process(server.engine_pid())}
    assert tuple(sorted(processes["engine"].cpu_affinity())) == budget.engine  # pyright: ignore[reportArgumentType]
    assert tuple(sorted(processes["api"].cpu_affinity())) == budget.api  # pyright: ignore[reportArgumentType]

    texts = [f"a sentence about the number {i} " * 20 for i in range(24)]
    server.client.post("/v1/embeddings", json={"model": "minilm", "input": texts[0]}).raise_for_status()
    before = {name: seconds_of_threads(p.pid) for name, p in processes.items()}

    def embed() -> None:
        server.client.post("/v1/embeddings", json={"model": "minilm", "input": texts}).raise_for_status()

    clients = [threading.Thread(target=embed) for _ in range(6)]
    clients += [threading.Thread(target=server.answer, args=(t, 40)) for t in texts[:6]]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for name, most in (("engine", budget.threads), ("api", 2)):  # 2: the loop, and the embedder
        used = {
            task: seconds - before[name].get(task, 0.0)
            for task, seconds in seconds_of_threads(processes[name].pid).items()
        }
        busy = [task for task, seconds in used.items() if seconds > 0.08 * sum(used.values())]
        assert 1 <= len(busy) <= most, (name, used)

    idle = sum(sum(p.cpu_times()[:2]) for p in processes.values())
    time.sleep(1.0)
    assert sum(sum(p.cpu_times()[:2]) for p in processes.values()) - idle <= 0.1


def test_the_server_says_when_another_process_competes(server: ServerProcess) -> None:
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    events = stream(server.client, "Once upon a time", 8000, ignore_eos=True)
    try:
        deadline = time.monotonic() + 60
        noticed = CompetitionMonitor.NOTICED_CORES
        while "other processes use" not in server.log or server.engine()["competing_cpu"] < noticed:
            assert time.monotonic() < deadline, "nothing is said"
            next(events)
        metrics = server.client.get("/metrics").text.splitlines()
        (line,) = [m for m in metrics if m.startswith("sharewell_competing_cpu_cores ")]
        assert float(line.split()[1]) >= noticed / 2  # the newest sample may be another one
    finally:
        events.close()
        for rival in rivals:
            rival.kill()
            rival.wait()
