"""The commands as functions: the options and checks of the command line, what each returns, and nothing left behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import hydra
import matplotlib as mpl
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from natsl import api
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice
from natsl.cli.generation import GenerateConfig, run_generation
from natsl.cli.main import composed
from natsl.cli.options import override_lines
from natsl.config import ModelConfig, TrainConfig
from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.files import read_config
from natsl.load import Choice, load_choice, read_front
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.search.report.figure import ShownFigure
from natsl.search.result import SearchResult
from natsl.search.samplers import Sampler
from natsl.space.policy import Op
from tests.run_helpers import make_run, write_front
from tests.search_helpers import is_png
from tests.test_pipeline import results, tiny

OPTIONS: dict[str, tuple[dict[str, Any], Callable[[SearchRunConfig], object], object]] = {
    "text": ({"name": "1.10"}, lambda c: c.name, "1.10"),
    "text with symbols": ({"search.storage": "a b, (c)={d} 'e' #"}, lambda c: c.search.storage, "a b, (c)={d} 'e' #"),
    "an interpolation": ({"search.storage": "${seed}\\"}, lambda c: c.search.storage, "${seed}\\"),
    "the text null": ({"search": {"storage": "null"}}, lambda c: c.search.storage, "null"),
    "null": ({"search": {"storage": None}}, lambda c: c.search.storage, None),
    "a path": ({"search": {"storage": Path("'a'/b")}}, lambda c: c.search.storage, "'a'/b"),
    "a flag": ({"export": False}, lambda c: c.export, False),
    "a number": ({"train": {"lr": 1e-05}}, lambda c: c.train.lr, 1e-05),
    "a member": ({"search.sampler": Sampler.tpe}, lambda c: c.search.sampler, Sampler.tpe),
    "its name": ({"search": {"sampler": "tpe"}}, lambda c: c.search.sampler, Sampler.tpe),
    "a list": ({"model": {"layers": [Op.delta, "routed"]}}, lambda c: c.model.layers, [Op.delta, Op.routed]),
    "a dictionary": ({"data": {"tasks": {"bytes": 2}}}, lambda c: c.data.tasks, {"bytes": 2.0}),
    "an entry": ({"data.tasks.bytes": 2}, lambda c: c.data.tasks, {"mqar": 1.0, "bytes": 2.0}),
    "a preset": ({"experiment": "smoke", "seed": 3}, lambda c: (c.train.steps, c.seed), (4, 3)),
    "a preset of a section": ({"model": "small"}, lambda c: c.model.width, 512),
    "a dataclass": ({"model": ModelConfig(width=16)}, lambda c: c.model, ModelConfig(width=16)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_arrive_as_they_are_given(case: str) -> None:
    options, of, expected = OPTIONS[case]
    config = composed("search", SearchRunConfig, override_lines(SearchRunConfig, options))
    assert of(config) == expected


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "unknown": (lambda: api.search(nme="x"), r"unknown option 'nme'; did you mean name\?"),
    "unknown in a section": (
        lambda: api.search(search={"n_trial": 3}),
        "unknown option 'search.n_trial'; did you mean",
    ),
    "unknown as typed": (lambda: api.search("search.n_trial=3"), "unknown option 'search.n_trial'; did you mean"),
    "unknown to load": (lambda: api.load(rn="x"), r"unknown option 'rn'; did you mean run\?"),
    "no number": (lambda: api.load(run="r", budget="much"), "budget = 'much' is not allowed"),
    "no such pick": (lambda: api.load(run="r", root=Path("nowhere"), pick=3), "there is no run 'r' in nowhere"),
    "out of bounds": (lambda: api.search(search={"n_trials": -3}), "search.n_trials = -3 is not allowed"),
    "of another type": (lambda: api.train(seed="many"), "seed: Value 'many' of type 'str' could not be converted"),
    "a preset": (lambda: api.plan(experiment="none"), "experiment = 'none' is not allowed: the presets are"),
    "missing": (lambda: api.export(), "run must be given: run=..."),
    "excluding": (lambda: api.evaluate(run="a", export="b"), "give either run=<name> or export=<folder>"),
    "no run": (lambda: api.front("none", "nowhere"), "there is no run 'none' in nowhere; known: none"),
    "no folder": (lambda: api.verify(export="nowhere"), "nowhere is not an exported model"),
    "a sweep": (lambda: api.search("seed=1,2"), "Ambiguous value"),
    "a flag": (lambda: api.generate("--help"), "'--help' is not an option: options are written name=value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call, text = MISTAKES[case]
    with pytest.raises(UserError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.load.load_choice", lambda choice: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        api.load(run="r")


def test_a_secret_is_in_no_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789abcdef")
    with pytest.raises(UserError, match="there is no run '<removed>'"):
        api.front("sk-0123456789abcdef", tmp_path)


def png(result: SearchResult) -> bytes:
    image = io.BytesIO()
    result.plot().savefig(image, format="png")
    return image.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(root: Path, text: str) -> SearchResult:
    """A small search in Python."""
    return api.search(**vars(tiny(root, text)))


def test_a_search_is_that_of_the_command_line(found: SearchResult, straight: dict[str, Any]) -> None:
    assert results(found.run) == straight
    assert found.front.run == "first"
    assert [point.id for point in found] == [point["id"] for point in straight["points"]]
    line = found.front.facts["commands"][0]
    assert line.startswith("natsl search name=first root=")
    assert "search.n_trials=7" in line


def test_its_name_again_resumes(found: SearchResult, root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = found.run.front_json.stat().st_mtime_ns
    again = api.search(**vars(tiny(root, text)))
    assert "nothing to do" in capsys.readouterr().out
    assert again.front == found.front == api.front("first", root).front
    assert found.run.front_json.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"seed: 0 then, 1 now"):
        api.search(**vars(replace(tiny(root, text), seed=1)))


@pytest.mark.parametrize("files", ["none", "of fewer trials"])
def test_who_has_evaluated_for_another_process_has_no_front(
    files: str, found: SearchResult, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsl.search.pipeline.run_search", lambda *_: None)
    if files == "none":
        Run.open("first", tmp_path)
    else:
        shutil.copytree(found.run.path, tmp_path / "first")
    with pytest.raises(
        UserError, match=r"has evaluated for the search 'first' of another one, whose run folder has the"
    ):
        api.search(**vars(tiny(tmp_path, text, n_trials=8)))
    if files != "none":
        assert api.search(**vars(tiny(tmp_path, text))).front == found.front


def test_the_front_is_drawn_as_in_its_file(found: SearchResult) -> None:
    before = mpl.get_backend()
    mpl.use("svg")  # the user's choice
    try:
        assert png(found) == found.run.front_png.read_bytes()
        assert mpl.get_backend() == "svg"
    finally:
        mpl.use(before)


def test_points_go_by_name(found: SearchResult) -> None:
    knee = found["knee"]
    assert knee == found.knee == found[knee.id] == found[knee.policy.digest()[:12]]
    assert len(found) == len(found.points) == len(list(found))
    with pytest.raises(UserError, match="pick = 't9' is not on the front: pick knee or one of t0"):
        found["t9"]


def test_an_empty_front_has_no_point(found: SearchResult) -> None:
    empty = SearchResult(found.run, replace(found.front, points=(), knee=None))
    assert (len(empty), empty.knee) == (0, None)
    assert png(empty)
    assert "front of first" in repr(empty)
    with pytest.raises(UserError, match="the front of run 'first' is empty"):
        empty["knee"]


def test_a_front_shows_itself(found: SearchResult) -> None:
    for shown in (repr(found), found._repr_html_()):
        assert "front of first, test split" in shown
        for point in found:
            assert shown.count(point.id) == 1
            assert point.policy.describe() in shown
    odd = SearchResult(found.run, replace(found.front, run="<b>"))
    assert "front of &lt;b&gt;," in odd._repr_html_()


def test_a_front_shows_itself_in_a_notebook(found: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rich takes every console for the notebook's own, and pyplot may have drawn nothing."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "front of first, test split" in repr(found)
    assert is_png(cast(ShownFigure, found.plot())._repr_png_())


def test_a_front_is_a_data_frame(found: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: (columns, rows)))
    columns, rows = found.to_frame()
    lines = found.run.front_csv.read_text().splitlines()
    assert ",".join(columns) == lines[0]
    assert len(rows) == len(lines) - 1
    assert rows[0][0] == found.points[0].id
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"^to_frame needs pandas, which is not installed: pip install pandas$"):
        found.to_frame()


def test_a_front_of_an_older_version(found: SearchResult, tmp_path: Path) -> None:
    plain = json.loads(found.run.front_json.read_text())
    for name in ("hypervolume_test", "knee_choice", "lengths", "controls"):
        del plain[name]
    for family in plain["families"]:
        family["points"] = [
            {key: item[key] for key in ("policy", "values", "search_values")} for item in family["points"]
        ]
    run = Run.open("older", tmp_path)
    run.write_json(run.front_json, plain)
    older = SearchResult.read(run)
    assert older.points == found.points
    assert png(older)
    run.write_json(run.front_json, plain | {"points": [{"id": "t0000", "policy": {}}]})
    with pytest.raises(UserError, match=r"front.json cannot be read"):
        SearchResult.read(run)


@pytest.fixture
def users_hydra(tmp_path: Path) -> Iterator[None]:
    """Hydra in use by somebody else in this process, by the rules of another version."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mine.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path / "theirs"), version_base="1.2"):
        yield


