"""SIGTERM as an exception that clean-up sees; a training holds it back until its step is done and stored.

A search with workers lets a first Ctrl-C wait until what they evaluate is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class TerminatedError(BaseException):
    """SIGTERM: the process is to end. Like ``KeyboardInterrupt``, no ``except Exception`` takes it for a failure."""


class _State:
    held = 0  # how many blocks hold it back
    pending = False
    draining = False


def pending() -> bool:
    """Whether a SIGTERM has come that ``held`` holds back."""
    return _State.pending


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold a first SIGTERM back until the block ends; a second one meanwhile ends it at once."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    if _State.pending and not _State.held:
        _State.pending = False
        raise _terminated()


def draining() -> bool:
    """Whether a Ctrl-C has come that ``drains`` holds back."""
    return _State.draining


@contextlib.contextmanager
def drains(on_first: Callable[[], None]) -> Iterator[None]:
    """Within the block a first Ctrl-C calls ``on_first`` and sets ``draining``; a second one, or its end, interrupts.

    In another thread than the main one, and where SIGINT is ignored, the block changes nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def on_sigint(number: int, frame: FrameType | None) -> None:
        if _State.draining:
            raise KeyboardInterrupt
        _State.draining = True
        on_first()

    signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
        if _State.draining:  # it came when there was nothing to wait for
            raise KeyboardInterrupt
    finally:
        _State.draining = False
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM raises ``TerminatedError`` in the main thread; elsewhere the block changes nothing.

    Once it is raised the block is left undisturbed: a further SIGTERM would interrupt what cleans up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _State.pending = False
        signal.signal(signal.SIGTERM, before)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if _State.held and not _State.pending:
        _State.pending = True
        return
    raise _terminated()


def _terminated() -> TerminatedError:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return TerminatedError()
