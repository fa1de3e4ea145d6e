"""Tables and pictures of an ablation, from results whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl.search.ablation.command import write_results
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.picture import kept_png, loss_png, share_png
from natsl.search.ablation.record import Spread, plain_task, rounded, rows
from natsl.search.ablation.table import paired_difference, report, share_text
from natsl.search.controls.comparison import LEARNED, InTask, Rival
from tests.ablation_helpers import job, judged, result, small
from tests.search_helpers import is_png

BUDGET = 0.25


def pair(layers: float, uniform: float, share: float | None = None) -> list[dict[str, Any]]:
    return [judged("layers", BUDGET, layers, share), judged("uniform", BUDGET, uniform, None, kept=0.3)]


@pytest.fixture
def config() -> AblationConfig:
    c = small(Path("unused"), variants={"base": {}, "noise": {"supernet": {"route_noise": 1}}, "a|b": {}})
    c.data = replace(c.data, tasks={"bytes": 1.0})
    return replace(c, seeds=[0, 1, 2])


@pytest.fixture
def results() -> list[dict[str, Any]]:
    """Differences of noise to base in the best layers: −.02, −.03, −.07."""
    base = [pair(1.30, 1.4, 0.1), pair(1.35, 1.4), pair(1.40, 1.4, 0.3)]
    noise = [pair(1.28, 1.5, 0.2), pair(1.32, 1.5, 0.2), pair(1.33, 1.6, 0.2)]
    of = {"base": base, "noise": noise}
    return [result(name, seed, policies) for name, seeds in of.items() for seed, policies in enumerate(seeds)]


def test_a_table_by_hand(config: AblationConfig, results: list[dict[str, Any]]) -> None:
    lines = report(results, config).splitlines()
    assert lines[0] == "## bytes at budget 0.25: loss on held-out text"
    compared = "learned / random heads / static heads / window / fixed window / fixed half | share | − base"
    assert lines[2] == (
        f"| variant | all-softmax | all-delta | layers: kept | {compared} | uniform: kept | {compared} |"
    )
    assert lines[4] == (
        "| base | 2.0000 | 4.0000 "
        "| 10.0 % | 1.3500 ± 0.0500 / 1.4500 / 1.5500 / 1.3000 / 1.2900 / 1.2800 | 0.20 ± 0.14 (2 of 3) | – "
        "| 30.0 % | 1.4000 ± 0.0000 / 1.5000 / 1.6000 / 1.3500 / 1.3400 / 1.3300 | – | – |"
    )
    # Mean −.04, standard deviation √.0007 = .02646, over √3: .01528. Uniform: +.1, +.1, +.2.
    assert lines[5] == (
        "| noise | 2.0000 | 4.0000 "
        "| 10.0 % | 1.3100 ± 0.0265 / 1.4100 / 1.5100 / 1.2600 / 1.2500 / 1.2400 | 0.20 ± 0.00 | -0.0400 ± 0.0153 "
        "| 30.0 % | 1.5333 ± 0.0577 / 1.6333 / 1.7333 / 1.4833 / 1.4733 / 1.4633 | – | +0.1333 ± 0.0333 |"
    )
    assert lines[6] == "| a\\|b |" + " – |" * 10
    assert lines[-1] == (
        "Trained without route noise, so that routes of other sequences are new to the supernet and the share is "
        "likely too high: base, a\\|b."
    )
    assert "Not scored" not in report(results, config)


def test_differences_are_paired_by_seed(results: list[dict[str, Any]]) -> None:
    own = [row for row in rows(results) if row.spread is Spread.layers]
    assert paired_difference(own, "noise", "base") == pytest.approx((-0.04, 0.0007**0.5 / 3**0.5))
    without = [row for row in own if (row.variant, row.seed) not in {("base", 2), ("noise", 1)}]
    value, error = paired_difference(without, "noise", "base") or (0.0, 0.0)
    assert value == pytest.approx(-0.02)
    assert error is None
    assert paired_difference([row for row in own if row.variant == "noise"], "noise", "base") is None


def test_one_seed_shows_the_error_over_sequences() -> None:
    own = [row for row in rows([result("base", 0, pair(1.0, 1.0, -0.25))]) if row.spread is Spread.layers]
    assert share_text(own) == "-0.25 ± 0.50"
    assert share_text([replace(own[0], share_error=None)]) == "-0.25"
    assert share_text([replace(own[0], share=None)]) == "–"
    assert share_text([replace(own[0], share=None, seed=1), *own]) == "-0.25 ± 0.50 (1 of 2)"


def test_lengths_tasks_and_budgets_have_tables_of_their_own(
    config: AblationConfig, results: list[dict[str, Any]]
) -> None:
    for item in results:
        (at,) = item["lengths"]
        tasks = {"mqar": {**judged("layers", BUDGET, 0.5)["tasks"]["bytes"], "metric": "recall_error"}}
        ends = {"mqar": {"metric": "recall_error", "softmax": None, "delta": 1.0}}
        longer = {"spread": "layers", "budget": BUDGET, "policy": "D", "tasks": tasks}
        item["lengths"].append(at | {"length": 3, "anchors": ends, "policies": [longer]})
    config.data = replace(config.data, tasks={"mqar": 1.0, "bytes": 1.0})
    text = report(results, replace(config, budgets=[BUDGET, 0.5], lengths=[3]))
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        "## bytes at budget 0.25: loss on held-out text",
        "## bytes at budget 0.5: loss on held-out text",
        "## mqar at budget 0.25, 3 × the length: recall error",
        "## mqar at budget 0.5, 3 × the length: recall error",
    ]
    qualities = "0.5000 ± 0.0000 / 0.6000 / 0.7000 / 0.4500 / 0.4400 / 0.4300"
    assert f"| base | – | 1.0000 | 10.0 % | {qualities} | – | – | – | – | – | – |" in text


def test_predictors_stand_beside_the_router(config: AblationConfig, results: list[dict[str, Any]]) -> None:
    """Two heads whose best tenths gain 1 and 3: the second counts three times; shares are means over two seeds."""
    for item, share in zip(results[:2], (0.2, 0.4), strict=True):
        ridge = {"r2": [0.1, 0.3], "captured": [0.2, 0.6]}
        loss = {"learned": {"share": 0.5}, "predicted: ridge, hidden": {"share": share}, "hindsight_in": {}}
        item["headroom"] = [{"budget": BUDGET, "layers": {"0": {"best_tenth": [1.0, 3.0], "ridge, hidden": ridge}}}]
        item["headroom"][0]["loss"] = loss
    lines = report(results, config).splitlines()
    start = lines.index("## What is known of gains at a uniform budget of 0.25: R² / captured · share")
    assert lines[start + 2] == "| variant | learned | ridge, hidden |"
    assert lines[start + 4] == "| base | 0.50 | 0.25 / 0.50 · 0.30 |"
    assert lines[start + 5] == "| noise | – | – |"


def test_an_order_has_no_unit(config: AblationConfig, results: list[dict[str, Any]]) -> None:
    """A predictor without r2 has none in the table, nor has a ranking of an older result, which stored one."""
    layer = {"best_tenth": [1.0], "order": {"captured": [0.6]}, "ranking, all": {"r2": [-9.0], "captured": [0.7]}}
    loss = {"learned": {"share": 0.5}} | {f"predicted: {name}": {"share": 0.2} for name in ("order", "ranking, all")}
    results[0]["headroom"] = [{"budget": BUDGET, "layers": {"0": layer}, "loss": loss | {"hindsight_in": {}}}]
    assert "| base | 0.50 | – / 0.60 · 0.20 | – / 0.70 · 0.20 |" in report(results, config).splitlines()


def test_numbers_have_six_digits() -> None:
    assert rounded({"a": [1.23456789, (0.000123456789,)], "b": 1234567, "c": None, "d": "1.23456789"}) == {
        "a": [1.23457, [0.000123457]],
        "b": 1234567,
        "c": None,
        "d": "1.23456789",
    }


def test_a_control_says_only_what_differs_from_the_router() -> None:
    own = Rival(LEARNED, "", 1.0, 0.0, 1, 0.1, 100.0, True)
    others = (
        replace(own, name="shuffled", value=2.0, std=0.5, draws=3, kept=0.1 + 1e-9),
        replace(own, name="oracle", kept=0.2, bytes=200.0),
    )
    plain = plain_task(InTask("bytes", "val_loss", own, others, None), [[0.1]])
    assert plain["controls"] == {
        "shuffled": {"value": 2.0, "std": 0.5},
        "oracle": {"value": 1.0, "kept": 0.2, "bytes": 200.0},
    }
    assert (plain["selection_share"], plain["kept_by_head"]) == (None, [[0.1]])


def test_results_are_stored_compactly_in_the_order_of_the_jobs(
    config: AblationConfig, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    jobs = [job(config, name, seed) for seed in config.seeds for name in config.variants]
    path = tmp_path / "ablation.json"
    write_results(path, results, jobs)
    stored = json.loads(path.read_text())
    assert [(r["seed"], r["variant"]) for r in stored] == [
        (seed, name) for seed in range(3) for name in ("base", "noise")
    ]
    assert sorted(stored, key=lambda r: (r["variant"], r["seed"])) == results
    assert len(path.read_text().splitlines()) == len(results) + 2
    write_results(path, [], jobs)
    assert json.loads(path.read_text()) == []


@pytest.mark.parametrize("names", [["base", "noise"], ["base", "costs 3$ {\\alpha}"]], ids=["plain", "odd name"])
def test_pictures(names: list[str], results: list[dict[str, Any]]) -> None:
    for item in results:
        item["variant"] = names[item["variant"] == "noise"]
    assert is_png(share_png(results, names))
    assert is_png(loss_png(results, names[-1]))


def test_pictures_show_what_is_drawn(results: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The series of each panel, by label: the points and their bars."""
    from matplotlib.axes import Axes

    drawn: dict[str, list[Any]] = {}
    original = Axes.errorbar

    def errorbar(self: Axes, x: list[float], y: list[float], yerr: list[float] | None = None, **rest: Any) -> Any:
        drawn.setdefault(rest["label"], []).append((x, y, yerr))
        return original(self, x, y, yerr=yerr, **rest)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    share_png(results, ["base", "noise"])
    assert drawn["base"] == [
        ([BUDGET], [pytest.approx(0.2)], [pytest.approx(0.02**0.5)]),
        ([], [], None),
    ]
    drawn.clear()
    loss_png(results, "base")
    assert drawn["learned"] == [([100.0], [pytest.approx(1.35)], [pytest.approx(0.05)])]
    assert drawn["learned, uniform"] == [([300.0], [pytest.approx(1.4)], None)]
    assert drawn["oracle"] == [([50.0], [pytest.approx(1.25)], None)]
    assert drawn["random heads"] == [([100.0], [pytest.approx(1.45)], None)]


def test_a_policy_that_was_not_scored_is_left_out_of_the_picture() -> None:
    assert is_png(loss_png([result("base", 0, [judged("uniform", BUDGET, 1.0)])], "base"))


def test_the_picture_of_a_sample_marks_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    marks: list[list[int]] = []
    original = Axes.plot

    def plot(self: Axes, *given: Any, **options: Any) -> Any:
        marks.append(list(given[0]))
        return original(self, *given, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    sample = {
        "text": ["import ä$x$\n", "\tpass", "'\""],
        "heads": ["0.1", "2.0"],
        "kept": [["2.0"], [], ["0.1", "2.0"]],
    }
    assert is_png(kept_png(sample, "base"))
    assert marks == [[1], [], [0, 1]]
    assert is_png(kept_png({**sample, "heads": [], "kept": [[], [], []]}, "base"))


def test_pictures_without_results() -> None:
    assert is_png(share_png([], ["base"]))
    assert is_png(loss_png([], "base"))