def test_two_searches_and_hydra_of_the_user_in_one_process(
    users_hydra: None, root: Path, text: str, found: SearchResult
) -> None:
    version = VersionBase.instance().getbase()
    config = tiny(root, text, n_trials=4)
    second = api.search(**vars(replace(config, name="second")))
    third = api.search("name=third", "supernet_from=second", *options_of(config))
    assert [second.run.name, third.run.name] == ["second", "third"]
    assert len(second.front.history) == len(third.front.history) == 4
    assert GlobalHydra.instance().is_initialized()
    assert VersionBase.instance().getbase() == version
    assert hydra.compose("mine", ["a=2"]).a == 2


def options_of(config: SearchRunConfig) -> list[str]:
    """A search of another supernet, as lines."""
    names = ("root", "device", "export", "data", "search", "tracking")
    return override_lines(SearchRunConfig, {name: getattr(config, name) for name in names})


def test_training_gives_the_run(root: Path, text: str, tmp_path: Path) -> None:
    config = tiny(root, text)
    names = ("root", "device", "model", "data", "supernet", "train", "tracking")
    run = api.train(name="net", **{name: getattr(config, name) for name in names})
    assert run.path == root / "net"
    policy = tmp_path / "mine.json"
    policy.write_text('{"chunk_size": 8, "layers": [{"op": "routed", "budget": 0.3}, {"op": "delta"}]}')
    others = {"root": root, "device": "cpu", "tracking": config.tracking}
    rate = {"lr": TrainConfig().lr}  # the default, but typed: a specialisation takes less unless it is
    fine = api.train(name="fine", specialise="net", policy=policy, train=rate, **others)
    assert fine.specialised.exists()
    assert read_config(fine.config)["train"]["lr"] == TrainConfig().lr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on random letters."""
    return make_run(tmp_path_factory.mktemp("letters"))


def test_generating_gives_what_the_command_prints(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = str(run.path.parent)
    (text,) = api.generate(run="r", root=root, prompt="abc", max_new_tokens=9, device="cpu")
    run_generation(GenerateConfig("r", root, prompt="abc", max_new_tokens=9, device="cpu"))
    assert capsys.readouterr().out == f"abc{text}\n"
    (tmp_path / "lines.txt").write_text("abc\nd\n")
    several = {"prompts_file": tmp_path / "lines.txt", "state": tmp_path / "s.state", "max_new_tokens": 4}
    first = api.generate(run="r", root=root, device="cpu", **several)
    assert (tmp_path / "s.state").exists()
    assert text.startswith(first[0])
    assert len(first) == 2


def test_evaluating_gives_what_the_command_writes(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"run": "r", "root": str(run.path.parent), "budget": 0.3, "device": "cpu", "lengths": [1]}
    measured = api.evaluate(**options, depths=1, sequences=2, out=tmp_path)
    assert measured.pop("folder") == tmp_path
    assert measured == json.loads((tmp_path / "evaluation.json").read_text())
    assert Evaluation.from_dict(measured["values"]) == evaluate_choice(EvaluateRunConfig(**options))


def test_loading_gives_model_and_policy(run: Run) -> None:
    model, policy = api.load(run="r", root=str(run.path.parent), pick="t0013")
    other, same, _ = load_choice(Choice(run="r", root=str(run.path.parent), pick="t0013"))
    assert policy == same
    assert model.config == other.config
    with pytest.raises(UserError, match="pick = 'x' is not on the front"):
        api.load(run="r", root=str(run.path.parent), pick="x")


def test_exporting_gives_a_folder_that_is_verified(
    run: Run, found: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    folder = api.export(run="r", root=str(run.path.parent), pick="t0002", name="mine", sequences=0)
    assert folder == run.exports / "mine"
    checks = api.verify(export=folder)
    assert {result.check for result in checks} >= {"files", "logits"}
    assert [result.fault for result in checks if result.loader == "natsl"].count(None) > 3
    own = found.export("knee", name="mine")
    assert own == found.run.exports / "mine"
    knee = found.export()
    assert knee == found.run.exports / found["knee"].id
    before = (knee / "manifest.json").stat().st_mtime_ns
    assert found.export(found["knee"].id) == knee
    assert (knee / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="exists: choose another name"):
        found.export("knee", name="mine")


def test_a_plan_writes_nothing(root: Path, text: str) -> None:
    before = sorted(root.iterdir())
    plan = api.plan(**vars(replace(tiny(root, text), name="planned")))
    assert plan.seconds > 0
    assert {stage.name for stage in plan.stages} >= {"train", "search"}
    assert sorted(root.iterdir()) == before


def test_calibrating_gives_the_table(run: Run, tmp_path: Path) -> None:
    table = api.calibrate(run="r", root=str(run.path.parent), name="mine", sequences=4, device="cpu")
    assert table == run.path / "calibrations" / "mine.json"
    assert table.exists()


def test_a_front_that_is_not_there(tmp_path: Path) -> None:
    run = Run.open("unfinished", tmp_path)
    with pytest.raises(UserError, match=r"has no front.json: finish the search first"):
        api.front("unfinished", tmp_path)
    write_front(run, [], None)
    assert read_front(run)["points"] == []
