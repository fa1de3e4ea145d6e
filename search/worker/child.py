"""A worker process as its parent sees it: started, and ended with all that it started. No torch at import."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import natsl

_MODULE = "natsl.search.worker"


def in_turn(workers: int | None, gpus: int, device: str) -> list[str]:
    """The device of each of the ``workers`` (None: one for each GPU): GPUs in turn, ``device`` where there are none."""
    return [f"cuda:{i % gpus}" if gpus else device for i in range(workers or max(1, gpus))]


def start(threads: int | None, errors: IO[bytes] | int, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """A new worker process, which waits for its job. ``errors``: where its standard error goes."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,  # a group of its own: Ctrl-C reaches the controller only
        env=environment(threads),
    )


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a worker process, which finds this natsl; ``threads``: how many it has (None: as here)."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    numbers = {} if threads is None else dict.fromkeys(names, str(threads))
    package = str(Path(natsl.__file__).absolute().parents[1])  # which may be on our path in a way of our own
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **numbers, "PYTHONPATH": path}


def tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Write to a worker, unless it has ended."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a worker that is ending, and close its pipes; one that does not end is killed, its group always."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
