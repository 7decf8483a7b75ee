"""mAP against an independent, slow statement of the ActivityNet toolkit's rules, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sharewell.perception import (
    Annotation,
    Detection,
    evaluate_map,
    mean_average_precision,
    predictions_document,
    write_json,
)
from sharewell.perception.tad.evaluate import ACTIVITYNET_TIOUS, THUMOS_TIOUS, parse_tious

SLOW_TIOUS = np.array([0.3, 0.5, 0.7, 0.95])


def slow_ap(truth, predictions, thresholds):
    """The toolkit's loop over one class: tables of rows (video, start, end[, score]), one flag at a time."""
    if not predictions:
        return [0.0] * len(thresholds)
    lock = -np.ones((len(thresholds), len(truth)))
    order = np.array([p[3] for p in predictions]).argsort()[::-1]
    ranked = [predictions[i] for i in order]
    tp, fp = np.zeros((2, len(thresholds), len(ranked)))
    for idx, (video, start, end, _) in enumerate(ranked):
        here = [(n, row) for n, row in enumerate(truth) if row[0] == video]
        if not here:
            fp[:, idx] = 1
            continue
        starts, ends = np.array([r[1] for _, r in here]), np.array([r[2] for _, r in here])
        inside = (np.minimum(end, ends) - np.maximum(start, starts)).clip(0)
        with np.errstate(invalid="ignore"):
            overlap = inside.astype(float) / ((ends - starts) + (end - start) - inside)
        for tidx, threshold in enumerate(thresholds):
            for jdx in overlap.argsort()[::-1]:
                if overlap[jdx] < threshold:
                    fp[tidx, idx] = 1
                    break
                if lock[tidx, here[jdx][0]] >= 0:
                    continue
                tp[tidx, idx] = 1
                lock[tidx, here[jdx][0]] = idx
                break
            if fp[tidx, idx] == 0 and tp[tidx, idx] == 0:
                fp[tidx, idx] = 1
    out = []
    for t in range(len(thresholds)):
        true, false = np.cumsum(tp[t]).astype(float), np.cumsum(fp[t]).astype(float)
        recall, precision = true / float(len(truth)), true / (true + false)
        mprec = np.hstack([[0], precision, [0]])
        mrec = np.hstack([[0], recall, [1]])
        for i in range(len(mprec) - 1)[::-1]:
            mprec[i] = max(mprec[i], mprec[i + 1])
        idx = np.where(mrec[1:] != mrec[:-1])[0] + 1
        out.append(float(np.sum((mrec[idx] - mrec[idx - 1]) * mprec[idx])))
    return out


@pytest.mark.parametrize("seed", range(50))
def test_average_precision_is_the_toolkits_bit_for_bit(seed: int):
    """With ties in score, repeated predictions, overlapping truth, videos without truth, unknown labels."""
    rng = np.random.default_rng(seed)
    labels = ["a", "b", "c"]
    truth, predictions = {}, {}
    for video in range(int(rng.integers(1, 7))):
        truth[f"v{video}"] = [
            Annotation(float(s), float(s + length), labels[int(c)])
            for s, length, c in zip(
                rng.integers(0, 40, 6), rng.integers(1, 12, 6), rng.integers(0, 3, 6), strict=True
            )
        ][: int(rng.integers(0, 7))]
    truth["v0"] = [*truth["v0"], Annotation(1.0, 5.0, "a")]
    for video in [*truth, "stranger"]:
        found = []
        for item in [*truth.get(video, []), Annotation(3.0, 9.0, "b"), Annotation(0.0, 4.0, "d")]:
            for _ in range(int(rng.integers(0, 4))):
                start, end = item.start + rng.integers(-2, 3) / 2, item.end + rng.integers(-2, 3) / 2
                score = float(rng.integers(0, 8)) / 8
                found += [Detection(start, end, item.label, score)] * int(rng.integers(1, 3))
        predictions[video] = found
    result = mean_average_precision(truth, predictions, SLOW_TIOUS.tolist())
    for label, ap in result.ap.items():
        rows = [(v, a.start, a.end) for v, items in truth.items() for a in items if a.label == label]
        guesses = [
            (v, d.start, d.end, d.score)
            for v, items in predictions.items()
            for d in items
            if d.label == label
        ]
        assert ap.tolist() == slow_ap(rows, guesses, SLOW_TIOUS)
    assert result.unknown == sum(d.label not in result.ap for items in predictions.values() for d in items)
    assert result.average == pytest.approx(np.mean([result.ap[label].mean() for label in result.ap]))


