"""``natsl <verb>``: the table of verbs, their help, unknown ones, completion, and every other spelling."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from natsl.cli.main import main
from natsl.cli.verbs import VERBS, Verb, load

ROOT = Path(__file__).parents[1]


@dataclass
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str


def natsl(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run ``natsl`` in this process."""
    monkeypatch.setattr(sys, "argv", ["natsl", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    assert isinstance(code, int)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)], ids=str)
def test_the_table_of_verbs(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = natsl(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (shown.code, shown.err) == (0, "")
    assert "Usage: natsl <command>" in shown.out
    for verb in VERBS.values():
        assert sum(line.split()[:1] == [verb.name] for line in shown.out.splitlines()) == 1
        assert verb.summary in shown.out
    assert max(map(len, shown.out.splitlines())) <= 120


def test_the_version_of_natsl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert natsl("--version", monkeypatch=monkeypatch, capsys=capsys).out == "natsl 0.1.0\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("serach", "; did you mean search?"), ("calibration", "; did you mean calibrate?"), ("name=x", ""), ("", "")],
)
def test_unknown_verbs(
    word: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = natsl(word, "name=x", monkeypatch=monkeypatch, capsys=capsys)
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err == f"error: unknown command {word!r}{hint} (natsl --help lists all)\n"


@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS.values() if verb.config is not None], ids=lambda verb: verb.name
)
def test_every_verb_has_help(verb: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = natsl(verb.name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert (shown.code, shown.err) == (0, "")
    assert f"Usage: natsl {verb.name} [flags]" in shown.out
    assert "COMMAND" not in shown.out
    assert callable(load(verb.function))


def test_a_verb_gets_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = natsl("export", "run=none", f"root={tmp_path}", monkeypatch=monkeypatch, capsys=capsys)
    assert (wrong.code, wrong.err) == (2, f"error: there is no run 'none' in {tmp_path}; known: none\n")
    wrong = natsl("train", "nme=x", monkeypatch=monkeypatch, capsys=capsys)
    assert (wrong.code, wrong.err) == (2, "error: unknown option 'nme'; did you mean name? (--help lists all)\n")


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = natsl("bench", "--ship", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert wrong.code == 2
    assert "--ship PATH is not allowed without --tune" in wrong.err
    shown = natsl("bench", "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert (shown.code, shown.err) == (0, "")
    assert "usage: natsl bench [" in shown.out
    assert "--first-call" in shown.out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("natsl ", [*VERBS]),
        ("natsl t", ["throughput", "train"]),
        ("natsl train", ["train"]),
        ("natsl train mod", ["model.", "model="]),
        ("natsl  search seed=1 search.n_tr", ["search.n_trials="]),
        ("natsl export ", None),
        ("natsl bench --q", []),
        ("natsl nonsense x", []),
    ],
)
def test_completion_of_natsl(
    line: str, offered: list[str] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    outcome = natsl("-sc", "query=bash", monkeypatch=monkeypatch, capsys=capsys)
    assert (outcome.code, outcome.err) == (0, "")
    if offered is None:
        assert {"run=", "pick=", "policy="} <= set(outcome.out.split())
    else:
        assert sorted(outcome.out.split()) == sorted(offered)


@pytest.mark.parametrize("verb", [(), ("train",)], ids=["natsl", "natsl train"])
def test_completion_is_installed_for_natsl(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = natsl(*verb, "-sc", "install=bash", monkeypatch=monkeypatch, capsys=capsys)
    assert shown.out.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion natsl")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


SPELLINGS = [
    *(f"natsl {verb}" for verb in VERBS),
    "search",
    "natsl.search",
    "natsl.train",
    "natsl.export",
    "natsl.generate",
    "natsl.evaluate",
    "natsl.throughput",
    "natsl.latency",
    "natsl.search.ablation",
    "search.ablation",
    "natsl.kernels.bench",
    "natsl bench search",
    "natsl.search.bench",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_help(spelling: str, tmp_path: Path) -> None:
    shown = python("-m", *spelling.split(), "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"sage: python -m {spelling} [" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_scripts_name_their_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts.pop("natsl") == "natsl.cli.main:main"
    assert set(scripts) == {f"natsl-{verb}" for verb in ("search", "train", "export", "generate", "evaluate")}
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name, entry in scripts.items():
        monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}", "--help"])
        load(entry)()
        assert f"Usage: {name} [flags]" in capsys.readouterr().out


def test_a_module_as_command(tmp_path: Path) -> None:
    wrong = python("-m", "natsl.export", "run=none", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "error: there is no run 'none' in runs; known: none\n")
    assert list(tmp_path.iterdir()) == []
