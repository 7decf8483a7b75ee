"""The masked diffusion model that ships, its trainer, and the command that measures caches on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharewell.cli import main
from sharewell.kv import (
    CacheTrial,
    DKVConfig,
    MaskedDiffusionLM,
    compare_caches,
    generate_masked_diffusion,
    load_masked_diffusion,
)
from sharewell.kv.worked_sums import MASK_ID, VOCAB_SIZE, WorkedSums, score
from sharewell.models import shipped_manifest, shipped_models
from sharewell.simulation import WallClock
from tools.train import masked_sums


@pytest.fixture(scope="module")
def shipped() -> MaskedDiffusionLM:
    return load_masked_diffusion(shipped_models()["masked-sums"])


def test_shipped_weights_solve_what_their_manifest_says(shipped: MaskedDiffusionLM) -> None:
    said = shipped_manifest("masked-sums")["model"]["solved"]  # also checks every file's sha256
    prompts, _ = WorkedSums(seed=masked_sums.JUDGED_SEED).batch(2)
    found = {}
    for variant in ("none", "decode"):
        out = generate_masked_diffusion(
            shipped.model, prompts, 128, 64, mask_id=shipped.mask_id, cache=DKVConfig(variant)
        )
        found[variant] = float(score(prompts, out.answers.numpy()).mean())
    # 32 problems at two tokens a step; the manifest has 256 at one
    assert abs(found["none"] - said) < 0.1 and abs(found["decode"] - said) < 0.1
    assert shipped.mask_id == MASK_ID and shipped.eos_id is None and shipped.shift is None


def test_the_loss_weights_each_masked_token_by_one_over_its_share() -> None:
    torch.manual_seed(0)
    shape = {**masked_sums.SHAPE, "num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    prompt, answer = (torch.from_numpy(x) for x in WorkedSums(2, 3).batch(3))
    loss, plain = masked_sums.loss_of(model, prompt, answer, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    shares = (torch.arange(3) + torch.rand(3, generator=generator)) / 3
    hidden = torch.rand(3, 16, generator=generator) < shares[:, None]
    expected, losses = 0.0, []
    for row in range(3):  # one row, one token at a time
        ids = torch.cat([prompt[row], torch.where(hidden[row], MASK_ID, answer[row])])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.zeros(1, 1, 32, 32)).logits[0, 16:]
        for place in hidden[row].nonzero().flatten().tolist():
            lost = -float(logits[place].log_softmax(0)[answer[row, place]])
            losses.append(lost)
            expected += lost / max(0.02, float(shares[row]))
    assert loss.item() == pytest.approx(expected / 48, rel=1e-4)
    assert plain.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_trainer_resumes_and_writes_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**masked_sums.SHAPE, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setattr(masked_sums, "SHAPE", small)
    for steps in ("2", "4"):
        monkeypatch.setattr(
            "sys.argv", ["masked_sums.py", "--steps", steps, "--batch", "2", "--out", str(tmp_path)]
        )
        masked_sums.main()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["cpu_s"] > 0
    assert capsys.readouterr().out.count("step 0 ") == 1  # the second call went on
    lm = load_masked_diffusion(tmp_path)
    assert lm.mask_id == MASK_ID and lm.model.config.vocab_size == VOCAB_SIZE
    written = lm.model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(written, state["model"]["model.embed_tokens.weight"].bfloat16().float())


def test_rows_stand_beside_the_plain_sampler(shipped: MaskedDiffusionLM) -> None:
    prompts, _ = WorkedSums(seed=5).batch(1)
    trial = CacheTrial(steps=(8,), variants=("decode", "block"), refresh=1)
    rows = compare_caches(
        shipped, prompts.tolist(), trial, WallClock(), lambda answers: float(answers.shape[1])
    )
    assert [row.variant for row in rows] == ["none", "decode", "block"]
    plain, decode, block = rows
    assert plain.computed == plain.times_faster == plain.same_tokens == 1.0
    assert decode.computed == decode.same_tokens == 1.0  # a refresh in every step is no cache
    assert 0 < block.computed < 1 and plain.solved == 128
    assert plain.tokens_per_s == pytest.approx(128 / plain.seconds)
    assert plain.kv_bytes == 256 * 6 * 2 * 192 * 4


def test_the_command_prints_what_changes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kv", "dlm-bench", "masked-sums", "--variant", "decode,pd", "--steps", "8,16", "--batch", "1"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["steps"], row["variant"]) for row in rows] == [
        (steps, variant) for steps in (8, 16) for variant in ("none", "decode", "pd")
    ]
    assert all(0 <= row["solved"] <= 1 and row["seconds"] > 0 for row in rows)
    assert rows[5]["computed"] < rows[4]["computed"] < rows[3]["computed"] == 1.0
    assert main([*command[:3], "--steps", "4", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert "decode" in printed and "100%" in printed and "pd" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--variant", "decoded"],
            "variant must be one of none, decode, greedy, prefill, pd, block, got 'decoded'",
        ),
        (["--variant", ","], "variants must name at least one of"),
        (["--steps", "8,x"], "--steps must be whole numbers with commas between, got '8,x'"),
        (["--steps", "0"], "steps must be numbers of at least 1, got (0,)"),
        (["--steps", "256"], "steps must be at most gen_length, 128"),
        (["--variant", "greedy", "--steps", "2"], "remasking must be random, got 'low_confidence'"),
        (["--gen-length", "64"], "--gen-length must be 128 for masked-sums, got 64"),
        (["--refresh", "0", "--steps", "2"], "refresh must be at least 1, got 0"),
        (["--prompts", "nowhere.txt"], "--prompts must be a file that exists, got nowhere.txt"),
    ],
)
def test_bad_options_are_named_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "dlm-bench", "masked-sums", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split()) and "Traceback" not in said


def test_another_model_needs_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "dlm-bench", str(shipped_models()["byte-lm"])]) == 2
    assert "--prompts must be given for this model" in " ".join(capsys.readouterr().err.split())
