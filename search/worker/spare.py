"""Worker processes that are started before their job is known, and import meanwhile what they will need.

With a GPU that takes about as long as a search takes until it has work for them. No torch at import.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from natsl.files import child_folder, user_path
from natsl.run import Run
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.worker.child import in_turn, kill, reap, start
from natsl.search.worker.process import SUPERNET

_DEVICES = Path("/dev")


class Spares:
    """Processes without a job, one for each of ``devices``, as options name them; they run inside a ``with`` block.

    ``answers``: as of their job. Where the system refuses a process there are fewer. What one prints before it has a
    job is lost; if it ends before, whoever has taken it starts another one.
    """

    def __init__(self, devices: Sequence[str], answers: str = SUPERNET) -> None:
        self._devices, self._answers = devices, answers
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def for_search(cls, config: SearchRunConfig) -> Spares:
        """Those that a search will likely need soon: none where a supernet is trained first, or all may be done."""
        settings = config.search
        gpus = _gpus() if config.device in ("auto", "cuda") else 0
        wanted = settings.launcher is Launcher.local and _comes_to_trials(config)
        return cls(in_turn(settings.workers, gpus, config.device) if wanted else [])

    def take(self) -> subprocess.Popen[bytes] | None:
        """One of them, in the order of the devices, which waits for its job like a new process (None: none is left)."""
        return self._processes.pop(0) if self._processes else None

    def close(self) -> None:
        """End those that were not taken."""
        for process in self._processes:
            kill(process)
        while self._processes:
            reap(self._processes.pop())

    def __enter__(self) -> Spares:
        try:
            with suppress(OSError):
                for device in self._devices:
                    arguments = [self._answers, device, str(os.getpid())]
                    self._processes.append(start(None, subprocess.DEVNULL, arguments))
        except BaseException:  # Ctrl-C
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _comes_to_trials(config: SearchRunConfig) -> bool:
    """Whether a search has a supernet, and is not reported yet; False where the system does not tell."""
    root = user_path(config.root, "root")
    with suppress(OSError):
        run = Run(child_folder(root, config.name, "name"))
        source = None if config.supernet_from is None else child_folder(root, config.supernet_from, "supernet_from")
        trained = run.study_db.exists() if source is None else Run(source).supernet.is_dir()
        return trained and not run.report.exists()
    return False


def _gpus() -> int:
    """How many GPUs torch is likely to see, found without it."""
    count, visible = len(list(_DEVICES.glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name]))
