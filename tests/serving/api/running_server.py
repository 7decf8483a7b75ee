"""A ``sharewell serve`` process for tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from sharewell.models import ModelConfig

ORIGIN = "https://app.example.org"  # the server's one CORS origin


@dataclass
class RunningServer:
    """A ``sharewell serve`` process and where it answers."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    keys: dict[str, str]

    def client(self, key: str | None = None, **options: object) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys.get(key, key)}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)  # pyright: ignore[reportArgumentType]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def serving(folder: Path, *options: str, keys: dict[str, str] | None = None) -> Iterator[RunningServer]:
    """A server on a free port with one thread, until the block ends."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "sharewell", "serve", "--port", "0", "--threads", "1"]
    # what is asked twice is to be computed twice, unless a test says otherwise
    command += ["--cache", "off", *options] if "--cache" not in options else options
    environment = {**os.environ, "SHAREWELL_STATE": str(folder / "state.sqlite3")}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"at (http://\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the server did not come up:\n" + log.read_text(errors="replace")[-4000:])
            time.sleep(0.05)
        yield RunningServer(found[1], process, log, keys or {})
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_adapter(folder: Path, config: ModelConfig) -> Path:
    """A peft adapter with random weights, large enough to change what the model says."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(7)
    out = {"q_proj": config.n_heads * config.head_dim, "v_proj": config.kv_width}
    tensors = {}
    for layer in range(config.n_layers):
        for name, width in out.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, config.hidden_size, generator=generator) * 0.05
            tensors[f"{stem}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
