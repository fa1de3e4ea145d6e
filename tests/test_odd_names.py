"""Odd roots, paths and names: they work, with every command that is printed, or are refused before anything runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

from natsl.cli.main import main
from natsl.command import option_text
from natsl.files import read_json

# Characters that nothing treats by their place share a root; quotes are apart and together, as they choose the quoting.
ROOTS = ["~/my runs", "./~", "#x", "it's", 'say "x"', "a,b=c&d;e|f:smile:<g>%s %20", "ä 日本", "$HOME `id` ${x} *?!"]
ROOTS += ["[a]{b}(c)", "a\\", "\\'", "null", "1.10", "'q' \"q\"", "-x", "a?mode=ro&b#c@d:e", "@+x"]
WITH_WORKERS = {"a?mode=ro&b#c@d:e", "ä 日本"}  # the others are searched in this process, which takes half the time

TINY = ["device=cpu", "experiment=smoke", "tracking.mode=disabled", "model.layers=[routed]", "model.width=16"]
TINY += [
    "train.steps=1",
    "search.n_trials=1",
    "search.random_draws=2",
    "search.uniform_budgets=[0.25]",
    "data.seq_len=96",
]
TINY += ["data.search_sequences=2", "data.test_sequences=2", "supernet.calibration_sequences=2", "export=false"]


@dataclass
class Outcome:
    """What one command did."""

    code: object
    out: str
    err: str


class Shell:
    """Runs ``natsl`` in this process; lines that were printed go through a shell first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self._bin = folder / "bin"
        self._bin.mkdir()
        stub = self._bin / "natsl"
        code = "import json, os, sys; print(json.dumps([os.fsencode(a).decode('latin-1') for a in sys.argv[1:]]))"
        stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
        stub.chmod(0o755)

    def natsl(self, *arguments: str) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["natsl", *arguments])
        self._monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        self._monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def paste(self, line: str) -> Outcome:
        """Run a printed line as a shell would split and expand it."""
        environment = {**os.environ, "PATH": f"{self._bin}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, ""), line
        return self.natsl(*(argument.encode("latin-1").decode() for argument in json.loads(done.stdout)))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # else a note says what other work uses the cores
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Shell(monkeypatch, capsys, tmp_path)


def commands(text: str) -> list[str]:
    """The lines in ``text`` that begin with natsl, or hold it after a word such as "next"."""
    return [found[1] for line in text.splitlines() if (found := re.search(r"(?:^|\s)(natsl [a-z]+ .*=.*)", line))]


@pytest.mark.parametrize("root", ROOTS)
def test_printed_commands_work_for_odd_roots(root: str, shell: Shell, tmp_path: Path) -> None:
    text = f"d{root.replace('/', '_')}.txt"
    Path(text).write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(600)))
    where = shlex.split(option_text({"root": root, "data.path": text, "tracking.tags": [root]}))
    launcher = [] if root in WITH_WORKERS else ["search.launcher=inline"]
    done = shell.natsl("search", "name=s1.10", *where, *TINY, *launcher)
    assert done.code == 0, done.err
    folder = (tmp_path / "home" / root[2:] if root.startswith("~/") else Path(root)) / "s1.10"
    report = (folder / "report.html").read_text()
    (pasted,) = re.findall("<pre>(.*?)</pre>", report, re.DOTALL)
    first, export, generate = commands(unescape(pasted))
    assert "nothing to do" in shell.paste(first).out
    exported = shell.paste(export)
    assert exported.code == 0, exported.err
    assert str(folder / "export") in exported.out
    assert commands(done.out) == [generate]
    again = [unescape(line) for line in re.findall('<code class="command">(.*?)</code>', report)]
    assert "exists: choose another name" in shell.paste(again[0]).err
    for line in (generate, *commands(exported.out)):
        drawn = shell.paste(line)
        assert (drawn.code, drawn.out[:4]) == (0, "def "), drawn.err
    assert read_json(folder / "front.json")["facts"]["setting"]["text"].startswith(str(tmp_path / "work" / text))
    made = {text} if root.startswith("~/") else {text, Path(root).name}
    assert {item.name for item in (tmp_path / "work").iterdir()} == made