def test_worked_example():
    truth = {"v": [Annotation(0, 10, "a"), Annotation(20, 30, "a")], "w": [Annotation(0, 10, "a")]}
    found = {
        "v": [Detection(0, 10, "a", 0.9), Detection(1, 10, "a", 0.8), Detection(20, 26, "a", 0.7)],
        "w": [Detection(5, 15, "a", 0.6)],
    }
    result = mean_average_precision(truth, found, (0.5, 0.7))
    # At 0.5: hit, double, hit, miss (IoU 1/3) of three. At 0.7 the third (0.6) misses as well.
    assert result.map.tolist() == pytest.approx([(1 + 2 / 3) / 3, 1 / 3])


def test_perfect_predictions_score_one_and_none_score_zero():
    truth = {"v": [Annotation(0, 10, "a"), Annotation(12, 14, "b")]}
    perfect = {"v": [Detection(a.start, a.end, a.label, 0.5) for a in truth["v"]]}
    assert mean_average_precision(truth, perfect, ACTIVITYNET_TIOUS).average == 1
    assert mean_average_precision(truth, {}, THUMOS_TIOUS).average == 0


def test_files_are_read_and_repeated_truth_counts_once(tmp_path: Path):
    entry = {"label": "a", "segment": [0, 10]}
    again = {"label": "a", "segment": [0.0005, 10.0005]}
    database = {
        "v": {"subset": "Test", "annotations": [entry, again]},
        "w": {"subset": "training", "annotations": [{"label": "a", "segment": [3, 4]}]},
    }
    (tmp_path / "gt.json").write_text(json.dumps({"database": database}))
    write_json(tmp_path / "pred.json", predictions_document({"v": [Detection(0, 10, "a", 0.9)]}))
    assert evaluate_map(tmp_path / "gt.json", tmp_path / "pred.json", subset="test").average == 1
    assert evaluate_map(tmp_path / "gt.json", tmp_path / "pred.json").average == 0.5
    with pytest.raises(ValueError, match="subset must name videos"):
        evaluate_map(tmp_path / "gt.json", tmp_path / "pred.json", subset="validation")


def test_thresholds_are_read_from_text():
    assert parse_tious("0.3:0.7:0.1") == THUMOS_TIOUS
    assert parse_tious("0.5:0.95:0.05") == pytest.approx(ACTIVITYNET_TIOUS)
    assert parse_tious("0.5,0.75") == (0.5, 0.75)
    for wrong in ("", "x", "0:1:0.1", "0.5:0.7:0", "1.5", "0.5:0.6"):
        with pytest.raises(ValueError, match="tiou must be like"):
            parse_tious(wrong)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", r"p\.json:1: no valid JSON"),
        ('{"result": {}}', 'must be an object with "results"'),
        ('{"results": {\n"v1": 3}}', r"p\.json:2: video v1: must be a list"),
        ('{"results": {"v1": [{"label": "a", "segment": [0, 1]}]}}', "video v1: a prediction needs label"),
        ('{"results": {"v1": [{"label": "a", "segment": [0, NaN], "score": 1}]}}', "video v1: a prediction"),
    ],
)
def test_a_wrong_prediction_file_is_named(tmp_path: Path, text: str, told: str):
    (tmp_path / "p.json").write_text(text)
    (tmp_path / "gt.json").write_text(
        '{"database": {"v1": {"annotations": [{"label": "a", "segment": [0, 1]}]}}}'
    )
    with pytest.raises(ValueError, match=told):
        evaluate_map(tmp_path / "gt.json", tmp_path / "p.json")
