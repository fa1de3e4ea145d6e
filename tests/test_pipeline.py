"""A whole search on a tiny model: files, resume, refusals, and the command line."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from natsl.checkpoint import load_model
from natsl.cli.main import run_verb
from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.data import TaskData, load_text
from natsl.errors import UserError
from natsl.evaluate import Evaluation, count, count_each, evaluate, summary
from natsl.files import read_config
from natsl.run import Run
from natsl.search import judge, pipeline, rungs, source
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig
from natsl.search.fault import SearchFailedError
from natsl.search.front import Front
from natsl.search.judge import make_judge
from natsl.search.pipeline import run_search
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks import DataConfig
from natsl.tasks.mqar import MqarConfig
from natsl.tracking import Tracker, TrackingConfig, TrackingMode
from tests.search_helpers import read_log

pytestmark = pytest.mark.usefixtures("no_picture")

KEY = "sk-0123456789abcdef"


def tiny(root: Path, text: str, **changes: Any) -> SearchRunConfig:
    """A search of seconds. ``changes``: fields of the search config."""
    settings: dict[str, Any] = {
        "n_trials": 7,
        "anchors": 3,
        "random_draws": 2,
        "uniform_budgets": [0.25],
        "batch_size": 8,
        "launcher": Launcher.inline,
    }
    return SearchRunConfig(
        name="first",
        root=str(root),
        device="cpu",
        export=False,
        model=ModelConfig(
            layers=[Op.routed] * 2, width=16, mlp_width=16, heads=2, key_dim=8, value_dim=8, chunk_size=8
        ),
        data=DataConfig(
            path=text, seq_len=64, search_sequences=3, test_sequences=3, mqar=MqarConfig(segment=8, query_segments=1)
        ),
        supernet=SupernetConfig(calibration_sequences=4, calibration_points=17, random_policies=2),
        train=TrainConfig(steps=2, batch_size=4, warmup_steps=1, checkpoint_every=1, log_every=1),
        search=SearchConfig(**(settings | changes)),
        tracking=TrackingConfig(mode=TrackingMode.disabled),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Run, Front]:
    """A finished search with its export."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_API_KEY", KEY)
        front = run_search(replace(tiny(root, text), export=True), ["name=first", f"data.path={KEY}"])
    assert front is not None
    return Run.open("first", root, create=False), front


def results(run: Run) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(run.front_json.read_text())
    facts = plain.pop("facts")
    return plain | {"evaluations": facts["evaluations"]}


def test_a_run_has_all_its_files(done: tuple[Run, Front]) -> None:
    run, front = done
    names = ("config.yaml", "calibration.json", "study.db", "front.json", "front.csv", "front.png", "report.html")
    for name in (*names, "log.jsonl", "supernet", "export"):
        assert (run.path / name).exists(), name
    plain = results(run)
    assert [point["id"] for point in plain["points"]] == [point.id for point in front.points]
    assert len(plain["hypervolume_history"]) == 7
    assert {"natsl", "model", "data", "supernet", "space", "objectives"} <= set(plain["fingerprint"])
    assert {item["kind"] for item in plain["baselines"]} >= {"extreme", "uniform", "single", "depth", "random"}
    assert [item.name for item in run.exports.iterdir()] == [front.knee]
    events = [record["event"] for record in read_log(run)]
    assert (events.count("step"), events.count("trial")) == (2, 7)


def test_figures_of_the_front_come_from_the_right_split(done: tuple[Run, Front], text: str) -> None:
    run, front = done
    model = load_model(run.supernet)[0]
    config = tiny(run.path.parent, text)
    data = TaskData(config.data, load_text(text), config.model.vocab_size)
    judge = make_judge(model, data, config.search)
    for point in front.points:
        tested = summary(judge.test(point.policy), model.kinds)
        assert tested.errors["recall_error"] == point.values["recall_error"]
        assert judge.search(point.policy, 1.0).kept_fraction == point.search_values["kept_fraction"]


