"""One choice of one request as the engine sees it: its tokens, how far they are computed, and where it
stands."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from .messages import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from ...kv import KVPlan
    from .grammar import GrammarState


class Status(Enum):
    """waiting -> running -> finished; running -> waiting on preemption; following: waits for its leader's
    prompt."""

    WAITING = auto()
    FOLLOWING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of a prompt and its answer; ``computed`` of them have keys and values in pages."""

    __slots__ = (
        "adapter_slot", "arrival", "block_hashes", "cached_tokens", "computed", "counts", "emitted_nothing",
        "followers", "grammar", "id", "index", "kv_plan", "limit", "n_prompt", "output_counts",
        "prompt_logprobs",
        "published", "request", "row", "salt", "sampling", "status", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self, sequence_id: int, request: EngineRequest, index: int, arrival: int, salt: bytes
    ) -> None:
        self.id, self.request, self.index, self.arrival, self.salt = (
            sequence_id,
            request,
            index,
            arrival,
            salt,
        )
        self.sampling: SamplingParams = request.sampling
        self.n_prompt = len(request.prompt_ids)
        emitted = request.emitted[index] if request.emitted else ()
        self.tokens: list[int] = [*request.prompt_ids, *emitted]
        self.computed = 0
        self.emitted_nothing = True
        self.cached_tokens = -1  # not admitted yet
        self.published = 0  # full blocks that others may share
        self.block_hashes: list[bytes] = []
        self.adapter_slot = -1
        self.status = Status.WAITING
        self.followers: list[Sequence] = []
        self.grammar: GrammarState | None = None
        self.counts: dict[int, int] | None = None
        self.output_counts: dict[int, int] | None = None
        self.prompt_logprobs: list | None = [] if request.sampling.prompt_logprobs is not None else None
        self.stop_ids: frozenset[int] = frozenset()
        self.row = -1
        self.kv_plan: KVPlan | None = None  # its prompt is computed in one piece and never published
        self.limit = request.sampling.max_tokens  # tokens of output; the engine lowers it to what fits

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def key(self) -> tuple[int, float, int, int]:
        """Order of service: priority, deadline, arrival, choice; no two are equal. The greatest is preempted
        first."""
        deadline = self.request.deadline_s
        return self.request.priority, float("inf") if deadline is None else deadline, self.arrival, self.id
