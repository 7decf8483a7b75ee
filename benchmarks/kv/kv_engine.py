"""The engine under plans beside the stock forward: overhead of doing nothing special, and what plans save."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharewell.bench import Progress, Report, Row, environment, interleave, values
from sharewell.kv import KVPlan, KVSegmentStore, OwnPlan, PagedForward, PlannedForward, TensorKV, model_key
from sharewell.kv.compare import compare, handover
from sharewell.models import Checkpoint, FusedDecoder, Tokenizer, load_transformers, resolve_model, supports
from sharewell.simulation import WallClock

TEXT = Path(__file__).parents[2] / "docs" / "architecture.md"
PREFILL, DECODE, CONTEXT = 1024, 32, 512


def small_model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class All(KVPlan):
    """Computes everything, but is asked at every layer."""


def overhead(
    model: Any, engine: PlannedForward, ids: torch.Tensor, repeats: int, progress: Progress
) -> list[Row]:
    from transformers import DynamicCache

    prompt, context = ids[:PREFILL], ids[:CONTEXT]

    @torch.inference_mode()
    def stock_prefill() -> None:
        model(prompt[None], logits_to_keep=1, use_cache=True)

    @torch.inference_mode()
    def stock_decode() -> None:
        cache = DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            held: Any = base.layers[layer]
            k, v = held.keys, held.values
            cache.update(k.clone(), v.clone(), layer)
        for i in range(DECODE):
            model(ids[None, i : i + 1], past_key_values=cache, logits_to_keep=1)

    base = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(context[None], past_key_values=base, logits_to_keep=1)
    space = engine(context).space

    def our_decode() -> None:
        space.forget(0, CONTEXT)  # pyright: ignore[reportAttributeAccessIssue]
        for i in range(DECODE):
            engine(ids[i : i + 1], OwnPlan(), space=space)

    rows = []
    for name, ours, theirs, target, claim in (
        (f"prefill of {PREFILL} tokens, CPU time", lambda: engine(prompt, OwnPlan()), stock_prefill, 1 / 1.10,
         "OwnPlan prefill costs at most 1.10x of the stock forward"),
        (f"{DECODE} decoded tokens behind {CONTEXT}, CPU time", our_decode, stock_decode, 1 / 1.15,
         "OwnPlan decode costs at most 1.15x of the stock forward"),
    ):  # fmt: skip
        taken = interleave({"ours": ours, "stock": theirs}, repeats, progress=progress)
        rows.append(
            Row.from_samples(
                name, values(taken["ours"], "cpu_s"), values(taken["stock"], "cpu_s"), "s", "lower",
                "transformers' forward with DynamicCache, float32", claim=claim, target=target,
            )
        )  # fmt: skip
    return rows


def exactness(model: Any, engine: PlannedForward, ids: torch.Tensor) -> Row:
    with torch.inference_mode():
        expected = model(ids[None, :256]).logits[0]
    difference = float((engine(ids[:256], want="all").logits - expected).abs().max())
    return Row(
        "largest logit difference to the stock forward, 256 tokens", difference, 1e-4, "", "lower",
        "bound of the card", claim="OwnPlan equals the stock forward", target=1.0,
    )  # fmt: skip


def reuse(
    engine: PlannedForward, ids: list[int], repeats: int, progress: Progress
) -> tuple[list[Row], dict[str, Any]]:
    """A text three quarters of which are in the store, from lookup to logits."""
    shared = ids[len(ids) // 5 : -len(ids) // 20]
    other = ids[: len(ids) // 10][::-1]
    store, key = KVSegmentStore(1 << 30), model_key(engine.decoder)
    out = engine([*other, *shared])
    places = torch.arange(len(other), len(other) + len(shared))
    kv = TensorKV.copied(out.space, 0, places)  # pyright: ignore[reportArgumentType]
    store.put(key, shared, kv, places)
    from sharewell.kv import ReusePlan

    def reused() -> None:
        found = store.find(key, ids)
        with store.pinned(*(m.segment for m in found)) as segments:
            matches = [
                (torch.arange(m.start, m.start + m.length), s, torch.arange(m.offset, m.offset + m.length))
                for m, s in zip(found, segments, strict=True)
            ]
            engine(ids, ReusePlan(matches))

    taken = interleave({"reuse": reused, "full": lambda: engine(ids)}, repeats, progress=progress)
    find = interleave({"find": lambda: store.find(key, ids)}, 5)
    rows = [
        Row.from_samples(
            f"{len(ids)} tokens of which {len(shared)} are stored: find, move, compute the rest",
            values(taken["reuse"], "cpu_s"), values(taken["full"], "cpu_s"), "s", "lower", "computing all",
        ),
        Row.from_samples(
            f"finding a segment in a prompt of {len(ids)} tokens", values(find["find"], "cpu_s"), None, "s",
            "lower",
            note="no baseline",
        ),
    ]  # fmt: skip
    return rows, {"stored_tokens": len(shared), "bytes": kv.nbytes}


def fused(folder: Path, ids: np.ndarray, repeats: int, progress: Progress) -> list[Row]:
    """A plan's layer-by-layer pass on the server's pages beside the ordinary step."""
    checkpoint = Checkpoint(folder)
    format = "bfloat16" if supports(checkpoint.config, "bfloat16") is None else "float32"
    pages = PagedForward(FusedDecoder(checkpoint, format, max_length=2048), 80, 16)
    table = np.arange(80, dtype=np.int32)
    at = np.arange(len(ids))
    logits: dict[str, torch.Tensor] = {}

    def ordinary() -> None:
        logits["step"] = pages(
            ids, at, at, np.array([0, len(ids)], np.int32), np.array([len(ids)], np.int32), table[None],
            at[-1:],
        ).clone()  # fmt: skip

    def planned() -> None:
        logits["plan"] = pages.planned(All(), ids, at, table, at[-1:])[0]

    taken = interleave({"plan": planned, "step": ordinary}, repeats, progress=progress)
    same = bool(torch.equal(logits["plan"], logits["step"]))
    return [
        Row.from_samples(
            f"server's fused decoder, {format}: {len(ids)} tokens under a plan that is asked at each layer",
            values(taken["plan"], "cpu_s"), values(taken["step"], "cpu_s"), "s", "lower",
            "the ordinary step", note="logits equal to the last bit" if same else "LOGITS DIFFER",
        )
    ]  # fmt: skip


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    rng = np.random.default_rng(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if full:
            folder = resolve_model("smollm2")
            model = load_transformers(folder)
            ids = Tokenizer(folder).encode(TEXT.read_text("utf-8"))
            words = torch.tensor(ids)
        else:
            model, ids = small_model(), rng.integers(0, 2000, 1200).tolist()
            words = torch.tensor(ids)
        engine = PlannedForward(model)
        rows = [*overhead(model, engine, words, 7 if full else 2, progress), exactness(model, engine, words)]
        more, extra = reuse(engine, ids[:1500] if full else ids[:400], 5 if full else 2, progress)
        rows += more
        if full:
            rows += fused(folder, np.array(ids[:768]), 7, progress)
        else:
            with tempfile.TemporaryDirectory() as place:
                model.save_pretrained(place)
                rows += fused(Path(place), np.array(ids[:100]), 2, progress)
        n = 400 if full else 120
        text = handover(engine, ids[:n], other_prefix=ids[n : n + n // 5])
        table = [row.as_dict() for row in compare(engine, text, WallClock())]
    finally:
        torch.set_num_threads(threads)
    moved, unmoved = (next(r for r in table if r["plan"] == name) for name in ("reuse", "reuse-unmoved"))
    rows.append(
        Row(
            f"KL to full attention, {len(text.shared)} of {n} tokens reused behind another prefix",
            moved["kl"],
            unmoved["kl"], "nats", "lower", "the same keys, not moved",
        )
    )  # fmt: skip
    return Report(
        "kv-engine", "full" if full else "smoke", tuple(rows), environment(), seed, {**extra, "plans": table}
    )
