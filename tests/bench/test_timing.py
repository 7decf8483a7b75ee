"""Timing and memory: turns are taken fairly, children count, peaks are seen. No test asks how long something
takes."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.bench import PeakMemory, Sample, interleave, measure, median, spread, values

BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
HOLD = "import sys, time\nblock = bytearray(%d)\nfor i in range(0, len(block), 4096): block[i] = 1\n"
MB = 1_000_000


def burn(cpu_s: float) -> None:
    end = time.process_time() + cpu_s
    while time.process_time() < end:
        pass


def touch(size: int) -> np.ndarray:
    # pages of its own: what malloc gives may have been touched, and freed, by another test before
    block = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    block[::4096] = 1
    return block


def test_contenders_take_turns_and_each_round_starts_with_another():
    order: list[str] = []
    samples = interleave({name: lambda n=name: order.append(n) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_warmup_runs_are_thrown_away():
    count = iter(range(100))
    taken = interleave({"only": lambda: next(count)}, repeats=2, warmup=3)["only"]
    assert [sample.value for sample in taken] == [3, 4]


def test_progress_counts_every_run_up_to_the_total():
    seen: list[tuple[str, float, float]] = []
    interleave({"a": int, "b": int}, repeats=2, warmup=1, progress=lambda *said: seen.append(said))
    assert seen == [("a vs b", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"contenders": {}}, "contenders must name at least one"),
        ({"contenders": {"a": int}, "repeats": 0}, "repeats must be at least 1, got 0"),
        ({"contenders": {"a": int}, "warmup": -1}, "warmup must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, told: str):
    with pytest.raises(ValueError, match=told):
        interleave(**arguments)


def test_what_a_contender_raises_goes_through():
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"broken": broken})


def test_sleeping_takes_wall_time_and_no_cpu_time():
    sample = measure(lambda: time.sleep(0.25))
    assert sample.wall_s >= 0.25
    assert sample.cpu_s < 0.1


def test_cpu_time_of_this_process_counts():
    sample = measure(lambda: burn(0.2))
    assert 0.2 <= sample.cpu_s <= sample.wall_s + 0.05


def test_cpu_time_of_a_child_that_ended_counts():
    sample = measure(lambda: subprocess.run([sys.executable, "-c", BURN], check=True))
    assert sample.cpu_s >= 0.3


def test_cpu_time_of_a_child_that_lives_on_counts_and_only_what_it_used_meanwhile():
    code = f"{BURN}\nprint('ready', flush=True)\ninput()\n{BURN}\nprint('done', flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout
    try:
        assert child.stdout.readline() == "ready\n"

        def work() -> None:
            assert child.stdin and child.stdout
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"

        sample = measure(work)
        assert 0.27 <= sample.cpu_s < 0.57  # the kernel counts living children in ticks of 10 ms
        last = measure(lambda: child.communicate("\n"))
        assert last.cpu_s < 0.2  # reaping it brings nothing back that was counted before
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()


@pytest.mark.parametrize("sampling", [False, True], ids=["kernel mark", "sampling"])
def test_a_peak_that_is_gone_at_the_end_is_seen(sampling: bool):
    with PeakMemory(sampling=sampling) as memory:
        block = touch(100 * MB)
        time.sleep(0.1)
        del block
    assert 95 * MB <= memory.peak_bytes - memory.start_bytes <= 150 * MB


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux keeps a mark that can be set back"
)
def test_an_earlier_peak_does_not_count():
    block = touch(150 * MB)
    del block
    with PeakMemory() as memory:
        block = touch(20 * MB)
    assert 15 * MB <= memory.peak_bytes - memory.start_bytes <= 60 * MB
    assert len(block)


@pytest.mark.parametrize("sampling", [False, True], ids=["kernel mark", "sampling"])
def test_memory_of_a_living_child_counts(sampling: bool):
    code = HOLD % (80 * MB) + "print('held', flush=True)\ninput()"
    child = None
    try:
        with PeakMemory(sampling=sampling) as memory:
            child = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdout and child.stdout.readline() == b"held\n"
            time.sleep(0.05)
        assert memory.peak_bytes - memory.start_bytes >= 80 * MB
    finally:
        if child:
            child.kill()
            child.wait()


def test_memory_of_a_child_that_came_and_went_counts():
    # In a process of its own: the kernel tells apart only what is larger than all that was reaped before.
    script = f"""
import subprocess, sys
from sharewell.bench import PeakMemory
with PeakMemory() as memory:
    subprocess.run([sys.executable, "-c", {HOLD % (400 * MB)!r}], check=True)
print(memory.peak_bytes - memory.start_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 400 * MB


def test_a_sample_knows_what_the_run_added():
    def work() -> int:
        return int(touch(60 * MB)[0])

    sample = measure(work)
    assert sample.value == 1
    assert 55 * MB <= sample.growth_bytes <= 110 * MB
    assert sample.peak_bytes >= sample.start_bytes > 0
    assert Sample(1.0, 1.0, 5, 7).growth_bytes == 0


def test_interval_must_be_positive():
    with pytest.raises(ValueError, match="interval_s must be positive, got 0"):
        PeakMemory(0)


numbers = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30)


@given(numbers)
def test_the_median_lies_between_the_quartiles(taken: list[float]):
    low, high = spread(taken)
    assert min(taken) <= low <= median(taken) <= high <= max(taken)


def test_quartiles_are_interpolated():
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert spread([4.0, 1.0, 3.0, 2.0]) == (1.75, 3.25)
    for of in (median, spread):
        with pytest.raises(ValueError, match="at least one"):
            of([])


def test_one_quantity_of_all_samples_keeps_their_order():
    taken = [Sample(1.0, 0.5, 10, 4), Sample(3.0, 0.25, 20, 4)]
    assert values(taken) == [1.0, 3.0]
    assert values(taken, "cpu_s") == [0.5, 0.25]
    assert values(taken, "growth_bytes") == [6.0, 16.0]
