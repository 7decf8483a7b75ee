"""Relaying as clients see it: which requests opt in, quoted answers as the tokens they were decoded as, and
how a prompt was computed.

A text that is quoted seldom encodes to the tokens that made it, so answers of requests that opt in are kept
with their token ids, and a later prompt of the same key gets those ids where it quotes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...models import Tokenizer
from ..core.messages import EngineStats
from .config import ServerConfig
from .errors import ApiError
from .keys import ApiKey, StateStore

if TYPE_CHECKING:
    from .schemas import Extensions

KEPT = 1024  # answers, and explanations
LOOKED_AT = 64  # answers of a key that a prompt is compared with when it names none
SHORTEST = 16  # tokens


@dataclass(frozen=True)
class Sharing:
    """A request's wish to relay; ``segments``: ids of answers, empty for any of its key's."""

    segments: tuple[str, ...] = ()

    def wire(self) -> dict[str, Any]:
        """For ``EngineRequest.sharing``."""
        return {"relay": "auto", **({"segments": self.segments} if self.segments else {})}


@dataclass(frozen=True)
class _Answer:
    request_id: str
    owner: int
    text: str
    token_ids: tuple[int, ...]


@dataclass
class Explained:
    """How one request's prompt was computed: ``spans`` of [first, end, origin, whose answer]."""

    request_id: str
    owner: int
    token_ids: tuple[int, ...]
    relayed: int = 0
    recomputed: int = 0
    predicted_kl: float | None = None
    sampled_kl: float | None = None
    reuse: float | None = None
    note: str = ""
    spans: list[list[Any]] = field(default_factory=list)


