"""The beat of the process that owns a study: other machines, which cannot see the process, see that it runs."""

from __future__ import annotations

import contextlib
import math
import threading
import time

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from natsl.errors import UserError
from natsl.search.storage import BEAT, OpenStudy

_SECONDS = 5.0  # between beats; well below what ``natsl.search.worker.group`` waits for the first one


class Heartbeat:
    """Changes the attribute ``BEAT`` of a study every few seconds, in a thread, from ``start`` to ``close``.

    So it does not matter what the process is at: a long evaluation, a report, or waiting for workers.
    """

    def __init__(self, opened: OpenStudy) -> None:
        self._opened = opened
        self._last = -math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def beat(self) -> None:
        """Beat if it is time to; ``UserError`` if another process owns the study by now."""
        self._opened.check_owner()
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            self._opened.study.set_user_attr(BEAT, round(now, 3))

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            # What is wrong with the study or its database, the main thread meets by itself.
            with contextlib.suppress(UserError, StorageInternalError, SQLAlchemyError):
                self.beat()
            self._stop.wait(_SECONDS)
        self._opened.storage.remove_session()  # this thread's
