"""Worker processes that are started before their job is known, and import meanwhile what they will need.

With a GPU that takes ten seconds, about as long as a search takes until it has work for them. No torch at import.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from natsl.files import child_folder, user_path
from natsl.run import Run
from natsl.search.config import Launcher, SearchRunConfig
from natsl.search.worker.child import kill, reap, start
from natsl.search.worker.process import SUPERNET

_DEVICES = Path("/dev")


class Spares:
    """``count`` processes without a job; with the end of the block those end that nobody has taken.

    ``device``: as the option; ``answers``: as of their job. What a process prints before it has a job is lost; if it
    ends before, whoever has taken it starts another one.
    """

    def __init__(self, count: int, device: str, answers: str = SUPERNET) -> None:
        self._processes = [start(None, subprocess.DEVNULL, [answers, device]) for _ in range(count)]

    @classmethod
    def for_search(cls, config: SearchRunConfig) -> Spares:
        """Those that a search is sure to need soon: none of one that is finished or trains its supernet first."""
        settings, root = config.search, user_path(config.root, "root")
        run = Run(child_folder(root, config.name, "name"))
        source = None if config.supernet_from is None else child_folder(root, config.supernet_from, "supernet_from")
        trained = run.study_db.exists() if source is None else Run(source).supernet.is_dir()
        wanted = settings.launcher is Launcher.local and trained and not run.report.exists()
        count = settings.workers or (max(1, _gpus()) if config.device in ("auto", "cuda") else 1)
        return cls(count if wanted else 0, config.device)

    def take(self) -> subprocess.Popen[bytes] | None:
        """One of them, which waits for its job like a new process (None: none is left)."""
        return self._processes.pop(0) if self._processes else None

    def __enter__(self) -> Spares:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            kill(process)
        for process in self._processes:
            reap(process)


def _gpus() -> int:
    """How many GPUs torch is going to see, as far as that can be told without it."""
    count, visible = len(list(_DEVICES.glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name]))
