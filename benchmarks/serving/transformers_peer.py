"""transformers as a peer: `generate` alone, `generate` on a padded batch, and its continuous batching."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from .processes import Group, ServerFailed, Usage
from .workload import Prompt

Way = Literal["generate", "static", "continuous"]


class Transformers:
    """The worker process; it stands still except while it generates. Use as a context manager."""

    def __init__(self, folder: Path, threads: int, logs: Path) -> None:
        self._folder, self._threads, self._log = folder, threads, logs / "transformers.log"

    def __enter__(self) -> Transformers:
        n = str(self._threads)
        environment = {"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n, "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            str(Path(__file__).with_name("transformers_worker.py")),
            str(self._folder),
            n,
        ]
        self.group = Group(command, environment, self._log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._read()
        self.group.pause()
        return self

    def __exit__(self, *_: object) -> None:
        self.group.stop()

    def _read(self) -> dict[str, object]:
        assert self.group.process.stdout is not None
        line = self.group.process.stdout.readline()
        if not line:
            code = self.group.process.wait()
            raise ServerFailed(f"transformers ended with code {code}:\n{self.group.tail()}")
        return json.loads(line)

    def run(self, way: Way, prompts: list[Prompt], new_tokens: int) -> float:
        """Wall seconds for exactly ``new_tokens`` after each prompt. Raises ServerFailed."""
        assert self.group.process.stdin is not None
        self.group.resume()
        request = json.dumps({"do": way, "prompts": prompts, "new_tokens": new_tokens}) + "\n"
        self.group.process.stdin.write(request.encode())
        self.group.process.stdin.flush()
        answer = self._read()
        self.group.pause()
        if answer["tokens"] != [new_tokens] * len(prompts):
            raise ServerFailed(
                f"transformers ({way}): {new_tokens} tokens each were asked for, got {answer['tokens']}"
            )
        return float(answer["wall_s"])  # pyright: ignore[reportArgumentType]

    def usage(self) -> Usage:
        """Of the worker."""
        return self.group.usage()
