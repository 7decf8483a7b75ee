"""The discrete-event kernel: order, and the closed form of a queue that is simulated with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.simulation import EventLoop


@given(st.lists(st.integers(0, 20), max_size=40))
def test_events_run_by_time_and_equal_times_by_order_of_scheduling(times: list[int]) -> None:
    loop: EventLoop[int] = EventLoop()
    for i, t in enumerate(times):
        loop.schedule(t, i)
    seen: list[tuple[float, int]] = []
    assert loop.run(lambda t, i: seen.append((t, i))) == len(times)
    assert seen == sorted((t, i) for i, t in enumerate(times)) and len(loop) == 0


def test_a_run_stops_behind_its_end_and_goes_on_from_there() -> None:
    loop: EventLoop[str] = EventLoop(start=1.0)
    for t in (1.0, 2.0, 3.0):
        loop.schedule(t, f"at {t}")
    seen: list[str] = []
    assert loop.run(lambda t, e: seen.append(e), until=2.0) == 2
    assert seen == ["at 1.0", "at 2.0"] and loop.now == 2.0 and len(loop) == 1
    assert loop.run(lambda t, e: seen.append(e), until=2.5) == 0 and loop.now == 2.5
    with pytest.raises(ValueError, match=r"t must be at least now \(2\.5\), got 2\.0"):
        loop.schedule(2.0, "past")
    with pytest.raises(ValueError, match="t must be at least now"):
        loop.schedule(float("nan"), "never")


def test_handlers_schedule_more() -> None:
    loop: EventLoop[int] = EventLoop()
    loop.schedule(0.0, 5)
    seen: list[tuple[float, int]] = []

    def handle(t: float, left: int) -> None:
        seen.append((t, left))
        if left:
            loop.schedule(t, left - 1)

    assert loop.run(handle) == 6
    assert seen == [(0.0, n) for n in (5, 4, 3, 2, 1, 0)]


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_an_md1_queue_waits_as_long_as_pollaczek_and_khinchine_say(load: float) -> None:
    n, service = 60_000, 1.0
    arrivals = np.cumsum(np.random.default_rng(7).exponential(service / load, n))
    loop: EventLoop[str] = EventLoop()
    queue: list[float] = []
    waits: list[float] = []
    following, busy = iter(arrivals.tolist()), False

    def handle(t: float, event: str) -> None:
        nonlocal busy
        if event == "arrive":
            queue.append(t)
            if (more := next(following, None)) is not None:
                loop.schedule(more, "arrive")
        else:
            busy = False
        if queue and not busy:
            busy = True
            waits.append(t - queue.pop(0))
            loop.schedule(t + service, "done")

    loop.schedule(next(following), "arrive")
    loop.run(handle)
    rate = load / service
    exact = rate * service**2 / (2 * (1 - load))
    assert len(waits) == n and np.mean(waits) == pytest.approx(exact, rel=0.05)
