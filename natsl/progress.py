"""How far a stage is and when it will be done: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


class Progress:
    """One stage of known length: ``with Progress("train", 240) as p: p.update(done, "loss 2.1")``.

    ``done`` at the beginning (a resumed stage) does not count as speed in the remaining time.
    """

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage, self.total, self.done, self._first = stage, total, done, done
        self._began = self._said = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = ("{task.description:<9}", BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
            self._bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, done: int, text: str = "") -> None:
        """Show that ``done`` of the total are finished."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS or done >= self.total:
            self._said = now
            left = (now - self._began) / max(1, done - self._first) * (self.total - done)
            print(f"{self.stage} {done}/{self.total} · {duration(left)} left · {text}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
