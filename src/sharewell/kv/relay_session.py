"""Agents on one model in one process that hand their texts on: decode, keep, relay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .engine import PlannedForward
from .plans import OwnPlan
from .relay import RelayConfig, RelayPlan, StudyPlan
from .relay_pieces import Piece, RelayDeclined
from .relay_profile import LayerProfile, profile_for
from .segments import TensorKV, model_key
from .store import KVSegmentStore, SegmentId

if TYPE_CHECKING:
    from ..models import ChatTemplate, Tokenizer
    from ..simulation import Clock

_MARK = "\x00"  # stands for a handed-on text while a prompt is made


@dataclass(frozen=True)
class Generation:
    """An agent's answer: ``segment`` is its place in the store (None when there was no room). As (part of)
    another message's content it stands for the text, token by token."""

    text: str
    ids: tuple[int, ...]
    segment: SegmentId | None


@dataclass(frozen=True)
class HandOverReport:
    """One prompt's figures. ``declined`` says why it was computed in full after all; KL in nats."""

    agent: str
    prompt_tokens: int
    found_tokens: int
    reuse_rate: float
    ttft_s: float
    predicted_kl: float | None
    sampled_kl: float | None
    declined: str = ""


class RelaySession:
    """Generates for several agents on ``model`` (what :class:`PlannedForward` takes). ``template`` renders
    messages; ``sample``: every so many-th hand-over is computed in full as well, to measure what relaying
    changed (0: never). Raises UnsupportedModel where keys cannot be moved."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: RelayConfig | None = None,
        store: KVSegmentStore | None = None,
        *,
        clock: Clock,
        profile: LayerProfile | None = None,
        sample: int = 0,
    ) -> None:
        self.engine = PlannedForward(model)
        self.tokenizer, self.template, self._clock = tokenizer, template, clock
        self.config = config or RelayConfig()
        self.store = store or KVSegmentStore(1 << 30)
        decoder = self.engine.decoder
        _ = self.engine.rope
        self.profile = profile or profile_for(decoder.config)
        self._layers = self.config.range(self.profile, decoder.config.n_layers)
        self._key, self._sample = model_key(decoder), sample
        self._reports: list[HandOverReport] = []

    def generate(
        self,
        agent: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 128,
        ends: Iterable[int] | None = None,
    ) -> Generation:
        """The greedy answer of ``agent``. A message's ``content`` is a text, a :class:`Generation`, or a list
        of both. ``ends``: token ids that end it (default: the model's)."""
        started = self._clock.monotonic()
        prompt = self._prompt(messages)
        stop = set(self.engine.decoder.config.eos_token_ids if ends is None else ends)
        matches = self.store.find(self._key, prompt)
        pieces, held = [], []
        for m in matches:
            try:
                held.append(self.store.pin(m.segment))
            except KeyError:
                continue  # evicted meanwhile: its tokens are computed
            pieces.append(Piece(held[-1], m.start, m.offset, m.length))
        plan = RelayPlan(pieces, self.config, self.profile)
        declined = ""
        try:
            out = self.engine(prompt, plan if pieces else OwnPlan())
        except RelayDeclined as error:
            declined = str(error)
            for damaged in plan.damaged:
                self.store.drop(damaged)
            out = self.engine(prompt, OwnPlan())
        finally:
            for segment in held:
                self.store.release(segment.id)
        ids = [int(out.logits[-1].argmax())]
        ttft = self._clock.monotonic() - started
        relayed = bool(pieces) and not declined
        sampled = None
        if relayed and self._sample and len(self._reports) % self._sample == 0:
            p, q = (x.logits[-1].float().log_softmax(-1) for x in (self.engine(prompt), out))
            sampled = max(0.0, float((p.exp() * (p - q)).sum()))
        self._reports.append(
            HandOverReport(
                agent, len(prompt), sum(p.length for p in pieces), plan.reuse_rate if relayed else 0.0, ttft,
                plan.predicted_kl if relayed else None, sampled, declined,
            )
        )  # fmt: skip
        space = out.space
        while len(ids) < max_new_tokens and ids[-1] not in stop:
            ids.append(int(self.engine([ids[-1]], space=space).logits[-1].argmax()))
        if ids[-1] in stop:
            ids.pop()
        segment = self._keep(agent, space, len(prompt), ids)
        return Generation(self.tokenizer.decode(ids), tuple(ids), segment)

    def _keep(self, agent: str, space: Any, start: int, ids: list[int]) -> SegmentId | None:
        """The answer as a segment; the last token is dropped where it has no keys and values yet."""
        n = min(len(ids), space.context(0) - start)
        if n < self.store.block:
            return None
        places = torch.arange(start, start + n)
        study = StudyPlan(self._layers, self.engine.decoder.config.n_heads)
        self.engine(ids[:n], study, space=space, positions=places, want=torch.arange(0))
        try:
            kv = TensorKV.copied(space, 0, places)
            return self.store.put(
                self._key, ids[:n], kv, places, hidden=study.kept, influence=study.influence, writer=agent
            )
        except ValueError:  # NaN or infinite values: nobody shall read them
            return None

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids; handed-on texts have the ids they were decoded as, the rest is encoded in pieces."""
        handed: list[Generation] = []
        plain = []
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str | Generation) else content
            text = ""
            for part in parts:
                if isinstance(part, Generation):
                    handed.append(part)
                    part = _MARK
                elif _MARK in part:
                    raise ValueError("content must be free of NUL characters")
                text += part
            plain.append({**message, "content": text})
        texts = self.template.render(plain).split(_MARK)
        if len(texts) != len(handed) + 1:
            raise ValueError(f"the template shows {len(texts) - 1} of {len(handed)} handed-on texts")
        ids = self.tokenizer.encode(texts[0])
        for generation, text in zip(handed, texts[1:], strict=True):
            ids += [*generation.ids, *(self.tokenizer.encode(text) if text else [])]
        return ids

    def report(self) -> list[HandOverReport]:
        """One entry for each prompt so far."""
        return list(self._reports)
