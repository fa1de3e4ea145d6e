"""Plans of outer searches: what they count, against one that was made; no test looks at how long anything took."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import api
from natsl.cli.plan import PlanConfig, Planned, run_plan
from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.run import Run
from natsl.search import plan
from natsl.search.outer import command
from natsl.search.outer.command import prepare_outer
from natsl.search.outer.config import OuterRunConfig, OuterSpace
from natsl.search.outer.plan import checkpoints, make_outer_plan, supernets, trials_at_rungs
from natsl.search.outer.report import OuterResult
from natsl.search.outer.study import is_promoted
from natsl.search.plan import Plan, Probe, Start
from natsl.search.prepare import prepare
from natsl.search.rungs import Parts
from natsl.space.policy import RoutingPolicy
from natsl.train import Trainer
from tests.test_outer import config

CPU = torch.device("cpu")
NO_CHOICE = OuterSpace(lr=[1e-3, 1e-1], route_temperature=[])
CHUNKS = OuterSpace(lr=[], route_temperature=[], chunk_size=[16, 8])


@pytest.fixture(autouse=True)
def _short_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(plan, "GROUP_SECONDS", 0.0)


def planned(own: OuterRunConfig) -> Plan:
    return make_outer_plan(own, prepare_outer(own), CPU, Start(1.0, 0.5))


def options(own: OuterRunConfig, **more: Any) -> PlanConfig:
    return PlanConfig(**{item.name: getattr(own, item.name) for item in fields(OuterRunConfig)}, **more)


def test_a_plan_counts_what_an_outer_search_does(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of four trials go on, so that nothing is assumed."""
    done: Counter[str] = Counter()
    step, judge_each = Trainer.step, Parts.judge_each

    def counted_step(trainer: Trainer, number: int) -> Any:
        done["train"] += 1
        return step(trainer, number)

    def counted_judge(parts: Parts, policies: list[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
        done["judge"] += len(policies)
        return judge_each(parts, policies, trials)

    own = config(tmp_path, text, NO_CHOICE, keep=1.0)
    found = planned(own)
    monkeypatch.setattr(Trainer, "step", counted_step)
    monkeypatch.setattr(Parts, "judge_each", counted_judge)
    monkeypatch.setattr("natsl.search.outer.report._png", lambda result: b"")
    monkeypatch.setattr("natsl.search.pipeline.run_search", lambda config, arguments: None)
    result: OuterResult = command.search_settings(own)
    stages = {stage.name: stage for stage in found.stages}
    assert (stages["train"].count, stages["judge"].count) == (done["train"], done["judge"])
    assert stages["calibrate"].count == own.supernet.calibration_sequences * len(own.outer.rungs) * own.outer.n_trials
    assert stages["start"].seconds == 2.0
    stored = sum(file.stat().st_size for file in result.run.trials.rglob("*.safetensors"))
    disk = {amount.name: amount.bytes for amount in found.disk}
    assert disk["trials/, checkpoints: 8"] == pytest.approx(stored, rel=0.5)  # and the names of its tensors
    own_files = result.run.study_db.stat().st_size + (result.run.path / "outer.json").stat().st_size
    assert disk["study.db and outer.json of the trials"] == pytest.approx(own_files, rel=0.6)


def test_the_policies_of_the_best_trial_are_searched_as_in_a_search(text: str, tmp_path: Path) -> None:
    own = config(tmp_path, text)
    search, problem, data, _ = prepare(own.trial("t0000", str(tmp_path)))
    probe = Probe(3.0, 1.0, 1.0, 3.0, 2.0, 4.0)
    after = plan.search_stages(search, problem, probe, data, CPU, Start(1.0, 0.5))
    names = [stage.name for stage in planned(own).stages]
    assert names == ["start", "train", "calibrate", "judge", *(stage.name for stage in after)]
    counts = {stage.name: stage.count for stage in planned(own).stages}
    assert {stage.name: stage.count for stage in after}.items() <= counts.items()


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 1.0])
def test_trials_go_on_as_often_as_in_the_mean_of_all_orders(keep: float) -> None:
    orders = list(itertools.permutations(range(6)))
    going = [sum(is_promoted(v, order[:i], keep) for i, v in enumerate(order)) for order in orders]
    first, second, *_ = trials_at_rungs(6, keep, 3)
    assert first == 6
    assert second == pytest.approx(statistics.fmean(going))


def test_of_choices_each_is_trained_once(text: str, tmp_path: Path) -> None:
    own = config(tmp_path, text, CHUNKS, n_trials=5)
    own = replace(own, search=replace(own.search, objectives=["val_loss", "cache_bytes"]))
    assert (supernets(own), supernets(config(tmp_path, text))) == (2, 4)
    notes = planned(own).notes
    assert "outer.space has 2 different settings: further trials have the results of those" in notes
    assert "assumed: every trial takes as long as one with model.chunk_size=8" in notes, "that of the options"


@pytest.mark.parametrize(
    ("every", "kept", "rungs", "count"),
    [(1, 2, [2, 4], 2), (10, 9, [2, 4], 2), (2, 9, [2, 4], 2), (2, 9, [3, 7], 5), (5, 3, [3, 8, 20], 3)],
    ids=str,
)
def test_checkpoints_are_those_of_steps_and_rungs(
    every: int, kept: int, rungs: list[int], count: int, text: str, tmp_path: Path
) -> None:
    train = replace(config(tmp_path, text).train, checkpoint_every=every, keep_checkpoints=kept)
    assert checkpoints(train, rungs) == count


def test_the_command_writes_nothing_but_its_plan(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = config(tmp_path / "runs", text, NO_CHOICE)
    run_plan(options(own, of=Planned.outer, out=str(tmp_path / "new")))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    record = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert record["config"]["outer"]["n_trials"] == 4
    out = capsys.readouterr().out
    assert "judge " in out
    assert "note: assumed: any place among the trials of a rung is as likely; judged are then 4 at step 1, " in out


def test_a_run_that_exists_is_named_with_its_command(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = config(tmp_path, text)
    Run.open(own.name, tmp_path).log({"event": "trial"})
    run_plan(options(own, of=Planned.outer))
    assert f"is not made again by natsl outer name=mine root={tmp_path}\n" in capsys.readouterr().out


MISTAKES = {
    "of a search": (
        {"outer": {"n_trials": 3}},
        "of = 'search' is not allowed: options of outer are those of natsl outer",
    ),
    "of nothing": ({"of": "train"}, "of: Invalid value 'train', expected one of"),
    "what outer refuses": ({"of": "outer", "supernet_from": "mine"}, "an outer search trains its own supernets"),
    "a measured time": (
        {"of": "outer", "search": {"objectives": ["val_loss", "decode_ms"]}},
        "objective 'decode_ms' is not for an outer search",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given, line = MISTAKES[case]
    with pytest.raises(UserError, match=line):
        api.plan(**given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