def test_secrets_are_nowhere_in_the_run(done: tuple[Run, Front]) -> None:
    for path in done[0].path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_finished_search_does_nothing(done: tuple[Run, Front], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = done
    before = {path: path.stat().st_mtime_ns for path in (run.front_json, run.report, run.config, run.log_file)}
    assert run_search(replace(tiny(run.path.parent, text), export=True)) is None
    assert "nothing to do: all 7 trials of 'first' are made" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def interrupted(
    plain: Callable[..., Any],
    at: int,
    error: type[BaseException] | Exception = KeyboardInterrupt,
    calls: list[None] | None = None,
) -> Callable[..., Any]:
    """The function, interrupted at its call number ``at``, or raising another error there.

    ``calls``: counts those of several functions together.
    """
    made: list[None] = [] if calls is None else calls

    def call(*args: Any, **named: Any) -> Any:
        made.append(None)
        if len(made) == at:
            raise error
        return plain(*args, **named)

    return call


def interrupt(
    monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException] | Exception = KeyboardInterrupt
) -> None:
    """Interrupt evaluations of a search at call number ``at``, or raise another error there."""
    calls: list[None] = []
    for module, function in ((judge, evaluate), (judge, count), (rungs, count), (rungs, count_each)):
        monkeypatch.setattr(module, function.__name__, interrupted(function, at, error, calls))


@pytest.mark.parametrize(
    "at", [1, 5, 16, 30], ids=["before the first trial", "in a trial", "with baselines", "while testing"]
)
def test_an_interrupted_search_ends_as_a_straight_one(
    at: int,
    done: tuple[Run, Front],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupt(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text))
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "natsl.search"):
        assert run_search(tiny(tmp_path, text)) is not None
    cut_off = [record.getMessage() for record in caplog.records if record.name == "natsl.search.pipeline"]
    assert cut_off == (["1 trials were cut off before; they are made again"] if at == 5 else [])
    assert results(Run.open("first", tmp_path, create=False)) == results(done[0])


