"""SIGTERM as an exception: cleaned up after, held back, and only once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from natsl.export import export_point
from natsl.signals import TerminatedError, held, pending, sigterm_raises
from tests.run_helpers import make_run


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_handler_of_before_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError), sigterm_raises():
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_signal_is_held_back_and_a_second_one_is_not() -> None:
    reached = []

    @held()
    def work(signals: int) -> None:
        for _ in range(signals):
            terminate()
        reached.append((signals, pending()))

    for signals in (0, 1, 2):
        with pytest.raises(TerminatedError) if signals else contextlib.nullcontext(), sigterm_raises():
            work(signals)
    assert reached == [(0, False), (1, True)]
    assert not pending()


def test_a_further_signal_does_not_interrupt_what_cleans_up() -> None:
    cleaned = []

    @held()
    def work() -> None:
        terminate()

    def interrupt(action: Callable[[], None]) -> None:
        try:
            action()
        finally:
            terminate()
            cleaned.append(action)

    for action in (terminate, work):
        with pytest.raises(TerminatedError), sigterm_raises():
            interrupt(action)
    assert cleaned == [terminate, work]


@pytest.mark.parametrize("where", ["natsl.export.verify", "natsl.export.write_json", "natsl.export._put_in_place"])
def test_an_export_that_is_terminated_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    monkeypatch.setattr(where, terminate)
    with pytest.raises(TerminatedError), sigterm_raises():
        export_point(run)
    assert list(run.exports.iterdir()) == []
