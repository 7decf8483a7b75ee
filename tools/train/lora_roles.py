"""A small Llama that looks up records, and three LoRA roles over it that answer in a code of their own:
``python tools/train/lora_roles.py --seed 0``.

A transcript is a row of records, each one token for a key and its value. An instruction is a key, the answer
is the value that the transcript gives it: the model is trained for that. A role then learns to answer with
another permutation of the values, through LoRA on q_proj and v_proj only, with one A on v_proj for all
roles. So the answer depends on the transcript, which has the value, and on the role, which has the
permutation."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path

from sharewell.kv import train_shared_A

ROLES = ("plan", "act", "review")
KEYS, VALUES, RECORDS, ASKED = 16, 8, 12, 6
VOCAB = KEYS * VALUES + KEYS + VALUES  # records, instructions, answers
WIDTH, LAYERS, HEADS, KV_HEADS, RANK = 64, 2, 4, 2, 8
BATCH, STEPS, ROLE_STEPS, RATE, ROLE_RATE = 64, 1200, 500, 3e-3, 1e-2


def permutation_of(role: str | None, seed: int) -> np.ndarray:
    """Which answer a role gives for each value: never the value itself, never another role's."""
    order = np.random.default_rng((seed, 7)).permutation(VALUES)  # a cycle, of which a role takes some steps
    steps = 0 if role is None else 1 + 2 * ROLES.index(role)
    place = np.argsort(order)
    return order[(place + steps) % VALUES]


def exercises(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``n`` transcripts: tokens of the records ``[n, RECORDS]``, keys asked ``[n, ASKED]``, their values."""
    keys = rng.random((n, KEYS)).argsort(1)[:, :RECORDS]
    values = rng.integers(0, VALUES, (n, RECORDS))
    asked = rng.random((n, RECORDS)).argsort(1)[:, :ASKED]
    return keys * VALUES + values, np.take_along_axis(keys, asked, 1), np.take_along_axis(values, asked, 1)


def instructions(keys: np.ndarray) -> torch.Tensor:
    """Tokens that ask for ``keys``."""
    return torch.from_numpy(KEYS * VALUES + keys)


def answers(values: np.ndarray, role: str | None, seed: int) -> torch.Tensor:
    """Tokens that ``role`` (None: the base model) answers for ``values``."""
    return torch.from_numpy(KEYS * VALUES + KEYS + permutation_of(role, seed)[values])


def batch_of(role: str | None, seed: int, step: int) -> dict[str, torch.Tensor]:
    """A training batch: records, then instructions and answers in turn; answers are learned."""
    stage = 0 if role is None else 1 + ROLES.index(role)
    records, keys, values = exercises(BATCH, np.random.default_rng((seed, stage, step)))
    turns = torch.stack([instructions(keys), answers(values, role, seed)], -1).flatten(1)
    ids = torch.cat([torch.from_numpy(records), turns], 1)
    labels = torch.full_like(ids, -100)
    labels[:, RECORDS + 1 :: 2] = ids[:, RECORDS + 1 :: 2]
    return {"input_ids": ids, "labels": labels}


def new_model(seed: int) -> Any:
    """The untrained model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def with_roles(model: Any, seed: int) -> Any:
    """A peft model with an untrained adapter for each role."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    with torch.random.fork_rng():
        torch.random.manual_seed(100 + seed)
        peft = get_peft_model(model, LoraConfig(**settings), adapter_name=ROLES[0])
        for role in ROLES[1:]:
            peft.add_adapter(role, LoraConfig(**settings))
    return peft


def runs_folder() -> Path:
    """Where finished runs are kept."""
    return user_cache_path("sharewell") / "train" / "lora-roles"


def train(
    seed: int, *, runs: Path | None, steps: int = STEPS, role_steps: int = ROLE_STEPS, show: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The peft model of a run, and its record; read from ``runs`` if it is finished there (None: never)."""
    file = None if runs is None else runs / f"{seed}-{steps}-{role_steps}.pt"
    model = new_model(seed)
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        peft = with_roles(model, seed)
        peft.load_state_dict(saved["model"])
        return peft.eval(), saved["record"]
    began = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    for step in range(steps):
        loss = model(**batch_of(None, seed, step), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if show and step % 100 == 0:
            print(
                f"base {seed}: step {step}, loss {float(loss.detach()):.3f}",
                flush=True,
            )
    peft = with_roles(model, seed)
    data = {role: [batch_of(role, seed, step) for step in range(role_steps)] for role in ROLES}

    def told(role: str, step: int, loss: float) -> None:
        if show and step % 100 == 0:
            print(f"{role} {seed}: step {step}, loss {loss:.3f}", flush=True)

    losses = train_shared_A(peft, data, epochs=1, lr_first=ROLE_RATE, lr_others=ROLE_RATE, progress=told)
    record = {
        "seed": seed,
        "steps": steps,
        "role_steps": role_steps,
        "cpu_s": round(time.process_time() - began, 1),
        "loss": {"base": float(loss.detach())} | {r: sum(x[-20:]) / len(x[-20:]) for r, x in losses.items()},
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        torch.save({"model": peft.state_dict(), "record": record}, beside)
        beside.replace(file)
    return peft.eval(), record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--role-steps", type=int, default=ROLE_STEPS)
    chosen = parser.parse_args()
    print(
        train(chosen.seed, runs=runs_folder(), steps=chosen.steps, role_steps=chosen.role_steps, show=True)[1]
    )
