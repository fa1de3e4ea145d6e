"""``natsl evaluate``: its files, what they hold, and that a result is neither measured twice nor overwritten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl.answers import Grid
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice, run_evaluation
from natsl.data import Split
from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.export import export_point
from natsl.files import read_json
from natsl.run import Run
from natsl.search.report.evaluation import answers_png, cache_png, kept_png
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.run_helpers import make_run
from tests.search_helpers import is_png

FILES = ["answers.png", "cache.png", "evaluation.json", "kept.png"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run that a test may damage."""
    (tmp_path / "runs").mkdir()
    return make_run(tmp_path / "runs")


def options(run: Run, **more: Any) -> EvaluateRunConfig:
    settings: dict[str, Any] = {"lengths": [1, 2], "depths": 2, "sequences": 3, "device": "cpu", **more}
    return EvaluateRunConfig("r", str(run.path.parent), **settings)


def folders(run: Run) -> list[Path]:
    return sorted((run.path / "evaluation").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_what_they_hold(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = options(run)
    run_evaluation(config)
    shown = capsys.readouterr()
    (folder,) = folders(run)
    assert folder.name.startswith("t0002-")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(is_png((folder / name).read_bytes()) for name in FILES if name.endswith("png"))
    result = read_json(folder / "evaluation.json")
    assert json.loads(shown.out) == result["values"]
    assert Evaluation.from_dict(result["values"]) == evaluate_choice(config)
    assert {"text", "other_data", "bits_per_byte", "kept_by_head"} <= result["values"].keys()
    assert result["settings"]["lengths"] == [44, 88]
    assert result["settings"]["checkpoint"]["step"] == 3
    assert {"mqar", "needle"} <= result["answers"].keys()
    needle = result["answers"]["needle"]
    assert [(cell["tokens"], cell["depth"], cell["asked"]) for cell in needle["cells"]] == [
        (tokens, [depth, depth], 3) for tokens in (44, 88) for depth in (0, 1)
    ]
    assert result["answers"]["mqar"]["cells"] == []
    assert "multiple of" in result["answers"]["mqar"]["left_out"]["44"]
    for row in result["cache"]["lengths"]:
        assert row["used"] <= row["held"]
        assert abs(row["difference"]) < 0.02
        assert f"{row['tokens']:>9,}  {row['used']:>15,.0f}  {row['predicted']:>15,.0f}" in shown.err
    assert "note: measured in " in shown.err
    assert "answers of mqar at 44, 88 tokens are left out: " in shown.err


def test_the_same_options_show_the_result_again(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_evaluation(options(run))
    first, before = capsys.readouterr().out, contents(folders(run)[0])
    monkeypatch.setattr("natsl.evaluate.run_batches", None)
    run_evaluation(options(run, batch_size=7))
    shown = capsys.readouterr()
    assert shown.out == first
    assert f"measured on {read_json(folders(run)[0] / 'evaluation.json')['date']} with these settings" in shown.err
    assert [contents(folder) for folder in folders(run)] == [before]


@pytest.mark.parametrize(
    "more",
    [{"depths": 1}, {"lengths": [1]}, {"sequences": 2}, {"split": "search"}, {"pick": "t0013"}, {"budget": 0.5}],
    ids=lambda more: next(iter(more)),
)
def test_other_options_have_another_folder(more: dict[str, Any], run: Run) -> None:
    run_evaluation(options(run))
    before = contents(folders(run)[0])
    run_evaluation(options(run, **more))
    assert len(folders(run)) == 2
    assert before in [contents(folder) for folder in folders(run)]


def test_a_folder_that_is_named_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    config = options(run, out=str(tmp_path / "mine"))
    run_evaluation(config)
    before = contents(tmp_path / "mine")
    assert sorted(before) == FILES
    assert not (run.path / "evaluation").exists()
    with pytest.raises(UserError, match=r"evaluation.json is the result of other settings \(lengths, depths\): choose"):
        run_evaluation(replace(config, lengths=[1], depths=1))
    assert contents(tmp_path / "mine") == before
    (tmp_path / "mine" / "evaluation.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="was not written by natsl evaluate"):
        run_evaluation(config)
    assert (tmp_path / "mine" / "evaluation.json").read_text() == '{"mine": 1}'


def test_a_folder_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("natsl.evaluate.run_batches", None)  # nothing is measured before
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=r"out: .*file.* cannot be written: "):
            run_evaluation(options(run, out=str(tmp_path / out)))


def test_links_that_lead_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (run.path / "evaluation").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leads out of"):
        run_evaluation(options(run))
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_run_without_a_front_and_an_export(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    exported = export_point(run)
    before = contents(exported)
    own = EvaluateRunConfig(export=str(exported), root=str(run.path.parent), lengths=[1], depths=1, device="cpu")
    run_evaluation(own)
    (folder,) = (run.path.parent / "evaluation").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert read_json(folder / "evaluation.json")["settings"]["export"] == "t0002"
    assert contents(exported) == before
    run.front_json.unlink()
    run_evaluation(options(run, budget=0.5, lengths=[]))
    (folder,) = folders(run)
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "kept.png"]
    result = read_json(folder / "evaluation.json")
    assert (result["answers"], result["cache"]["lengths"]) == ({}, [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lengths": [1, 0]}, r"lengths\[1\] = 0"),
        ({"depths": 0}, "depths = 0"),
        ({"sequences": 0}, "sequences = 0"),
    ],
)
def test_options(more: dict[str, Any], message: str, run: Run) -> None:
    with pytest.raises(ValueError, match=message):
        options(run, **more)


def test_pictures_of_every_shape() -> None:
    layers = tuple(LayerPolicy(budget=(0.123, 0.25) * 3) if i % 4 else LayerPolicy(Op.delta) for i in range(40))
    kept = tuple((0.5,) * 6 if i % 4 else (0.0,) * 6 for i in range(40))
    values = Evaluation(None, None, {}, 0.4, tuple(map(max, kept)), kept, {"a": 0.1, "b": 0.2}, {"a": kept, "b": kept})
    assert is_png(kept_png(values, RoutingPolicy(layers, 8), "costs 3$ or 4$ {\\alpha}"))
    assert Grid(Split.test, (64,), 1, None, 1).spans(True) == [(0.5, 0.5)]
    from natsl.answers import Answers
    from natsl.footprint import Footprint

    assert is_png(answers_png([Answers("mqar", True, 3, (), {64: "why"})], (64,), 64, "nothing"))
    assert is_png(cache_png([Footprint(64, 100.0, 200.0, 100.0, 10.0, 100.0, ())], "one"))
