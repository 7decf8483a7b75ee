"""Relaying through the API: opting in, quoting by the original tokens, scopes, and explanations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer

from sharewell.cli import main
from sharewell.models import Tokenizer
from sharewell.serving.api.config import ServerConfig
from sharewell.serving.api.keys import ApiKey, StateStore
from sharewell.serving.api.relays import Relays, Sharing
from sharewell.simulation import VirtualClock

CHAT = "/v1/chat/completions"


@pytest.fixture
def relays(smollm2: Path) -> Relays:
    return Relays(ServerConfig(), Tokenizer(smollm2), StateStore(None, VirtualClock()))


def joined(relays: Relays, pieces: list[Any]) -> str:
    decode = relays._tokenizer.decode
    return "".join(p if isinstance(p, str) else decode(p) for p in pieces)


def test_a_quoted_answer_has_the_tokens_that_it_was_decoded_as(relays: Relays) -> None:
    tokenizer, key = relays._tokenizer, ApiKey(1, "a")
    text = " The ferry leaves at noon, and the café by the pier opens its doors an hour before that.\n"
    # other tokens than the text encodes to: cut in single words' halves
    ids = [t for a in range(0, len(text), 3) for t in tokenizer.encode(text[a : a + 3])]
    assert ids != tokenizer.encode(text)
    relays.keep("r1", "r1", key, text, ids)
    for quoted in (text, text.strip()):
        prompt = f"Review this:\n\n{quoted}\n\nWhat is missing? Again: {quoted}"
        pieces = relays.weave(prompt, Sharing(), key)
        assert joined(relays, pieces) == prompt
        found = [p for p in pieces if not isinstance(p, str)]
        assert len(found) == 2 and all(len(p) >= len(ids) - 3 for p in found)
        assert all(",".join(map(str, p)) in ",".join(map(str, ids)) for p in found)
    edited = text.replace("noon", "dawn")
    assert relays.weave(edited, Sharing(), key) == [edited]
    assert relays.weave(text, Sharing(), ApiKey(2, "b")) == [text]
    assert relays.weave(text, Sharing(("other",)), key) == [text]


def test_other_answers_than_ones_own_are_404(relays: Relays) -> None:
    from sharewell.serving.api.errors import ApiError
    from sharewell.serving.api.schemas import Extensions

    relays.keep("r1", "r1", ApiKey(1, "a"), "x", [1])
    named = Extensions(relay="auto", segments=["r1"])
    assert relays.wish(named, ApiKey(1, "a")) == Sharing(("r1",))
    for name, key in (("r1", ApiKey(2, "b")), ("never", ApiKey(1, "a"))):
        with pytest.raises(ApiError) as caught:
            relays.wish(Extensions(segments=[name]), key)
        assert caught.value.status == 404 and caught.value.code == "segment_not_found"
    assert relays.wish(None, ApiKey(1, "a")) is None
    assert relays.wish(Extensions(relay="off", segments=["never"]), ApiKey(1, "a")) is None


def test_answers_are_relayed_explained_and_counted(keyed: RunningServer, capsys: Any) -> None:
    def ask(api: httpx.Client, system: str, text: str, n: int, **sharing: Any) -> Any:
        body = {
            "model": "smollm2", "max_tokens": n, "temperature": 0, "sharewell": {"relay": "auto", **sharing},
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
        }  # fmt: skip
        return api.post(CHAT, json=body)

    with keyed.client("alice") as alice, keyed.client("bob") as bob:
        first = ask(alice, "You write specifications.", "Specify a chess clock.", 96).json()
        assert first["sharewell"]["relayed_tokens"] == 0
        spec = first["choices"][0]["message"]["content"]
        question = f"Here is a specification:\n{spec}\nName one risk."
        second = ask(alice, "You are a strict reviewer of other people's work.", question, 8,
                     segments=[first["id"]]).json()  # fmt: skip
        told, usage = second["sharewell"], second["usage"]
        assert told["relayed_tokens"] > 30 and told["relay_kl"] > 0
        assert 80 < told["relayed_tokens"] + told["recomputed_tokens"] <= 96 < usage["prompt_tokens"]
        stolen = ask(bob, "You are a thief.", question, 1, segments=[first["id"]])
        assert stolen.status_code == 404 and stolen.json()["error"]["param"] == "sharewell.segments.0"
        assert ask(bob, "You are a reader.", question, 1).json()["sharewell"]["relayed_tokens"] == 0

        found = alice.get(f"/v1/sharewell/explain/{second['id']}").json()
        assert found["tokens"]["relayed"] == told["relayed_tokens"]
        assert sum(found["tokens"].values()) == found["prompt_tokens"] == usage["prompt_tokens"]
        text = "".join(s["text"] for s in found["spans"])
        assert question in text
        page = alice.get(f"/explain/{second['id']}")
        assert page.headers["content-type"].startswith("text/html") and 'class="relayed"' in page.text
        for path in ("/v1/sharewell/explain/", "/explain/"):
            assert bob.get(path + second["id"]).status_code == 404
        metrics = alice.get("/metrics").text
        assert f"sharewell_relayed_tokens_total {float(told['relayed_tokens'])}" in metrics
        ordinary = alice.post(CHAT, json={"model": "smollm2", "max_tokens": 1, "messages": [
            {"role": "user", "content": "Hi"}]}).json()  # fmt: skip
        assert "sharewell" not in ordinary
    command = ["kv", "explain", second["id"], "--server", keyed.url, "--key", keyed.keys["alice"]]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == found["tokens"]
    assert main(command) == 0
    assert "relayed from an earlier answer" in " ".join(capsys.readouterr().out.split())
    assert main(["kv", "explain", "none", "--server", keyed.url, "--key", keyed.keys["alice"]]) == 2
    assert "not known" in capsys.readouterr().err
    assert main(["kv", "explain", "none", "--server", "http://127.0.0.1:9"]) == 2
