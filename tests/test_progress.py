"""Progress: lines where there is no terminal, a view that keeps out of the way where there is one."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from natsl import progress
from natsl.progress import Progress, View, is_live

ROOT = Path(__file__).parents[1]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Hands:
    """A clock that tests set."""

    now = 50.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("natsl.progress.time.monotonic", lambda: self.now)


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hands = Hands(monkeypatch)
    with Progress("train", 240, 40) as shown:
        hands.now += 9
        shown.update(50, "loss 3.000")
        hands.now += 1
        shown.update(60, "loss 2.000")
        hands.now += 90
        shown.update(240, "loss 1.000")
    assert capsys.readouterr() == (
        "",
        "train 60/240 · 1:30 left · loss 2.000\ntrain 240/240 in 1:40 · loss 1.000\n",
    )
    with Progress("anchors", 3) as shown:
        shown.update(3)
    assert capsys.readouterr().err == "anchors 3/3 in 0:00\n"
    with Progress("controls", 5) as shown:
        shown.update(3, "drop")
        shown.total = 3  # they were fewer than was thought
    assert capsys.readouterr().err == "controls 3/3 in 0:00 · drop\n"
    with contextlib.suppress(KeyboardInterrupt), Progress("test", 5) as shown:
        shown.update(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
    assert View.current is None


def test_a_stage_of_unknown_length(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hands = Hands(monkeypatch)
    with Progress("tasks done", None) as shown:
        for seconds, done in ((29, 3), (1, 5), (10, 6), (19, 7), (1, 8), (2, 9)):
            hands.now += seconds
            shown.update(done)
    assert capsys.readouterr().err == "tasks done 5 in 0:30\ntasks done 8 in 1:00\ntasks done 9 in 1:02\n"
    with Progress("tasks done", None):
        hands.now += 60
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "terminal", "live"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, True),
        ({"TERM": "xterm", "CI": "true"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "unknown"}, True, False),
        ({}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
    ids=["terminal", "no color", "CI", "dumb", "unknown", "no TERM", "pipe"],
)
def test_where_there_is_a_view(
    environment: dict[str, str], terminal: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert is_live() is live


def on_terminal(code: str, environment: dict[str, str] | None = None, sent: bytes = b"") -> tuple[int, str]:
    """Exit code and output of a program on a terminal; ``sent`` is typed once it has printed ``ready``."""
    master, slave = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**variables, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **(environment or {})},
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(slave)
    output = b""
    try:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(master, 65536):
                output += part
                if sent and b"ready" in output:
                    time.sleep(0.3)  # not in the middle of the line
                    os.killpg(process.pid, signal.SIGINT)  # what a terminal makes of Ctrl-C
                    sent = b""
        return process.wait(60), output.decode()
    finally:
        process.kill()
        process.wait()
        os.close(master)


START = """
import logging, sys, time
from natsl import progress
from natsl.cli.main import _guard
from natsl.progress import Progress, View
progress.REFRESH_SECONDS = 0.02
class Shown(View):
    def body(self, width):
        yield "the body"
"""

WORK = (
    START
    + """
def work():
    with Shown():
        with Progress("train", 3) as shown:
            for i in range(3):
                time.sleep(0.1)
                shown.update(i + 1, f"loss {i}.5 [b]")
                logging.getLogger("natsl").info("a note [b]%d", i)
                print("a line", i)
        with Progress("test", 0):
            pass
    assert View.current is None and type(sys.stdout).__name__ == "TextIOWrapper", sys.stdout
    print("at the end")
