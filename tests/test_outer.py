"""The outer search: supernets under other settings, judged in one scale, stopped early, cut off and resumed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import api, checkpoint, train
from natsl.cli.main import composed
from natsl.cli.options import override_lines
from natsl.data import Split, TaskData, load_text
from natsl.errors import UserError
from natsl.evaluate import evaluate
from natsl.load import Choice, load_choice, read_point
from natsl.resume import check_resume
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.search.fault import SearchFailedError
from natsl.search.outer import command, value
from natsl.search.outer.config import OuterConfig, OuterRunConfig, OuterSpace
from natsl.search.outer.report import OuterResult, print_result
from natsl.search.outer.study import OuterRecord, OuterStudy, OuterTrial, State, is_promoted
from natsl.search.pipeline import run_search
from natsl.search.prepare import make_problem
from natsl.space.policy import Op, RoutingPolicy
from natsl.train import TrainingDivergedError, learning_rate
from tests.search_helpers import read_log
from tests.test_pipeline import tiny
from tests.train_helpers import Killed

pytestmark = pytest.mark.usefixtures("no_picture", "no_figure")

SPACE = OuterSpace(lr=[1e-3, 1e-1], route_temperature=[])


@pytest.fixture(autouse=True)
def no_figure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a tiny search; ``done`` has one."""
    monkeypatch.setattr("natsl.search.outer.report._png", lambda result: b"")


@pytest.fixture
def no_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best trial's policies are not searched."""
    monkeypatch.setattr("natsl.search.pipeline.run_search", lambda config, arguments: None)


