"""The engine's configuration: one frozen, self-validating record that crosses the process boundary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs one model.

    ``dtype="auto"``: on CPU the fastest that keeps quality (int4 for checkpoints that are stored in 4 bits,
    bfloat16 otherwise), bfloat16 on CUDA. ``kv_cache_bytes=None`` takes 2 GiB on CPU, capped at a quarter of
    the memory, and 80 % of what is free on CUDA. ``runner="stock"`` keeps the transformers modules (fallback
    and oracle). ``deterministic`` makes logits, bit for bit, independent of which other requests are running
    and of how a prompt is cut; the fused runner's always are, the stock runner pays by computing token by
    token. ``max_batch_tokens`` bounds the tokens of one step (prefill is chunked to fit); ``threads=None``
    takes every core that this process may use. Raises ValueError naming the field and its range."""

    model: str = "smollm2"
    dtype: DType = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    runner: Literal["auto", "fused", "stock"] = "auto"
    block_size: int = 16
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None  # overrides kv_cache_bytes
    max_model_len: int | None = None
    max_batch_tokens: int = 256
    max_seqs: int = 64
    max_waiting: int = 1024
    prefix_sharing: bool = True
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> peft folder
    max_adapters: int = 8
    max_lora_rank: int = 64
    threads: int | None = None
    deterministic: bool = False
    relay_share: float = 0.25  # of the pages that answers of requests with relay may pin
    relay_sample: float = 0.05  # of relayed requests that are computed in full as well, when idle
    relay_fallback_kl: float | None = None  # measured divergence (nats) above which nothing is relayed
    forced_preemption_every: int = 0  # testing: preempt one running sequence every so many steps, 0 never

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        check(
            self.dtype in ("auto", "float32", "bfloat16", "int8", "int4"),
            "dtype",
            "auto, float32, bfloat16, int8 or int4",
        )
        check(self.device in ("cpu", "cuda"), "device", "cpu or cuda")
        check(self.runner in ("auto", "fused", "stock"), "runner", "auto, fused or stock")
        check(
            1 <= self.block_size <= 512 and self.block_size & (self.block_size - 1) == 0,
            "block_size",
            "a power of two in [1, 512]",
        )
        check(self.kv_cache_bytes is None or self.kv_cache_bytes > 0, "kv_cache_bytes", "None or positive")
        check(self.num_blocks is None or self.num_blocks >= 2, "num_blocks", "None or at least 2")
        check(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "None or at least 2")
        check(self.max_batch_tokens >= 1, "max_batch_tokens", "at least 1")
        check(self.max_seqs >= 1, "max_seqs", "at least 1")
        check(
            self.max_batch_tokens >= self.max_seqs, "max_batch_tokens", f"at least max_seqs ({self.max_seqs})"
        )
        check(self.max_waiting >= 0, "max_waiting", "at least 0")
        check(self.max_adapters >= 0, "max_adapters", "at least 0")
        check(1 <= self.max_lora_rank <= 512, "max_lora_rank", "in [1, 512]")
        check(0 < self.relay_share < 1, "relay_share", "in (0, 1)")
        check(0 <= self.relay_sample <= 1, "relay_sample", "in [0, 1]")
        bound = self.relay_fallback_kl
        check(bound is None or bound > 0, "relay_fallback_kl", "None or positive")
        check(self.threads is None or self.threads >= 1, "threads", "None or at least 1")
