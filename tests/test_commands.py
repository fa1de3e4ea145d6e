"""What the commands do beyond their libraries: policies of the user's own, and calibration on other text."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import checkpoint
from natsl.cli.commands import CalibrateConfig, ExportConfig, run_calibration, run_export
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice, run_evaluation
from natsl.cli.generation import GenerateConfig, run_generation
from natsl.errors import UserError
from natsl.files import read_json, write_json
from natsl.generate import read_prompt
from natsl.load import Choice, load_choice, load_exported
from natsl.run import Run
from natsl.space.policy import RoutingPolicy
from natsl.tasks import CalibrationDataConfig
from tests.run_helpers import BUDGET, KINDS, SOFTMAX, make_model, make_run, save, write_letters


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run that a test may damage."""
    (tmp_path / "runs").mkdir()
    return make_run(tmp_path / "runs")


@pytest.fixture
def calibrated(run: Run) -> Run:
    """The run once ``natsl calibrate name=own`` has made a table on its own data, and ``name=other`` on other text."""
    write_letters(run.path.parent / "other.txt", "0123456789+-*/()\n")
    run_calibration(options(run, "own"))
    run_calibration(options(run, "other", data=CalibrationDataConfig(str(run.path.parent / "other.txt"))))
    return run


def options(run: Run, name: str, **more: Any) -> CalibrateConfig:
    return CalibrateConfig(run.name, name, str(run.path.parent), **{"device": "cpu", **more})


def table(run: Run, name: str) -> Any:
    return read_json(run.path / "calibrations" / f"{name}.json")