def test_more_trials_can_be_added(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    run_search(tiny(tmp_path, text, n_trials=3))
    front = run_search(tiny(tmp_path, text))
    assert front is not None
    assert len(front.history) == 7
    assert results(Run.open("first", tmp_path, create=False)) == results(done[0])


def test_a_foreign_trial_is_noted_and_skipped(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_search(tiny(tmp_path, text, n_trials=1))
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/first/study.db", study_name="first")
    study.add_trial(optuna.trial.create_trial(values=[0.0, 0.0]))
    with caplog.at_level(logging.INFO, "natsl.search"):
        front = run_search(tiny(tmp_path, text, n_trials=2))
    assert "trials of the study that natsl did not make are skipped: 1" in caplog.messages
    assert front is not None
    assert len(front.history) == 2


def test_a_search_cut_off_before_its_export_exports_on_the_next_call(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    config = replace(tiny(tmp_path, text), export=True)
    monkeypatch.setattr("natsl.export.export_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(config)
    monkeypatch.undo()
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])  # the export of ``done`` was verified
    run = Run.open("first", tmp_path, create=False)
    assert run.report.exists()
    assert not run.exports.exists()
    assert run_search(config) is None
    assert "nothing to do" in capsys.readouterr().out
    knee = json.loads(run.front_json.read_text())["knee"]
    assert [item.name for item in run.exports.iterdir()] == [knee]
    (folder,) = run.exports.iterdir()
    before = (folder / "manifest.json").stat().st_mtime_ns
    run.report.unlink()  # the report is made again, the export is kept
    assert run_search(config) is not None
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (folder / "policy.json").write_text("{}")
    with pytest.raises(UserError, match="checksum error"):
        run_search(config)
    assert (folder / "policy.json").read_text() == "{}"


def test_a_search_cut_off_between_its_trials_and_its_report_is_not_done(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_search(tiny(tmp_path, text, n_trials=3))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text))
    monkeypatch.undo()
    front = run_search(tiny(tmp_path, text))
    assert front is not None
    assert len(front.history) == 7


def test_a_finished_search_is_tracked_again_only_if_it_goes_on(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(*arguments: Any) -> Tracker:
        started.append(arguments)
        return Tracker()

    monkeypatch.setattr(pipeline, "start_tracker", start)
    for n_trials, trackers in ((2, 1), (2, 1), (3, 2)):
        run_search(tiny(tmp_path, text, n_trials=n_trials))
        assert len(started) == trackers


def contents(run: Run) -> dict[Path, bytes]:
    """Everything in a run's folder but its database, which SQLite tidies up when it is opened."""
    files = [path for path in run.path.rglob("*") if path.is_file() and not path.name.startswith("study.db")]
    return {path: path.read_bytes() for path in files}


def test_a_resume_under_other_settings_is_refused(done: tuple[Run, Front], text: str) -> None:
    run, _ = done
    before = contents(run)
    config = tiny(run.path.parent, text, n_trials=9, objectives=["val_loss", "kept_fraction"])
    with pytest.raises(UserError, match=r"made under other settings .*objectives: \['recall_error'.* now"):
        run_search(config)
    config = tiny(run.path.parent, text, n_trials=9)
    config.train.steps = 3
    with pytest.raises(ValueError, match="choose another name"):
        run_search(config)
    assert contents(run) == before


def test_another_supernet_from_under_the_same_name_is_refused(text: str, tmp_path: Path) -> None:
    """The run holds the weights of the first one for ever, and its files say so."""
    for name, seed in (("a", 0), ("b", 1)):
        run_search(replace(tiny(tmp_path, text, n_trials=1), name=name, seed=seed))
    config = replace(tiny(tmp_path, text, n_trials=1), name="sf", supernet_from="a", train=TrainConfig(), seed=3)
    run_search(config)
    run = Run.open("sf", tmp_path, create=False)
    assert read_config(run.config)["supernet_from"] == "a"
    assert read_config(run.config)["train"]["steps"] == 2, "how the supernet was trained, not what would be the default"
    assert run.calibration.read_bytes() == Run.open("a", tmp_path, create=False).calibration.read_bytes()
    before = contents(run)
    for other in ("b", None):
        with pytest.raises(UserError, match=f"supernet_from: 'a' then, {other!r} now"):
            run_search(replace(config, supernet_from=other))
    with pytest.raises(UserError, match="supernet_from: None then, 'b' now"):
        run_search(replace(config, name="a", supernet_from="b", seed=0))
    run_search(config)
    assert contents(run) == before


def test_a_source_that_was_removed_or_trained_again(done: tuple[Run, Front], text: str, tmp_path: Path) -> None:
    shutil.copytree(done[0].path, tmp_path / "first")
    config = replace(tiny(tmp_path, text, n_trials=1), name="second", supernet_from="first")
    run_search(config)
    shutil.rmtree(tmp_path / "first")
    config.search.n_trials = 2
    front = run_search(config)  # its own copy is all that is needed
    assert front is not None
    assert len(front.history) == 2
    run_search(replace(tiny(tmp_path, text, n_trials=1), seed=5))
    with pytest.raises(UserError, match="of run 'first' is not the one that was copied into run 'second'"):
        run_search(config)


def test_a_source_that_was_removed_from_a_home_folder(
    done: tuple[Run, Front], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(done[0].path, tmp_path / "first")
    config = replace(tiny(tmp_path, text, n_trials=1), root="~", name="second", supernet_from="first")
    assert run_search(config) is not None
    shutil.rmtree(tmp_path / "first")
    assert run_search(config) is None


def test_a_finished_search_is_reported_again_under_other_baselines(text: str, tmp_path: Path) -> None:
    run_search(tiny(tmp_path, text, n_trials=2))
    front = run_search(tiny(tmp_path, text, n_trials=2, uniform_budgets=[0.5], random_draws=3))
    assert front is not None
    assert "uniform-0.5" in {item.name for item in front.baselines}
    assert {item.draws for item in front.baselines if item.name == "random@uniform-0.5"} == {3}
    assert run_search(tiny(tmp_path, text, n_trials=2, uniform_budgets=[0.5], random_draws=3)) is None


def test_the_supernet_of_another_run_is_searched(done: tuple[Run, Front], text: str) -> None:
    run, first = done
    config = replace(tiny(run.path.parent, text), name="second", supernet_from="first", model=ModelConfig())
    front = run_search(config)
    assert front is not None
    assert [point.values for point in front.points] == [point.values for point in first.points]
    with pytest.raises(UserError, match=r"there is no run 'thrid' .* known: first, second"):
        run_search(replace(config, name="third", supernet_from="thrid"))


def test_a_supernet_of_other_data_is_noted(
    done: tuple[Run, Front], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(tiny(done[0].path.parent, text, n_trials=1), name="elsewhere", supernet_from="first")
    config.data = replace(config.data, seq_len=80)
    with caplog.at_level(logging.INFO, "natsl.search"):
        assert run_search(config) is not None
    assert "the supernet of 'first' was trained on other data" in caplog.messages


def test_an_unfinished_supernet_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("natsl.train.calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text))
    second = replace(tiny(tmp_path, text), name="second", supernet_from="first")
    with pytest.raises(UserError, match="the supernet of run 'first' is not trained to its end"):
        run_search(second)
    monkeypatch.undo()
    run_search(tiny(tmp_path, text))
    assert run_search(second) is not None, "nothing of the unfinished one was kept"


def test_a_supernet_is_copied_whole_or_not_at_all(
    done: tuple[Run, Front], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done[0].path, tmp_path / "first")
    newest = json.loads(max((tmp_path / "first" / "supernet").glob("*.json")).read_text())["step"]
    config = replace(tiny(tmp_path, text), name="second", supernet_from="first")
    calls = []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes()[:100])

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(config)
    monkeypatch.undo()
    copy = tmp_path / "second" / "supernet"
    assert not copy.exists()
    assert run_search(config) is not None
    assert {path.name for path in copy.iterdir()} == {f"step-{newest:06d}.json", f"step-{newest:06d}.safetensors"}
    assert not [path for path in copy.parent.iterdir() if path.name.endswith(".new")]


def test_the_command_in_a_report_works_outside_the_repository(text: str, tmp_path: Path) -> None:
    front = run_search(tiny(tmp_path, text, n_trials=1))
    assert front is not None
    assert front.facts["commands"][0] == f"natsl search name=first root={tmp_path}"


def without_text(config: SearchRunConfig) -> None:
    """Make the sequences needles and nothing else."""
    config.search.objectives = ["val_loss", "kept_fraction"]
    config.model.chunk_size = 4  # smaller than is allowed, so that nothing else is wrong
    config.data = replace(config.data, seq_len=4, tasks={"needle": 1.0})


def refuse_training(*_: object, **__: object) -> None:
    raise AssertionError("training began")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: setattr(c.search, "objectives", ["recal"]), "objective 'recal' is unknown"),
        (lambda c: setattr(c.search, "objectives", ["needle_error"]), "needs the task needle"),
        (lambda c: setattr(c.search, "constraints", {"speed": 1.0}), "objective 'speed' is unknown"),
        (lambda c: setattr(c.model, "layers", [Op.delta]), "routed layer"),
        (lambda c: setattr(c.search, "policies", ["/nowhere/p.json"]), "p.json cannot be read"),
        (lambda c: setattr(c, "device", "tpu"), "device = 'tpu'"),
        (lambda c: setattr(c, "name", "../x"), "name = '../x'"),
        (lambda c: setattr(c.data, "path", "/nowhere"), "/nowhere"),
        (lambda c: setattr(c.train, "batch_size", 5), "train.batch_size = 5"),
        (
            lambda c: setattr(c.model, "chunk_size", 128),
            "data.seq_len = 64 is not allowed: calibration needs complete chunks: .* shorter than chunk_size = 128",
        ),
        (lambda c: setattr(c.model, "vocab_size", 300), "model.vocab_size = 300 .* task mqar needs at least 384"),
        (without_text, "objective 'val_loss' needs text: no sequence of data.seq_len = 4 has any"),
        (lambda c: setattr(c.search, "storage", "sqlite:////nowhere/x.db"), "search.storage cannot be opened"),
    ],
    ids=[
        "objective",
        "task",
        "constraint",
        "nothing to route",
        "policy file",
        "device",
        "name",
        "data",
        "batch",
        "sequence shorter than a chunk",
        "vocabulary",
        "loss on text without text",
        "storage",
    ],
)
def test_mistakes_are_told_before_training(
    change: Callable[[SearchRunConfig], None],
    error: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "fit", refuse_training)
    config = tiny(tmp_path, text)
    change(config)
    with pytest.raises(ValueError, match=error) as caught:
        run_search(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "first").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ({"chunk_size": 8, "layers": [{"op": "delta"}] * 2, "speed": 1}, "unknown key 'speed'"),
        (
            {"chunk_size": 8, "layers": [{"op": "delta"}] * 3},
            r"search.policies: .*policy.json: .* the model has 2 layers",
        ),
        (
            {"chunk_size": 8, "layers": [{"op": "routed", "budget": [1, 0]}] * 2},
            r"\(1.0, 0.0\) .* one number per layer",
        ),
        ({"chunk_size": 8, "layers": [{"op": "routed", "budget": 1.2}, {"op": "delta"}]}, "budget = 1.2"),
        ({"chunk_size": 8, "layers": [{"op": "routed", "threshold": 0.1}, {"op": "delta"}]}, "budget"),
    ],
    ids=["unknown key", "other depth", "one per head", "budget 1.2", "outside the space"],
)
def test_a_policy_of_the_users_that_cannot_be_tried_is_rejected(
    policy: dict[str, Any], error: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "fit", refuse_training)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    with pytest.raises(ValueError, match=error):
        run_search(tiny(tmp_path, text, policies=[str(path)]))


