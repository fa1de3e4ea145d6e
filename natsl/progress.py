"""How far a stage is and when it will be done: a live view on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

_LOG = logging.getLogger(__name__)
LINE_SECONDS = 10.0
COUNT_SECONDS = 30.0  # the same of a stage of unknown length, which may last for hours
REFRESH_SECONDS = 0.5  # between two pictures of a view, at least


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def is_live() -> bool:
    """Whether stderr is a terminal on which lines can be drawn again; that of a CI system is taken for a file."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown") and not os.getenv("CI")


class View:
    """What a terminal shows while its block runs: the present stage, and below it what a subclass adds.

    Only where ``is_live`` and no other view is open; elsewhere the block changes nothing. What is printed meanwhile
    appears above it, and when it closes, its place is empty. A thread draws it twice a second at most, where anything
    has changed. It is a guest: if drawing fails it closes, which is noted, and lines take its place.
    """

    current: View | None = None  # the open one of this process

    def __init__(self) -> None:
        self._stages: list[Progress] = []
        self._changed = True
        self._drawn: tuple[int, int] = (-1, 0)  # second and width of the last picture
        self._picture: SegmentLines = SegmentLines([])
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._live: Live | None = None
        self._streams = sys.stdout, sys.stderr

    def body(self, width: int) -> Iterable[RenderableType]:
        """What stands below the stage; called by the drawing thread. May fail."""
        return ()

    def change(self) -> None:
        """Have it drawn again."""
        self._changed = True

    def begin(self, stage: Progress) -> None:
        """Show a stage until it ends, or another one begins."""
        self._stages.append(stage)
        self.change()

    def end(self, stage: Progress) -> None:
        """Leave a line above the view about a stage that has done anything."""
        self._stages.remove(stage)
        self.change()
        if self._live is not None and stage.advanced:
            self._guard(lambda console: console.print(Text(stage.last_line(), no_wrap=True, overflow="ellipsis")))

    def __enter__(self) -> View:
        if View.current is None and is_live():
            self._streams = sys.stdout, sys.stderr
            try:
                console = Console(stderr=True)
                self._live = Live(
                    console=console,
                    auto_refresh=False,
                    transient=True,
                    get_renderable=self._render,
                    redirect_stdout=sys.stdout.isatty(),  # a file gets what is printed as it is
                )
                self._live.start()
            except Exception as error:
                self._fail(error)
                return self
            View.current = self
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back as it was; a closed view does nothing."""
        self._stop.set()
        live, self._live = self._live, None
        if View.current is self:
            View.current = None
        if live is None:
            return
        try:
            with contextlib.suppress(Exception):
                live.stop()
        finally:  # also where that failed in the middle
            if isinstance(sys.stdout, FileProxy):
                sys.stdout = self._streams[0]
            if isinstance(sys.stderr, FileProxy):
                sys.stderr = self._streams[1]
            with contextlib.suppress(Exception):
                live.console.show_cursor(True)

    def _run(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            if self._changed or int(time.monotonic()) != self._drawn[0]:
                self._guard(lambda console: None)

    def _guard(self, action: Callable[[Console], None]) -> None:
        """Draw, after an action on the console; what goes wrong closes the view."""
        live = self._live
        if live is None:
            return
        try:
            action(live.console)
            live.refresh()
        except Exception as error:
            self._error = self._error or error
        if self._error is not None:
            self._fail(self._error)

    def _fail(self, error: Exception) -> None:
        self.close()
        with contextlib.suppress(Exception):
            _LOG.info("the live view has ended (%s: %s): lines follow", type(error).__name__, error)

    def _render(self) -> SegmentLines:
        """The picture, which is drawn here so that nothing can fail where rich prints it, such as in a log call."""
        live, second = self._live, int(time.monotonic())
        if live is None or self._error is not None:
            return SegmentLines([])
        try:
            width = live.console.width
            if self._changed or self._drawn != (second, width):
                self._changed, self._drawn = False, (second, width)
                parts = [stage.row() for stage in self._stages[-1:]]
                options = live.console.options.update(width=width, no_wrap=True, overflow="ellipsis")
                lines = live.console.render_lines(Group(*parts, *self.body(width)), options, pad=False)
                self._picture = SegmentLines(lines[: live.console.height - 1], new_lines=True)
        except Exception as error:
            self._error = error
            return SegmentLines([])
        return self._picture


class Progress:
    """One stage: ``with Progress("train", 240) as p: p.update(done, "loss 2.1")``.

    ``done`` at the beginning (a resumed stage) does not count as speed in the remaining time. ``total`` may turn out to
    be less before the end; null: nobody knows how much it will be.
    """

    def __init__(self, stage: str, total: int | None, done: int = 0) -> None:
        self.stage, self.total, self.done, self._first = stage, total, done, done
        self.text = ""
        self._began = self._said = time.monotonic()
        self._ended = False  # whether the line about its end was printed
        self._own: View | None = None  # of a stage that is shown by itself
        self._view: View | None = None

    def __enter__(self) -> Progress:
        if View.current is None:
            self._own = View()
            self._own.__enter__()
        self._view = View.current
        if self._view is not None:
            self._view.begin(self)
        return self

    @property
    def advanced(self) -> bool:
        """Whether anything was done since it began."""
        return self.done > self._first

    def update(self, done: int, text: str = "") -> None:
        """Show that ``done`` of the total are finished."""
        self.done, self.text = done, text
        if self._view is not None and self._view is View.current:
            self._view.change()
            return
        now = time.monotonic()
        ended = self.total is not None and done >= self.total
        if ended or now - self._said >= (COUNT_SECONDS if self.total is None else LINE_SECONDS):
            self._said = now
            self._say(ended)

    def _say(self, ended: bool) -> None:
        """A line without a terminal."""
        self._ended = ended
        when = f" in {self._passed()}" if ended or self.total is None else f" · {self._left(self.total)} left"
        text = f" · {self.text}" if self.text else ""
        print(f"{self.stage} {self._count()}{when}{text}", file=sys.stderr, flush=True)

    def _count(self) -> str:
        return str(self.done) if self.total is None else f"{self.done}/{self.total}"

    def _passed(self) -> str:
        return duration(time.monotonic() - self._began)

    def _left(self, total: int) -> str:
        passed = time.monotonic() - self._began
        return duration(passed / max(1, self.done - self._first) * (total - self.done))

    def row(self) -> RenderableType:
        """A bar with what is done and what is left, if that is known."""
        row = Table.grid(padding=(0, 1))
        stage, count = Text(f"{self.stage:<9}"), Text(self._count())
        if self.total is None:
            row.add_row(stage, count, Text(self._passed()), Text(self.text))
            return row
        left = f"{self._left(self.total)} left" if self.advanced else self._passed()
        bar = ProgressBar(total=max(1, self.total), completed=self.done, width=24)
        row.add_row(stage, bar, count, Text(left), Text(self.text))
        return row

    def last_line(self) -> str:
        """What remains of it on a terminal."""
        line = f"{self.stage:<9} {self._count()} in {self._passed()}"
        return f"{line} · {self.text}" if self.text else line

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._view is not None:
                self._view.end(self)
            elif error is None and self.advanced and not self._ended:
                self._say(ended=True)
        finally:
            if self._own is not None:
                self._own.close()
