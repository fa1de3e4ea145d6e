"""Searches whose costs are times: from a table by formula, which the cache folder holds as if it had been measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import latency
from natsl.config import Precision
from natsl.device import device_name
from natsl.files import write_json
from natsl.latency import Setting, table_path
from natsl.run import Run
from natsl.search.config import SearchConfig
from natsl.search.front import Baseline, Front, Point
from natsl.search.pipeline import run_search
from natsl.space.latency import LatencyTable, Step
from tests.latency_helpers import made_table
from tests.test_pipeline import tiny

pytestmark = pytest.mark.usefixtures("no_picture")

NAMES = ["val_loss", "decode_ms"]


def store(root: Path, text: str, table: LatencyTable | None = None) -> LatencyTable:
    """Put a table into the cache folder, where a search of ``tiny`` looks for its own."""
    setting = Setting(tiny(root, text).model, Precision.float32, torch.device("cpu"), 1)
    table = made_table(setting.to_dict()) if table is None else table
    table_path(setting).parent.mkdir(parents=True, exist_ok=True)
    write_json(table_path(setting), table.to_dict())
    return table


@pytest.fixture(autouse=True)
def _nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> LatencyTable:
        raise AssertionError("a table was there")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measure_table", measure)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Run, Front]:
    """A finished search over decoding time, with points measured at twice the length."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        store(root, text)
        front = run_search(tiny(root, text, objectives=NAMES, constraints={"prefill_ms": 30.0}, lengths=[1, 2]))
    assert front is not None
    return Run.open("first", root, create=False), front


def copied(done: tuple[Run, Front], root: Path) -> Run:
    """The finished run in another folder."""
    shutil.copytree(done[0].path, root / "first")
    return Run.open("first", root, create=False)


def test_values_are_those_of_the_table(done: tuple[Run, Front], text: str) -> None:
    run, front = done
    table = LatencyTable.from_dict(json.loads(run.latency.read_text()))
    shapes = tiny(run.path, text).model.layer_shapes()
    assert len(front.points) > 1
    scored: list[Point | Baseline] = [*front.points, *front.baselines]
    for item in scored:
        kept = item.measured["kept_by_layer"]
        expected = table.milliseconds(Step.decode, shapes, item.policy, kept, 64)
        assert item.values["decode_ms"] == pytest.approx(expected)
    for point in front.points:
        kept = point.measured["kept_by_layer"]
        assert table.milliseconds(Step.prefill, shapes, point.policy, kept, 64) <= 30
    assert front.fingerprint["latency"] == table.digest()


def test_other_lengths_are_billed_there(done: tuple[Run, Front]) -> None:
    front = done[1]
    assert front.lengths is not None
    costs = [at.costs["all-softmax"] for at in front.lengths.measured]
    assert costs[0]["decode_ms"] == pytest.approx(0.5 + 2 * (0.2 + 0.064))
    assert costs[1]["decode_ms"] == pytest.approx(0.5 + 2 * (0.2 + 0.128))
    assert costs[1]["prefill_ms"] == pytest.approx(128 * (0.25 + 2 * (0.02 + 0.0128)))


def test_the_report_names_the_unit_and_the_device(done: tuple[Run, Front], tmp_path: Path) -> None:
    page = done[0].report.read_text()
    assert "time of a decoding step (ms)" in page
    assert "\N{NO-BREAK SPACE}ms" in page
    assert f"{device_name(torch.device('cpu'))}, batch size 1" in page
    assert done[0].front_png.stat().st_size > 10_000


def test_a_run_keeps_the_table_that_it_began_with(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    """Whatever the cache folder holds by then, here nothing."""
    copied(done, tmp_path)
    same: dict[str, Any] = {"objectives": NAMES, "constraints": {"prefill_ms": 30.0}, "lengths": [1, 2]}
    assert run_search(tiny(tmp_path, text, **same)) is None
    front = run_search(tiny(tmp_path, text, **same, n_trials=9))
    assert front is not None
    assert front.fingerprint == done[1].fingerprint


def test_costs_of_two_tables_are_never_mixed(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    run = copied(done, tmp_path)
    table = LatencyTable.from_dict(json.loads(run.latency.read_text()))
    config = tiny(tmp_path, text, objectives=NAMES, constraints={"prefill_ms": 30.0}, lengths=[1, 2], n_trials=9)
    write_json(run.latency, replace(table, rest=dict.fromkeys(Step, (1.0,) * 4)).to_dict())
    with pytest.raises(ValueError, match=r'latency: "[0-9a-f]+\.*.* → "'):
        run_search(config)
    run.latency.write_text("{")  # damaged: the cache folder has another one, or the same
    store(tmp_path, text, replace(table, rest=dict.fromkeys(Step, (1.0,) * 4)))
    with pytest.raises(ValueError, match="latency: "):
        run_search(config)
    run.latency.write_text("{")
    store(tmp_path, text, table)
    assert run_search(config) is not None


def test_another_batch_size_is_refused(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    copied(done, tmp_path)
    settings: dict[str, Any] = {"objectives": NAMES, "constraints": {"prefill_ms": 30.0}, "lengths": [1, 2]}
    with pytest.raises(ValueError, match=r"search\.cost_batch_size: 1 then, 4 now"):
        run_search(tiny(tmp_path, text, **settings, cost_batch_size=4))


def test_a_search_without_times_measures_none(text: str, tmp_path: Path) -> None:
    front = run_search(tiny(tmp_path, text, n_trials=1, objectives=["recall_error", "cache_bytes"]))
    assert front is not None
    assert "latency" not in front.fingerprint
    assert not Run.open("first", tmp_path, create=False).latency.exists()


def test_a_batch_has_a_sequence() -> None:
    with pytest.raises(ValueError, match=r"search\.cost_batch_size = 0 is not allowed: it must be an integer ≥ 1"):
        SearchConfig(cost_batch_size=0)
