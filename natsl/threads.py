"""Threads of OpenMP on cores that others use too: how they wait, how many they are, and the same number after a resume.

At every barrier a thread spins until the last one comes. That is fastest on idle cores. Where other work holds a core,
the last one comes only after the scheduler's time slice, and all wait for it: training becomes many times slower, and
passive waiting is faster there. No torch at import: OpenMP reads its settings when torch is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BUSY = 0.1  # share of the cores that other work has to use before threads wait passively
SAMPLE_SECONDS = 0.1
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUMBER = "OMP_NUM_THREADS"
_NUMBERS = (NUMBER, "MKL_NUM_THREADS")
_log = logging.getLogger(__name__)
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


class _Chosen:
    here = False  # whether the number of threads in the environment is ours, not the user's


def choose_threads() -> None:
    """Set OpenMP's number of threads and way of waiting in this process's environment, for its children too.

    The number where a cgroup's quota allows fewer cores than there are, the waiting where other work uses the cores at
    this moment. What the user has set stays, and nothing is set where the system does not tell, or torch is loaded.
    """
    if "torch" in sys.modules:
        return
    cores = _own_cores()
    if not cores:
        return
    threads = _number(os.environ[NUMBER]) if NUMBER in os.environ else None
    if NUMBER not in os.environ:
        quota = cpu_quota()
        threads = len(cores)
        if quota is not None and quota < threads:
            threads = max(1, int(quota))
            os.environ[NUMBER] = str(threads)
            _Chosen.here = True
    if threads == 1 or any(name in os.environ for name in WAITING):
        return
    used = other_work(cores)
    # With a core for each thread none has to wait for other work.
    if used is not None and used > BUSY * len(cores) and used + (threads or len(cores)) > len(cores):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        _log.info("other work uses %.1f of %d cores: threads wait without spinning", used, len(cores))


def other_work(cores: set[int], seconds: float = SAMPLE_SECONDS) -> float | None:
    """How many of the cores are in use while this process sleeps; None if the system does not tell."""
    before = _core_times(cores)
    time.sleep(seconds if before else 0)
    after = _core_times(cores)
    used = 0.0
    for core in before.keys() & after.keys():
        busy, total = (new - old for new, old in zip(after[core], before[core], strict=True))
        used += min(1.0, max(0.0, busy / total)) if total > 0 else 0.0
    return used if before and after else None


def cpu_quota() -> float | None:
    """Cores that the cgroups of this process, its own and those above it, allow at a time; None: no limit."""
    limits = []
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if not controllers:
            mounts = [_CGROUPS, _CGROUPS / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [_CGROUPS / controllers, _CGROUPS / "cpu"]
        else:
            continue
        parts = [part for part in own.split("/") if part not in ("", ".", "..")]
        # In a container the path may be the host's; the mount itself is then the container's own cgroup.
        folders = [mount.joinpath(*parts[:depth]) for mount in mounts for depth in range(len(parts) + 1)]
        limits += [limit for limit in map(_limit, folders) if limit is not None]
    return min(limits, default=None)


def threads_each(processes: int) -> int:
    """Threads of each of so many processes that share the cores with which torch computes here.

    Where the user has set a number of threads, each has that many.
    """
    import torch

    own = torch.get_num_threads()
    given = not _Chosen.here and any(name in os.environ for name in _NUMBERS)
    return own if given else max(1, own // processes)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """After the block torch computes with as many threads as before it."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def resume_threads(record: Mapping[str, Any]) -> None:
    """Go on with as many threads as a checkpoint was made with: another number may add in another order.

    A checkpoint that does not say it changes nothing.
    """
    import torch

    stored, here = record.get("threads"), torch.get_num_threads()
    if not isinstance(stored, int) or stored < 1 or stored == here:
        return
    torch.set_num_threads(stored)
    _log.info(
        "training goes on with %d threads, as it began, so that its result stays the same (here it would be %d: for "
        "these train anew, under another name)",
        stored,
        here,
    )


def _own_cores() -> set[int]:
    """Cores that this process may run on; empty if the system does not tell."""
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # macOS has no such call
        return set()


def _core_times(cores: set[int]) -> dict[int, tuple[int, int]]:
    """Ticks since the boot of each of the cores: in use, and all."""
    times = {}
    for line in _read(_PROC / "stat").splitlines():
        name, _, rest = line.partition(" ")
        number = name.removeprefix("cpu")
        if name == number or not number.isdecimal() or int(number) not in cores:
            continue
        with contextlib.suppress(ValueError):
            ticks = [int(field) for field in rest.split()[:8]]  # what follows, of guests, is counted in the first two
            idle = sum(ticks[3:5])  # idle, and idle while waiting for a disk
            if len(ticks) > 4:
                times[int(number)] = (sum(ticks) - idle, sum(ticks))
    return times


def _limit(folder: Path) -> float | None:
    """Cores that one cgroup allows at a time, by version 2 or 1; None: no limit, or not to be read."""
    fields = _read(folder / "cpu.max").split()
    if not fields:
        fields = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = (int(field) for field in fields)  # "max", and -1 in version 1: no limit
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _number(text: str) -> int | None:
    """The first number of a list such as ``4,2``; None if it is none."""
    first = text.partition(",")[0].strip()
    return int(first) if first.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
