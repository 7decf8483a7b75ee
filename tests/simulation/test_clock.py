"""Virtual time: it moves only when told to, and what falls due runs in order."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.simulation import VirtualClock, WallClock


@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_callbacks_run_in_order_of_time_then_of_asking(times: list[float], moves: list[float]) -> None:
    clock = VirtualClock()
    seen: list[tuple[float, int, float]] = []
    for i, t in enumerate(times):
        clock.call_at(t, lambda i=i, t=t: seen.append((t, i, clock.monotonic())))
    now = 0.0
    for seconds in moves:
        clock.advance(seconds)
        now += seconds
        assert clock.monotonic() == now
    assert [(t, i) for t, i, _ in seen] == sorted((t, i) for i, t in enumerate(times) if t <= now)
    assert all(t == at for t, _, at in seen), "each callback sees its own time"


async def test_sleepers_wake_when_their_time_comes() -> None:
    clock = VirtualClock(start=10.0)
    woken: list[str] = []

    async def sleep(name: str, t: float) -> None:
        await clock.sleep_until(t)
        woken.append(name)

    tasks = [asyncio.create_task(sleep(*x)) for x in (("late", 13.0), ("early", 11.0), ("past", 9.0))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert woken == ["past"]
    clock.advance(1.0)
    await asyncio.sleep(0)
    assert woken == ["past", "early"]
    clock.advance(5.0)
    await asyncio.gather(*tasks)
    assert woken == ["past", "early", "late"] and clock.monotonic() == 16.0


async def test_a_cancelled_sleeper_is_no_obstacle() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(clock.sleep_until(1.0))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    clock.advance(2.0)
    assert task.cancelled()


def test_what_a_callback_asks_for_in_the_same_span_still_runs() -> None:
    clock = VirtualClock()
    seen: list[float] = []

    def again() -> None:
        seen.append(clock.monotonic())
        clock.call_at(clock.monotonic() + 1, again)

    clock.call_at(1.0, again)
    clock.advance(3.5)
    assert seen == [1.0, 2.0, 3.0]


def test_unix_time_runs_beside_the_monotonic_axis_and_time_never_goes_back() -> None:
    clock = VirtualClock(start=5.0, unix_start=1000.0)
    clock.advance(2.0)
    assert (clock.monotonic(), clock.unix()) == (7.0, 1002.0)
    with pytest.raises(ValueError, match=r"seconds must be at least 0, got -1\.0"):
        clock.advance(-1.0)


async def test_the_wall_clock_is_the_machines() -> None:
    clock = WallClock()
    assert abs(clock.monotonic() - time.monotonic()) < 5 and abs(clock.unix() - time.time()) < 5
    until = clock.monotonic() + 0.01
    await clock.sleep_until(until)
    await clock.sleep_until(until - 1)
    assert clock.monotonic() >= until