def test_a_policy_of_the_users_comes_first(text: str, tmp_path: Path) -> None:
    mine = RoutingPolicy((LayerPolicy(budget=0.321), LayerPolicy(Op.softmax)), 8)
    path = tmp_path / "policy.json"
    path.write_text(mine.to_json())
    run_search(tiny(tmp_path, text, policies=[str(path)], n_trials=1))
    log = read_log(Run.open("first", tmp_path, create=False))
    trials = [record for record in log if record["event"] == "trial"]
    assert [record["policy"] for record in trials] == [mine.describe()]


def test_a_search_without_a_feasible_trial_still_reports(text: str, tmp_path: Path) -> None:
    front = run_search(replace(tiny(tmp_path, text, constraints={"recall_error": -1.0}), export=True))
    assert front is not None
    assert front.points == ()
    run = Run.open("first", tmp_path, create=False)
    assert "nothing to export" in run.report.read_text()
    assert run.front_png.exists()
    assert not run.exports.exists()


@pytest.mark.parametrize(
    ("bad", "error"),
    [("all", "the supernet is of no use"), ("routed", "5 of 7 trials failed")],
    ids=["every policy", "routed policies"],
)
def test_a_model_that_gives_nan_ends_the_search(
    bad: str, error: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(self: rungs.Parts, policy: RoutingPolicy, share: float) -> Evaluation:
        result = plain(self, policy, share)
        fails = bad == "all" or any(layer.op is Op.routed for layer in policy.layers)
        return replace(result, errors={"recall_error": math.nan}) if fails else result

    plain = rungs.Parts.judge
    monkeypatch.setattr(rungs.Parts, "judge", judge)
    monkeypatch.setattr(rungs.Parts, "judge_each", lambda self, policies, trials: [{} for _ in policies])
    with pytest.raises(UserError, match=error) as caught:
        run_search(tiny(tmp_path, text, anchors=7))
    assert isinstance(caught.value, SearchFailedError) == (bad == "routed")
    assert not (tmp_path / "first" / "report.html").exists()


def test_random_routing_keeps_the_fractions_asked_for(done: tuple[Run, Front], text: str) -> None:
    run, _ = done
    model = load_model(run.supernet)[0]
    config = tiny(run.path.parent, text)
    config.data.test_sequences = 64
    data = TaskData(config.data, load_text(text), config.model.vocab_size)
    judge = make_judge(model, data, config.search)
    policy = RoutingPolicy((LayerPolicy(budget=0.5), LayerPolicy(Op.softmax)), 8)
    first, again, other = (judge.random(policy, (0.25, 1.0), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.kept_by_layer == pytest.approx((0.25, 1.0), abs=1e-12)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "search", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_the_command_searches_and_then_has_nothing_to_do(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=smoke", "name=cli", f"root={tmp_path}", f"data.path={text}", "search.n_trials=3"]
    arguments += ["tracking.mode=disabled", "export=false", "device=cpu", "data.seq_len=96", "model.width=16"]
    arguments += ["data.search_sequences=2", "data.test_sequences=2"]
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    assert f"report  {tmp_path}/cli/report.html" in first.stdout
    assert f"natsl generate run=cli root={tmp_path} pick=knee" in first.stdout
    assert "natsl search experiment=smoke name=cli" in (tmp_path / "cli" / "report.html").read_text()
    run_verb("search", arguments)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("search.n_trials=-3", "search.n_trials = -3"),
        ("search.objectives=[]", "search.objectives"),
        ("search.sampler=best", "search.sampler"),
        ("+search.foo=1", "search.foo"),
        ("search.space.budget_max=1.2", "budget_max = 1.2"),
    ],
)
def test_a_wrong_argument_is_one_line(argument: str, error: str, tmp_path: Path) -> None:
    found = command(argument, f"root={tmp_path}")
    assert found.returncode == 2
    assert error in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_importing_the_search_command_loads_no_torch() -> None:
    code = "import sys, natsl.search.__main__; print({'torch', 'optuna', 'wandb'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
