"""Run folders: names, locks, formats, the log, and that no secret is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from natsl.cli.commands import TrainRunConfig
from natsl.cli.evaluation import EvaluateRunConfig, evaluate_choice
from natsl.errors import UserError
from natsl.export import export_point
from natsl.files import read_config, read_json, to_plain
from natsl.load import stored_data
from natsl.run import FORMAT, Run
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.tasks import DataConfig
from natsl.tracking import TrackingConfig
from tests.run_helpers import make_run

BAD_NAMES = {
    "empty": "",
    "parent": "../x",
    "deep parent": "../../x",
    "parent inside": "a..b",
    "dots": "..",
    "dot": ".",
    "absolute": "/tmp/x",
    "slash": "a/b",
    "backslash": "a\\b",
    "NUL": "a\0b",
    "newline": "a\n",
    "space": "a b",
    "hidden": ".a",
    "option": "-rf",
    "long": "a" * 65,
    "not ASCII": "ä",
}


@pytest.mark.parametrize("create", [True, False], ids=["create", "read"])
@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_bad_names_are_refused(name: str, create: bool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UserError, match="is not allowed") as caught:
        Run.open(name, root, create=create)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*")) == [root]


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0" * 64])
def test_good_names(name: str, tmp_path: Path) -> None:
    run = Run.open(name, tmp_path / "new")
    assert run.path == tmp_path / "new" / name
    assert read_json(run.version)["format"] == FORMAT
    assert Run.open(name, tmp_path / "new", create=False).name == name


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "x").symlink_to(outside)
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root)
    for name in ("x", "broken", "self"):
        with pytest.raises(UserError, match="leads out of"):
            Run.open(name, root)
    assert list(outside.iterdir()) == []


def test_a_link_inside_the_root_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    Run.open("real", tmp_path / "root")
    (tmp_path / "root" / "also").symlink_to("real")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert Run.open("also", tmp_path / "link").version.is_file()


def test_a_file_in_place_of_the_root_or_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, root in (("x", tmp_path / "file"), ("file", tmp_path)):
        with pytest.raises(UserError, match="cannot be written"):
            Run.open(name, root)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        Run.open("x", tmp_path)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        Run.open("x", tmp_path)


def test_an_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: none"):
        Run.open("x", tmp_path / "missing", create=False)
    for name in ("b", "a"):
        Run.open(name, tmp_path).log({"step": 1})
    with Run.open("empty", tmp_path).lock():  # a search that failed before it wrote anything
        pass
    (tmp_path / "not_a_run").mkdir()
    with pytest.raises(UserError, match=r"there is no run 'x' in .*; known: a, b$"):
        Run.open("x", tmp_path, create=False)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    for create in (True, False):
        with pytest.raises(UserError, match="not a folder of a run"):
            Run.open("photos", tmp_path, create=create)
    assert [item.name for item in (tmp_path / "photos").iterdir()] == ["one.jpg"]


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".run.json.abc.tmp").touch()  # killed while the first file was written
    assert Run.open("x", tmp_path).version.is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 99, "natsl": "7.0"}', "has the format 99, .* reads 1: use natsl 7.0"),
        ('{"format": 0, "natsl": "0.0.3"}', "has the format 0, .*: use natsl 0.0.3"),
        ("{}", "use natsl unknown"),
        ("[]", "use natsl unknown"),
        ("{", "run.json is not valid JSON"),
    ],
    ids=["newer", "older", "no format", "no record", "torn"],
)
def test_a_run_of_another_format(content: str, message: str, tmp_path: Path) -> None:
    run = Run.open("x", tmp_path)
    run.version.write_text(content)
    for create in (True, False):
        with pytest.raises(UserError, match=message):
            Run.open("x", tmp_path, create=create)
    assert run.version.read_text() == content


def test_a_second_process_finds_the_run_locked(tmp_path: Path) -> None:
    run = Run.open("x", tmp_path)
    code = "import sys; from natsl.run import Run\n"
    code += "with Run.open('x', sys.argv[1]).lock(): print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="'x' is in use"), run.lock():
            pass
    finally:
        other.kill()
        other.communicate()
    with run.lock():
        pass
    with run.lock():
        pass


def test_the_log_keeps_whole_lines(tmp_path: Path) -> None:
    run = Run.open("x", tmp_path)
    run.log({"step": 1, "loss": float("nan")})
    with run.log_file.open("a") as file:
        file.write('{"step": 2, "lo')  # killed in the middle of a line
    run.log({"step": 3, "loss": 0.5})
    first, torn, last = run.log_file.read_text().splitlines()
    assert (json.loads(first), json.loads(last)) == ({"step": 1, "loss": None}, {"step": 3, "loss": 0.5})
    assert torn == '{"step": 2, "lo'


def test_what_is_written_as_config_is_read(tmp_path: Path) -> None:
    run = Run.open("x", tmp_path)
    run.write_config(TrainRunConfig(name="x"))
    assert read_config(run.config) == to_plain(TrainRunConfig(name="x"))


def test_no_secret_reaches_the_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run = Run.open("x", tmp_path)
    config = TrainRunConfig(name="x", tracking=TrackingConfig(project="0123456789abcdef", tags=["${oc.env:HOME}"]))
    run.write_config(config)
    run.log({"text": "key 0123456789abcdef", "api_key": "hunter2"})
    run.write_json(run.front_json, {"0123456789abcdef": 1, "token": "hunter2"})
    for path in run.path.iterdir():
        assert "0123456789abcdef" not in path.read_text()
        assert "hunter2" not in path.read_text()
    stored: dict[str, Any] = yaml.safe_load(run.config.read_text())
    assert stored["model"]["key_dim"] == config.model.key_dim
    assert stored["data"]["tasks"] == {"mqar": 1.0}
    assert stored["supernet"]["sandwich"] == "groups"
    assert stored["tracking"]["tags"] == ["${oc.env:HOME}"]


@pytest.mark.parametrize("secret", ["postgres", "letters.txt", "test_sequences", "recall_error", "my-first-run"])
def test_a_password_that_is_also_a_word_alters_nothing_that_is_read_back(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", secret)
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    root = tmp_path / "postgres" / "my-first-run"
    root.mkdir(parents=True)
    run = make_run(root)
    text = str(root / "letters.txt")
    assert stored_data("r", str(root), None).path == text
    folder = export_point(run)
    settings = replace(stored_data(None, "runs", str(folder)), path=text)
    assert settings == stored_data("r", str(root), None)
    before = evaluate_choice(EvaluateRunConfig("r", str(root), device="cpu"))
    assert evaluate_choice(EvaluateRunConfig(export=str(folder), device="cpu")) == before
    config = SearchRunConfig(
        name="my-first-run",
        root=str(root),
        data=DataConfig(path=text),
        search=SearchConfig(storage="postgresql://me:hunter2@host/db", policies=[text]),
        tracking=TrackingConfig(project=f"about {secret}"),
    )
    run.write_config(config)
    stored = read_config(run.config)
    expected = to_plain(config)
    expected["tracking"]["project"] = "about <removed>"
    assert "hunter2" not in stored["search"].pop("storage")
    del expected["search"]["storage"]
    assert stored == expected
