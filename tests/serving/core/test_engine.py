"""The engine core over the hash runner: whatever the mix, every request gets what it would get alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hash_runner import (
    EOS,
    NAN_TOKEN,
    VOCAB,
    Reference,
    adapter_hash,
    drain,
    make_core,
    reference,
    tiny_adapter,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.serving.core.engine import EngineCore, QueueFull, Refused
from sharewell.serving.core.messages import EngineRequest, SamplingParams

GREEDY = {"temperature": 0.0}


def request(
    name: str, prompt: Any, max_tokens: int = 12, *, n: int = 1, salt: str = "", **params: Any
) -> EngineRequest:
    fields = {
        k: params.pop(k) for k in ("adapter", "priority", "deadline_s", "emitted", "finished") if k in params
    }
    sampling = SamplingParams(**{**GREEDY, "max_tokens": max_tokens, **params})
    return EngineRequest(name, tuple(prompt), sampling, n=n, cache_salt=salt, **fields)


def prompt_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 90) for i in range(length)]


def assert_exact(
    core: EngineCore,
    requests: list[EngineRequest],
    outputs: dict[tuple[str, int], list[Any]],
    **adapters: int,
) -> None:
    room = min(core.info.context_length, core.info.num_blocks * core.info.block_size)
    for r in requests:
        for i in range(r.n):
            got = outputs[r.request_id, i]
            expected = reference(r, i, adapters.get(r.adapter or "", 0), room)
            assert (tokens_of(got), got[-1].finish_reason) == expected, f"{r.request_id} choice {i}"
            assert all(o.finish_reason is None for o in got[:-1]), "a finish reason before the end"


def assert_empty(core: EngineCore) -> None:
    core.blocks.check_integrity()
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_free == stats.blocks_total
    assert not core._live and sorted(core._rows) == list(range(core.config.max_seqs))
    assert core._deadlines == 0 and not any(core.adapters._pins)
    assert not core.blocks._claims


def test_alone_equals_the_reference() -> None:
    core, _ = make_core()
    requests = [request("a", prompt_of(1, 40), 30)]
    core.submit(requests[0])
    assert_exact(core, requests, drain(core))
    assert_empty(core)


def test_a_prompt_is_computed_in_chunks_within_the_budget() -> None:
    core, runner = make_core(max_batch_tokens=16, max_seqs=4, prefix_sharing=False)
    requests = [request(f"r{i}", prompt_of(i, 70), 8, ignore_eos=True) for i in range(4)]
    for r in requests:
        core.submit(r)
    assert_exact(core, requests, drain(core))
    assert max(tokens for _, tokens in runner.batches) == 16
    assert_empty(core)


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    core, _ = make_core(max_batch_tokens=16, max_seqs=4)
    core.submit(request("talks", prompt_of(1, 5), 40, ignore_eos=True))
    while not core.step(0.0):
        pass
    core.submit(request("long", prompt_of(2, 150), 4))
    for _ in range(8):
        assert [o.request_id for o in core.step(0.0)] == ["talks"], (
            "the running answer gets a token in every step"
        )
    drain(core)


def test_thirty_two_requests_compute_their_common_prefix_once() -> None:
    core, _ = make_core(num_blocks=400, context=1024, max_batch_tokens=256, max_seqs=64)
    prefix = prompt_of(7, 512)
    requests = [request(f"r{i}", prefix + prompt_of(100 + i, 32), 4) for i in range(32)]
    for r in requests:
        core.submit(r)
    outputs = drain(core)
    assert_exact(core, requests, outputs)
    stats = core.stats()
    assert stats.computed_prompt_tokens == 512 + 32 * 32
    assert stats.cached_prompt_tokens == 31 * 512
    assert stats.computed_prompt_tokens <= 0.12 * stats.prompt_tokens
    assert [outputs[r.request_id, 0][0].cached_tokens for r in requests] == [0] + [512] * 31
    assert_empty(core)


def test_the_last_prompt_token_is_always_computed() -> None:
    core, _ = make_core(block_size=16)
    prompt = prompt_of(3, 64)
    for name in ("first", "again"):
        core.submit(request(name, prompt, 3, ignore_eos=True))
        outputs = drain(core)
    assert outputs["again", 0][0].cached_tokens == 48
    assert_exact(core, [request("again", prompt, 3, ignore_eos=True)], outputs)


def test_answers_are_shared_with_the_next_turn() -> None:
    core, _ = make_core(block_size=8)
    prompt = prompt_of(4, 20)
    core.submit(request("turn1", prompt, 30, ignore_eos=True))
    answer = tokens_of(drain(core)["turn1", 0])
    turn2 = request("turn2", [*prompt, *answer, 5, 6, 7], 6)
    core.submit(turn2)
    outputs = drain(core)
    assert outputs["turn2", 0][0].cached_tokens == 48  # 49 tokens have keys and values: 6 full blocks
    assert_exact(core, [turn2], outputs)


def test_salt_and_adapter_scope_the_sharing() -> None:
    core, _ = make_core()
    adapter = tiny_adapter("lora", 1)
    core.load_adapter("lora", adapter)
    prompt = prompt_of(5, 40)
    variants = [
        request("a", prompt, 3),
        request("b", prompt, 3, salt="key2"),
        request("c", prompt, 3, adapter="lora"),
    ]
    for r in variants:
        core.submit(r)
        outputs = drain(core)
        assert outputs[r.request_id, 0][0].cached_tokens == 0
        assert_exact(core, [r], outputs, lora=adapter_hash(adapter))


def test_an_adapter_loaded_anew_under_its_name_shares_nothing_with_the_old_one() -> None:
    core, _ = make_core()
    prompt = prompt_of(6, 40)
    for seed in (1, 2):
        adapter = tiny_adapter("lora", seed)
        core.load_adapter("lora", adapter)
        r = request(f"r{seed}", prompt, 8, adapter="lora")
        core.submit(r)
        assert_exact(core, [r], drain(core), lora=adapter_hash(adapter))


def test_adapters_are_resident_by_last_use_and_pinned_while_in_use() -> None:
    core, runner = make_core(max_adapters=2)
    adapters = {f"l{i}": tiny_adapter(f"l{i}", i) for i in range(4)}
    hashes = {name: adapter_hash(a) for name, a in adapters.items()}
    for name, adapter in adapters.items():
        core.load_adapter(name, adapter)
    requests = [request(f"r{i}", prompt_of(i, 9), 6, adapter=f"l{i % 4}") for i in range(8)]
    for r in requests:
        core.submit(r)
    assert_exact(core, requests, drain(core), **hashes)
    assert_empty(core)
    loads = len(runner.loads)
    last = [name for _, name in runner.loads[-2:]]
    for i, name in enumerate(last):
        core.submit(request(f"again{i}", prompt_of(i, 9), 2, adapter=name))
    drain(core)
    assert len(runner.loads) == loads, "a resident adapter is not loaded again"


def test_an_adapter_in_use_cannot_be_unloaded_and_unknown_ones_are_refused() -> None:
    core, _ = make_core()
    core.load_adapter("lora", tiny_adapter("lora", 1))
    core.submit(request("r", prompt_of(1, 9), 3, adapter="lora"))
    with pytest.raises(ValueError, match="in use"):
        core.unload_adapter("lora")
    drain(core)
    core.unload_adapter("lora")
    with pytest.raises(Refused) as refusal:
        core.submit(request("r", prompt_of(1, 9), 3, adapter="lora"))
    assert refusal.value.code == "model_not_found"
    with pytest.raises(ValueError, match="not loaded"):
        core.unload_adapter("lora")
    none, _ = make_core(max_adapters=0)
    with pytest.raises(ValueError, match="max_adapters is 0"):
        none.load_adapter("lora", tiny_adapter("lora", 1))


def test_preempted_requests_resume_exactly() -> None:
    core, _ = make_core(num_blocks=10, block_size=4, context=40, max_seqs=8, max_batch_tokens=32)
    requests = [request(f"r{i}", prompt_of(i, 6), 25, ignore_eos=True) for i in range(6)]
    for r in requests:
        core.submit(r)
    assert_exact(core, requests, drain(core))
    assert core.stats().preemptions > 0
    assert_empty(core)


def test_the_oldest_is_never_preempted() -> None:
    core, _ = make_core(num_blocks=8, block_size=4, max_seqs=8, max_batch_tokens=16)
    requests = [request(f"r{i}", prompt_of(i, 5), 20, ignore_eos=True) for i in range(5)]
    for r in requests:
        core.submit(r)
    ended = []
    while core.has_work:
        ended += [o.request_id for o in core.step(0.0) if o.finish_reason]
    assert ended == sorted(ended), "with equal priorities answers of one length end in order of arrival"
    assert core.stats().preemptions > 0


def test_forced_preemption_changes_no_token() -> None:
    core, _ = make_core(forced_preemption_every=3, max_seqs=8, max_batch_tokens=32)
    requests = [request(f"r{i}", prompt_of(i, 11 * i + 1), 15, temperature=1.0, seed=i) for i in range(8)]
    for r in requests:
        core.submit(r)
    assert_exact(core, requests, drain(core))
    assert core.stats().preemptions >= 5
    assert_empty(core)


def test_smaller_priority_is_served_first_and_preempted_last() -> None:
    core, _ = make_core(num_blocks=8, block_size=4, max_seqs=1, max_batch_tokens=16)
    for i, priority in enumerate((5, 0, 3)):
        core.submit(request(f"p{priority}", prompt_of(i, 5), 4, priority=priority, ignore_eos=True))
    ended = []
    while core.has_work:
        ended += [o.request_id for o in core.step(0.0) if o.finish_reason]
    assert ended == ["p0", "p3", "p5"]
    core, _ = make_core(num_blocks=6, block_size=4, max_seqs=4, max_batch_tokens=16)
    requests = [request("low", prompt_of(1, 8), 12, priority=1, ignore_eos=True)]
    core.submit(requests[0])
    core.step(0.0)
    core.step(0.0)
    requests.append(request("high", prompt_of(2, 12), 8, priority=0, ignore_eos=True))
    core.submit(requests[1])
    outputs: dict[tuple[str, int], list[Any]] = {}
    order = []
    while core.has_work:
        for o in core.step(0.0):
            outputs.setdefault((o.request_id, o.index), []).append(o)
            order += [o.request_id] if o.finish_reason else []
    assert order == ["high", "low"]
    assert core.stats().preemptions > 0
    assert tokens_of(outputs["high", 0]) == reference(requests[1], room=24)[0]


def test_earlier_deadlines_go_first_and_missed_ones_end_with_an_error() -> None:
    core, _ = make_core(max_seqs=1)
    core.submit(request("late", prompt_of(1, 5), 3, deadline_s=20.0, ignore_eos=True))
    core.submit(request("soon", prompt_of(2, 5), 3, deadline_s=10.0, ignore_eos=True))
    core.submit(request("missed", prompt_of(3, 5), 3, deadline_s=1.0, ignore_eos=True, n=2))
    outputs = drain(core, now=2.0)
    ended = [key[0] for key, got in outputs.items() if got[-1].finish_reason == "length"]
    assert ended == ["soon", "late"]
    for i in range(2):
        assert (outputs["missed", i][-1].finish_reason, outputs["missed", i][-1].error) == (
            "error",
            "deadline_exceeded",
        )
    assert_empty(core)


def test_choices_share_the_prompt_and_differ_by_their_noise() -> None:
    core, _ = make_core(block_size=4, max_seqs=8)
    requests = [request("many", prompt_of(1, 30), 10, n=5, temperature=1.5, seed=3, ignore_eos=True)]
    core.submit(requests[0])
    outputs = drain(core)
    assert_exact(core, requests, outputs)
    assert len({tuple(tokens_of(got)) for got in outputs.values()}) == 5
    assert core.stats().computed_prompt_tokens == 30
    assert_empty(core)


def test_more_choices_than_room_are_queued() -> None:
    core, _ = make_core(block_size=4, num_blocks=16, max_seqs=3, max_batch_tokens=16)
    requests = [request(f"r{i}", prompt_of(i, 10), 9, n=7, temperature=1.0, seed=i) for i in range(2)]
    for r in requests:
        core.submit(r)
    assert_exact(core, requests, drain(core))
    assert_empty(core)


def test_cancelling_frees_everything_and_disturbs_nobody() -> None:
    core, _ = make_core(max_seqs=4, max_batch_tokens=16)
    requests = [
        request(f"r{i}", prompt_of(i, 20), 15, n=1 + i % 2, temperature=1.0, seed=1) for i in range(8)
    ]
    for r in requests:
        core.submit(r)
    outputs: dict[tuple[str, int], list[Any]] = {}
    for step in range(200):
        if step in (1, 4, 9):
            core.cancel(f"r{(step * 3) % 8}")
        core.cancel("nobody")
        for o in core.step(0.0):
            outputs.setdefault((o.request_id, o.index), []).append(o)
    cancelled = {f"r{(s * 3) % 8}" for s in (1, 4, 9)}
    assert_exact(core, [r for r in requests if r.request_id not in cancelled], outputs)
    assert_empty(core)


@pytest.mark.parametrize("before", [0, 1, 3, 6])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_cancelled_choice_leaves_the_others_as_they_were(before: int, index: int) -> None:
    """Choice 0 computes the prompt for the others; before 3 steps are over they still wait for it."""
    core, _ = make_core(max_seqs=4, max_batch_tokens=16)
    whole = request("r", prompt_of(1, 40), 15, n=3, temperature=1.0, seed=1)
    core.submit(whole)
    outputs: dict[tuple[str, int], list[Any]] = {}

    def step() -> None:
        for o in core.step(0.0):
            outputs.setdefault((o.request_id, o.index), []).append(o)

    for _ in range(before):
        step()
    core.cancel("r", index)
    core.cancel("r", index)
    seen = len(outputs.get(("r", index), []))
    while core.has_work:
        step()
    assert len(outputs.get(("r", index), [])) == seen
    for i in {0, 1, 2} - {index}:
        got = outputs["r", i]
        assert (tokens_of(got), got[-1].finish_reason) == reference(whole, i, 0, 512)
    assert_empty(core)
    core.submit(whole)  # nothing of it is left
    assert_exact(core, [whole], drain(core))


def test_ten_thousand_submitted_and_cancelled_requests_leave_no_page_behind() -> None:
    core, _ = make_core(num_blocks=40, block_size=4, max_seqs=6, max_batch_tokens=16, max_waiting=20)
    rng = random.Random(3)
    live: list[str] = []
    for i in range(10_000):
        prompt = prompt_of(rng.randrange(9), rng.randrange(1, 14))
        r = request(f"r{i}", prompt, 8, n=rng.choice((1, 1, 3)), temperature=1.0, priority=rng.randrange(2))
        core.submit(r)
        live.append(r.request_id)
        if rng.random() < 0.3:
            core.step(0.0)
        while len(live) > rng.randrange(1, 12):
            core.cancel(live.pop(rng.randrange(len(live))))
        if i % 500 == 0:
            core.blocks.check_integrity()
    for name in live:
        core.cancel(name)
    assert not core.has_work and core.stats().steps > 2000
    assert_empty(core)


def test_a_cancelled_id_gives_no_further_output_and_can_be_used_again() -> None:
    core, _ = make_core()
    core.submit(request("r", prompt_of(1, 5), 9))
    core.step(0.0)
    core.cancel("r")
    assert not core.has_work
    again = request("r", prompt_of(2, 5), 9)
    core.submit(again)
    assert_exact(core, [again], drain(core))


def test_nan_logits_fail_only_their_request() -> None:
    core, _ = make_core()
    bad = request("bad", [5, NAN_TOKEN], 5, n=2)
    good = request("good", prompt_of(1, 9), 5)
    core.submit(bad)
    core.submit(good)
    outputs = drain(core)
    for i in range(2):
        assert (outputs["bad", i][-1].finish_reason, outputs["bad", i][-1].error) == ("error", "nan_logits")
    assert_exact(core, [good], outputs)
    assert_empty(core)


def test_impossible_requests_are_refused_with_both_lengths() -> None:
    core, _ = make_core(num_blocks=4, block_size=4, context=100)
    with pytest.raises(Refused, match=r"120 tokens.*context is 100") as refusal:
        core.submit(request("r", prompt_of(1, 120)))
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(Refused, match=r"16 tokens.*holds 16"):
        core.submit(request("r", prompt_of(1, 16)))
    with pytest.raises(Refused, match=rf"\[0, {VOCAB}\), got {VOCAB}"):
        core.submit(request("r", [1, VOCAB]))
    core.submit(request("r", [1]))
    with pytest.raises(Refused, match="in use"):
        core.submit(request("r", [1]))


def test_a_full_queue_refuses() -> None:
    core, _ = make_core(max_waiting=3)
    for i in range(3):
        core.submit(request(f"r{i}", [1, 2]))
    with pytest.raises(QueueFull, match="3 requests wait"):
        core.submit(request("r3", [1, 2]))
    core.step(0.0)
    core.submit(request("r3", [1, 2]))
    drain(core)
    assert_empty(core)


def test_an_answer_ends_where_context_or_pages_end() -> None:
    for num_blocks, context in ((64, 30), (5, 512)):
        core, _ = make_core(num_blocks=num_blocks, block_size=4, context=context, max_batch_tokens=64)
        r = request("r", prompt_of(1, 10), 1000, ignore_eos=True)
        core.submit(r)
        outputs = drain(core)
        assert_exact(core, [r], outputs)
        assert len(tokens_of(outputs["r", 0])) == min(num_blocks * 4, context) - 10
        assert_empty(core)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompt_logprobs_score_every_prompt_token_but_the_first(max_tokens: int) -> None:
    core, _ = make_core(max_batch_tokens=64, max_seqs=4, forced_preemption_every=2)
    prompt = prompt_of(1, 100)
    for name in ("a", "b"):  # the second could share every block, but needs the logits
        core.submit(request(name, prompt, max_tokens, prompt_logprobs=3, n=2))
    outputs = drain(core)
    for got in outputs.values():
        scores = got[0].prompt_logprobs
        assert scores is not None and len(scores) == 100 and scores[0] is None
        state = Reference(prompt[:1])
        for token, score in zip(prompt[1:], scores[1:], strict=True):
            logits = state.logits().astype(float)
            assert score is not None and score.token_id == token and len(score.top) == 3
            expected = logits[token] - np.log(np.exp(logits).sum())
            assert score.logprob == pytest.approx(expected, abs=1e-5)
            assert score.top[0][0] == int(logits.argmax())
            state.push(token)
        assert len(tokens_of(got)) <= max_tokens and got[-1].finish_reason in ("length", "stop")
    assert_empty(core)


def test_min_tokens_stop_ids_bias_and_penalties_act_together() -> None:
    core, _ = make_core(max_seqs=8, forced_preemption_every=4)
    requests = [
        request("min", prompt_of(1, 9), 40, min_tokens=20, stop_token_ids=tuple(range(0, 97, 3))),
        request("bias", prompt_of(2, 9), 10, logit_bias={EOS: 100.0}),
        request("ban", prompt_of(3, 9), 30, logit_bias=dict.fromkeys(range(90), -100.0)),
        request("rep", prompt_of(4, 9), 40, repetition_penalty=1.7, ignore_eos=True),
        request(
            "freq", prompt_of(5, 9), 40, frequency_penalty=1.5, presence_penalty=-0.5, temperature=0.8, seed=9
        ),
        request("top", prompt_of(6, 9), 40, temperature=1.3, top_k=9, top_p=0.8, min_p=0.1, seed=2**64 - 1),
    ]
    for r in requests:
        core.submit(r)
    outputs = drain(core)
    assert_exact(core, requests, outputs)
    assert tokens_of(outputs["bias", 0]) == [] and outputs["bias", 0][-1].stop_token_id == EOS
    assert len(tokens_of(outputs["min", 0])) >= 20
    assert min(tokens_of(outputs["ban", 0])) >= 90


def test_a_request_taken_over_from_another_engine_goes_on_where_it_was() -> None:
    whole = request(
        "r", prompt_of(1, 21), 30, n=3, temperature=1.2, seed=5, presence_penalty=0.6, ignore_eos=True
    )
    expected = [reference(whole, i)[0] for i in range(3)]
    core, _ = make_core()
    core.submit(
        request(
            "r",
            whole.prompt_ids,
            30,
            n=3,
            temperature=1.2,
            seed=5,
            presence_penalty=0.6,
            ignore_eos=True,
            emitted=(tuple(expected[0][:11]), tuple(expected[1]), ()),
            finished=(1,),
        )
    )
    outputs = drain(core)
    assert tokens_of(outputs["r", 0]) == expected[0][11:]
    assert tokens_of(outputs["r", 2]) == expected[2]
    assert ("r", 1) not in outputs
    assert_empty(core)
    core.submit(request("done", [1, 2], 2, emitted=((3, 4),)))
    assert drain(core)["done", 0][-1].finish_reason == "length"
    core.submit(request("nothing", [1, 2], 2, emitted=((3, 4),), finished=(0,)))
    assert not core.has_work
    assert_empty(core)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[int, EngineRequest]], list[tuple[int, int]]]:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_seqs = draw(st.integers(1, 6))
    longest = 60
    config = {
        "block_size": block_size,
        "num_blocks": draw(st.integers(max(2, -(-longest // block_size)), 2 + 4 * longest // block_size)),
        "max_seqs": max_seqs,
        "max_batch_tokens": draw(st.integers(max_seqs, 40)),
        "prefix_sharing": draw(st.booleans()),
        "forced_preemption_every": draw(st.sampled_from([0, 0, 2, 5])),
        "max_adapters": 1,
    }
    families = [draw(st.lists(st.integers(3, 60), min_size=1, max_size=30)) for _ in range(3)]
    requests = []
    for i in range(draw(st.integers(1, 10))):
        prompt = draw(st.sampled_from(families)) + draw(st.lists(st.integers(3, 60), max_size=10))
        params: dict[str, Any] = {"max_tokens": draw(st.integers(0, 20))}
        if draw(st.booleans()):
            params |= {"temperature": draw(st.sampled_from([0.5, 1.0])), "seed": draw(st.integers(0, 3))}
        if draw(st.booleans()):
            params |= {"presence_penalty": 1.0, "repetition_penalty": 1.2}
        fields: dict[str, Any] = {
            "n": draw(st.sampled_from([1, 1, 1, 2, 4])),
            "priority": draw(st.integers(0, 1)),
        }
        if draw(st.integers(0, 4)) == 0:
            fields["adapter"] = draw(st.sampled_from(["l1", "l2"]))
        when = draw(st.integers(0, 30))
        requests.append(
            (when, request(f"r{i}", prompt, **params, **fields, salt=draw(st.sampled_from(["", "s"]))))
        )
    cancels = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4))
    return config, requests, cancels


@settings(max_examples=150)
@given(mixes())
def test_every_mix_gives_what_each_request_gets_alone(
    mix: tuple[dict[str, Any], list[tuple[int, EngineRequest]], list[tuple[int, int]]],
) -> None:
    config, requests, cancels = mix
    core, _ = make_core(**config)
    adapters = {name: tiny_adapter(name, i) for i, name in enumerate(("l1", "l2"))}
    for name, adapter in adapters.items():
        core.load_adapter(name, adapter)
    outputs: dict[tuple[str, int], list[Any]] = {}
    cancelled = set()
    step = 0
    while core.has_work or any(when >= step for when, _ in requests):
        for when, r in requests:
            if when == step:
                core.submit(r)
        for when, i in cancels:
            if when == step and any(r.request_id == f"r{i}" and at <= step for at, r in requests):
                core.cancel(f"r{i}")
                cancelled.add(f"r{i}")
        for o in core.step(float(step)):
            assert o.request_id not in cancelled
            outputs.setdefault((o.request_id, o.index), []).append(o)
        core.blocks.check_integrity()
        step += 1
        assert step < 20_000, "no progress"
    alone = [r for _, r in requests if r.request_id not in cancelled]
    assert_exact(core, alone, outputs, **{name: adapter_hash(a) for name, a in adapters.items()})
    assert_empty(core)
