"""What stands in for the work of a process in tests, with the arguments of ``pool._work``. Loads no torch."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

from natsl.files import write_json
from natsl.search.ablation.job import Job


def note_device(own: Job, device: str, sender: Connection) -> None:
    """Writes its device as its result; seed 0 of four holds its own until the others are done."""
    others = [own.folder.parent / f"00-{seed}" / "result.json" for seed in (1, 2, 3)]
    for _ in range(600 if own.seed == 0 else 0):
        if all(path.exists() for path in others):
            break
        time.sleep(0.1)
    own.folder.mkdir(parents=True)
    write_json(own.result, {"seed": own.seed, "device": device})


def meet(own: Job, device: str, sender: Connection) -> None:
    """Writes its device as its result once three are at work."""
    own.folder.mkdir(parents=True)
    for _ in range(600):
        if len(list(own.folder.parent.iterdir())) == 3:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("three at a time were asked for")
    write_json(own.result, {"seed": own.seed, "device": device})


def be_killed(own: Job, device: str, sender: Connection) -> None:
    """Seed 1 is killed by the system, the others would go on for long."""
    if own.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
