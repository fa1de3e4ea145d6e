"""Runs on files of token ids, from the search to every command that reads a run or its export."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from natsl.cli.commands import (
    CalibrateConfig,
    ExportConfig,
    TrainRunConfig,
    run_calibration,
    run_export,
    run_training,
)
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice, run_evaluation
from natsl.cli.generation import GenerateConfig, run_generation
from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.files import read_json
from natsl.record import DataRecord
from natsl.run import Run
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.pipeline import run_search
from natsl.space.policy import Op
from natsl.tasks import CalibrationDataConfig, DataConfig, OtherTextConfig
from natsl.tasks.mqar import MqarConfig
from natsl.tracking import TrackingConfig, TrackingMode
from tests.run_helpers import write_letters

pytestmark = pytest.mark.usefixtures("no_picture")

VOCABULARY = 1_000  # ids from 256 to 871 have room behind keys and values


def save_ids(path: Path, seed: int, largest: int = 871) -> Path:
    ids = np.random.default_rng(seed).integers(0, largest, 6_000)
    ids[:2] = (300, largest)
    np.save(path, ids.astype(np.uint16))
    return path


def tiny(root: Path, path: Path, **changes: Any) -> SearchRunConfig:
    """A search of seconds."""
    layers = [Op.routed] * 2
    config = SearchRunConfig(
        name="first",
        root=str(root),
        device="cpu",
        export=False,
        model=ModelConfig(layers, VOCABULARY, 16, 16, heads=2, key_dim=8, value_dim=8, chunk_size=8),
        data=DataConfig(
            path=str(path),
            tasks={"mqar": 1.0, "bytes": 1.0},
            seq_len=64,
            search_sequences=2,
            test_sequences=2,
            mqar=MqarConfig(segment=8, query_segments=1),
        ),
        supernet=SupernetConfig(calibration_sequences=4, calibration_points=17, random_policies=2),
        train=TrainConfig(steps=1, batch_size=4, warmup_steps=1, checkpoint_every=1, log_every=1),
        search=SearchConfig(
            objectives=["val_loss", "kept_fraction"],
            n_trials=2,
            random_draws=2,
            uniform_budgets=[0.25],
            lengths=[2],
        ),
        tracking=TrackingConfig(mode=TrackingMode.disabled),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a finished search on ids, called ``first``, with what it printed, and the file of the ids."""
    root = tmp_path_factory.mktemp("runs")
    path = save_ids(root.parent / "ids.npy", 0)
    with (root / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
        run_search(tiny(root, path))
    return root, path


def options(root: Path, **more: Any) -> EvaluateRunConfig:
    return EvaluateRunConfig("first", str(root), budget=0.5, device="cpu", **more)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def values_of(plain: Any, key: str) -> list[Any]:
    """All values under a key, wherever it is in plain data."""
    if isinstance(plain, dict):
        return [v for k, v in plain.items() if k == key] + [x for v in plain.values() for x in values_of(v, key)]
    return [x for item in plain for x in values_of(item, key)] if isinstance(plain, list) else []


def test_bits_per_byte_is_null_wherever_a_front_reports_it(done: tuple[Path, Path]) -> None:
    run = Run.open("first", done[0], create=False)
    front = read_json(run.front_json)
    bits = values_of(front, "bits_per_byte")
    assert len(bits) > 10, "points, baselines and other lengths"
    assert set(bits) == {None}
    assert None not in values_of(front, "val_loss")
    assert "tokens, split by span" in run.report.read_text()


def test_the_text_of_a_run_is_recorded_as_ids(done: tuple[Path, Path]) -> None:
    record = DataRecord.read(Run.open("first", done[0], create=False).text)
    assert record is not None
    assert record.trained.tokens
    (file,) = record.files
    assert (file.name, file.size, file.part) == ("ids.npy", 12_000, "all")


def test_a_run_is_evaluated_on_its_ids_and_on_others(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, path = done

    def printed(config: EvaluateRunConfig) -> dict[str, Any]:
        run_evaluation(config)
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert result["val_loss"] > 0
        assert result["bits_per_byte"] is None
        return result

    own = printed(options(root))
    assert own["other_data"] is None
    assert own["text"] == f"{path}: 1 file, 6,000 tokens, split by span"
    other = OtherTextConfig(str(save_ids(tmp_path / "other.npy", 1)))
    assert "other.npy' was named" in printed(options(root, data=other))["other_data"]
    copy = OtherTextConfig(str(save_ids(tmp_path / "copy.npy", 0)))
    printed(options(root, data=copy, allow_other_data=True))
    assert "is one that the supernet was trained on" in refused(lambda: evaluate_choice(options(root, data=copy)))
    larger = OtherTextConfig(str(save_ids(tmp_path / "larger.npy", 1, 872)))
    message = refused(lambda: evaluate_choice(options(root, data=larger)))
    assert "model.vocab_size = 1000 is not allowed" in message
    assert "larger.npy', moved behind keys and values, need at least 1001" in message


def test_ids_that_have_changed_are_not_scored_unnoticed(done: tuple[Path, Path]) -> None:
    root, path = done
    save_ids(path, 1)
    try:
        message = refused(lambda: evaluate_choice(options(root)))
        assert evaluate_choice(options(root, allow_other_data=True)).val_loss is not None
    finally:
        save_ids(path, 0)
    assert "ids.npy changed (12,000 bytes then, 12,000 now)" in message


def test_text_and_ids_do_not_replace_each_other(done: tuple[Path, Path], tmp_path: Path) -> None:
    root, path = done
    text = tmp_path / "letters.txt"
    write_letters(text, "abcdefgh ")
    named = OtherTextConfig(str(text))
    line = "letters.txt holds text, the supernet was trained on token ids: it can be judged on token ids only"
    for allow in (False, True):
        config = options(root, data=named, allow_other_data=allow)
        assert line in refused(lambda config=config: evaluate_choice(config))  # type: ignore[misc]
    calibration = CalibrateConfig("first", "x", str(root), CalibrationDataConfig(str(text)), device="cpu")
    assert line in refused(lambda: run_calibration(calibration))
    second = tiny(root, text, name="second", supernet_from="first")
    assert line in refused(lambda: run_search(second))
    assert not (root / "second").exists()
    goes_on = tiny(root, text, allow_other_data=True)
    goes_on.search.n_trials = 3
    assert line in refused(lambda: run_search(goes_on))

    run_search(tiny(tmp_path / "runs", text))
    ids = options(tmp_path / "runs", data=OtherTextConfig(str(path)))
    assert "ids.npy holds token ids, the supernet was trained on text" in refused(lambda: evaluate_choice(ids))


def test_calibration_on_other_ids(done: tuple[Path, Path], tmp_path: Path) -> None:
    root, _ = done
    named = CalibrationDataConfig(str(save_ids(tmp_path / "other.npy", 1)))
    run_calibration(CalibrateConfig("first", "mine", str(root), named, device="cpu"))
    table = read_json(root / "first" / "calibrations" / "mine.json")["data"]
    assert "6,000 tokens" in table["text"]


def test_text_is_not_generated_from_ids_by_a_run_or_its_export(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = done
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    run_export(ExportConfig("first", str(root), name="mine"))
    folder = str(root / "first" / "export" / "mine")
    assert f"try it: natsl evaluate export={folder}" in capsys.readouterr().out
    for config in (GenerateConfig("first", str(root)), GenerateConfig(export=folder)):
        message = refused(lambda config=config: run_generation(config))  # type: ignore[misc]
        assert message == (
            "the model was trained on token ids, and natsl has no tokenizer: generate continues text only"
        )
    own, exported = EvaluateRunConfig("first", str(root), device="cpu"), EvaluateRunConfig(export=folder, device="cpu")
    assert evaluate_choice(exported) == evaluate_choice(own)


def test_the_search_names_commands_that_work(done: tuple[Path, Path]) -> None:
    root, _ = done
    assert f"next    natsl evaluate run=first root={root} pick=knee" in (root / "printed.txt").read_text()
    assert "natsl generate" not in (root / "first" / "report.html").read_text()


def test_bits_per_byte_is_no_objective_and_no_constraint_for_ids(tmp_path: Path) -> None:
    path = save_ids(tmp_path / "ids.npy", 0)
    for change in ({"objectives": ["bits_per_byte", "kept_fraction"]}, {"constraints": {"bits_per_byte": 3.0}}):
        config = tiny(tmp_path / "runs", path)
        config.search = replace(config.search, **change)
        message = refused(lambda config=config: run_search(config))  # type: ignore[misc]
        assert f"objective 'bits_per_byte' is not defined for token ids, which data.path = {str(path)!r}" in message
        assert not (tmp_path / "runs" / "first").exists(), "nothing is trained"


def test_training_names_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs", save_ids(tmp_path / "ids.npy", 0, 900))
    train = TrainRunConfig(
        "t",
        config.root,
        device="cpu",
        model=config.model,
        data=config.data,
        supernet=config.supernet,
        train=config.train,
    )
    message = refused(lambda: run_training(train))
    assert message.startswith("model.vocab_size = 1000 is not allowed")
    assert message.endswith("need at least 1029")
