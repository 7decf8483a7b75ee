"""Targets, losses, suppression and decoding against brute force and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.perception import (
    DecodeConfig,
    Detection,
    FeatureMeta,
    LiquidTADConfig,
    fuse_video_scores,
    soft_nms_1d,
)
from sharewell.perception.tad.decode import Candidates, candidates, suppress, to_detections
from sharewell.perception.tad.losses import diou_loss_1d, focal_loss, loss_sums
from sharewell.perception.tad.model import LevelOutput
from sharewell.perception.tad.nms import vote
from sharewell.perception.tad.targets import assign, batch_targets, points

CONFIG = LiquidTADConfig(c_in=4, n_cls=3, dim=16, arch=(1, 1, 3))


def brute_force(config, rows, segments, labels):
    """(classes, offsets) of every point, one point and one segment at a time."""
    classes, offsets = [], []
    for level in range(config.levels):
        stride = 2**level
        low = 0 if level == 0 else 4 * 2 ** (level - 1)
        high = 4 * 2**level if level < config.levels - 1 else 10_000
        for index in range(rows // stride):
            t = index * stride
            hits = []
            for (start, end), label in zip(segments, labels, strict=True):
                middle = (start + end) / 2
                inside = start < t < end and abs(t - middle) < config.center_radius * stride
                if inside and low <= max(t - start, end - t) <= high:
                    hits.append((end - start, start, end, label))
            hot = [0.0] * config.n_cls
            reach = None
            if hits:
                shortest = min(hit[0] for hit in hits)
                for length, _, _, label in hits:
                    if length <= shortest + 1e-3:
                        hot[label] = 1.0
                first = next(hit for hit in hits if hit[0] == shortest)
                reach = ((t - first[1]) / stride, (first[2] - t) / stride)
            classes.append(hot)
            offsets.append(reach)
    return classes, offsets


@given(st.data())
@settings(max_examples=60)
def test_assignment_is_that_of_brute_force(data):
    rows = 64
    halves = st.integers(0, 2 * rows)  # half rows: ties and points on the ends are common
    found = data.draw(st.lists(st.tuples(halves, halves, st.integers(0, 2)), max_size=6))
    segments = [(min(a, b) / 2, max(a, b) / 2) for a, b, _ in found if a != b]
    labels = [label for a, b, label in found if a != b]
    ours = assign(
        points(CONFIG, rows), torch.tensor(segments).reshape(-1, 2), torch.tensor(labels, dtype=torch.long), 3
    )
    classes, offsets = brute_force(CONFIG, rows, segments, labels)
    assert ours.classes.tolist() == classes
    for positive, ours_at, reach in zip(ours.positive.tolist(), ours.offsets.tolist(), offsets, strict=True):
        assert positive == (reach is not None)
        if reach is not None:
            assert ours_at == pytest.approx(reach)


def test_two_labels_of_one_segment_are_both_learned():
    segments = torch.tensor([[10.2, 20.1], [10.2, 20.1005]])
    targets = assign(points(CONFIG, 64), segments, torch.tensor([0, 2]), 3)
    assert targets.positive.any()
    assert set(map(tuple, targets.classes[targets.positive].tolist())) == {(1.0, 0.0, 1.0)}


def test_focal_loss_is_the_formula():
    logits, targets = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.0])
    p = torch.sigmoid(logits).tolist()
    expected = [-0.25 * (1 - p[0]) ** 2 * math.log(p[0]), -0.75 * p[1] ** 2 * math.log(1 - p[1])]
    assert focal_loss(logits, targets).tolist() == pytest.approx(expected, rel=1e-5)


def test_diou_loss_of_worked_examples():
    equal = diou_loss_1d(torch.tensor([[2.0, 3.0]]), torch.tensor([[2.0, 3.0]]))
    assert equal.item() == pytest.approx(0)
    # [-1, 1] against [-2, 4]: IoU 1/3, centres 1 apart, both within a length of 6
    off = diou_loss_1d(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 4.0]]))
    assert off.item() == pytest.approx(1 - 1 / 3 + (1 / 6) ** 2, rel=1e-6)
    both_empty = diou_loss_1d(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2))
    assert torch.isfinite(both_empty).all()


def random_levels(seed: int, rows: int = 64, batch: int = 1) -> list[LevelOutput]:
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for stride in CONFIG.strides:
        count = rows // stride
        levels.append(
            LevelOutput(
                torch.randn(batch, 3, count, generator=generator),
                torch.rand(batch, 2, count, generator=generator) * 6,
                torch.ones(batch, 1, count),
            )
        )
    return levels


def test_padded_points_cost_nothing_and_a_batch_without_actions_is_background():
    levels = random_levels(0)
    nothing = batch_targets(CONFIG, 64, [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.long)])
    whole = loss_sums(levels, nothing)
    assert whole.positives == 0 and whole.regression == 0 and whole.classification > 0
    for level in levels:
        level.mask[:, :, level.mask.shape[2] // 2 :] = 0
    expected = sum(
        focal_loss(level.logits[:, :, : n // 2], torch.zeros(1, 3, n // 2)).sum()
        for level in levels
        if (n := level.mask.shape[2])
    )
    assert loss_sums(levels, nothing).classification == pytest.approx(float(expected), rel=1e-5)


# -- suppression


def reference_soft_nms(segments, scores, sigma, min_score, max_out):
    """Pick, decay, repeat, over plain lists."""
    left = [(s, i) for i, s in enumerate(scores)]
    taken = []
    while left and len(taken) < max_out:
        best = max(left, key=lambda item: (item[0], -segments[item[1]][0], -item[1]))
        if best[0] <= min_score:
            break
        left.remove(best)
        taken.append((best[1], best[0]))
        a, b = segments[best[1]]
        decayed = []
        for score, index in left:
            c, d = segments[index]
            inside = max(0.0, min(b, d) - max(a, c))
            union = (b - a) + (d - c) - inside
            iou = inside / union if union > 0 else 0.0
            decayed.append((score * math.exp(-(iou**2) / sigma), index))
        left = decayed
    return taken


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 20)), max_size=40),
    st.sampled_from([0.1, 0.5, 0.75]),
    st.integers(1, 50),
)
@settings(max_examples=80)
def test_soft_nms_is_the_quadratic_reference(items, sigma, max_out):
    segments = np.array([(a / 2, (a + length) / 2) for a, length, _ in items], float).reshape(-1, 2)
    scores = np.array([score / 20 for *_, score in items])
    index, kept = soft_nms_1d(segments, scores, sigma=sigma, min_score=0.01, max_out=max_out)
    expected = reference_soft_nms(segments.tolist(), scores.tolist(), sigma, 0.01, max_out)
    assert index.tolist() == [i for i, _ in expected]
    assert kept.tolist() == pytest.approx([score for _, score in expected])
    assert np.all(np.diff(kept) <= 1e-12)


def test_soft_nms_refuses_what_it_cannot_order():
    with pytest.raises(ValueError, match="n scores"):
        soft_nms_1d(np.zeros((3, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        soft_nms_1d(np.array([[0, 1.0]]), np.array([np.nan]))


def test_voting_takes_the_mean_weighted_by_score_and_overlap():
    segments = np.array([[0.0, 10.0], [0.0, 8.0], [50.0, 60.0]])
    out = vote(segments[:1], segments, np.array([1.0, 0.5, 1.0]), 0.7)
    assert out.tolist() == [[0.0, pytest.approx((10 + 8 * 0.5 * 0.8) / (1 + 0.5 * 0.8))]]


def test_candidates_stand_where_points_offsets_and_strides_say():
    levels = random_levels(1)
    config = DecodeConfig(min_score=0.6, min_length=0)
    (found,) = candidates(levels, config, first_row=100)
    expected = []
    for depth, level in enumerate(levels):
        stride = 2**depth
        for i in range(level.logits.shape[2]):
            for cls in range(3):
                score = torch.sigmoid(level.logits[0, cls, i]).item()
                if score > 0.6:
                    o = (level.offsets[0, :, i] * stride).tolist()
                    expected.append((100 + i * stride - o[0], 100 + i * stride + o[1], cls, score))
    ours = zip(*found.segments.T, found.classes, found.scores, strict=True)
    assert sorted(map(tuple, ours)) == [pytest.approx(e, abs=1e-5) for e in sorted(expected)]


def test_each_level_keeps_its_best_only():
    levels = random_levels(2)
    (found,) = candidates(levels, DecodeConfig(min_score=0.0, min_length=0, top_k_per_level=5))
    best = torch.cat([level.logits[0].sigmoid().flatten().sort(descending=True)[0][:5] for level in levels])
    assert np.sort(found.scores) == pytest.approx(np.sort(best.numpy()))


def test_classes_are_suppressed_apart_unless_they_are_one():
    found = Candidates(np.array([[0.0, 10.0], [0.0, 10.0]]), np.array([0.9, 0.8]), np.array([0, 1]))
    assert suppress(found, DecodeConfig()).scores.tolist() == [0.9, 0.8]
    together = suppress(found, DecodeConfig(class_agnostic=True))
    assert together.scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-1 / 0.5)])


def test_rows_become_seconds_and_back_and_stay_within_the_recording():
    meta = FeatureMeta(fps=30, stride=4, num_frames=16, duration_s=20)
    assert meta.to_seconds(np.array([0.0, 10.0])).tolist() == pytest.approx([8 / 30, 48 / 30])
    assert meta.to_rows(meta.to_seconds(np.array([3.25]))) == pytest.approx(3.25)
    found = Candidates(
        np.array([[-9.0, 9.0], [100.0, 400.0], [300.0, 400.0]]), np.array([0.9, 0.8, 0.7]), np.zeros(3)
    )
    seconds = to_detections(found, meta, 140, ["a"])
    assert [(d.start, d.end) for d in seconds] == [
        (0.0, pytest.approx(44 / 30)),
        (pytest.approx(408 / 30), 20.0),
    ]


def test_video_classes_name_segments_of_any_class():
    named = fuse_video_scores([Detection(1, 2, "action", 0.64)], {"dig": 0.25, "run": 0.01, "swim": 0.09})
    assert [(d.label, d.score) for d in named] == [("dig", pytest.approx(0.4)), ("swim", pytest.approx(0.24))]