_guard(work)
"""
)


def screen(output: str) -> list[str]:
    """The lines that are left of it on a terminal."""
    lines, row, column = [""], 0, 0
    for code, other in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|([^\x1b])", output):
        if other == "\r":
            column = 0
        elif other == "\n":
            row += 1
        elif code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code.endswith("K"):
            lines[row] = "" if code == "2K" else lines[row][:column]
        elif other:
            lines[row] = lines[row][:column].ljust(column) + other + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines if line.strip()]


def test_what_is_printed_stands_above_the_view_and_nothing_of_it_is_left() -> None:
    code, output = on_terminal(WORK)
    assert code == 0, output
    lines = screen(output)
    notes = [line for i in range(3) for line in (f"note: a note [b]{i}", f"a line {i}")]
    assert lines[:-2] == notes
    assert re.fullmatch(r"train     3/3 in 0:0\d · loss 2.5 \[b\]", lines[-2])
    assert lines[-1] == "at the end"
    assert "the body" in output
    assert "train     ━" in re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert output.count(HIDE) == 1
    assert output.rfind(SHOW) > output.rfind(HIDE)


def test_without_colour() -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;5;\d+)m")
    assert coloured.search(on_terminal(WORK)[1])
    code, output = on_terminal(WORK, {"NO_COLOR": "1"})
    assert code == 0
    assert "the body" in output
    assert not coloured.search(output)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "1"}], ids=["dumb", "CI"])
def test_lines_on_a_terminal_that_is_none(environment: dict[str, str]) -> None:
    code, output = on_terminal(WORK, environment)
    assert code == 0
    assert "\x1b" not in output
    assert "train 3/3 in 0:00 · loss 2.5 [b]\r\n" in output


INTERRUPTED = (
    START
    + """
def work():
    with Shown(), Progress("train", 3) as shown:
        shown.update(1, "x")
        time.sleep(0.2)
        print("ready")
        time.sleep(60)
_guard(work)
"""
)


def test_ctrl_c_leaves_a_sane_terminal() -> None:
    code, output = on_terminal(INTERRUPTED, sent=b"\x03")
    assert code == 130
    assert output.rfind(SHOW) > output.rfind(HIDE) >= 0
    assert [re.sub(r"\d:\d\d", "", line) for line in screen(output)] == [
        "ready",
        "train     1/3 in  · x",
        "interrupted",
    ]


FAILING = (
    START
    + """
progress.REFRESH_SECONDS = {refresh}
class Broken(View):
    fails = False
    def body(self, width):
        if Broken.fails:
            {fault}
        yield "the body"
def work():
    with Broken():
        with Progress("train", 2) as shown:
            shown.update(1, "one")
            Broken.fails = True
            shown.update(1, "one")
            time.sleep({pause})
            print("a line")
            shown.update(2, "two")
    print("at the end")
_guard(work)
"""
)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("yield object.__new__(object)", "NotRenderableError: "),
        ("sys.stderr = None; raise OSError(5, 'gone')", ""),
    ],
    ids=["error", "while drawing", "stream"],
)
def test_a_view_that_fails_gives_way_to_lines(fault: str, said: str) -> None:
    code, output = on_terminal(FAILING.format(fault=fault, refresh=0.02, pause=0.3))
    assert code == 0, output
    lines = screen(output)
    assert lines[-1] == "at the end"
    if said:
        assert sum(f"the live view has ended ({said}" in line for line in lines) == 1
        assert "train 2/2 in 0:00 · two" in lines
        assert lines.index("a line") < lines.index("train 2/2 in 0:00 · two")
    assert "Traceback" not in output
    assert output.rfind(SHOW) > output.rfind(HIDE) >= 0


def test_a_view_that_fails_while_something_is_printed_fails_no_print() -> None:
    code, output = on_terminal(FAILING.format(fault="raise KeyError('x')", refresh=3600, pause=0))
    assert code == 0, output
    lines = screen(output)
    assert lines[0] == "a line"
    assert lines[-1] == "at the end"
    assert any("the live view has ended (KeyError: 'x')" in line for line in lines)
    assert "Traceback" not in output


def test_a_picture_is_drawn_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never by the thread that works."""
    hands = Hands(monkeypatch)
    drawn: list[int] = []

    class Counted(View):
        def body(self, width: int) -> list[str]:
            drawn.append(width)
            return ["x"]

    monkeypatch.setattr(progress, "is_live", lambda: True)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 3600.0)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=io.StringIO(), force_terminal=True))
    with Counted() as view, Progress("train", 1000) as shown:
        drawn.clear()
        for i in range(1000):
            shown.update(i)
        assert drawn == []
        for pictures, seconds in ((1, 0), (1, 0), (2, 1), (2, 0)):
            hands.now += seconds
            view._guard(lambda console: None)
            assert len(drawn) == pictures
    assert View.current is None
