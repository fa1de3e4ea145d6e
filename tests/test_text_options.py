"""Options whose type is text are taken as typed: on the command line, in config files and in a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from natsl.cli.generation import GenerateConfig
from natsl.cli.main import run_main
from natsl.search.config import SearchRunConfig


@dataclass
class Outcome:
    """What one command did."""

    code: object = 0
    jobs: list[SearchRunConfig] = field(default_factory=list)
    err: str = ""


Command = Callable[..., Outcome]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the search command's options up to the call of its function."""

    def call(*arguments: str) -> Outcome:
        outcome = Outcome()
        monkeypatch.setattr(sys, "argv", ["natsl-search", *arguments])
        try:
            run_main("search", SearchRunConfig, outcome.jobs.append)
        except SystemExit as ended:
            outcome.code = ended.code
        outcome.err = capsys.readouterr().err
        return outcome

    return call


NAMES = ["1.10", "2026-11-26", "true", "1e3", "007", "1_000", "No", "0x10", "inf", "nan", "1.", "x.y-z_1"]
TEXTS = [
    *NAMES,
    "12:30",
    "~",
    "a b",
    "a,b",
    "a=b",
    "f(x)",
    "[a]",
    "{a: 1}",
    "it's",
    '"',
    "'a' or 'b'",
    "a#b",
    "\\",
    "%s",
]
TEXTS += [
    "ä ⟨k3⟩",
    "choice(a,b)",
    " led and trailed ",
    "a\\ b",
    "$x",
    "&",
    "+1",
    "\\'",
    "x'",
    "''x",
    "null or so",
    "@a",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_typed(name: str, search: Command, tmp_path: Path) -> None:
    assert [job.name for job in search(f"name={name}").jobs] == [name]
    assert [job.name for job in search("-m", f"name={name},other").jobs] == [name, "other"]
    (tmp_path / "user.yaml").write_text(f"defaults: [search, _self_]\nname: {name}\ntracking: {{tags: [{name}, b]}}\n")
    (job,) = search(f"--config-dir={tmp_path}", "--config-name=user").jobs
    assert (job.name, job.tracking.tags) == (name, [name, "b"])


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_taken_as_typed(text: str) -> None:
    seen: list[GenerateConfig] = []
    run_main("generate", GenerateConfig, seen.append, ["run=x", f"prompt={text}"], "natsl generate")
    assert [config.prompt for config in seen] == [text]


def test_lists_of_text_are_taken_as_typed(search: Command) -> None:
    (job,) = search("tracking.tags=[1.10, true,2026-11-26,a b,'c, d',1e3]").jobs
    assert job.tracking.tags == ["1.10", "true", "2026-11-26", "a b", "c, d", "1e3"]
    first, second = search("-m", "name=a,b", "tracking.tags=[1.10,x]").jobs
    assert first.tracking.tags == second.tracking.tags == ["1.10", "x"]


def test_quotes_null_and_references_keep_their_meaning(search: Command) -> None:
    (job,) = search("name='s${seed}'", "seed=7", 'root="a b"', "data.path=null", "tracking.group='null'").jobs
    assert (job.name, job.root, job.data.path, job.tracking.group) == ("s7", "a b", None, "null")
    (job,) = search("name=s${seed}.10", "seed=7").jobs
    assert job.name == "s7.10"
    jobs = search("-m", "seed=1,2", "name=s${seed}", "tracking.group=1.10").jobs
    assert [(job.name, job.tracking.group) for job in jobs] == [("s1", "1.10"), ("s2", "1.10")]


def test_a_sweep_of_odd_text(search: Command) -> None:
    jobs = search("-m", "name=1.10,true,x", "root=a(b").jobs
    assert [(job.name, job.root) for job in jobs] == [("1.10", "a(b"), ("true", "a(b"), ("x", "a(b")]
    assert [job.name for job in search("-m", "name=choice(a,b)").jobs] == ["a", "b"]
    assert [job.name for job in search("-m", "name=range(1,3)").jobs] == ["1", "2"]


def test_a_function_that_rewrites_text_is_refused_with_what_works(search: Command) -> None:
    wrong = search("-m", "name=choice(1.10,2.20)")
    assert (wrong.code, wrong.jobs) == (2, [])
    assert "name=choice(1.10,2.20) is not allowed" in wrong.err
    assert "in quotes" in wrong.err
    jobs = search("-m", "name=choice('1.10','2.20')").jobs
    assert [job.name for job in jobs] == ["1.10", "2.20"]


def test_a_text_that_is_needed_is_not_null(search: Command) -> None:
    wrong = search("name=null")
    assert (wrong.code, wrong.jobs) == (2, [])
    assert (
        wrong.err == "error: name = null is not allowed: it needs a value (the text null is written name='\"null\"')\n"
    )
    assert [job.name for job in search('name="null"').jobs] == ["null"]


def test_files_of_a_group_hold_text_as_typed(search: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "2026.yaml").write_text(
        "# @package _global_\nname: 1.10\ntracking: &t {group: 1e3}\ndata: {path: 2026-11-26}\n"
    )
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "mine.yaml").write_text("group: true\nproject: 0x10\ntags: [on, 1.0]\n")
    (job,) = search(f"--config-dir={tmp_path}", "experiment=2026").jobs
    assert (job.name, job.tracking.group, job.data.path) == (
        "1.10",
        "1e3",
        str(Path("2026-11-26").absolute()),  # paths are stored so that they mean the same from every folder
    )
    (job,) = search(f"--config-dir={tmp_path}", "+tracking=mine").jobs
    assert (job.tracking.group, job.tracking.project, job.tracking.tags) == ("true", "0x10", ["on", "1.0"])
