"""The time that a search may take: counted over its calls, and what a search does when it is used up."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl.evaluate import Evaluation
from natsl.run import Run
from natsl.search import stopwatch
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.pipeline import run_search
from natsl.search.stopwatch import Stopwatch
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.space.policy import RoutingPolicy
from tests.search_helpers import problem, synthetic
from tests.test_pipeline import tiny


class Hands:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(stopwatch, "monotonic", lambda: self.now)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    return Hands(monkeypatch)


def test_calls_add_up(hands: Hands, tmp_path: Path) -> None:
    path = tmp_path / "hours.json"
    for call in range(3):
        with Stopwatch(path, 1.0).start() as watch:
            hands.now += 1000
            assert watch.seconds == 1000 * (call + 1)
            assert not watch.up
        hands.now += 10_000  # between the calls
    assert Stopwatch(path, 1.0).seconds == 3000
    with Stopwatch(path, 1.0).start() as watch:
        hands.now += 600
        assert watch.up
    assert Stopwatch(path, 1.0).up
    assert not Stopwatch(path, 1.1).up
    assert not Stopwatch(path, None).up


def test_a_call_that_is_killed_counts(hands: Hands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_STORE_SECONDS", 0.01)
    path = tmp_path / "hours.json"
    watch = Stopwatch(path, None).start()
    hands.now += 500
    while not path.exists() or json.loads(path.read_text())["seconds"] != 500:
        pass
    watch._stop.set()  # and nothing more is stored
    assert Stopwatch(path, None).seconds == 500


def test_an_error_ends_the_count_and_a_damaged_file_is_said(
    hands: Hands, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hours.json"

    def interrupted() -> None:
        with Stopwatch(path, None).start():
            hands.now += 7
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Stopwatch(path, None).seconds == 7
    path.write_text('{"seconds": "long"}')
    with caplog.at_level(logging.INFO, "natsl"):
        assert Stopwatch(path, None).seconds == 0
    assert "hours.json cannot be read" in caplog.text


def test_what_a_search_ends_with_is_stored_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storing, stored = threading.Event(), []

    def store(path: Path, plain: dict[str, Any]) -> None:
        if threading.current_thread() is not threading.main_thread():
            storing.set()
            time.sleep(0.2)
        stored.append(plain["ended"])

    monkeypatch.setattr(stopwatch, "_STORE_SECONDS", 0.01)
    monkeypatch.setattr(stopwatch, "write_json", store)
    watch = Stopwatch(tmp_path / "hours.json", None).start()
    assert storing.wait(20)
    watch.stop(5)
    time.sleep(0.3)  # for a thread that still stores
    assert stored[-1] == 5


@pytest.mark.parametrize("hours", [0, -1.0, math.inf, math.nan])
def test_hours_out_of_range_are_refused(hours: float) -> None:
    with pytest.raises(ValueError, match=r"search\.max_hours"):
        SearchConfig(max_hours=hours)


def opened(folder: Path, batch: int) -> PolicyStudy:
    config = SearchConfig(n_trials=12, anchors=2, rungs=[1.0], batch=batch)
    return open_policy_study(folder / "study.db", "first", config, problem(config), 0, {"model": "m"})


@pytest.mark.parametrize(("batch", "made"), [(1, 5), (4, 8)])
def test_what_is_open_is_finished_and_later_calls_go_on(batch: int, made: int, tmp_path: Path) -> None:
    """The time is up in the fifth evaluation, which may be in the middle of a batch."""
    calls: list[str] = []

    def judge(policy: RoutingPolicy, share: float) -> Evaluation:
        calls.append(policy.digest())
        return synthetic(policy, share)

    study = opened(tmp_path, batch)
    study.stops = lambda: len(calls) >= 5
    study.run(judge)
    assert len(study.records) == made
    study.run(judge)
    assert len(study.records) == made
    study.close()
    again = opened(tmp_path, batch)
    assert again.cut_off == 0
    again.run(judge)
    assert len(again.records) == 12
    (tmp_path / "other").mkdir()
    straight = opened(tmp_path / "other", batch)
    straight.run(synthetic)
    assert [item.policy for item in again.records] == [item.policy for item in straight.records]


def limited(root: Path, text: str, hours: float | None) -> SearchRunConfig:
    return tiny(root, text, objectives=["val_loss", "kept_fraction"], max_hours=hours)


def test_a_search_whose_time_is_up_is_scored_and_goes_on_with_more(
    hands: Hands,
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    no_picture: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = PolicyStudy.tell

    def tell(self: PolicyStudy, *arguments: Any, **options: Any) -> Any:
        hands.now += 600
        return real(self, *arguments, **options)

    monkeypatch.setattr(PolicyStudy, "tell", tell)
    line = "search.max_hours = 0.75 was used up after 5 of 7 trials"
    with caplog.at_level(logging.INFO, "natsl"):
        front = run_search(limited(tmp_path, text, 0.75))
    assert caplog.text.count("search.max_hours = 0.75 is used up: what is open is finished") == 1
    assert line in caplog.text
    assert front is not None
    assert front.facts["counts"]["trials"] == 5
    assert line in front.facts["problems"]
    run = Run.open("first", tmp_path, create=False)
    assert line in run.report.read_text()

    capsys.readouterr()
    assert run_search(limited(tmp_path, text, 0.75)) is None
    assert f"nothing to do: of 'first' {line}; see" in capsys.readouterr().out
    front = run_search(limited(tmp_path, text, 2))
    assert front is not None
    assert front.facts["counts"]["trials"] == 7
    assert not any("max_hours" in problem for problem in front.facts["problems"])
    assert run_search(limited(tmp_path, text, 2)) is None
    assert "all 7 trials of 'first' are made" in capsys.readouterr().out


def test_a_search_without_time_still_reports(hands: Hands, tmp_path: Path, text: str, no_picture: None) -> None:
    config = limited(tmp_path, text, 1.0)
    Run.open("first", tmp_path)
    (tmp_path / "first" / "hours.json").write_text('{"seconds": 3600.0, "ended": -1}')
    front = run_search(replace(config, export=True))
    assert front is not None
    assert (front.points, front.knee, front.facts["counts"]) == ((), None, {})
    assert "search.max_hours = 1 was used up after 0 of 7 trials" in front.facts["problems"]
