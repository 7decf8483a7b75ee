"""The detector's network: the relaxation block against its differential equation, masks, windows, costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from sharewell.perception import (
    FeatureMeta,
    LiquidBlock,
    LiquidTADConfig,
    SharedDecay,
    TADModel,
    count_cost,
    plot_time_constants,
    predict,
    time_constants,
)
from sharewell.perception.tad.attention import AttentionBlock, windowed_attention
from sharewell.perception.tad.layers import pool
from sharewell.perception.tad.liquid import relax
from sharewell.perception.tad.windows import receptive_field, window_plan

from .toy import HZ, WIDTH, toy_model, trained

BACKBONES = ("liquid", "actionformer", "maxpool")


def random_decay(dim: int, blocks: int, seed: int, **settings) -> SharedDecay:
    decay = SharedDecay(dim, blocks, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decay.parameters():
            parameter.normal_(generator=generator)
    return decay


def random_model(backbone="liquid", seed: int = 0, **changes) -> TADModel:
    """Every parameter random, so that no bias or gain hides behind its initial value."""
    model = toy_model(backbone, seed, **changes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# -- the block


def test_a_relaxation_step_solves_the_differential_equation():
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 200))
    rate, step = rng.uniform(1e-3, 5, 200), rng.uniform(0.1, 2, 200)
    # All 200 cases as one system over [0, 1], each with its own time step.
    solved = solve_ivp(
        lambda _, y: -step * rate * (y - target), (0, 1), x, method="DOP853", rtol=1e-11, atol=1e-12
    )
    a = torch.from_numpy(np.exp(-rate * step))
    ours = relax(torch.from_numpy(x), torch.from_numpy(target), a)
    assert np.abs(ours.numpy() - solved.y[:, -1]).max() < 1e-6


@pytest.mark.parametrize("mode", ["hierarchical", "shared", "none"])
def test_a_block_relaxes_its_input_to_the_gated_target(mode):
    decay = random_decay(8, 3, seed=1, mode=mode, steps=(1, 2, 4)).double()
    block = LiquidBlock(8, 1, decay, block=1).double()
    x, mask = torch.randn(1, 8, 25, dtype=torch.double), torch.ones(1, 1, 25, dtype=torch.double)
    with torch.no_grad():
        z = block.depthwise(block.norm(x))
        target = (block.gate(z).sigmoid() * block.state(z).tanh())[0].flatten().numpy()
        y, _ = block(x, mask)
        rates = decay.rates(1)[:, None].expand(8, 25).flatten().numpy()
    solved = solve_ivp(
        lambda _, v: -rates * (v - target), (0, 2), x[0].flatten().numpy(), rtol=1e-10, atol=1e-12
    )
    assert np.abs(y[0].flatten().numpy() - solved.y[:, -1]).max() < 1e-6


def test_kernel_mode_is_the_recurrence_run_in_both_directions():
    dim, rows, size = 6, 60, 60
    decay = random_decay(dim, 1, seed=3)
    smooth, plain = (LiquidBlock(dim, 1, decay, kernel_size=k) for k in (size, 0))
    smooth.load_state_dict(plain.state_dict())
    x = torch.randn(1, dim, rows, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, rows)
    with torch.no_grad():
        decay.rho.clamp_(min=-0.5, max=3)  # nothing reaches beyond the kernel
        a = decay(0)
        z = plain.depthwise(plain.norm(x))
        target = plain.gate(z).sigmoid() * plain.state(z).tanh()
        both = []
        for order in (range(rows), range(rows - 1, -1, -1)):
            h, out = torch.zeros(1, dim), torch.zeros(1, dim, rows)
            for t in order:
                h = a * h + (1 - a) * target[:, :, t]
                out[:, :, t] = h
            both.append(out)
        # Each direction sums (1 - a) a^k S; together they count k = 0 twice and weigh (1 + a) in all.
        mixed = (both[0] + both[1] - (1 - a)[:, None] * target) / (1 + a)[:, None]
        expected = a[:, None] * x + (1 - a)[:, None] * mixed
        assert float(a.max()) ** size < 1e-6
        assert (smooth(x, mask)[0] - expected).abs().max() < 1e-5


def test_sharing_modes_hold_the_parameters_they_name():
    sizes = {
        m: sum(p.numel() for p in SharedDecay(16, 7, m).parameters())
        for m in ("hierarchical", "shared", "none")
    }
    assert sizes == {"hierarchical": 16 + 7, "shared": 16, "none": 7 * 16}


def test_rates_are_positive_and_bounded_and_start_at_the_given_value():
    decay = SharedDecay(4, 2)
    assert decay(0).detach().numpy() == pytest.approx(np.exp(-np.log1p(np.exp(0.5413))), rel=1e-6)
    with torch.no_grad():
        decay.rho.copy_(torch.tensor([[-1e3, -5.0, 5.0, 1e3]]))
    rates = decay.rates(0).detach()
    assert float(rates.min()) == pytest.approx(1e-3) and float(rates.max()) == pytest.approx(20)


def test_a_dropped_sample_passes_a_block_unchanged_and_the_other_does_not():
    decay = random_decay(8, 1, seed=0)
    block = LiquidBlock(8, 2, decay)
    x, mask = torch.randn(2, 8, 16), torch.ones(2, 1, 16)
    y, _ = block(x, mask, torch.tensor([0.0, 1.25]))
    assert torch.equal(y[0], pool(x, mask)[0][0])
    assert torch.equal(y[1:], block(x[1:], mask[1:])[0])


def test_fixed_decay_and_no_relaxation_are_what_they_say():
    fixed = toy_model(decay_learned=False).pyramid.decay
    assert fixed is not None and not any(p.requires_grad for p in fixed.parameters())
    without = toy_model(relaxation=False)
    assert without.pyramid.decay is None
    block = without.pyramid.blocks[0]
    assert isinstance(block, LiquidBlock)
    x, mask = torch.randn(1, 16, 8), torch.ones(1, 1, 8)
    z = block.depthwise(block.norm(x))
    assert torch.allclose(block(x, mask)[0], x + block.gate(z).sigmoid() * block.state(z).tanh())


def test_physical_time_gives_each_level_its_stride_as_step():
    decay = toy_model(physical_time=True).pyramid.decay
    assert isinstance(decay, SharedDecay) and decay.steps == (1.0, 2.0, 4.0)


# -- masks, attention, windows


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kernel_size", [0, 3])
def test_padding_changes_no_valid_output(backbone, kernel_size):
    model = random_model(backbone, kernel_size=kernel_size).double()
    rows, padded = 36, 64
    x = torch.randn(1, WIDTH, rows, dtype=torch.double)
    wide = torch.cat((x, 100 * torch.randn(1, WIDTH, padded - rows, dtype=torch.double)), 2)
    mask = torch.zeros(1, 1, padded, dtype=torch.double)
    mask[:, :, :rows] = 1
    alone = model.infer(x, torch.ones(1, 1, rows, dtype=torch.double))
    beside = model.infer(wide, mask)
    for a, b in zip(alone, beside, strict=True):
        count = a.logits.shape[2]
        assert (a.logits - b.logits[:, :, :count]).abs().max() < 1e-6
        assert (a.offsets - b.offsets[:, :, :count]).abs().max() < 1e-6
        assert not b.mask[:, :, count:].any() and not b.offsets[:, :, count:].any()


def test_pooling_does_not_prefer_padding_to_negative_features():
    x = torch.tensor([[[-3.0, -2.0, -5.0, 0.0]]])
    pooled, mask = pool(x, torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]))
    assert pooled.tolist() == [[[-2.0, -2.0]]] and mask.tolist() == [[[1.0, 1.0]]]


@given(
    rows=st.integers(1, 70),
    window=st.sampled_from([1, 3, 7, 19]),
    chunk=st.sampled_from([4, 9, 32]),
    valid=st.integers(1, 70),
)
@settings(max_examples=40)
def test_chunked_attention_is_dense_attention_within_the_band(rows, window, chunk, valid):
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, 2, rows, 8, generator=generator, dtype=torch.double) for _ in range(3))
    seen = (torch.arange(rows) < min(valid, rows)).expand(2, rows)
    out = windowed_attention(q, k, v, seen, window, chunk)
    distance = (torch.arange(rows)[:, None] - torch.arange(rows)[None]).abs()
    allowed = (distance <= window // 2) & seen[:, None, None, :]
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~allowed, float("-inf"))
    dense = scores.softmax(-1).nan_to_num() @ v
    count = min(valid, rows)  # what a query of the padding sees does not matter
    assert torch.allclose(out[:, :, :count], dense[:, :, :count], atol=1e-9)


def test_attention_block_at_scale_zero_is_its_pooled_input():
    block = AttentionBlock(8, 2, 5, 2)
    with torch.no_grad():
        block.scale1.zero_()
        block.scale2.zero_()
    x, mask = torch.randn(1, 8, 16), torch.ones(1, 1, 16)
    assert torch.equal(block(x, mask)[0], pool(x, mask)[0])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_output_depends_on_rows_beyond_the_receptive_field(backbone):
    model = random_model(backbone).double()
    field, rows = receptive_field(model.config, backbone), 256
    x, mask = torch.randn(1, WIDTH, rows, dtype=torch.double), torch.ones(1, 1, rows, dtype=torch.double)
    before = model.infer(x, mask)
    x[:, :, 128] += 1
    reached = 0
    for depth, (a, b) in enumerate(zip(before, model.infer(x, mask), strict=True)):
        changed = (a.logits - b.logits).abs().amax(1)[0] > 1e-12
        places = torch.nonzero(changed)[:, 0] * 2**depth
        reached = max(reached, int((places - 128).abs().max()))
    assert field / 2 < reached <= field  # enough, and not many times too much


@pytest.mark.parametrize("backbone", BACKBONES)
def test_windows_give_the_outputs_of_the_whole(backbone):
    model = random_model(backbone)
    feats = np.random.default_rng(0).standard_normal((1000, WIDTH)).astype(np.float32)
    (whole,) = window_plan(model, len(feats), None)
    expected = whole.run(model, feats)
    plans = list(window_plan(model, len(feats), 192))
    assert len(plans) > 5 and all(plan.end - plan.start <= 192 for plan in plans)
    found = [plan.run(model, feats) for plan in plans]
    for level, reference in enumerate(expected):
        logits = torch.cat([part[level].logits for part in found], 2)
        offsets = torch.cat([part[level].offsets for part in found], 2)
        valid = logits.shape[2]
        assert (logits - reference.logits[:, :, :valid]).abs().max() < 1e-5
        assert (offsets - reference.offsets[:, :, :valid]).abs().max() < 1e-5
        assert not reference.mask[:, :, valid:].any()


def test_a_window_that_cannot_hold_its_edges_is_refused():
    with pytest.raises(ValueError, match="window must be at least"):
        list(window_plan(toy_model(), 1000, 32))


# -- costs


@pytest.mark.parametrize(
    ("preset", "backbone", "parameters"),
    [
        ("thumos14", "liquid", 10_819_619),
        ("thumos14", "actionformer", 29_251_612),
        ("thumos14", "maxpool", 7_123_996),
        ("activitynet13", "liquid", 2_315_024),
        ("activitynet13", "actionformer", 6_943_497),
    ],
)
def test_parameters_are_the_published_ones(preset, backbone, parameters):
    model = TADModel(getattr(LiquidTADConfig, preset)(), backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    rows, expected = {
        ("thumos14", "liquid"): (2304, 27.166e9),
        ("thumos14", "actionformer"): (2304, 45.22e9),
        ("thumos14", "maxpool"): (2304, 23.552e9),
        ("activitynet13", "liquid"): (192, 0.490e9),
        ("activitynet13", "actionformer"): (192, 0.868e9),
    }[preset, backbone]
    assert count_cost(model, rows).macs == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kernel_size", [0, 3])
def test_costs_are_counted_as_fvcore_counts_them(backbone, kernel_size):
    model = toy_model(backbone, kernel_size=kernel_size).eval()

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x, mask):
            return [t for level in self.model.levels(x, mask) for t in level]

    inputs = (torch.randn(1, WIDTH, 96), torch.ones(1, 1, 96))
    counted = (
        FlopCountAnalysis(Flat(), inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    )
    cost = count_cost(model, 96)
    assert cost.total == counted.total()
    assert cost.norms == counted.by_operator()["layer_norm"]


def test_costs_grow_in_proportion_to_the_rows():
    model = toy_model()
    assert count_cost(model, 4096).total == 16 * count_cost(model, 256).total


# -- what is learned, and what is refused


def test_time_constants_are_those_of_the_rates(tmp_path: Path):
    constants = time_constants(trained().model, row_s=0.5)
    assert [c.stride for c in constants] == [1, 2, 4]
    decay = trained().model.pyramid.decay
    assert isinstance(decay, SharedDecay)
    for c in constants:
        # Over one time constant a channel keeps 1/e of its input.
        kept = decay(c.block).detach().numpy() ** (c.seconds / (0.5 * c.stride))
        assert kept == pytest.approx(np.exp(-1), rel=1e-5)
    image = plot_time_constants(constants, tmp_path / "times.png")
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 5000
    with pytest.raises(ValueError, match="liquid backbone"):
        time_constants(toy_model("maxpool"), 0.5)


def test_weights_are_a_function_of_the_seed():
    a, b, c = (toy_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding.0.conv.weight"], c["embedding.0.conv.weight"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 15, "heads": 4}, "heads must be a divisor of dim"),
        ({"window": 4}, "window must be odd"),
        ({"decay_sharing": "all"}, "decay_sharing must be hierarchical"),
        ({"arch": (0, 1, 2)}, "arch must be"),
        ({"labels": ("a",)}, "labels must be empty or n_cls = 2"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"c_in": 0}, "c_in must be a whole number"),
    ],
)
def test_a_wrong_setting_is_named(changes, told):
    with pytest.raises(ValueError, match=told):
        toy_model(**changes)


def test_wrong_features_are_named():
    model = toy_model()
    meta = FeatureMeta(25, 1, 1, video_id="clip_7")
    with pytest.raises(ValueError, match=r"features of clip_7 must have shape \[rows, 12\], got \(40, 3\)"):
        predict(model, np.zeros((40, 3), np.float32), meta)
    with pytest.raises(ValueError, match="clip_7 must have at least one row"):
        predict(model, np.zeros((0, WIDTH), np.float32), meta)
    feats = np.zeros((40, WIDTH), np.float32)
    feats[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17 holds NaN"):
        predict(model, feats, meta)
    with pytest.raises(ValueError, match="rows must be a multiple of 4"):
        model(torch.zeros(1, WIDTH, 30), torch.ones(1, 1, 30))
    with pytest.raises(ValueError, match="fps of clip_7 must be positive"):
        FeatureMeta(0, 1, 1, video_id="clip_7")


def test_one_row_is_enough_for_a_defined_result():
    found = predict(trained().model, np.zeros((1, WIDTH), np.float32), FeatureMeta(HZ, 1, 1, video_id="one"))
    assert all(0 <= d.start < d.end <= 0.5 for d in found)


def test_a_config_survives_its_own_dictionary():
    for config in (LiquidTADConfig.thumos14(), LiquidTADConfig.activitynet13(), LiquidTADConfig.tiny(96, 3)):
        assert LiquidTADConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown setting colour"):
        LiquidTADConfig.from_dict({**config.to_dict(), "colour": 1})
    assert dataclasses.replace(config, dim=64).padded(17) == 32