def test_printed_commands_of_training_and_calibration(shell: Shell) -> None:
    Path("d, #1.txt").write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(600)))
    name, where = "x" * 64, ["root=my 'runs'", "data.path=d, #1.txt"]
    options = [item for item in TINY if not item.startswith(("search.", "export", "experiment"))]
    options += ["train.batch_size=8", "train.warmup_steps=1"]
    trained = shell.natsl("train", f"name={name}", *where, *options)
    assert trained.code == 0, trained.err
    (line,) = commands(trained.out)
    searched = shell.paste(f"{line} {shlex.join(item for item in TINY if not item.startswith('data'))}")
    assert searched.code == 0, searched.err
    calibrated = shell.natsl("calibrate", f"run={name}", "name=1.0", where[0], "device=cpu")
    assert calibrated.code == 0, calibrated.err
    (line,) = commands(calibrated.out)
    evaluated = shell.paste(line)
    assert (evaluated.code, "kept_by_layer" in evaluated.out) == (0, True), evaluated.err


def test_printed_commands_of_plans_specialisations_and_static_models(shell: Shell) -> None:
    """Each names the run by a root that a shell, Hydra and both of its quotes would take apart."""
    Path("d, #1.txt").write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(600)))
    where = ["root=it's $my {runs}, \\", "data.path=d, #1.txt"]
    searched = shell.natsl("search", "name=1.0", *where, *TINY)
    assert searched.code == 0, searched.err
    planned = shell.natsl("plan", "name=1.0", *where, *TINY)
    assert planned.code == 0, planned.err
    (line,) = commands(planned.out)
    again = shell.paste(f"{line} {shlex.join([where[1], *TINY])}")
    assert "nothing to do" in again.out, again.err
    special = ["name=tuned", "specialise=1.0", where[0], "device=cpu", "train.steps=1", "train.batch_size=2"]
    specialised = shell.natsl("train", *special, "tracking.mode=disabled")
    assert specialised.code == 0, specialised.err
    (line,) = commands(specialised.out)
    exported = shell.paste(line)
    assert exported.code == 0, exported.err
    options = [item for item in TINY if not item.startswith(("search.", "export", "experiment", "model.layers"))]
    static = shell.natsl("train", "name=s", *where, *options, "model.layers=[delta]", "train.warmup_steps=1")
    assert static.code == 0, static.err
    (line,) = commands(static.out)
    scored = shell.paste(line)
    assert scored.code == 0, scored.err
    assert "val_loss" in scored.out


REFUSED = {
    "root that is no UTF-8": ("root=r\udcff", "root = 'r\\udcff' is not allowed: it has a byte that is not UTF-8"),
    "root of two lines": ("root=a\nb", "root = 'a\\nb' is not allowed: it has a control character"),
    "data that is no UTF-8": ("data.path=\udcff.txt", "data.path = '\\udcff.txt' is not allowed"),
    "tag that is no UTF-8": ("tracking.tags=[\udcff]", "tracking.tags = '\\udcff' is not allowed"),
    "policy that is no UTF-8": ("search.policies=[\udcff]", "search.policies = '\\udcff' is not allowed"),
    "home of nobody": ("root=~no_such_user/x", "there is no such user"),
    "name with a space": ("name=a b", "name = 'a b' is not allowed: 1 to 64 letters"),
    "name with a colon": ("name=a:b", "name = 'a:b' is not allowed: 1 to 64 letters"),
    "escape": ("tracking.project=\x1b[1m", "tracking.project = '\\x1b[1m' is not allowed"),
}


@pytest.mark.parametrize(("option", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_before_anything_runs(option: str, message: str, shell: Shell) -> None:
    wrong = shell.natsl("search", *TINY, option)
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert message in wrong.err
    assert list(Path().iterdir()) == []
