"""Plans of searches: what they count, against a search that was made; no test looks at how long anything took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.cli.plan import PlanConfig, run_plan
from natsl.config import Precision
from natsl.files import write_json
from natsl.latency import Setting, table_path
from natsl.progress import Progress
from natsl.run import Run
from natsl.search import plan, score
from natsl.search.baseline import Named, baselines
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.families import Swept
from natsl.search.front import Front
from natsl.search.pipeline import COMPARED, run_search
from natsl.search.plan import Plan, Probe, Start, make_plan
from natsl.search.prepare import prepare
from natsl.search.rungs import useful
from natsl.search.score import RANDOM_POINTS
from natsl.search.trial import Record
from natsl.space.policy import Op
from tests.latency_helpers import made_table
from tests.test_pipeline import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(plan, "GROUP_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Run, Front]:
    """A finished search, measured again at three times the length."""
    root = tmp_path_factory.mktemp("runs")
    front = run_search(tiny(root, text, objectives=["val_loss", "kept_fraction"], lengths=[1, 3]))
    assert front is not None
    return Run.open("first", root, create=False), front


def planned(config: SearchRunConfig) -> Plan:
    config, problem, data, _ = prepare(config)
    return make_plan(config, problem, data, CPU, Start(1.0, 0.5))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


def options(config: SearchRunConfig, **more: Any) -> PlanConfig:
    return PlanConfig(**{item.name: getattr(config, item.name) for item in fields(SearchRunConfig)}, **more)


def test_a_plan_counts_what_a_search_does(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    front = done[1]
    config = tiny(tmp_path, text, objectives=["val_loss", "kept_fraction"], lengths=[1, 3])
    found = planned(config)
    stages = {stage.name: stage for stage in found.stages}
    assert any("the progress of the search counts a policy in each of its families" in note for note in found.notes)
    real = front.facts["evaluations"]
    assert (stages["train"].count, stages["calibrate"].count, stages["anchors"].count) == (2, 4, 3)
    assert stages["anchors"].count <= real["trials"] <= stages["anchors"].count + 4
    assert stages["families"].count + stages["heads"].count >= real["families"]
    assert stages["test"].count >= real["test split"]
    assert stages["controls"].count >= real["controls"]
    assert front.lengths is not None
    assert stages["lengths"].count >= len(front.lengths.measured[1].measured)
    assert "192 tokens" in stages["lengths"].work
    assert "export" not in stages  # the search has none
    assert stages["start"].seconds == 1.5
    assert "workers" not in stages  # it evaluates by itself


def test_a_plan_agrees_with_the_progress_of_the_search(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of everything, but for what the plan says: policies in several families, draws of random routing."""
    totals: dict[str, int] = {}

    begin = Progress.__init__

    def counted(progress: Progress, stage: str, total: int, done: int = 0) -> None:
        totals[stage] = total
        begin(progress, stage, total, done)

    monkeypatch.setattr(Progress, "__init__", counted)
    members: list[int] = []

    def steps_to_score(records: Sequence[Record], fixed: Sequence[Named], swept: Sequence[Swept]) -> int:
        members.append(sum(len(item.members) for item in swept))
        return score.steps_to_score(records, fixed, swept)

    monkeypatch.setattr("natsl.search.pipeline.steps_to_score", steps_to_score)
    config = tiny(tmp_path, text, objectives=["val_loss", "kept_fraction"], lengths=[1, 3])
    front = run_search(config)
    assert front is not None
    monkeypatch.setattr(plan, "FRONT_POINTS", len(front.points))
    monkeypatch.setattr(plan, "FAMILY_MEMBERS", 0)
    counts = {stage.name: stage.count for stage in planned(config).stages}
    for stage in ("train", "anchors", "heads"):
        assert counts[stage] == totals[stage], stage
    assert counts["anchors"] + config.search.n_trials - 3 == totals["search"]
    problem = prepare(config)[1]
    families = [item.policy for _, items in plan._families(config, problem) for item in items]
    assert counts["families"] == len(set(families))
    assert len(families) <= totals["families"] <= len(families) + counts["heads"], "paths of whole heads are found"
    draws = config.search.random_draws
    beside = min(len(front.points), RANDOM_POINTS) + 1  # one uniform budget
    scored = totals["test"] - beside - members[0]
    assert scored <= counts["test"] - beside * draws <= scored + 2, "paths of whole heads may be baselines already"
    left_out = min(len(front.points), COMPARED) - len(front.comparisons)  # points that route nothing
    assert totals["lengths"] == 2 * (counts["lengths"] - left_out), "the own length is not measured again"
    assert counts["controls"] >= totals["controls"]


def test_times_are_counts_by_what_was_timed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_step_seconds", lambda trainer: (7.0, 2.0))
    monkeypatch.setattr(plan, "_scores", lambda *_: Probe(7.0, 2.0, 40.0, 0.5, 0.25, 0.125))
    config = tiny(tmp_path, text)
    config = replace(config, train=replace(config.train, steps=100), data=replace(config.data, search_sequences=8))
    found = planned(config)
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert seconds["train"] == 7 + 99 * 2
    assert seconds["calibrate"] == 40
    assert seconds["anchors"] == 3 * 0.25
    assert seconds["search"] == pytest.approx(4 * (0.25 + 0.75 * plan.GOES_ON) * 0.5 + 7 * plan.TRIAL_SECONDS)
    assert seconds["heads"] == 9 * 0.5
    assert found.seconds == pytest.approx(sum(seconds.values()))
    # the front, baselines, among them three of the four heads, members of four families, random routing beside some
    fixed = baselines([Op.routed] * 2, 8, [0.25], config.search.space)
    assert seconds["test"] == (7 + len(fixed) + 3 + 4 * plan.FAMILY_MEMBERS + (7 + 1) * 2) * 0.125