class Relays:
    """Answers and explanations of one server; they are in memory, and gone with it."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer, store: StateStore) -> None:
        self._config, self._tokenizer, self._store = config, tokenizer, store
        self._answers: OrderedDict[str, list[_Answer]] = OrderedDict()
        self._explained: OrderedDict[str, Explained] = OrderedDict()

    def _mine(self, owner: int, key: ApiKey) -> bool:
        return self._config.share_scope == "all" or owner == key.id

    # Requests

    def wish(self, extensions: Extensions | None, key: ApiKey) -> Sharing | None:
        """What a request asks for, or the configuration for it. Raises ApiError 404 for the answer of
        another key, and for one that never was."""
        segments = tuple((extensions.segments if extensions else None) or ())
        relay = (extensions.relay if extensions else None) or ("auto" if segments else self._config.relay)
        if relay == "off":
            return None
        for i, name in enumerate(segments):
            if not self._known(name, key):
                raise ApiError(
                    404, f"answer {name[:200]!r} does not exist", param=f"sharewell.segments.{i}",
                    code="segment_not_found",
                )  # fmt: skip
        return Sharing(
            tuple(a.request_id for name in segments for a in self._answers.get(name, ())) or segments
        )

    def _known(self, name: str, key: ApiKey) -> bool:
        held = self._answers.get(name)
        if held:
            return self._mine(held[0].owner, key)
        everyone = self._config.share_scope == "all"
        return any(self._store.owns(n, None if everyone else key) for n in (name, f"{name}-0"))

    def weave(self, text: str, sharing: Sharing, key: ApiKey) -> list[str | tuple[int, ...]]:
        """``text`` in pieces: texts to encode, and the token ids of answers that it quotes."""
        if sharing.segments:
            wanted = set(sharing.segments)
            answers = [a for held in self._answers.values() for a in held if a.request_id in wanted]
        else:
            answers = [a for held in self._answers.values() for a in held][-4 * LOOKED_AT :]
        answers = [a for a in answers if self._mine(a.owner, key)][-LOOKED_AT:]
        raw = text.encode("utf-8")
        found: list[tuple[int, int, tuple[int, ...]]] = []
        for answer in sorted(answers, key=lambda a: -len(a.text)):
            for at, end, ids in self._quotes(raw, answer):
                if all(end <= a or at >= b for a, b, _ in found):
                    found.append((at, end, ids))
        pieces: list[str | tuple[int, ...]] = []
        done = 0
        for at, end, ids in sorted(found):
            pieces += [raw[done:at].decode("utf-8"), ids]
            done = end
        return [p for p in (*pieces, raw[done:].decode("utf-8")) if p]

    def _quotes(self, raw: bytes, answer: _Answer) -> Iterable[tuple[int, int, tuple[int, ...]]]:
        """(first byte, end, token ids) of each place where ``raw`` quotes the answer."""
        parts = [self._tokenizer.token_bytes(t) for t in answer.token_ids]
        offsets = list(accumulate(map(len, parts), initial=0))
        spoken = b"".join(parts)
        for needle in dict.fromkeys((answer.text.encode("utf-8"), answer.text.strip().encode("utf-8"))):
            start = spoken.find(needle) if needle else -1
            if start < 0:
                continue
            # whole tokens inside the quote, cut where characters begin
            first = next(i for i, o in enumerate(offsets) if o >= start)
            last = max(i for i, o in enumerate(offsets) if o <= start + len(needle))
            while first < last and not _boundary(spoken, offsets[first]):
                first += 1
            while first < last and not _boundary(spoken, offsets[last]):
                last -= 1
            if last - first < SHORTEST:
                continue
            at, places = raw.find(needle), []
            while at >= 0:
                places.append(at)
                at = raw.find(needle, at + len(needle))
            if places:
                head, length = offsets[first] - start, offsets[last] - offsets[first]
                ids = answer.token_ids[first:last]
                yield from ((at + head, at + head + length, ids) for at in places)
                return

    # What became of them

    def keep(
        self, response_id: str, request_id: str, key: ApiKey, text: str, token_ids: Sequence[int]
    ) -> None:
        """Remember an answer under the id that its client knows."""
        self._answers.setdefault(response_id, []).append(_Answer(request_id, key.id, text, tuple(token_ids)))
        self._answers.move_to_end(response_id)
        while len(self._answers) > KEPT:
            self._answers.popitem(last=False)

    def alias(self, response_id: str, source: str, key: ApiKey) -> None:
        """An answer from the cache is the one that was computed under another id."""
        held = [a for a in self._answers.get(source, ()) if self._mine(a.owner, key)]
        if held:
            self._answers[response_id] = held

    def explain(self, request_id: str, key: ApiKey, prompt: tuple[int, ...], told: Mapping[str, Any]) -> None:
        """Note how a prompt was computed."""
        self._explained[request_id] = Explained(
            request_id, key.id, prompt, told["relayed"], told["recomputed"], told["kl"], None,
            told.get("reuse"), told["note"], [list(span) for span in told["spans"]],
        )  # fmt: skip
        while len(self._explained) > KEPT:
            self._explained.popitem(last=False)

    def explained(self, request_id: str, key: ApiKey, stats: EngineStats) -> Explained:
        """How a prompt of this key was computed. Raises ApiError 404."""
        found = self._explained.get(request_id) or self._explained.get(f"{request_id}-0")
        if found is None or not self._mine(found.owner, key):
            raise ApiError(
                404, f"request {request_id[:200]!r} is not known, or did not opt in to relaying",
                code="request_not_found",
            )  # fmt: skip
        for name, kl in stats.relay_recent:
            if name in self._explained:
                self._explained[name].sampled_kl = kl
        return found


def extension(sharing: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a reply says of relaying; nothing for requests that did not opt in."""
    if sharing is None:
        return {}
    body = {
        "relayed_tokens": sharing["relayed"],
        "recomputed_tokens": sharing["recomputed"],
        "relay_kl": sharing["kl"],
    }
    if sharing["note"]:
        body["note"] = sharing["note"]
    return {"sharewell": body}


def _boundary(text: bytes, at: int) -> bool:
    return at >= len(text) or text[at] & 0xC0 != 0x80


_COUNTERS = {
    "relayed_prompts": "Prompts in which tokens of earlier answers were reused",
    "relayed_tokens": "Tokens of earlier answers that were reused",
    "relay_recomputed_tokens": "Tokens of earlier answers that were computed anew in part",
    "relay_declined": "Relay plans given up for full computation",
    "relay_missing": "Segments evicted between lookup and use",
    "relay_damaged": "Segments dropped for NaN or infinite values",
    "relay_fallbacks": "Requests that the quality guard kept from relaying",
    "relay_evictions": "Segments evicted",
    "relay_samples": "Relayed requests that were computed in full as well",
    "relay_kl_sum": "Their divergences from full computation together, in nats",
}


class RelayCollector(Collector):
    """The engine's figures about relaying; ``stats`` is the last snapshot."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def collect(self) -> Iterable[Metric]:
        s = self.stats
        for name, about in _COUNTERS.items():
            yield CounterMetricFamily("sharewell_" + name, about, getattr(s, name))
        yield GaugeMetricFamily("sharewell_relay_segments", "Answers kept for relaying", s.relay_segments)
        yield GaugeMetricFamily(
            "sharewell_relay_segment_bytes", "Bytes of pages that they pin", s.relay_segment_bytes
        )
        yield GaugeMetricFamily(
            "sharewell_relay_fallen_back", "1 while the quality guard holds relaying off", s.relay_fallen_back
        )
