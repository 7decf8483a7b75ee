"""Runs in a process of its own: transformers on the same weights, driven by JSON lines on standard input.

Each line ``{"do": ..., "prompts": [[ids]], "new_tokens": n}`` gives one line with seconds and tokens.
Only the generation is timed: no HTTP, no tokenising, which is to this peer's advantage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(folder: str, threads: int) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model: Any = loaded.eval()
    pad = model.config.eos_token_id or 0

    def settings(new_tokens: int) -> Any:
        return GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=pad, bos_token_id=model.config.bos_token_id,
        )  # fmt: skip

    def static(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(ids, attention_mask=mask, generation_config=settings(new_tokens))
        return out[:, width:].tolist()

    def continuous(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        from transformers import ContinuousBatchingConfig

        # Its defaults (a cache as large as memory, steps of 8,192 tokens) are 1.5 times slower here; and
        # the manager is kept, so that only the warm-up round pays for its start.
        config = settings(new_tokens)
        config.eos_token_id = -1  # none: None is refused
        out = model.generate_batch(
            prompts, generation_config=config, progress_bar=False, persistent_manager=True,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        )  # fmt: skip
        return [list(r.generated_tokens) for r in out.values()]

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        run = {"generate": static, "static": static, "continuous": continuous}[request["do"]]
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            if request["do"] == "generate":  # one after the other
                got = [tokens for prompt in prompts for tokens in run([prompt], new_tokens)]
            else:
                got = run(prompts, new_tokens)
        wall_s = time.perf_counter() - start
        print(json.dumps({"wall_s": wall_s, "tokens": [len(t) for t in got]}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
