"""Hand-overs between agents on a real model: the first agent's answer is decoded, then stands in the prompt
of the second. The profile and the benchmark take other topics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharewell.kv.relay_profile import HandOver
from sharewell.models import ChatTemplate, Tokenizer, python_text

TOPICS = (
    "a queue of print jobs", "a chess clock", "a parking garage", "a library of recipes", "a bank ledger",
    "a weather station", "a lending library", "a train timetable", "a spelling checker", "a thermostat",
    "a voting machine", "a phone book", "a card game", "an elevator", "a grade book", "a text editor",
    "a photo album", "a traffic light", "a stopwatch", "a shopping cart", "a hotel", "a calendar",
    "a music player", "a tide table", "a garden planner", "a word counter", "a museum guide", "a lottery",
    "a currency exchange", "a bicycle rental", "a post office", "a bakery", "an observatory", "a ferry line",
    "a greenhouse", "a ski lift", "a water meter", "a radio station", "a vending machine", "a zoo",
)  # fmt: skip
# first agent's system prompt and task, second agent's system prompt, words before and after the text
PIPELINES = (
    ("You write short specifications.", "Write a specification of {}: purpose, data, operations, errors.",
     "You are a programmer.", "This is the specification:\n\n", "\n\nWrite the class in Python."),
    ("You write Python code.", "Write a Python class for {}, with docstrings and an example.",
     "You review code strictly.", "Review this code:\n\n", "\n\nList the three worst problems."),
    ("You argue in favour of what you are asked about.", "Argue why every town needs {}.",
     "You are a sober editor.", "An author sent this:\n\n", "\n\nSummarise it in two sentences."),
)  # fmt: skip


def decode(model: Any, prompts: list[list[int]], n: int, ends: set[int]) -> list[list[int]]:
    """Greedy answers of at most ``n`` tokens with a small penalty for repetition, all prompts at once."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            do_sample=False,
            repetition_penalty=1.1,
            pad_token_id=0,
        )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, t in enumerate(row) if t in ends or t == 0), len(row))
        answers.append(row[:end])
    return answers


def handovers(
    model: Any, folder: Path, count: int, seed: int, *, longest: int = 500, first_topic: int = 0
) -> list[HandOver]:
    """``count`` hand-overs over the three pipelines, with prefixes of 20 to 400 tokens and texts of 100 to
    ``longest``."""
    rng = np.random.default_rng(seed)
    tokenizer, template = Tokenizer(folder), ChatTemplate(folder)
    filler = tokenizer.encode(python_text("held-out", 200_000).decode("utf-8", "ignore"))
    ends = {tokenizer.id_of("<|im_end|>") or -1, tokenizer.id_of("<|endoftext|>") or -1}

    def padded(system: str, more: int) -> str:
        at = int(rng.integers(0, len(filler) - more - 1))
        notes = tokenizer.decode(filler[at : at + more]) if more else ""
        return f"{system}\n\nNotes:\n{notes}" if notes else system

    asked, parts = [], []
    for i in range(count):
        first, task, second, before, after = PIPELINES[i % len(PIPELINES)]
        topic = TOPICS[(first_topic + i) % len(TOPICS)]
        a = template.render(
            [
                {"role": "system", "content": padded(first, int(rng.integers(0, 340)))},
                {"role": "user", "content": task.format(topic)},
            ]
        )
        b = template.render(
            [
                {"role": "system", "content": padded(second, int(rng.integers(0, 340)))},
                {"role": "user", "content": f"{before}\x00{after}"},
            ]
        )
        head, _, tail = b.partition("\x00")
        asked.append(tokenizer.encode(a))
        parts.append((tokenizer.encode(head), tokenizer.encode(tail), int(rng.integers(100, longest + 1))))
    made = []
    for at in range(0, count, 15):
        n = max(p[2] for p in parts[at : at + 15])
        made += decode(model, asked[at : at + 15], n, ends)
    return [
        HandOver(a, answer[:n], b, suffix)
        for a, answer, (b, suffix, n) in zip(asked, made, parts, strict=True)
        if len(answer[:n]) >= min(64, longest)
    ]
