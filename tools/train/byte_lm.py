"""Train the byte-level language models that ship as ``byte-lm`` and ``byte-lm-routed``, and those that they
are compared with: ``python tools/train/byte_lm.py --kind routed --seed 0``.

Every kind sees the same bytes in the same order for as many steps, and starts from the same weights where its
shape allows. A run saves itself and goes on where it stopped; ``--seconds`` bounds one piece of it.
``--ship`` writes the two finished runs of seed 0 into ``src/sharewell/models/assets/``."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path

from sharewell.kv import (
    DepthShareConfig,
    DepthSharePlan,
    PlanCache,
    RoutedTraining,
    cache_argument,
    depth_loss,
    enable_rcla,
    groups,
    note_training,
)
from sharewell.models import python_text

KINDS = ("base", "routed", "shallow", "cla2")
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, CONTEXT, BATCH = 8, 128, 384, 4, 2, 256, 4
STEPS, WARMUP, PEAK_RATE, DECAY = 1200, 60, 2e-3, 0.1
P_CROSS = 0.5
ASSETS = Path(__file__).resolve().parents[2] / "src" / "sharewell" / "models" / "assets"
SLUGS = {"base": "byte-lm", "routed": "byte-lm-routed"}


def new_model(kind: str, seed: int) -> Any:
    """An untrained model. ``shallow`` has a quarter of the layers, hence a quarter of the cache."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS // 4 if kind == "shallow" else LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a tenth."""
    warmup = min(WARMUP, steps // 4)
    if step < warmup:
        return PEAK_RATE * (step + 1) / warmup
    return PEAK_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def batch_of(text: np.ndarray, seed: int, step: int) -> torch.Tensor:
    """The windows of one step, int64 ``[BATCH, CONTEXT]``: a function of seed and step alone."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - CONTEXT, BATCH)
    return torch.from_numpy(np.stack([text[s : s + CONTEXT] for s in starts]).astype(np.int64))


def held_out(windows: int = 128) -> torch.Tensor:
    """Held-out windows, int64 ``[windows, CONTEXT]``, spread evenly over the held-out text."""
    text = np.frombuffer(python_text("held-out"), np.uint8)
    starts = np.linspace(0, len(text) - CONTEXT, windows).astype(np.int64)
    return torch.from_numpy(np.stack([text[s : s + CONTEXT] for s in starts]).astype(np.int64))


def runs_folder() -> Path:
    """Where runs are kept unless ``--runs`` says otherwise."""
    return user_cache_path("sharewell") / "train" / "byte-lm"


def train(
    kind: str, seed: int, *, runs: Path, steps: int = STEPS, seconds: float = math.inf, show: bool = True
) -> tuple[Any, dict[str, Any]] | None:
    """The finished model of a run and its record; None when ``seconds`` ended first (call again)."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    file = runs / f"{kind}-{seed}-{steps}.pt"
    runs.mkdir(parents=True, exist_ok=True)
    model = new_model(kind, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, (0.9, 0.95), weight_decay=DECAY)
    at, cpu, losses = 0, 0.0, []
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        at, cpu, losses = saved["step"], saved["cpu_s"], saved["losses"]
        if at < steps:
            optimizer.load_state_dict(saved["optimizer"])
    text = np.frombuffer(python_text("train"), np.uint8)
    config = DepthShareConfig(p_cross=P_CROSS, seed=seed)
    routed: RoutedTraining | None = enable_rcla(model, config) if kind == "routed" else None
    start, started = time.monotonic(), time.process_time()

    def save() -> None:
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": at,
                "cpu_s": cpu + time.process_time() - started,
                "losses": losses,
            },
            beside,
        )
        beside.replace(file)

    done = at
    while at < steps and time.monotonic() - start < seconds:
        ids = batch_of(text, seed, at)
        for group in optimizer.param_groups:
            group["lr"] = rate(at, steps)
        if routed is not None:
            routed.begin_step(at)
        more: dict[str, Any] = {"use_cache": False}
        if kind == "cla2":
            cache = PlanCache(LAYERS, DepthSharePlan(groups(LAYERS, 2), LAYERS))
            more = {"use_cache": True, cache_argument(model.forward) or "past_key_values": cache}
        loss = model(input_ids=ids, labels=ids, **more).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 5))
        at += 1
        if show and at % 50 == 0:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"{kind} {seed}: step {at}/{steps}, loss {recent:.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if at % 200 == 0 and at < steps:
            save()
    if at > done:
        save()
    if routed is not None:
        routed.remove()
        note_training(model, P_CROSS)
    if at < steps:
        return None
    record = {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "cpu_s": torch.load(file, weights_only=True)["cpu_s"],
    }
    return model.eval(), record


def byte_tokenizer() -> Any:
    """A tokenizer whose ids are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's alphabet writes every byte as a visible character; here each keeps its own number as its id
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({alphabet[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ship(runs: Path) -> None:
    """Write the two shipped models in bfloat16, with their manifests."""
    windows = held_out()
    for kind, slug in SLUGS.items():
        finished = train(kind, 0, runs=runs)
        assert finished is not None
        model, record = finished
        folder = ASSETS / slug
        folder.mkdir(parents=True, exist_ok=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}) + "\n"
        )
        score = depth_loss(model.float(), windows)
        quarter = depth_loss(model, windows, groups(LAYERS, 4))
        lines = [
            f"# A byte-level model of Python's standard library, written by tools/train/byte_lm.py ({kind}).",
            "[model]",
            f'script = "tools/train/byte_lm.py --kind {kind} --seed 0"',
            "seed = 0",
            f"steps = {record['steps']}",
            f"training_cpu_s = {record['cpu_s']:.0f}",
            f'trained_on = "modules and pydoc topics of Python {platform.python_version()} (PSF-2.0)"',
            f'trained_on_sha256 = "{hashlib.sha256(python_text("train")).hexdigest()}"',
            'licence = "Apache-2.0"',
            'dtype = "bfloat16"',
            "# headline: held-out loss in nats per byte, with a cache in every layer and in every fourth",
            f"loss = {score:.4f}",
            f"loss_quarter = {quarter:.4f}",
        ]
        for path in sorted(folder.iterdir()):
            if path.name != "manifest.toml":
                lines += ["", "[[file]]", f'name = "{path.name}"']
                lines.append(f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        (folder / "manifest.toml").write_text("\n".join(lines) + "\n")
        print(f"{folder.name}: loss {score:.4f}, in every fourth layer {quarter:.4f}")


def main() -> int:
    """0 when the run is finished, 1 when ``--seconds`` ended first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="routed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop and save after so long")
    parser.add_argument("--runs", type=Path, default=runs_folder())
    parser.add_argument(
        "--ship", action="store_true", help="write the finished runs of seed 0 into the package"
    )
    given = parser.parse_args()
    if given.ship:
        ship(given.runs)
        return 0
    return 0 if train(given.kind, given.seed, runs=given.runs, seconds=given.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