@pytest.mark.parametrize(("rungs", "share"), [([1.0], 1.0), ([0.25, 1.0], 0.625), ([0.25, 0.5, 1.0], 0.5)], ids=str)
def test_trials_that_stop_take_less(rungs: list[float], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GOES_ON", 0.5)
    assert plan._mean_share(useful(rungs, 32)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("hours", "drawn"), [(None, 4), (1.0, 4), (0.5, 2), (0.1, 0)], ids=["none", "enough", "half", "used up before"]
)
def test_hours_end_the_trials(
    hours: float | None, drawn: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of ten minutes each, and of all sequences, after ten minutes for a start."""
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.0)
    config, problem, data, _ = prepare(
        tiny(tmp_path, text, objectives=["val_loss", "kept_fraction"], rungs=[1.0], max_hours=hours)
    )
    probe = Probe(0.0, 0.0, 0.0, 600.0, 0.0, 0.0)
    stages = {stage.name: stage for stage in plan._stages(config, problem, probe, data, CPU, Start(600.0, 0.0))}
    search = stages["search"]
    assert search.count == pytest.approx(drawn)
    assert search.seconds == pytest.approx(600.0 * drawn)
    shown = f"scores of about {drawn} of 4 further trials: search.max_hours = {hours} ends them"
    assert search.work == (shown if drawn < 4 else "scores of 4 further trials")


def test_memory_and_disk_are_those_of_a_search(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    found = planned(tiny(tmp_path, text))
    memory, disk = ({amount.name: amount for amount in amounts} for amounts in (found.memory, found.disk))
    assert memory["gradients and optimiser"].bytes == pytest.approx(3 * memory["parameters"].bytes, rel=0.02)
    stored = sum(path.stat().st_size for path in done[0].supernet.glob("*.safetensors"))
    assert disk["supernet/, checkpoints: 2"].bytes == pytest.approx(stored, rel=0.5)  # and the names of its tensors
    assert done[0].study_db.stat().st_size == pytest.approx(disk["study.db"].bytes, rel=0.5)


def test_a_search_of_a_supernet_that_exists_trains_none(done: tuple[Run, Front], text: str) -> None:
    root = done[0].path.parent
    before = files(root)
    found = planned(replace(tiny(root, text), name="second", supernet_from="first"))
    assert {"train", "calibrate"}.isdisjoint(stage.name for stage in found.stages)
    assert [amount.name for amount in found.memory] == ["parameters", "largest size so far"]
    assert found.disk[0].name == "supernet/, checkpoints: 1"
    assert files(root) == before


@pytest.mark.parametrize("stored", [False, True], ids=["no table", "a table"])
def test_a_table_of_times_is_a_stage(stored: bool, text: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, text, objectives=["recall_error", "decode_ms"])
    if stored:
        path = table_path(Setting(config.model, Precision.float32, CPU, 1))
        path.parent.mkdir(parents=True)
        write_json(path, made_table().to_dict())
    (stage,) = [stage for stage in planned(config).stages if stage.name == "latency"]
    assert stage.work == "times of layers, for decode_ms"
    assert (stage.seconds == 0) == stored


def test_the_command_writes_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(options(tiny(tmp_path, text)))
    assert files(tmp_path) == []
    out = capsys.readouterr().out
    assert "in all" in out
    for title in ("stage ", "memory ", "disk "):
        assert sum(line.startswith(title) for line in out.splitlines()) == 1


def test_the_command_writes_where_it_is_told_to(
    done: tuple[Run, Front], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = done[0].path.parent
    run_plan(options(tiny(root, text), out=str(tmp_path / "new")))
    record = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert files(tmp_path / "new") == [tmp_path / "new" / "plan.json"]
    assert record["seconds"] == pytest.approx(
        sum(stage["count"] * stage["each"] + stage["once"] for stage in record["stages"])
    )
    assert "out" not in record["config"]
    assert f"the run 'first' exists: what it has made is not made again by natsl search name=first root={root}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"objectives": ["speed"]}, "objective 'speed' is unknown"),
        ({"objectives": ["needle_error"]}, "needs the task needle"),
        ({"policies": ["nowhere.json"]}, "nowhere.json"),
    ],
    ids=["objective", "task", "policy"],
)
def test_a_search_that_cannot_be_is_refused(changes: dict[str, Any], error: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        run_plan(options(tiny(tmp_path, text, **changes)))
    assert files(tmp_path) == []


def test_workers_on_gpus_share_the_scores(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, text, launcher=Launcher.local, workers=2)
    one = {stage.name: stage for stage in planned(config).stages}
    assert one["workers"].seconds == 1.5
    probe = Probe(0.0, 1.0, 1.0, 3.0, 2.0, 4.0)
    monkeypatch.setattr(plan, "_scores", lambda *_: probe)
    alone = {stage.name: stage.each for stage in planned(config).stages}
    monkeypatch.setattr(plan, "worker_devices", lambda *_: ["cuda:0", "cuda:1", "cuda:0"])
    shared = {stage.name: stage.each for stage in planned(config).stages}
    for name in ("anchors", "search", "heads", "families", "test"):
        assert alone[name] == 2 * shared[name]
    config.search.batch = 1
    assert {stage.name: stage.each for stage in planned(config).stages}["search"] == alone["search"]
