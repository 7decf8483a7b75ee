"""Train the small masked diffusion language model that ships as ``masked-sums`` (about 10 minutes on one
core).

``python tools/train/masked_sums.py [--steps N] [--out FOLDER]``. Resumes from ``FOLDER/last.pt`` when it is
there; ``--ship`` then judges it and writes it into the package. The loss is LLaDA's (arXiv 2502.09992, eq. 3)
on the answer alone: a share t of its tokens is masked, and each masked token's cross entropy is weighted by
1 / t.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sharewell.kv.worked_sums import MASK_ID, PROBLEMS, VOCAB_SIZE, WorkedSums, score

SEED = 0
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 1024,
    "rope_theta": 10_000.0, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "mask_token_id": MASK_ID,
}  # fmt: skip
SLUG = "masked-sums"
ASSETS = Path(__file__).parents[2] / "src" / "sharewell" / "models" / "assets"
JUDGED_SEED, JUDGED = 900_000, 16  # exercises of 16 problems that no step of the training sees


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


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, AdamW for the rest: AdamW alone needs several times the steps
    to learn to add digits."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def solved(folder: Path) -> float:
    """Share of problems solved without a cache, a token a step."""
    from sharewell.kv import generate_masked_diffusion, load_masked_diffusion

    lm = load_masked_diffusion(folder)
    prompts, answers = WorkedSums(seed=JUDGED_SEED).batch(JUDGED)
    length = answers.shape[1]
    out = generate_masked_diffusion(lm.model, prompts, length, length, mask_id=lm.mask_id)
    return float(score(prompts, out.answers.numpy()).mean())


def ship(out: Path) -> None:
    """Copy weights and configuration into the package, with the manifest."""
    folder = ASSETS / SLUG
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(out / name, folder / name)
    record = torch.load(out / "last.pt", weights_only=True)
    lines = [
        "# A masked diffusion model of sums in base 5 and of sorting, written by tools/train/masked_sums.py.",
        "[model]",
        f'script = "tools/train/masked_sums.py --steps {record["step"]}"',
        f"seed = {SEED}",
        f"steps = {record['step']}",
        f"training_cpu_s = {record['cpu_s']:.0f}",
        'trained_on = "exercises that sharewell.kv.worked_sums makes"',
        'licence = "Apache-2.0"',
        'dtype = "bfloat16"',
        f"# headline: share of {JUDGED * PROBLEMS} unseen problems solved without a cache, a token a step",
        f"solved = {solved(folder):.4f}",
    ]
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.toml":
            lines += ["", "[[file]]", f'name = "{path.name}"']
            lines.append(f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')
    (folder / "manifest.toml").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=520)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--out", type=Path, default=Path("build/masked-sums"))
    options.add_argument("--ship", action="store_true", help="write the finished model into the package")
    given = options.parse_args()
    if given.ship:
        ship(given.out)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    model = build()
    optimizers = optimizers_of(model)
    first, last, before_s = 0, given.out / "last.pt", 0.0
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, before_s = state["step"], state["cpu_s"]
    for step in range(first, given.steps):
        # Warm up, stay, and go down over the last fifth.
        now = given.lr * min(1.0, (step + 1) / 50, (given.steps - step) / (0.2 * given.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = now
        prompt, answer = (torch.from_numpy(x) for x in WorkedSums(seed=1_000_000 + step).batch(given.batch))
        generator = torch.Generator().manual_seed(step)
        loss, plain = loss_of(model, prompt, answer, generator)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            spent = before_s + time.process_time()
            print(
                f"step {step} loss {loss.item():.4f} per masked token {plain.item():.4f} {spent:.0f} CPU s",
                flush=True,
            )
        if step % 100 == 99 or step + 1 == given.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "cpu_s": before_s + time.process_time(),
            }
            torch.save(state, last)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, given.out / "model.safetensors")
    model.config.save_pretrained(given.out)


if __name__ == "__main__":
    main()
