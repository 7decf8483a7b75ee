"""Train the small masked diffusion language model that ships as ``masked-sums`` (about 20 minutes on one
core).

``python tools/train/masked_sums.py [--steps N] [--out FOLDER]``. Resumes from ``FOLDER/last.pt`` when it is
there. The loss is LLaDA's (arXiv 2502.09992, eq. 3) on the answer alone: a share t of its tokens is masked,
and each masked token's cross entropy is weighted by 1 / t.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sharewell.kv.worked_sums import MASK_ID, VOCAB_SIZE, WorkedSums

SEED = 0
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 1024,
    "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip


def build() -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]))


def loss_of(model: LlamaForCausalLM, prompt: torch.Tensor, answer: torch.Tensor, generator: torch.Generator):
    """LLaDA's bound on the answer's negative log-likelihood per token."""
    n, length = answer.shape
    # One t per exercise, spread evenly over (0, 1]: less noise than n independent ones.
    t = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    hidden = torch.rand(n, length, generator=generator) < t[:, None]
    ids = torch.cat([prompt, answer.masked_fill(hidden, MASK_ID)], 1)
    everything = torch.zeros(n, 1, ids.shape[1], ids.shape[1])  # additive mask: attend to all
    logits = model(input_ids=ids, attention_mask=everything).logits[:, prompt.shape[1] :]
    losses = F.cross_entropy(logits[hidden].float(), answer[hidden], reduction="none")
    weights = (1 / t.clamp(min=0.02))[:, None].expand(n, length)[hidden]
    return (losses * weights).sum() / (n * length), losses.mean()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--out", type=Path, default=Path("build/masked-sums"))
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = build()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.lr, betas=(0.9, 0.98))
    first, last = 0, given.out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began = time.perf_counter()
    for step in range(first, given.steps):
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / given.steps))
        for group in optimizer.param_groups:
            group["lr"] = given.lr * warm * max(cosine, 0.02)
        prompt, answer = (torch.from_numpy(x) for x in WorkedSums(seed=1_000_000 + step).batch(given.batch))
        generator = torch.Generator().manual_seed(step)
        loss, plain = loss_of(model, prompt, answer, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            spent = time.perf_counter() - began
            print(
                f"step {step} loss {loss.item():.4f} per masked token {plain.item():.4f} {spent:.0f} s",
                flush=True,
            )
        if step % 100 == 99 or step + 1 == given.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, last)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, given.out / "model.safetensors")
    model.config.save_pretrained(given.out)


if __name__ == "__main__":
    main()
