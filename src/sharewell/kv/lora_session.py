"""Several LoRA roles on one growing transcript: who runs which tokens, over one cache or several.

Source: LRAgent, arXiv 2602.01053."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .depth_sharing import cache_argument
from .hf_cache import GrowingLayer, PlanCache
from .lora_measure import Similarity, similarity
from .lora_sharing import LoraShareConfig, LoraShareError, SharedLoraCache, shareable_layers

ALIKE = 0.9  # cosine of base values between agents below which sharing them is doubtful (0.95 in the source)


class DivergedPrompt(UserWarning):
    """A role's prompt that parts from the transcript: what follows is not shared."""


@dataclass(frozen=True)
class Turn:
    """Tokens ``start ... end - 1`` of the transcript, whose keys and values ``role`` wrote first."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class SessionMemory:
    """Bytes of the caches of a session; ``separate`` is what a cache for each role holds for as many
    tokens."""

    keys: int
    values: int
    low_rank: int
    separate: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.keys + self.values + self.low_rank

    @property
    def ratio(self) -> float:
        """Of separate caches."""
        return self.total / self.separate if self.separate else 0.0


class MultiLoraSession:
    """Roles of one transcript, each a LoRA adapter of a peft ``model`` (``adapters``: role to its name).

    ``tokenizer`` (anything with ``encode(text)``) is needed only for roles that are given text.
    ``transcript`` are all tokens so far, ``turns`` who wrote what, ``computed`` the tokens that each role
    pushed through the layers. Raises LoraShareError for adapters that cannot share."""

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, str],
        config: LoraShareConfig | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.adapters = model, dict(adapters)
        self.config, self.tokenizer = config or LoraShareConfig(), tokenizer
        attentions = shareable_layers(model, self.adapters, self.config.mode)
        self._first, self._n_layers = attentions[0], len(attentions)
        self._argument = cache_argument(model.get_base_model().forward) or "past_key_values"
        self.transcript: list[int] = []
        self.turns: list[Turn] = []
        self.computed = dict.fromkeys(self.adapters, 0)
        self._shared = None
        if self.config.mode in ("base", "base_lr"):
            self._shared = SharedLoraCache(model, self.adapters, self.config)
        names = ["*"] if self.config.mode == "full" else list(self.adapters)
        self._own = {} if self._shared is not None else {name: PlanCache(self._n_layers) for name in names}
        self._checked = False

    # Running

    def run(
        self, role: str, new: str | Sequence[int] = (), *, whole: bool = False, **generate: Any
    ) -> list[int]:
        """Append ``new`` to the transcript and let ``role`` answer: the tokens that ``model.generate(...,
        **generate)`` gives, which join the transcript. ``whole``: ``new`` is the role's whole prompt; its
        common beginning with the transcript is shared and the rest replaces what follows. When generation is
        cancelled, or fails, the transcript and every role's cache are as before."""
        with self._turn(role, new, whole) as ids:
            cache = self._catch_up(role)
            begun = torch.tensor([ids], device=self.model.device)
            with self._as(role, cache), self._counted(role):
                out = self.model.generate(
                    input_ids=begun,
                    attention_mask=torch.ones_like(begun),
                    **{self._argument: cache},
                    **generate,
                )
            answer = out[0, len(ids) :].tolist()
            ids += answer
        return answer

    def logits(self, role: str, new: str | Sequence[int] = (), *, whole: bool = False) -> torch.Tensor:
        """Append ``new`` and compute it as ``role``, without an answer: logits ``[tokens computed, vocab]``,
        of which the last are those of ``new``."""
        with self._turn(role, new, whole) as ids:
            cache = self._catch_up(role)
            have = self._length(role)
            if have == len(ids):
                raise ValueError("new must hold at least one token that was not computed, got none")
            rest = torch.tensor([ids[have:]], device=self.model.device)
            with self._as(role, cache), self._counted(role), torch.no_grad():
                return self._forward(rest, cache).logits[0]

    @contextmanager
    def _turn(self, role: str, new: str | Sequence[int], whole: bool) -> Any:
        if role not in self.adapters:
            raise LoraShareError(f"role must be one of {', '.join(self.adapters)}, got {role!r}")
        ids, before, turns = self._ids(new), list(self.transcript), list(self.turns)
        lengths = {name: self._length(name) for name in self.adapters}
        if whole:
            ids = self._rebase(role, ids)
        elif self.config.check_similarity and not self._checked and turns and turns[-1].role != role:
            self._check_similarity()
        self.transcript += ids
        if not self.transcript:
            raise ValueError("new must hold at least one token, got none")
        start = self._written()
        try:
            yield self.transcript
        except BaseException:
            self.transcript[:], self.turns[:] = before, turns
            for name in self.adapters:
                self._truncate(name, min(lengths[name], self._length(name)))
            raise
        if self._written() > start:
            self.turns.append(Turn(role, start, self._written()))

    def _ids(self, new: str | Sequence[int]) -> list[int]:
        if isinstance(new, str):
            if self.tokenizer is None:
                raise ValueError("text needs a tokenizer: pass tokenizer= to the session, or token ids")
            return list(self.tokenizer.encode(new))
        return [int(token) for token in new]

    def _rebase(self, role: str, prompt: list[int]) -> list[int]:
        """What is left of ``prompt`` behind its common beginning with the transcript, now its end."""
        old = self.transcript
        pairs = zip(old, prompt, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(prompt)))
        if common < len(old):
            if common < len(prompt):
                warnings.warn(
                    f"the prompt of role {role!r} parts from the transcript at token {common}: "
                    f"{prompt[common]} there, {old[common]} here; {len(old) - common} tokens are not shared",
                    DivergedPrompt,
                    stacklevel=5,
                )
            common = min(common, max(0, len(prompt) - 1))
            del self.transcript[common:]
            for name in self.adapters:
                self._truncate(name, common)
            self.turns = [Turn(t.role, t.start, min(t.end, common)) for t in self.turns if t.start < common]
        return prompt[common:]

    def _catch_up(self, role: str) -> Any:
        """The role's cache; in base mode its low-rank part of all stored tokens is there then."""
        if self._shared is None:
            return self._own["*" if self.config.mode == "full" else role]
        cache = self._shared.fork(role)
        have, stored = cache.covered(), cache.stored
        if have < stored:
            ids = torch.tensor([self.transcript[have:stored]], device=self.model.device)
            with cache.attached(skip=True), self._counted(role), torch.no_grad():
                self._forward(ids, cache, logits_to_keep=1)
        return cache

    def _forward(self, ids: torch.Tensor, cache: Any, **more: Any) -> Any:
        return self.model(input_ids=ids, use_cache=True, **{self._argument: cache}, **more)

    @contextmanager
    def _as(self, role: str, cache: Any) -> Any:
        if isinstance(cache, SharedLoraCache):
            with cache.attached():
                yield
            return
        active = self.model.active_adapter
        self.model.set_adapter(self.adapters[role])
        try:
            yield
        finally:
            self.model.set_adapter(active)

    @contextmanager
    def _counted(self, role: str) -> Any:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.computed[role] += hidden.shape[0] * hidden.shape[1]

        hook = self._first.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    # State

    def _length(self, role: str) -> int:
        if self._shared is not None:
            return self._shared.covered(role)
        return self._own["*" if self.config.mode == "full" else role].get_seq_length()

    def _written(self) -> int:
        """Tokens that some role has computed."""
        if self._shared is not None:
            return self._shared.stored
        return max(cache.get_seq_length() for cache in self._own.values())

    def _truncate(self, role: str, length: int) -> None:
        if self._shared is not None:
            self._shared.fork(role).truncate(length)
            return
        cache = self._own["*" if self.config.mode == "full" else role]
        for layer in cache.layers:  # a pass that failed has not reached all of them
            if isinstance(layer, GrowingLayer):
                layer.crop(min(0, length - layer.get_seq_length()))

    def memory(self) -> SessionMemory:
        """Bytes that the session's caches hold now."""
        tokens, config = self._written(), self.model.get_base_model().config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        separate = len(self.adapters) * 2 * width * tokens * self._n_layers
        if self._shared is not None:
            parts = self._shared.nbytes()
            return SessionMemory(parts["k"], parts["v"], parts["z"], separate)
        half = sum(cache.nbytes for cache in self._own.values()) // 2
        return SessionMemory(half, half, 0, separate)

    def similarity_report(self) -> Similarity:
        """How alike the roles' keys and values of the transcript are (a pass of the transcript a role)."""
        if not self.transcript:
            raise ValueError("the transcript is empty: let a role run first")
        return similarity(self.model, self.adapters, self.transcript)

    def _check_similarity(self) -> None:
        self._checked = True
        found = self.similarity_report()
        if found.base_values < ALIKE:
            warnings.warn(
                f"base values of the roles are alike by {found.base_values:.2f} only (cosine; the method "
                f"supposes {ALIKE} and more): shared caches may cost quality",
                stacklevel=6,
            )
