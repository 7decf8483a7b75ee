"""Peak resident memory of a piece of work, children included."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil


class PeakMemory:
    """Context manager: ``start_bytes`` and ``peak_bytes`` of this process and its descendants.

    On Linux the kernel keeps the high-water mark of every process: it is set back at the start and read at
    the end, so that no short peak is missed and nothing runs beside the work. The peaks of the processes are
    added up; they may lie at different moments, so the sum is an upper bound (as it is for pages that
    processes share). A child that lived and died inside counts when it was the largest that this process has
    ever reaped. Where the mark cannot be set back, a thread looks every ``interval_s`` instead.
    """

    def __init__(self, interval_s: float = 0.01, *, sampling: bool = False) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s must be positive, got {interval_s}")
        self.start_bytes = 0
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._sampling = sampling
        self._resident: dict[int, int] = {}
        self._reaped_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        self._resident = _resident_by_pid()
        self.start_bytes = self.peak_bytes = sum(self._resident.values())
        self._reaped_bytes = _largest_reaped_bytes()
        if not self._sampling:
            could = [_reset_peak(pid) for pid in self._resident]  # every one of them, also after a failure
            self._sampling = not all(could)
        if self._sampling:
            self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._look()
            return
        now = _resident_by_pid()
        peaks = [_peak_bytes(pid, resident) for pid, resident in now.items()]
        gone = [resident for pid, resident in self._resident.items() if pid not in now]
        reaped = _largest_reaped_bytes()
        born_and_gone = [reaped] if reaped > self._reaped_bytes else []
        self.peak_bytes = max(self.start_bytes, sum(peaks) + sum(gone) + sum(born_and_gone))

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(_resident_by_pid().values()))


def _resident_by_pid() -> dict[int, int]:
    """Resident bytes of this process and all its living descendants."""
    here = psutil.Process()
    resident = {}
    for process in (here, *here.children(recursive=True)):
        try:
            resident[process.pid] = process.memory_info().rss
        except psutil.Error:
            continue  # ended while we looked
    return resident


def _reset_peak(pid: int) -> bool:
    """Set the kernel's high-water mark back to what is resident now; False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except FileNotFoundError:
        return Path(
            f"/proc/{psutil.Process().pid}/clear_refs"
        ).exists()  # the child has ended: nothing to set back
    except OSError:
        return False
    return True


def _peak_bytes(pid: int, otherwise: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return otherwise


def _largest_reaped_bytes() -> int:
    """Peak of the largest child that was ever reaped (the kernel counts it in KiB, macOS in bytes)."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
