"""The engine in its own process: streams, cancellation, and every way to die."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hash_runner import EOS, POISON, adapter_hash, reference, tiny_adapter

from sharewell.serving.core.config import EngineConfig
from sharewell.serving.core.messages import EngineRequest, SamplingParams, TokenOutput
from sharewell.serving.core.process import AsyncEngine, Draining, EngineFailed, QueueFull, Refused

BUILDER = "hash_runner:build"


async def start(model: str = "hash", *, in_process: bool = False, **settings: Any) -> AsyncEngine:
    options = {k: settings.pop(k) for k in ("recover_timeout_s", "hang_timeout_s") if k in settings}
    config = EngineConfig(model=model, num_blocks=256, threads=1, **settings)
    return await AsyncEngine.start(config, builder=BUILDER, in_process=in_process, **options)


def request(
    name: str, length: int = 20, max_tokens: int = 40, *, n: int = 1, first: int | None = None, **params: Any
) -> EngineRequest:
    rng = random.Random(name)
    prompt = [rng.randrange(3, 90) for _ in range(length)]
    if first is not None:
        prompt[0] = first
    adapter = params.pop("adapter", None)
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params})
    return EngineRequest(name, tuple(prompt), sampling, n=n, adapter=adapter)


async def collect(engine: AsyncEngine, r: EngineRequest) -> dict[int, tuple[list[int], str]]:
    """Tokens and finish reason (or error) of each choice; fails when an ended choice gives more."""
    tokens: dict[int, list[int]] = {i: [] for i in range(r.n)}
    ends: dict[int, str] = {}
    async for output in engine.submit(r):
        assert output.index not in ends, "output behind the end"
        tokens[output.index] += output.token_ids
        if output.finish_reason:
            ends[output.index] = output.error or output.finish_reason
    return {i: (tokens[i], ends[i]) for i in range(r.n)}


def expected(r: EngineRequest, adapter: int = 0) -> dict[int, tuple[list[int], str]]:
    return {i: reference(r, i, adapter, 512) for i in range(r.n)}


@pytest.fixture(params=[False, True], ids=["process", "thread"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    made = await start(in_process=request.param)
    yield made
    await made.close()


async def test_streams_are_exact_and_mixed_at_will(engine: AsyncEngine) -> None:
    requests = [
        request(f"r{i}", 1 + 9 * i, 30, n=1 + i % 3, temperature=float(i % 2), seed=i, ignore_eos=False)
        for i in range(12)
    ]
    assert await asyncio.gather(*(collect(engine, r) for r in requests)) == [expected(r) for r in requests]
    stats = await engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, engine.live) == (0, 0, 0, 0)
    assert stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests)


async def test_everything_of_an_output_crosses_the_boundary(engine: AsyncEngine) -> None:
    r = request("r", 10, 3, logprobs=2, prompt_logprobs=1)
    outputs: list[TokenOutput] = [o async for o in engine.submit(r)]
    assert all(len(o.logprobs) == 1 and len(o.logprobs[0].top) == 2 for o in outputs)
    scores = outputs[0].prompt_logprobs
    assert scores is not None and scores[0] is None and len(scores) == 10
    assert scores[1] is not None and scores[1].token_id == r.prompt_ids[1] and len(scores[1].top) == 1
    assert outputs[-1].finish_reason == "length"
    stopped = request("s", 10, 50, logit_bias={EOS: 100.0}, ignore_eos=False)
    (only,) = [o async for o in engine.submit(stopped)]
    assert (only.finish_reason, only.stop_token_id, only.token_ids) == ("stop", EOS, ())
    again = [o async for o in engine.submit(request("r", 64, 2))] and [
        o async for o in engine.submit(request("r", 64, 2))
    ]
    assert again[0].cached_tokens == 48


async def test_leaving_a_stream_early_cancels_its_request(engine: AsyncEngine) -> None:
    stream = engine.submit(request("r", 20, 400))
    async for _ in stream:
        break
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    stats = await engine.stats()
    assert (stats.running, stats.blocks_used, engine.live) == (0, 0, 0)


async def test_a_cancelled_stream_ends_for_its_reader() -> None:
    engine = await start("hash:0.01")
    reader = asyncio.create_task(collect(engine, request("r", 20, 400, n=2)))
    while not (await engine.stats()).generated_tokens:
        pass
    engine.cancel("r")
    assert {end for _, end in (await reader).values()} == {"cancelled"}
    await engine.close()


async def test_a_cancelled_choice_ends_and_the_others_go_on() -> None:
    engine = await start("hash:0.01")
    r = request("r", 20, 30, n=3)
    ends: dict[int, str] = {}
    tokens: dict[int, list[int]] = {i: [] for i in range(3)}
    async for output in engine.submit(r):
        tokens[output.index] += output.token_ids
        if output.index == 1 and not ends:
            engine.cancel_choice("r", 1)
            engine.cancel_choice("r", 1)
        if output.finish_reason:
            ends[output.index] = output.finish_reason
    assert ends == {0: "length", 1: "cancelled", 2: "length"}
    assert len(tokens[1]) < 30
    assert {i: tokens[i] for i in (0, 2)} == {i: expected(r)[i][0] for i in (0, 2)}
    stats = await engine.stats()
    assert (stats.running, stats.blocks_used, engine.live) == (0, 0, 0)
    assert stats.generated_tokens < 3 * 30
    engine.cancel_choice("r", 0)
    await engine.close()


async def test_refusals_reach_the_caller_before_the_first_output(engine: AsyncEngine) -> None:
    for bad, code in (
        (request("long", 600), "context_length_exceeded"),
        (request("lora", adapter="nobody"), "model_not_found"),
    ):
        with pytest.raises(Refused) as refusal:
            await collect(engine, bad)
        assert refusal.value.code == code
    assert engine.live == 0
    r = request("r", 5, 5)
    assert await collect(engine, r) == expected(r)


async def test_a_full_queue_and_a_used_id_are_refused() -> None:
    engine = await start("hash:0.01", max_seqs=1, max_waiting=1)
    first = engine.submit(request("first", 5, 60))
    await anext(first)
    second = asyncio.create_task(collect(engine, request("second", 5, 2)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await collect(engine, request("third", 5, 2))
    with pytest.raises(Refused, match="in use"):
        await collect(engine, request("first", 5, 2))
    await first.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert (await second)[0][1] == "length"
    await engine.close()


async def test_adapters_come_and_go_at_run_time(engine: AsyncEngine) -> None:
    r = request("r", 20, 10, adapter="lora")
    await engine.load_adapter("lora", "5")
    assert engine.adapters == ("lora",)
    assert await collect(engine, r) == expected(r, adapter_hash(tiny_adapter("lora", 5)))
    with pytest.raises(Refused, match="no adapter"):
        await engine.load_adapter("bad", "x")
    await engine.unload_adapter("lora")
    with pytest.raises(Refused, match="not loaded"):
        await engine.unload_adapter("lora")
    with pytest.raises(Refused):
        await collect(engine, r)
    assert engine.adapters == ()


async def test_a_killed_engine_is_replaced_and_every_stream_goes_on() -> None:
    engine = await start("hash:0.004", max_seqs=8)
    await engine.load_adapter("lora", "5")
    requests = [request(f"r{i}", 30, 120, n=1 + i % 2, temperature=0.7 * (i % 2), seed=i) for i in range(7)]
    requests.append(request("lora", 30, 120, adapter="lora"))
    readers = [asyncio.create_task(collect(engine, r)) for r in requests]
    before = engine.pid
    for _ in range(2):
        while (await engine.stats()).running < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
    answers = await asyncio.gather(*readers)
    hashes = {"lora": adapter_hash(tiny_adapter("lora", 5))}
    for r, got in zip(requests, answers, strict=True):
        assert got == expected(r, hashes.get(r.adapter or "", 0)), r.request_id
    assert engine.pid != before and engine.restarts == 2
    stats = await engine.stats()
    assert stats.restarts == 2 and stats.blocks_used == 0
    after = request("after", 5, 5)
    assert await collect(engine, after) == expected(after)
    await engine.close()


async def test_prompt_scores_and_cached_tokens_are_reported_once_across_a_death() -> None:
    engine = await start("hash:0.005")
    r = request("r", 40, 80, prompt_logprobs=0)
    outputs = []
    async for output in engine.submit(r):
        outputs.append(output)
        if len(outputs) == 5:
            os.kill(engine.pid, signal.SIGKILL)
    assert [t for o in outputs for t in o.token_ids] == expected(r)[0][0]
    assert [o.prompt_logprobs is not None for o in outputs] == [True] + [False] * (len(outputs) - 1)
    await engine.close()


async def test_requests_made_while_the_engine_is_down_are_answered() -> None:
    engine = await start()
    os.kill(engine.pid, signal.SIGKILL)
    r = request("r", 9, 9)
    assert await collect(engine, r) == expected(r)
    await engine.close()


async def test_a_silent_engine_is_ended_and_replaced() -> None:
    engine = await start("hash:0.005", hang_timeout_s=1.0)
    r = request("r", 9, 100)
    reader = asyncio.create_task(collect(engine, r))
    while not (await engine.stats()).generated_tokens:
        pass
    os.kill(engine.pid, signal.SIGSTOP)
    assert await reader == expected(r)
    assert engine.restarts == 1
    await engine.close()


@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
async def test_a_request_that_kills_engines_is_given_up_and_the_next_one_answered(in_process: bool) -> None:
    engine = await start(in_process=in_process)
    assert (await collect(engine, request("poison", 9, 9, first=POISON)))[0] == ([], "engine_lost")
    r = request("r", 9, 9)
    assert await collect(engine, r) == expected(r)
    assert engine.restarts == 4
    await engine.close()


async def test_requests_end_with_an_error_when_recovery_fails_and_service_resumes_later(
    tmp_path: Path,
) -> None:
    flag = tmp_path / "broken"
    (tmp_path / "sometimes_broken.py").write_text(
        "import hash_runner, pathlib\n"
        "def build(config):\n"
        f"    assert not pathlib.Path({str(flag)!r}).exists()\n"
        "    return hash_runner.build(config)\n"
    )
    os.environ["PYTHONPATH"], kept = (
        f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}",
        os.environ["PYTHONPATH"],
    )
    try:
        config = EngineConfig(model="hash:0.01", num_blocks=256, threads=1)
        engine = await AsyncEngine.start(config, builder="sometimes_broken:build", recover_timeout_s=1.0)
        reader = asyncio.create_task(collect(engine, request("r", 9, 200)))
        while not (await engine.stats()).generated_tokens:
            pass
        flag.touch()
        os.kill(engine.pid, signal.SIGKILL)
        tokens, end = (await reader)[0]
        assert end == "engine_lost" and tokens == expected(request("r", 9, 200))[0][0][: len(tokens)]
        with pytest.raises(EngineFailed, match="could not be restarted"):
            await collect(engine, request("s", 9, 9))
        flag.unlink()
        s = request("s", 9, 9)
        while True:
            try:
                assert await collect(engine, s) == expected(s)
                break
            except EngineFailed:
                await asyncio.sleep(0.1)
        await engine.close()
    finally:
        os.environ["PYTHONPATH"] = kept


async def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(EngineFailed, match="ValueError: this model cannot be loaded"):
        await start("hash:broken")


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    engine = await start("hash:0.005")
    r = request("r", 9, 40)
    reader = asyncio.create_task(collect(engine, r))
    while not engine.live:  # noqa: ASYNC110
        await asyncio.sleep(0)
    draining = asyncio.create_task(engine.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await collect(engine, request("s", 9, 9))
    assert await draining and await reader == expected(r)
    assert not await _drain_of_a_long_one(engine)
    await engine.close()


async def _drain_of_a_long_one(engine: AsyncEngine) -> bool:
    engine._draining = False
    reader = asyncio.create_task(collect(engine, request("long", 9, 400)))
    while not engine.live:  # noqa: ASYNC110
        await asyncio.sleep(0)
    done = await engine.drain(0.1)
    await engine.close()
    assert (await reader)[0][1] == "engine_closed"
    return done


async def test_an_idle_engine_sleeps_and_closing_ends_its_process(engine: AsyncEngine) -> None:
    await collect(engine, request("r", 9, 9))
    if engine.pid == os.getpid():
        return
    process = psutil.Process(engine.pid)
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(0.5)
    assert sum(process.cpu_times()[:2]) - before <= 0.1
    await engine.close()
    assert not process.is_running()


def test_the_engine_dies_with_the_process_that_owns_it(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import asyncio\n"
        "from test_process import start, request\n"
        "async def main():\n"
        "    engine = await start('hash:0.01')\n"
        "    async for _ in engine.submit(request('r', 9, 400)):\n"
        "        print(engine.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    engine = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def test_termination_of_the_process_group_does_not_reach_the_engine(engine: AsyncEngine) -> None:
    if engine.pid == os.getpid():
        return
    os.kill(engine.pid, signal.SIGTERM)
    os.kill(engine.pid, signal.SIGINT)
    r = request("r", 9, 9)
    assert await collect(engine, r) == expected(r)
    assert engine.restarts == 0
