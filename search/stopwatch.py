"""How long a search has taken over all of its calls, until its last trial: what ``search.max_hours`` limits.

No torch at import.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from natsl.files import read_json, write_json

_LOG = logging.getLogger(__name__)
_STORE_SECONDS = 10.0  # what a call that is killed takes at most without being counted


class Stopwatch:
    """Counts seconds while its block runs and stores their sum over all calls in the file ``path``.

    ``hours``: how many there may be (None: any number). A thread stores the sum now and then, for calls that are
    killed. Time is that of the monotonic clock.
    """

    def __init__(self, path: Path, hours: float | None) -> None:
        self._path, self.hours = path, hours
        self._before, self._ended = 0.0, -1
        if path.exists():
            try:
                plain = read_json(path)
                self._before, self._ended = float(plain["seconds"]), int(plain["ended"])
            except (ValueError, KeyError, TypeError):
                _LOG.info("%s cannot be read: the time of earlier calls is not known and does not count", path)
        self._began: float | None = None
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def seconds(self) -> float:
        """Of all calls up to now."""
        return self._before + (0.0 if self._began is None else monotonic() - self._began)

    @property
    def up(self) -> bool:
        """Whether no time is left; the first time it is said."""
        up = self.hours is not None and self.seconds >= 3600 * self.hours
        if up and self._began is not None and not self._told:
            self._told = True
            _LOG.info("search.max_hours = %g is used up: what is open is finished, nothing more is tried", self.hours)
        return up

    def wanted(self, trials: int) -> int:
        """How many of so many trials a finished search has: fewer where it ended because its time was up."""
        return self._ended if self.up and self._ended >= 0 else trials

    def ended(self, made: int, trials: int) -> str | None:
        """A line for a search whose time was up after so many of its trials (None: it was not)."""
        return f"search.max_hours = {self.hours:g} was used up after {made} of {trials} trials" if self.up else None

    def start(self) -> Stopwatch:
        """Begin to count."""
        self._began = monotonic()
        self._thread.start()
        return self

    def stop(self, ended: int = -1) -> None:
        """Count no longer. ``ended``: with how many trials the search ends because its time is up (−1: it does not)."""
        if self._began is None:
            return
        self._stop.set()
        self._thread.join()  # which may be storing a sum of before
        self._before, self._began, self._ended = self.seconds, None, ended
        self._store()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # what ended the block is what counts
            self.stop()

    def _run(self) -> None:
        while not self._stop.wait(_STORE_SECONDS):
            with contextlib.suppress(OSError):  # such as a full disk, which the search meets by itself
                self._store()

    def _store(self) -> None:
        plain: dict[str, Any] = {"seconds": round(self.seconds, 3), "ended": self._ended if self._began is None else -1}
        write_json(self._path, plain)