def config(root: Path, text: str, space: OuterSpace = SPACE, **outer: Any) -> OuterRunConfig:
    """An outer search of seconds. ``outer``: fields of its section."""
    base = tiny(root, text, n_trials=3, anchors=2, objectives=["val_loss", "kept_fraction"])
    own = {item.name: getattr(base, item.name) for item in fields(SearchRunConfig)}
    settings: dict[str, Any] = {"n_trials": 4, "rungs": [0.25, 0.5, 1.0], "keep": 0.3, "space": space} | outer
    changes = {"name": "mine", "train": replace(base.train, steps=4), "outer": OuterConfig(**settings)}
    return OuterRunConfig(**own | changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: str) -> OuterResult:
    """A finished outer search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natsl.search.pipeline.front_png", lambda front: b"")
        return command.search_settings(config(tmp_path_factory.mktemp("runs"), text))


def results(result: OuterResult) -> list[dict[str, Any]]:
    """All that its trials are, but for where they are."""
    return [record.to_plain(result.rungs) for record in result.records]


def folder(result: OuterResult, record: OuterRecord) -> Run:
    return Run.open(record.id, result.run.path / "trials", create=False)


def test_an_outer_search_has_all_its_files(done: OuterResult) -> None:
    assert [record.id for record in done.records] == ["t0000", "t0001", "t0002", "t0003"]
    assert done.records[0].settings == {"train.lr": 6e-3}  # the config's own
    assert done.rungs == (1, 2, 4)
    assert done.run.report.read_text().count("t0003") == 1 + (done.best is not None and done.best.index == 3) * 3
    plain = json.loads((done.run.path / "outer.json").read_text())
    assert plain["trials"] == results(done)
    assert done.test is not None
    assert plain["best"]["test"] == done.test > 0
    events = [record for record in read_log(done.run) if record["event"] == "trial"]
    assert [event["id"] for event in events] == [record.id for record in done.records]
    best = max(record.value for record in done.records if record.value is not None)
    assert done.best is not None
    assert done.best.value == best


def test_the_picture_and_the_table_show_every_trial(done: OuterResult, capsys: pytest.CaptureFixture[str]) -> None:
    image = (done.run.path / "outer.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    print_result(done)
    shown = capsys.readouterr().out
    assert done.best is not None
    for text in (*(record.id for record in done.records), "stopped after", f"best: {done.best.id}", *done.commands()):
        assert text in shown


def test_the_best_trial_is_a_run_of_a_search(done: OuterResult) -> None:
    best = done.best_run
    assert best is not None
    root = str(best.path.parent)
    assert done.commands()[0] == f"natsl export run={best.name} root={root} pick=knee"
    model, policy, _ = load_choice(Choice(run=best.name, root=root, pick="knee"))
    assert policy.to_dict() == read_point(best, "knee")["policy"]
    assert model.kinds == [Op.routed] * 2
    with pytest.raises(UserError, match=f"is an outer search, .* as run={best.name} root="):
        read_point(done.run, "knee")


def test_a_value_is_the_area_that_the_fixed_policies_dominate(done: OuterResult, text: str) -> None:
    best = done.best
    assert best is not None
    own = config(done.run.path.parent, text)
    model = checkpoint.load_model(folder(done, best).supernet)[0]
    data = TaskData(own.data, load_text(text), own.model.vocab_size)
    policies = value.fixed_policies(make_problem(own), own.search)
    assert len({policy.digest() for policy in policies}) == len(policies) > 5
    found = [evaluate(model, policy, data.eval_sets(Split.search)) for policy in policies]
    area, cheaper, guess = 0.0, 1.0, math.log(own.model.vocab_size)
    for loss, kept in sorted((item.val_loss or 0.0, item.kept_fraction) for item in found):
        if loss < guess and kept < cheaper:  # all that is better has been counted at the cost above
            area += (cheaper - kept) * (1 - loss / guess)
            cheaper = kept
    assert best.value == pytest.approx(area, rel=1e-5)
    assert 0.01 < area < 1


def test_a_stopped_trial_says_so_and_had_the_schedule_of_all_steps(done: OuterResult, text: str) -> None:
    own = config(done.run.path.parent, text)
    stopped = [record for record in done.records if record.state is State.pruned]
    assert stopped
    for record in done.records:
        run = folder(done, record)
        plain = json.loads((run.path / "trial.json").read_text())
        assert (plain["outer"], plain["state"]) == ("mine", record.state.value)
        rates = [line["lr"] for line in read_log(run) if line["event"] == "step"]
        schedule = replace(own.train, lr=record.settings["train.lr"])
        assert rates == [learning_rate(schedule, step) for step in range(done.rungs[len(record.values) - 1])]
    for record in stopped:
        last = done.rungs[len(record.values) - 1]
        assert max(checkpoint.steps(folder(done, record).supernet)) == last < 4
        assert folder(done, record).front_json.exists() is False


def test_the_command_of_a_trial_makes_its_config(done: OuterResult, text: str) -> None:
    own = config(done.run.path.parent, text)
    own = replace(own, model=replace(own.model, associative_init=False), data=replace(own.data, tasks={"bytes": 1.0}))
    trial = own.trial("t0002", str(done.run.path / "trials"), done.records[2].settings)
    assert composed("search", SearchRunConfig, command.search_options(trial)) == trial
    plain = json.loads((folder(done, done.records[2]).path / "trial.json").read_text())
    assert plain["command"].startswith(f"natsl search name=t0002 root={done.run.path / 'trials'} ")


def test_a_finished_search_does_nothing(done: OuterResult, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.Trainer, "step", None)
    again = command.search_settings(config(done.run.path.parent, text))
    assert results(again) == results(done)
    assert again.test == done.test


def kill_at(number: int, function: Callable[..., Any], before: bool) -> Callable[..., Any]:
    """The function, whose call of this number (from 0) ends the process before or after it is made."""
    calls: list[None] = []

    @functools.wraps(function)
    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == number + 1 and before:
            raise Killed
        result = function(*arguments, **options)
        if len(calls) == number + 1:
            raise Killed
        return result

    return killed


@pytest.mark.usefixtures("no_policies")
@pytest.mark.parametrize(
    ("owner", "name", "number", "before"),
    [
        pytest.param(train.Trainer, "step", 6, True, id="in a step"),
        pytest.param(checkpoint, "save", 3, False, id="after a checkpoint"),
        pytest.param(OuterStudy, "report", 3, True, id="before a value is stored"),
        pytest.param(OuterStudy, "report", 7, False, id="before a trial is stopped"),
        pytest.param(OuterStudy, "finish", 1, True, id="before a trial is finished"),
        pytest.param(command, "write_json", 2, True, id="before its folder says so"),
        pytest.param(OuterSpace, "suggest", 2, True, id="before settings are drawn"),
        pytest.param(OuterSpace, "suggest", 1, False, id="before settings are stored"),
        pytest.param(OuterStudy, "next", 0, False, id="before the first training"),
    ],
)
def test_a_search_that_is_killed_equals_an_unbroken_one(
    owner: Any,
    name: str,
    number: int,
    before: bool,
    done: OuterResult,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    take = train.Trainer.step

    def step(self: train.Trainer, step: int) -> Any:
        steps.append(step)
        return take(self, step)

    monkeypatch.setattr(train.Trainer, "step", step)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill_at(number, getattr(owner, name), before))
        with pytest.raises(Killed):
            command.search_settings(config(tmp_path, text))
    resumed = command.search_settings(config(tmp_path, text))
    assert results(resumed) == results(done)
    for record in resumed.records:
        assert json.loads((folder(resumed, record).path / "trial.json").read_text())["id"] == record.id
    unbroken = sum(done.rungs[len(record.values) - 1] for record in done.records)
    assert len(steps) - unbroken in (0, 1)  # the one that was not stored


@pytest.mark.usefixtures("no_policies")
def test_more_trials_go_on_as_if_it_had_been_one_search(done: OuterResult, tmp_path: Path, text: str) -> None:
    command.search_settings(config(tmp_path, text, n_trials=2))
    assert results(command.search_settings(config(tmp_path, text))) == results(done)


@pytest.mark.usefixtures("no_policies")
@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        ("natsl.train.fit", TrainingDivergedError("5 steps"), "diverged"),
        ("natsl.search.outer.value.judge", FloatingPointError("logits of task mqar are not finite"), "not finite"),
    ],
)
def test_settings_of_no_use_fail_and_the_search_goes_on(
    where: str, error: Exception, reason: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(where, error, monkeypatch)
    result = command.search_settings(config(tmp_path, text, n_trials=2, rungs=[1.0]))
    first, second = result.records
    assert (first.state, second.state) == (State.failed, State.complete)
    assert reason in str(first.reason)
    assert json.loads((folder(result, first).path / "trial.json").read_text())["reason"] == first.reason
    assert result.best == second
    again = command.search_settings(config(tmp_path, text, n_trials=3, rungs=[1.0]))
    assert again.records[:2] == result.records
    assert len(again.records) == 3


@pytest.mark.usefixtures("no_policies")
@pytest.mark.parametrize(
    ("where", "skip", "killed", "error"),
    [
        pytest.param("natsl.train.fit", 0, False, RuntimeError("can't allocate memory"), id="first steps on a CPU"),
        pytest.param("natsl.calibrate.calibrate", 1, False, torch.OutOfMemoryError("full"), id="past a rung"),
        pytest.param(
            "natsl.calibrate.calibrate", 1, True, torch.OutOfMemoryError("full"), id="killed when tried again"
        ),
    ],
)
def test_what_did_not_fit_into_memory_is_tried_again_by_the_next_call(
    where: str,
    skip: int,
    killed: bool,
    error: Exception,
    done: OuterResult,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged, report = [], OuterStudy.report

    def reported(study: OuterStudy, trial: OuterTrial, value: float, points: Any) -> None:
        judged.append((trial.id, len(trial.values)))
        report(study, trial, value, points)

    monkeypatch.setattr(OuterStudy, "report", reported)
    fail_once(where, error, monkeypatch, skip)
    own = config(tmp_path, text, n_trials=1)
    with pytest.raises(UserError, match="no trial of 'mine' was trained to its end; the last failure: out of memory"):
        command.search_settings(own)
    marked = tmp_path / "mine" / "trials" / "t0000" / "trial.json"
    assert json.loads(marked.read_text())["state"] == "failed"
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(OuterStudy, "report", kill_at(0, reported, before=False))
            with pytest.raises(Killed):
                command.search_settings(own)
    result = command.search_settings(config(tmp_path, text))
    assert results(result) == results(done)
    assert json.loads(marked.read_text())["state"] == "complete"
    assert len(judged) == len(set(judged))  # each once at each rung


@pytest.mark.usefixtures("no_policies")
def test_what_never_fits_into_memory_is_tried_once_in_a_call(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def fit(run: Run, *arguments: Any, **options: Any) -> None:
        begun.append(run.name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("natsl.train.fit", fit)
    own = config(tmp_path, text, n_trials=2)
    for n_trials, expected in ((2, ["t0000", "t0001"]), (3, ["t0000", "t0001", "t0002"])):
        begun.clear()
        with pytest.raises(UserError, match="no trial of 'mine'"):
            command.search_settings(config(tmp_path, text, n_trials=n_trials))
        assert begun == expected
    own = replace(own, search=replace(own.search, min_failures=3))
    begun.clear()
    with pytest.raises(SearchFailedError, match="3 of 3 trials failed"):
        command.search_settings(own)
    assert begun == expected


def fail_once(where: str, error: Exception, monkeypatch: pytest.MonkeyPatch, skip: int = 0) -> None:
    """``skip``: calls before the one that fails."""
    module, _, name = where.rpartition(".")
    works = getattr(__import__(module, fromlist=[name]), name)
    outcomes = [error, *[None] * skip]

    def fails(*arguments: Any, **options: Any) -> Any:
        outcome = outcomes.pop() if outcomes else None
        if outcome is not None:
            raise outcome
        return works(*arguments, **options)

    monkeypatch.setattr(where, fails)


@pytest.mark.usefixtures("no_policies")
def test_another_fault_ends_the_search_and_the_trial_goes_on(
    done: OuterResult, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once("natsl.search.outer.value.judge", RuntimeError("device lost"), monkeypatch)
    with pytest.raises(RuntimeError, match="device lost"):
        command.search_settings(config(tmp_path, text))
    assert results(command.search_settings(config(tmp_path, text))) == results(done)


def test_too_many_failures_end_the_search(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*arguments: Any, **options: Any) -> None:
        raise TrainingDivergedError("not finite")

    monkeypatch.setattr("natsl.train.fit", diverges)
    own = config(tmp_path, text, n_trials=8)
    own = replace(own, search=replace(own.search, min_failures=3))
    with pytest.raises(SearchFailedError, match=r"3 of 3 trials failed, more than search.max_failure_rate = 0.5"):
        command.search_settings(own)
    with pytest.raises(UserError, match="no trial of 'few' was trained to its end; the last failure: diverged"):
        command.search_settings(replace(config(tmp_path, text, n_trials=1), name="few"))


@pytest.mark.usefixtures("no_policies")
def test_choices_are_searched_and_the_same_one_is_trained_once(tmp_path: Path, text: str) -> None:
    layers = {"all": [Op.routed, Op.routed], "last": [Op.delta, Op.routed]}
    own = config(tmp_path, text, OuterSpace(lr=[], route_temperature=[], layers=layers), n_trials=5, rungs=[1.0])
    own = replace(own, search=replace(own.search, objectives=["val_loss", "cache_bytes"]))
    result = command.search_settings(own)
    assert [record.id for record in result.records] == [f"t000{i}" for i in range(5)]
    originals = [record for record in result.records if record.same_as is None]
    assert len(originals) == len({record.settings["model.layers"] for record in originals}) <= 2
    for record in result.records:
        if record.same_as is not None:
            assert record.value == result.records[record.same_as].value
            assert not (result.run.path / "trials" / record.id).exists()
    for record in originals:
        model = checkpoint.load_model(folder(result, record).supernet)[0]
        assert model.kinds == layers[record.settings["model.layers"]]
    again = command.search_settings(own)
    assert results(again) == results(result)


def test_a_scale_has_the_ends_of_all_structures(tmp_path: Path, text: str) -> None:
    own = config(tmp_path, text, OuterSpace(layers={"all": [Op.routed] * 2, "one": [Op.delta, Op.routed]}))
    own = replace(own, search=replace(own.search, objectives=["bits_per_byte", "kv_bytes_per_token"]))
    both = [own.trial("t", "r", settings) for settings in own.outer.space.structures()]
    scale = value.common_scale(both)
    assert scale.best == (0.0, 0.0)
    assert scale.worst[0] == pytest.approx(math.log2(384))
    single = [value.common_scale([item]).worst[1] for item in both]
    assert scale.worst[1] == max(single) == 2 * min(single)


@pytest.mark.parametrize(
    ("own", "others", "keep", "expected"),
    [
        (0.1, [], 0.5, True),
        (0.1, [0.2], 0.5, False),
        (0.3, [0.2], 0.5, True),
        (0.2, [0.2, 0.2, 0.2], 0.25, True),
        (0.1, [0.3, 0.0], 0.5, True),
        (0.1, [0.3, 0.2], 0.5, False),
        (0.0, [0.3, 0.2], 1.0, True),
    ],
)
def test_the_better_share_goes_on(own: float, others: Sequence[float], keep: float, expected: bool) -> None:
    assert is_promoted(own, others, keep) is expected


MISTAKES = {
    "outer.space.lr=[0.1,0.01]": r"outer.space.lr = \[0.1, 0.01\] is not allowed: it must be \[low, high\]",
    "outer.space.lr=[0,0.01]": "searched by its logarithm: low must be > 0",
    "outer.space.counterfactual_rate=[.5,2]": "with supernet.counterfactual_rate=2: supernet.counterfactual_rate = 2.0",
    "outer.space.distill=[0,1]": "it needs supernet.sandwich=accumulate",
    "outer.space.random_policies=[6,7]": "with supernet.random_policies=7: train.batch_size = 24 is not allowed",
    "outer.space.chunk_size=[16,48]": "with model.chunk_size=48: model.chunk_size = 48 is not allowed",
    "outer.space.chunk_size=[16,16]": "each may come once",
    "outer.space.layers={a:[routed,nothing]}": "outer.space.layers",
    "outer.space.layers={a:[routed],b:[routed]}": "each list may come once",
    "outer.space={lr:[],route_temperature:[]}": "at least one of lr, route_temperature",
    "outer.rungs=[.5,.25,1]": "outer.rungs = .* they must rise",
    "outer.keep=0": "outer.keep = 0.0 is not allowed",
    "outer.n_trials=0": "outer.n_trials = 0 is not allowed",
    "outer.space.momentum=[0,1]": "unknown option 'outer.space.momentum'",
    "search.max_hours=2": "search.max_hours = 2.0 is not allowed: an outer search ends after outer.n_trials",
    "supernet_from=other": "supernet_from = 'other' is not allowed",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[line]) as caught:
        composed("outer", OuterRunConfig, [line])
    assert "\n" not in str(caught.value).strip() or "outer.space.layers" in line


def searching(own: OuterRunConfig, *objectives: str) -> OuterRunConfig:
    return replace(own, search=replace(own.search, objectives=list(objectives)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: searching(replace(c, outer=OuterConfig(space=OuterSpace(chunk_size=[8, 16]))), "val_loss",
                             "kept_fraction"), "'kept_fraction' does not compare chunk sizes"),
        (lambda c: searching(c, "val_loss", "decode_ms"), "'decode_ms' is not for an outer search"),
        (lambda c: replace(c, outer=OuterConfig(space=OuterSpace(layers={"none": [Op.delta]}))), "at least one routed"),
        (lambda c: searching(c, "nothing"), "objective 'nothing' is unknown"),
    ],
    ids=["kept_fraction", "decode_ms", "no router", "unknown"],
)  # fmt: skip
def test_what_does_not_compare_is_refused_before_anything_is_written(
    change: Callable[[OuterRunConfig], OuterRunConfig], message: str, tmp_path: Path, text: str
) -> None:
    with pytest.raises(ValueError, match=message):
        command.search_settings(change(config(tmp_path, text)))
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused_on_resume(done: OuterResult, text: str) -> None:
    root = done.run.path.parent
    with pytest.raises(UserError, match=r"outer.keep: 0.3 then, 0.9 now"):
        command.search_settings(config(root, text, keep=0.9))
    with pytest.raises(UserError, match=r"outer.space.lr: \[0.001, 0.1\] then"):
        command.search_settings(config(root, text, OuterSpace(lr=[1e-3, 2e-1], route_temperature=[])))
    changed = config(root, text)
    changed = replace(changed, search=replace(changed.search, uniform_budgets=[0.33]))
    with pytest.raises(UserError, match=r"made under other settings .*policies"):
        command.search_settings(changed)


def test_the_run_of_a_search_is_left_alone(tmp_path: Path, text: str) -> None:
    run = Run.open("mine", tmp_path)
    run.supernet.mkdir()
    (run.supernet / "step-000001.json").write_text("{}")
    with pytest.raises(UserError, match="name = 'mine' is a run with a supernet of its own"):
        command.search_settings(config(tmp_path, text))
    assert not run.study_db.exists()


def test_another_command_leaves_an_outer_search_alone(done: OuterResult, text: str) -> None:
    own, trials = config(done.run.path.parent, text), done.run.path / "trials"
    assert done.best is not None
    with pytest.raises(UserError, match=f"'mine' is an outer search: .* root={trials} name={done.best.id}$"):
        run_search(replace(tiny(done.run.path.parent, text), name="mine"))
    assert not done.run.supernet.exists()
    assert results(command.search_settings(own)) == results(done)


@pytest.fixture
def elsewhere(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> OuterRunConfig:
    """An outer search of one trial whose study is in a database, made."""
    monkeypatch.setattr("natsl.search.pipeline.run_search", lambda config, arguments: None)
    own = config(tmp_path / "runs", text, n_trials=1, rungs=[1.0])
    own = replace(own, search=replace(own.search, storage=f"sqlite:///{tmp_path}/trials.db"))
    command.search_settings(own)
    return own


def test_refused_options_are_not_written_beside_a_study_in_a_database(elsewhere: OuterRunConfig) -> None:
    file = Path(elsewhere.root) / "mine" / "config.yaml"
    before = file.read_text()
    with pytest.raises(UserError, match=r"outer.keep: 0.3 then, 0.9 now"):
        command.search_settings(replace(elsewhere, outer=replace(elsewhere.outer, keep=0.9)))
    assert file.read_text() == before


def test_trials_in_another_root_are_missed(elsewhere: OuterRunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no trial t0000: the trials of this study are in another root"):
        command.search_settings(replace(elsewhere, root=str(tmp_path / "others")))


@pytest.mark.usefixtures("no_policies")
def test_given_policies_are_read_before_the_first_trial_only(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(RoutingPolicy.uniform([Op.routed] * 2, 8, 0.4).to_json())
    own = config(tmp_path / "runs", text, OuterSpace(chunk_size=[8], route_temperature=[]), n_trials=2, rungs=[1.0])
    own = replace(own, search=replace(own.search, policies=[str(policy)]))
    ask = OuterStudy.next

    def next_trial(study: OuterStudy) -> Any:
        policy.unlink(missing_ok=True)
        return ask(study)

    monkeypatch.setattr(OuterStudy, "next", next_trial)
    assert [record.state for record in command.search_settings(own).records] == [State.complete] * 2


def test_in_python(done: OuterResult, text: str) -> None:
    own = config(done.run.path.parent, text)
    result = api.outer(*override_lines(OuterRunConfig, vars(own)))
    assert results(result) == results(done)
    assert check_resume(result.run, own) == frozenset()


def test_settings_keep_their_option_or_the_space_does_not_hold_them(tmp_path: Path, text: str) -> None:
    own = config(tmp_path, text, OuterSpace(lr=[1e-3, 1e-1], layers={"all": [Op.routed, Op.routed]}))
    assert own.outer.space.own(own) == {"train.lr": 6e-3, "supernet.route_temperature": 0.5, "model.layers": "all"}
    assert OuterSpace(lr=[1e-2, 1e-1]).own(own) is None
    assert OuterSpace(lr=[], layers={"last": [Op.delta, Op.routed]}).own(own) is None