def contents(run: Run) -> dict[str, bytes]:
    files = [path for path in run.path.rglob("*") if path.is_file() and path.parent.name != "calibrations"]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def test_the_table_follows_the_text_and_training_s_own_stays(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    write_letters(run.path.parent / "other.txt", "0123456789+-*/()\n")
    run_calibration(options(run, "own"))
    run_calibration(options(run, "other", data=CalibrationDataConfig(str(run.path.parent / "other.txt"))))
    assert contents(run) == before
    own, other = table(run, "own"), table(run, "other")
    assert own["by_layer"] != other["by_layer"]
    assert own["data"]["fingerprint"] != other["data"]["fingerprint"]
    assert "other.txt" in other["data"]["text"]
    assert own["data"]["settings"]["seq_len"] == other["data"]["settings"]["seq_len"] == 44
    assert own["checkpoint"] == {"step": 3, "sha256": read_json(run.supernet / "step-000003.json")["sha256"]}
    assert (own["seed"], own["sequences"], own["natsl"]) == (5, 16, "0.1.0")
    assert own["levels"][0] == 0
    assert own["levels"][-1] == 1
    assert len(own["levels"]) == len(own["by_head"][0][0]) == len(own["by_layer"][0]) == 65
    assert own["by_head"][1] == [[None] * 65] * 2  # a layer without a router
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("kept of the test part:") + 1
    asked, measured = zip(*(map(float, line.split()) for line in lines[start + 1 : start + 5]), strict=True)
    assert asked == (0.05, 0.1, 0.25, 0.5)
    assert sorted(measured) == list(measured)
    assert abs(measured[3] - 0.5) < 0.2


def test_options_of_a_calibration(calibrated: Run) -> None:
    path = str(calibrated.path.parent / "other.txt")
    tasks = CalibrationDataConfig(path, tasks={"bytes": 1.0, "needle": 1.0})
    changes: dict[str, dict[str, Any]] = {"more": {"sequences": 32}, "seed": {"seed": 6}, "tasks": {"data": tasks}}
    for name, more in changes.items():
        run_calibration(options(calibrated, name, **{"data": CalibrationDataConfig(path), **more}))
        assert table(calibrated, name)["by_layer"] != table(calibrated, "other")["by_layer"]
    assert table(calibrated, "more")["sequences"] == 32
    assert table(calibrated, "tasks")["data"]["settings"]["tasks"] == {"bytes": 1.0, "needle": 1.0}
    run_calibration(options(calibrated, "again", data=CalibrationDataConfig(path)))
    assert table(calibrated, "again")["by_layer"] == table(calibrated, "other")["by_layer"]


def test_a_name_is_taken_once(calibrated: Run) -> None:
    before = table(calibrated, "own")
    with pytest.raises(UserError, match=r"calibrations/own\.json exists: choose another name or give overwrite=true"):
        run_calibration(options(calibrated, "own", seed=9))
    assert table(calibrated, "own") == before
    run_calibration(options(calibrated, "own", seed=9, overwrite=True))
    assert table(calibrated, "own")["by_layer"] != before["by_layer"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden", "a b", "a\0b", "x" * 65])
def test_odd_names(name: str, run: Run) -> None:
    with pytest.raises(UserError, match="is not allowed: 1 to 64 letters"):
        options(run, name)
    with pytest.raises(UserError, match="is not allowed: 1 to 64 letters"):
        load_choice(Choice(run="r", root=str(run.path.parent), calibration=name))


@pytest.mark.parametrize(
    ("more", "message"),
    [({"sequences": 0}, "sequences = 0"), ({"seed": -1}, "seed = -1"), ({"sequences": 2.5}, "sequences = 2.5")],
    ids=["sequences", "seed", "fraction"],
)
def test_counts(more: dict[str, Any], message: str, run: Run) -> None:
    with pytest.raises(ValueError, match=message):
        options(run, "x", **more)


def test_links_that_lead_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (run.path / "calibrations").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leads out of"):
        run_calibration(options(run, "x"))
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_supernet_that_is_not_trained_to_its_end(run: Run) -> None:
    model = make_model()
    checkpoint.save(run.supernet, 4, model, torch.optim.AdamW(model.parameters()), {"finished": False}, keep=1)
    with pytest.raises(UserError, match="is not trained to its end"):
        run_calibration(options(run, "x"))
    assert not (run.path / "calibrations").exists()


def test_text_that_is_too_short(run: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="is too short"):
        run_calibration(options(run, "x", data=CalibrationDataConfig(str(tmp_path / "short.txt"))))
    assert not (run.path / "calibrations").exists()


def test_evaluation_uses_the_table_that_is_named(calibrated: Run) -> None:
    root = str(calibrated.path.parent)

    def kept(**more: Any) -> tuple[float, ...]:
        return evaluate_choice(EvaluateRunConfig("r", root, device="cpu", **more)).kept_by_layer

    assert len({kept(budget=0.3), kept(budget=0.3, calibration="own"), kept(budget=0.3, calibration="other")}) == 3
    assert kept() != kept(calibration="own")
    with pytest.raises(UserError, match="calibration = 'own' has no effect: no budget of the policy"):
        kept(pick="t0013", calibration="own")
    own = kept(budget=0.3, calibration="own")
    assert all(abs(own[layer] - 0.3) < 0.2 for layer in (0, 2))


def test_an_export_holds_the_table_that_is_named(calibrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for calibration in ("own", None):
        run_export(ExportConfig("r", str(calibrated.path.parent), calibration=calibration))  # verified for once
        monkeypatch.setattr("natsl.export.verify", lambda folder: [])
        folders.append(calibrated.exports / ("t0002" if calibration is None else "t0002-own"))
    (own, policy), (stored, _) = (load_exported(folder) for folder in folders)
    assert policy == BUDGET
    expected = table(calibrated, "own")["by_head"][0]
    assert own.calibration.by_head[0].tolist() == expected
    assert read_json(folders[0] / "calibration.json")["by_head"][0] == expected
    assert torch.equal(stored.calibration.by_head[0], make_model().calibration.by_head[0])
    made_from = read_json(folders[0] / "provenance.json")
    assert made_from["calibration"]["name"] == "own"
    # the scores of the search were measured under training's table
    assert "values" not in made_from
    assert made_from["searched"]["values"] == read_json(folders[1] / "provenance.json")["values"]
    assert "calibration" not in read_json(folders[1] / "provenance.json")


def refused(run: Run, name: str) -> str:
    with pytest.raises(UserError) as error:
        load_choice(Choice(run="r", root=str(run.path.parent), budget=0.3, calibration=name))
    return str(error.value)


def test_static_heads_and_budgets_of_heads_are_policies(run: Run, tmp_path: Path) -> None:
    root, path = str(run.path.parent), tmp_path / "heads.json"

    def kept(first: list[float]) -> list[float]:
        layers = [{"op": "routed", "budget": first}, {"op": "delta"}, {"op": "delta"}]
        write_json(path, {"chunk_size": 8, "layers": layers})
        found = evaluate_choice(EvaluateRunConfig("r", root, policy=str(path), device="cpu"))
        assert found.kept_by_head[1:] == ((0.0, 0.0), (0.0, 0.0))
        return list(found.kept_by_head[0])

    assert kept([1, 0]) == [1.0, 0.0]
    assert kept([0, 1]) == [0.0, 1.0]
    learned = kept([0.5, 0])
    assert 0 < learned[0] < 1
    assert learned[1] == 0
    with pytest.raises(UserError, match=r"heads.json does not fit the model: .* 2 routing heads, not 3"):
        kept([0.1, 0.2, 0.3])


def test_a_table_of_an_older_version_gives_its_thresholds(calibrated: Run) -> None:
    path = calibrated.path / "calibrations" / "own.json"
    new = read_json(path)
    older = {name: new[name] for name in ("natsl", "date", "checkpoint", "data", "sequences", "seed")}
    row = [i / 64 for i in range(65)]
    write_json(path, {**older, "quantiles": row, "margins": [[row] * 2, [[None] * 65] * 2, [row] * 2]})
    choice = Choice(run="r", root=str(calibrated.path.parent), budget=0.3, calibration="own")
    model, policy, _ = load_choice(choice)
    assert model.compile_policy(policy, 1).threshold[0, 0].tolist() == pytest.approx([0.7] * 2)


def test_tables_that_cannot_be_used(calibrated: Run) -> None:
    assert refused(calibrated, "mine") == "run 'r' has no calibration 'mine'; known: other, own"
    path = calibrated.path / "calibrations" / "own.json"
    good = read_json(path)
    short = [[row[:-1] for row in layer] for layer in good["by_head"]]
    for bad, message in (
        ({"by_head": good["by_head"]}, "is not a calibration table written by natsl"),
        ([], "is not a calibration table written by natsl"),
        ({**good, "by_head": [[["x"]]]}, "is not a calibration table of this model"),
        ({**good, "by_head": short}, "is not a calibration table of this model"),
        ({**good, "by_layer": [good["by_layer"][1]] * 3}, "is not a calibration table of this model"),
    ):
        write_json(path, bad)
        assert refused(calibrated, "own") == f"{path} {message}"
    path.write_text("{")
    assert "is not valid JSON" in refused(calibrated, "own")


def test_a_table_of_another_checkpoint(calibrated: Run) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    save(calibrated, model)
    assert "was made for another supernet" in refused(calibrated, "own")


def test_commands_take_any_policy(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, path = str(run.path.parent), tmp_path / "p.json"
    path.write_text(RoutingPolicy.uniform(KINDS, 8, 0.25).to_json())
    file = evaluate_choice(EvaluateRunConfig("r", root, policy=str(path), device="cpu"))
    assert file == evaluate_choice(EvaluateRunConfig("r", root, budget=0.25, device="cpu"))
    path.write_text(SOFTMAX.to_json())
    drawn = []
    for pick, policy in ((None, str(path)), ("t0013", None)):
        run_generation(GenerateConfig("r", root, pick=pick, policy=policy, device="cpu", max_new_tokens=6))
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]


def test_a_prompt_from_a_file_or_from_standard_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any bytes, more of them than a command line can hold."""
    data = b"caf\xc3\xa9 \xff'\"${x} " * 500
    (tmp_path / "p.txt").write_bytes(data)
    drawn = []
    for source in (str(tmp_path / "p.txt"), "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper((tmp_path / "p.txt").open("rb")))
        root = str(run.path.parent)
        run_generation(GenerateConfig("r", root, prompt_file=source, device="cpu", max_new_tokens=1, temperature=0.0))
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(data.decode(errors="replace"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty: give at least one character"), (None, "cannot be read: No such file or directory")],
    ids=["empty", "missing"],
)
def test_a_prompt_file_that_cannot_be_used(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompt(str(tmp_path / "p.txt"))
    with pytest.raises(ValueError, match=r"prompt, prompt_file = .*: give only one of them"):
        GenerateConfig("r", prompt="a", prompt_file=str(tmp_path / "p.txt"))


CONFLICTS = [
    (EvaluateRunConfig, {"policy": "p", "budget": 0.5}, "policy, budget = ('p', 0.5)"),
    (EvaluateRunConfig, {"pick": "knee", "policy": "p"}, "pick, policy = ('knee', 'p')"),
    (GenerateConfig, {"pick": "knee", "policy": "p"}, "pick, policy = ('knee', 'p')"),
    (ExportConfig, {"pick": "knee", "policy": "p"}, "pick, policy = ('knee', 'p')"),
]


@pytest.mark.parametrize(("config", "more", "message"), CONFLICTS)
def test_a_command_takes_one_policy(config: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(run="r", **more)


def test_evaluation_prints_json(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluation(EvaluateRunConfig("r", str(run.path.parent), device="cpu"))
    assert len(json.loads(capsys.readouterr().out)["kept_by_layer"]) == 3
