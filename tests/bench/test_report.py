"""Reports: ratios point the right way, files round-trip, and a doctored file is refused."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sharewell.bench import Report, Row, environment

MACHINE = {
    "date": "2025-01-01T00:00:00+00:00",
    "commit": "abc",
    "cpu_model": "A CPU",
    "cores": 2,
    "platform": "Linux",
    "python": "3.11.7",
}


def row(**changes: Any) -> Row:
    fields: dict[str, Any] = {
        "metric": "tokens/s",
        "ours": 30.0,
        "baseline": 20.0,
        "unit": "tokens/s",
        "better": "higher",
        "baseline_name": "peer",
    }
    return Row(**{**fields, **changes})


def report(*rows: Row, **changes: Any) -> Report:
    fields: dict[str, Any] = {"slug": "engine", "scale": "smoke", "environment": MACHINE, "seed": 3}
    return Report(rows=rows or (row(),), **{**fields, **changes})


positive = st.floats(min_value=1e-9, max_value=1e12)
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    baseline = draw(st.none() | finite)
    pair = st.none() | st.tuples(finite, finite).map(lambda p: (min(p), max(p)))
    return Row(
        draw(st.text(min_size=1).filter(str.strip)),
        draw(finite),
        baseline,
        draw(st.text()),
        draw(st.sampled_from(["higher", "lower"])),
        draw(st.text(min_size=1).filter(str.strip)),
        draw(st.text()),
        draw(pair),
        draw(pair),
        draw(st.text()),
        draw(st.none() | positive),
        draw(pair),
        draw(st.integers(1, 1000)),
    )


def test_ratio_is_above_one_where_ours_is_better():
    assert row(ours=30, baseline=20, better="higher").ratio == 1.5
    assert row(ours=20, baseline=30, better="lower").ratio == 1.5
    assert row(ours=30, baseline=20, better="lower").ratio == pytest.approx(2 / 3)


def test_ratio_of_zeros_is_one_and_over_zero_infinite_and_of_negatives_undefined():
    assert row(ours=0, baseline=0).ratio == 1
    assert row(ours=0, baseline=5, better="lower").ratio == math.inf
    assert row(ours=0, baseline=5, better="higher").ratio == 0
    assert row(ours=-1, baseline=5).ratio is None


@given(positive, positive)
def test_swapping_ours_and_baseline_inverts_the_ratio(a: float, b: float):
    for better in ("higher", "lower"):
        there, back = (
            row(ours=a, baseline=b, better=better).ratio,
            row(ours=b, baseline=a, better=better).ratio,
        )
        assert there is not None and back is not None
        assert there * back == pytest.approx(1)


def test_a_claim_is_met_from_its_target_on_and_never_without_a_baseline():
    assert row(target=1.5).met is True
    assert row(target=1.51).met is False
    assert row().met is None
    assert row(baseline=None, note="peer not installed", target=1.2).met is False


def test_row_of_samples_has_medians_quartiles_and_paired_ratios():
    made = Row.from_samples("time", [1.0, 2.0, 4.0], [2.0, 6.0, 4.0], "s", "lower", "peer", target=2.0)
    assert (made.ours, made.baseline, made.ratio, made.samples) == (2.0, 4.0, 2.0, 3)
    assert made.ours_spread == (1.5, 3.0)
    assert made.baseline_spread == (3.0, 5.0)
    assert made.ratio_spread == (1.5, 2.5)  # of 2/1, 6/2, 4/4
    assert made.met
    alone = Row.from_samples("time", [1.0], None, "s", "lower", note="peer not installed")
    assert alone.ratio is None and alone.baseline_spread is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metric": " "}, "metric must be"),
        ({"ours": math.nan}, "ours must be a finite number"),
        ({"ours": True}, "ours must be a finite number"),
        ({"baseline": math.inf}, "baseline must be"),
        ({"better": "bigger"}, "better must be higher or lower"),
        ({"baseline_name": ""}, "baseline_name must be given"),
        ({"ours_spread": (2.0, 1.0)}, "ours_spread must be"),
        ({"ratio_spread": (1.0, math.nan)}, "ratio_spread must be"),
        ({"target": 0}, "target must be positive"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_a_wrong_row_names_the_field(changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        row(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"slug": ""}, "slug must be"),
        ({"scale": "huge"}, "scale must be smoke or full"),
        ({"rows": ()}, "rows must be at least one"),
        ({"rows": (row(), row(ours=1.0))}, "rows must be one per metric and baseline"),
        ({"environment": {}}, "environment must be the record of bench.environment"),
        ({"seed": "3"}, "seed must be a whole number"),
    ],
)
def test_a_wrong_report_names_the_field(changes: dict[str, Any], told: str):
    fields: dict[str, Any] = {
        "slug": "s",
        "scale": "full",
        "rows": (row(),),
        "environment": MACHINE,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=told):
        Report(**{**fields, **changes})


@given(st.lists(rows(), min_size=1, max_size=4, unique_by=lambda r: (r.metric, r.baseline_name)))
def test_every_report_survives_its_file_and_obeys_the_schema(made: list[Row]):
    original = report(*made, extra={"note": "ü", "numbers": [1, 2.5, None]})
    text = json.dumps(original.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == original
    jsonschema_rs.validator_for(Report.json_schema()).validate(json.loads(text))


def test_saved_report_is_loaded_as_it_was(tmp_path: Path):
    original = report(row(target=1.2), environment=environment()).with_load({"other_cores": 0.25})
    path = original.save(tmp_path / "new" / "engine-full.json")
    assert Report.load(path) == original
    assert json.loads(path.read_text())["rows"][0]["ratio"] == 1.5
    assert [p.name for p in path.parent.iterdir()] == ["engine-full.json"]


def edit(document: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *path, last = where.split(".")
    target: Any = document
    for part in path:
        target = target[int(part)] if part.isdigit() else target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("rows.0.ratio", 3.0, "ratio of 'tokens/s' must be 1.5"),
        ("rows.0.ratio", None, "ratio of 'tokens/s' must be 1.5"),
        ("rows.0.ours", 60.0, "ratio of 'tokens/s' must be 3.0"),
        ("rows.0.met", False, "met: True"),
        ("rows.0.ours", "30", "rows.0.ours"),
        ("rows.0.colour", "red", "rows.0.colour"),
        ("rows.0.unit", ..., "rows.0.unit"),
        ("rows", "none", "rows must be a list"),
        ("format", "other", "this is no report"),
        ("environment.cores", ..., "environment must be"),
        ("seed", ..., "seed"),
        ("colour", "red", "colour"),
    ],
)
def test_a_doctored_file_is_refused_and_named(tmp_path: Path, where: str, value: Any, told: str):
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(edit(report(row(target=1.2)).to_dict(), where, value)))
    with pytest.raises(ValueError) as error:
        Report.load(path)
    assert str(error.value).startswith("edited.json: ")
    assert told in str(error.value)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path):
    path = report().save(tmp_path / "cut.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"^cut\.json: "):
        Report.load(path)


def printed(shown: Report) -> str:
    console = Console(file=io.StringIO(), width=200, no_color=True)
    shown.print(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_ratio_spread_and_whether_the_claim_is_met():
    met = Row.from_samples(
        "a", [30.0, 33.0, 36.0], [20.0, 22.0, 24.0], "t/s", "higher", "p", claim="fast", target=1.2
    )
    missed = row(metric="b", claim="faster", target=1.6)
    absent = row(metric="c", baseline=None, baseline_name="", note="peer not installed")
    text = printed(report(met, missed, absent))
    assert "33.0 [31.5, 34.5]" in text and "1.50x" in text
    assert "fast (needs 1.20x: met)" in text
    assert "faster (needs 1.60x: NOT met)" in text
    assert "peer not installed" in text
    assert "A CPU, 2 cores" in text


def test_the_plot_draws_every_row_that_has_a_ratio(tmp_path: Path):
    shown = report(
        row(metric="first", target=1.2), row(metric="second", ours=5.0), row(metric="third", baseline=None)
    )
    svg = shown.plot(tmp_path / "plot.svg").read_text()
    assert "1.50x" in svg and "0.250x" in svg
    assert "first" in svg and "second" in svg and "third" not in svg
    assert shown.plot(tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_refuses_what_it_cannot_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="plot must end in"):
        report().plot(tmp_path / "plot.txt")
    with pytest.raises(ValueError, match="at least one row with a baseline"):
        report(row(baseline=None)).plot(tmp_path / "plot.svg")
