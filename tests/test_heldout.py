"""What a run is judged on: compared with what it stored, and never what its supernet was trained on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl.cli.commands import CalibrateConfig, run_calibration
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice, run_evaluation
from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.data import Split, TaskData, load_text
from natsl.errors import UserError
from natsl.export import export_choice, export_point
from natsl.files import read_json, to_plain, write_json
from natsl.heldout import keep_record, trained_text
from natsl.load import Choice, stored_data
from natsl.record import DataRecord, TrainedText
from natsl.run import Run
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.pipeline import run_search
from natsl.search.source import held_out_data
from natsl.space.policy import Op
from natsl.tasks import CalibrationDataConfig, DataConfig, OtherTextConfig
from natsl.tasks.mqar import MqarConfig
from natsl.tracking import TrackingConfig, TrackingMode
from tests.run_helpers import make_model, make_run, save, write_letters

pytestmark = pytest.mark.usefixtures("no_picture")


def words(seed: int, size: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz \n", k=size))


def write_files(folder: Path, numbers: range, size: int = 400) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"file{i}.txt").write_text(words(i, size))
    return folder


def rotate(path: Path) -> None:
    """Move the first tenth of a text to its end, so that what was trained on is held out."""
    text = path.read_text()
    path.write_text(text[len(text) // 10 :] + text[: len(text) // 10])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def run(root: Path) -> Run:
    """A finished run that has stored which text it was made with."""
    run = make_run(root)
    shutil.rmtree(run.supernet)
    keep_record(run, data_of(run), str(root), None, allow_other=False)
    save(run, make_model())
    return run


def data_of(run: Run) -> TaskData:
    root = str(run.path.parent)
    return held_out_data(SearchRunConfig(root=root, data=stored_data(run.name, root, None)))[0]


def options(run: Run, **more: Any) -> EvaluateRunConfig:
    return EvaluateRunConfig("r", str(run.path.parent), device="cpu", **more)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def printed(config: EvaluateRunConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    run_evaluation(config)
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# Changed text, moved text, other text


def test_text_that_has_changed_is_not_scored_unnoticed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = printed(options(run), capsys)
    assert before["other_data"] is None
    assert "letters.txt" in before["text"]
    path = run.path.parent / "letters.txt"
    rotate(path)
    message = refused(lambda: evaluate_choice(options(run)))
    assert "not what run 'r' was judged on: letters.txt changed (4,000 bytes then, 4,000 now)" in message
    assert "allow_other_data=true" in message
    after = printed(options(run, allow_other_data=True), capsys)
    assert after["val_loss"] != before["val_loss"]
    assert after["other_data"] == "letters.txt changed (4,000 bytes then, 4,000 now)"
    rotate(path)
    path.write_text(path.read_text()[:3000])
    assert "4,000 bytes then, 3,000 now" in refused(lambda: evaluate_choice(options(run)))


def test_an_export_is_scored_on_the_text_of_its_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    config = EvaluateRunConfig(export=str(export_point(run, "t0013")), device="cpu")
    assert evaluate_choice(config) == evaluate_choice(options(run, pick="t0013"))
    rotate(run.path.parent / "letters.txt")
    assert "letters.txt changed" in refused(lambda: evaluate_choice(config))
    assert evaluate_choice(replace(config, allow_other_data=True)) is not None


def test_an_export_says_no_folder_and_no_file_of_its_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    run_calibration(CalibrateConfig("r", "mine", str(run.path.parent), device="cpu"))
    choice = Choice(run="r", root=str(run.path.parent), pick="t0002", calibration="mine")
    exported = export_choice(choice, sequences=0)
    plain = (exported / "provenance.json").read_text()
    assert str(tmp_path) not in plain
    assert plain.count("letters.txt") == 3, "the last name of the path, in settings, calibration and record"
    config = EvaluateRunConfig(export=str(exported), device="cpu")
    before = evaluate_choice(config)  # it is still in the folder of its run
    away = shutil.copytree(exported, tmp_path / "away")
    moved = replace(config, export=str(away))
    message = refused(lambda: evaluate_choice(moved))
    assert "letters.txt' does not exist; an export does not say in which folder its text is: data.path=" in message
    text = tmp_path / "elsewhere" / "letters.txt"
    text.parent.mkdir()
    shutil.copy(run.path.parent / "letters.txt", text)
    named = replace(moved, data=OtherTextConfig(str(text)))
    capsys.readouterr()
    assert evaluate_choice(named) == before
    assert printed(replace(named, lengths=[], root=str(tmp_path / "out")), capsys)["other_data"] is None
    monkeypatch.chdir(text.parent)
    assert evaluate_choice(moved) == before
    rotate(text)
    assert "letters.txt changed (4,000 bytes then, 4,000 now)" in refused(lambda: evaluate_choice(moved))
    monkeypatch.chdir(tmp_path)
    write_json(run.text, {**read_json(run.text), "text": "another"})
    assert "does not exist; an export does not say" in refused(lambda: evaluate_choice(config))


def test_what_an_export_was_trained_on_is_known_by_digests(tmp_path: Path) -> None:
    corpus = load_text(str(write_files(tmp_path / "texts", range(60))))
    record = DataRecord("d", corpus.fingerprint, corpus.source, "runs", corpus.contents, TrainedText.of(corpus))
    hidden = DataRecord.from_dict(json.loads(json.dumps(to_plain(record.without_names()))), tmp_path)
    assert hidden == record.without_names() == hidden.without_names()
    assert "file" not in json.dumps(to_plain(hidden.files))
    assert (hidden.source, hidden.runs, hidden.trained.folder) == ("texts", "", "")
    own = {file.name: file.sha256 for file in corpus.contents}
    expected = {file.name for file in corpus.contents if file.part == "train"}
    assert hidden.trained.matches("", own) == record.trained.matches("", own) == expected
    assert hidden.trained.matches("", dict.fromkeys(own, "new contents")) == expected
    assert hidden.trained.matches("", {f"x{name}": sha256 for name, sha256 in own.items()}) == {
        f"x{name}" for name in expected
    }
    assert hidden.difference(corpus) is None
    for name in ("file2.txt", "file3.txt"):
        (tmp_path / "texts" / name).write_text(f"changed {name}")
    (tmp_path / "texts" / "file1.txt").unlink()
    write_files(tmp_path / "texts", range(70, 71))
    found = hidden.difference(load_text(str(tmp_path / "texts")))
    assert found == "2 files changed (file2.txt, file3.txt); 1 added (file70.txt); 1 missing"


def test_calibration_takes_the_text_of_its_run(run: Run) -> None:
    config = CalibrateConfig("r", "mine", str(run.path.parent), device="cpu")
    rotate(run.path.parent / "letters.txt")
    assert "letters.txt changed" in refused(lambda: run_calibration(config))
    assert not (run.path / "calibrations").exists()
    run_calibration(replace(config, allow_other_data=True))
    assert "letters.txt changed" in read_json(run.path / "calibrations" / "mine.json")["data"]["other_data"]
    other = CalibrationDataConfig(str(run.path.parent / "letters.txt"))
    run_calibration(replace(config, name="named", data=other))
    assert "was named" in read_json(run.path / "calibrations" / "named.json")["data"]["other_data"]


def test_text_that_has_moved_is_named_and_is_the_same(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluate_choice(options(run))
    moved = run.path.parent / "moved"
    moved.mkdir()
    (run.path.parent / "letters.txt").rename(moved / "letters.txt")
    assert "letters.txt' does not exist; data.path=<path> names where" in refused(lambda: evaluate_choice(options(run)))
    config = options(run, data=OtherTextConfig(str(moved / "letters.txt")))
    assert evaluate_choice(config) == before
    assert printed(config, capsys)["other_data"] is None


def test_other_text_is_named_on_purpose_and_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.path.parent / "other.txt"
    write_letters(other, "0123456789\n")
    result = printed(options(run, data=OtherTextConfig(str(other))), capsys)
    assert result["other_data"] == f"data.path = {str(other)!r} was named instead of the text of the run"
    assert "other.txt" in result["text"]


def test_named_text_without_a_file_that_was_not_trained_on(run: Run) -> None:
    copy = run.path.parent / "copy.txt"
    copy.write_text((run.path.parent / "letters.txt").read_text())
    config = options(run, data=OtherTextConfig(str(copy)))
    assert "each of its files is one that the supernet was trained on" in refused(lambda: evaluate_choice(config))
    assert evaluate_choice(replace(config, allow_other_data=True)) is not None


def test_patterns_go_with_the_path_that_they_choose_from() -> None:
    with pytest.raises(ValueError, match=r"data.include = \['\*.md'\] is not allowed: it goes with data.path"):
        OtherTextConfig(include=["*.md"])


def test_a_path_means_the_same_from_every_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_letters(tmp_path / name / "letters.txt", name)
    monkeypatch.chdir(tmp_path / "here")
    config = DataConfig(path="letters.txt")
    assert config.path == str(tmp_path / "here" / "letters.txt")
    assert DataConfig(path="~/x").path == str(Path.home() / "x")
    assert OtherTextConfig().path is None


def test_an_older_run_is_compared_with_the_fingerprint_that_it_has(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(run)
    run.text.unlink()
    with caplog.at_level("INFO", "natsl.heldout"):
        before = evaluate_choice(options(run))
    assert "does not say which text it was judged on" in caplog.text
    write_json(run.front_json, {**read_json(run.front_json), "fingerprint": {"data": data.fingerprint}})
    assert evaluate_choice(options(run)) == before
    rotate(run.path.parent / "letters.txt")
    assert "the fingerprint of" in refused(lambda: evaluate_choice(options(run)))


def test_files_that_came_and_went_are_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts", range(30))
    corpus = load_text(str(folder))
    record = DataRecord("d", corpus.fingerprint, corpus.source, "", corpus.contents, TrainedText.of(corpus))
    assert record.difference(corpus) is None
    (folder / "file1.txt").unlink()
    (folder / "new.txt").write_text("new")
    for i in (2, 3):
        (folder / f"file{i}.txt").write_text(f"changed {i}")
    found = record.difference(load_text(str(folder)))
    assert found == "2 files changed (file2.txt, file3.txt); 1 added (new.txt); 1 missing (file1.txt)"


# Text that a supernet was trained on


def tiny(root: Path, text: Path, **changes: Any) -> SearchRunConfig:
    """A search of seconds."""
    config = SearchRunConfig(
        name="first",
        root=str(root),
        device="cpu",
        export=False,
        model=ModelConfig(
            layers=[Op.routed] * 2, width=16, mlp_width=16, heads=2, key_dim=8, value_dim=8, chunk_size=8
        ),
        data=DataConfig(
            path=str(text),
            seq_len=64,
            search_sequences=2,
            test_sequences=2,
            mqar=MqarConfig(segment=8, query_segments=1),
        ),
        supernet=SupernetConfig(calibration_sequences=4, calibration_points=17, random_policies=2),
        train=TrainConfig(steps=1, batch_size=4, warmup_steps=1, checkpoint_every=1, log_every=1),
        search=SearchConfig(n_trials=2, random_draws=2, uniform_budgets=[0.25]),
        tracking=TrackingConfig(mode=TrackingMode.disabled),
    )
    return replace(config, **changes)


def test_a_wider_folder_never_scores_what_the_supernet_was_trained_on(root: Path, tmp_path: Path) -> None:
    texts = write_files(tmp_path / "all" / "part", range(60))
    first = tiny(root, texts)
    run_search(first)
    trained = {file.sha256 for file in load_text(str(texts)).contents if file.part == "train"}
    write_files(tmp_path / "all" / "rest", range(100, 200))
    wider = load_text(str(tmp_path / "all"))
    assert trained & {file.sha256 for file in wider.contents if file.part != "train"}, "the names hash anew"

    second = tiny(root, tmp_path / "all", name="second", supernet_from="first")
    assert run_search(second) is not None
    data, _ = held_out_data(second)
    assert not trained & {file.sha256 for file in data.corpus.contents if file.part != "train"}
    held = bytes(data.corpus.part(Split.search).tolist() + data.corpus.part(Split.test).tolist())
    for path in texts.iterdir():
        if any(file.name == f"part/{path.name}" and file.part == "train" for file in data.corpus.contents):
            assert path.read_bytes() not in held
    record = DataRecord.read(Run.open("second", root, create=False).text)
    assert record is not None
    assert {sha256 for _, sha256 in record.trained.files} == trained, "what the copied supernet was trained on"
    evaluate_choice(EvaluateRunConfig("second", str(root), budget=0.5, device="cpu"))  # the same files are left out

    # a copy under another name is known by its contents, a new version by its name
    shutil.rmtree(tmp_path / "all" / "rest")
    (tmp_path / "all" / "part").rename(tmp_path / "all" / "renamed")
    for path in (tmp_path / "all" / "renamed").iterdir():
        if load_text(str(path)).contents[0].sha256 not in trained:
            path.unlink()
    assert "so that none is left" in refused(lambda: run_search(replace(second, name="third")))


def test_the_same_text_has_the_split_of_the_supernet_and_a_new_version_of_it_is_known(
    root: Path, tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(words(0, 20_000))
    run_search(tiny(root, text))
    second = tiny(root, text, name="second", supernet_from="first")
    first = Run.open("first", root, create=False)
    data, trained = held_out_data(second)
    assert trained is not None
    assert data.corpus.fingerprint == trained.text == load_text(str(text)).fingerprint
    first.text.unlink()  # as in an older run, whose text is still there
    assert trained_text(first) == trained
    rotate(text)
    assert "the text that it was trained on is no longer there" in refused(lambda: held_out_data(second))


def test_a_search_goes_on_with_the_text_that_it_began_with(root: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(words(0, 20_000))
    config = tiny(root, text)
    run_search(config)
    run = Run.open("first", root, create=False)
    more = tiny(root, text)
    more.search.n_trials = 3
    rotate(text)
    message = refused(lambda: run_search(more))
    assert "not what run 'first' began with: book.txt changed (20,000 bytes then, 20,000 now)" in message
    front = run_search(replace(more, allow_other_data=True))
    assert front is not None
    mark = "part of the trials and scores is of other text: book.txt changed (20,000 bytes then, 20,000 now)"
    assert mark in front.facts["problems"]
    assert "part of the trials and scores is of other text" in run.report.read_text()
    text.write_text(words(0, 20_000))
    more.search.n_trials = 4
    again = run_search(more)
    assert again is not None
    assert mark in again.facts["problems"], "the mark stays"
    assert evaluate_choice(EvaluateRunConfig("first", str(root), budget=0.5, device="cpu")) is not None


def test_a_training_goes_on_with_its_own_text_only(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    text = tmp_path / "book.txt"
    text.write_text(words(0, 20_000))
    config = tiny(root, text)
    config.train.steps = 2
    monkeypatch.setattr("natsl.train.calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(config)
    monkeypatch.undo()
    rotate(text)
    message = "its training goes on with the same text only: choose another name"
    assert message in refused(lambda: run_search(config))
    assert message in refused(lambda: run_search(replace(config, allow_other_data=True)))


def test_the_run_folder_inside_the_data_folder_resumes_and_evaluates(tmp_path: Path) -> None:
    texts = write_files(tmp_path / "texts", range(60))
    config = tiny(texts / "runs", texts)
    run_search(config)
    more = tiny(texts / "runs", texts)
    more.search.n_trials = 3
    assert run_search(more) is not None
    result = evaluate_choice(EvaluateRunConfig("first", str(texts / "runs"), budget=0.5, device="cpu"))
    assert result.errors["recall_error"] is not None
