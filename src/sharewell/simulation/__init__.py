"""Clocks and the discrete-event kernel: events and time only, no knowledge of what is simulated."""

from .clock import Clock, VirtualClock, WallClock
from .events import EventLoop

__all__ = ["Clock", "EventLoop", "VirtualClock", "WallClock"]
