"""``python -m tests.soak --kills 200 --seed 0``: a search whose processes are killed, stopped and ended at random.

Whatever ends is started again, until the search is done; then its trials must be those of a search that nothing
disturbed, each made once, with a sound database, and no process left. One line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from natsl.search.config import SearchConfig
from natsl.search.owner import Owner
from tests.fake_search import search

ROOT = Path(__file__).parents[1]
SECONDS = 0.15  # of an evaluation
LEASE_SECONDS = 2.0
OPTIONS: dict[str, Any] = {"anchors": 8, "batch": 8, "workers": 2, "lease_seconds": LEASE_SECONDS}
CONTROLLER = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
WORKER = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


@dataclass
class Soak:
    """One search under signals, in ``folder``; ``share`` of them go to the controller."""

    folder: Path
    trials: int
    random: random.Random
    share: float
    sent: Counter[str] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)  # processes that were workers or controllers

    def run(self, kills: int) -> None:
        """Make the search under at most so many signals."""
        while (code := self._controller(kills)) != 0:
            assert code in (-signal.SIGKILL, 143, 130), f"the controller ended with exit code {code}"

    def _controller(self, kills: int) -> int:
        """Run a controller until it ends; its exit code."""
        line = {**OPTIONS, "folder": str(self.folder), "n_trials": self.trials, "answers": {"seconds": SECONDS}}
        command = [sys.executable, "-m", "tests.fake_search", json.dumps(line)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        output = (self.folder / "output").open("a")
        with output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
            self.seen.add(process.pid)
            while process.poll() is None:
                time.sleep(self.random.uniform(0.1, 0.8))
                if sum(self.sent.values()) >= kills or not self._children(process.pid):
                    continue
                if self.random.random() < self.share:
                    self._to_controller(process)
                else:
                    self._to_worker()
        return process.returncode

    def _to_controller(self, process: subprocess.Popen[bytes]) -> None:
        sent = self.random.choice(CONTROLLER)
        self.sent[f"{sent.name} of the controller"] += 1
        process.send_signal(sent)
        if sent == signal.SIGSTOP:
            time.sleep(self.random.uniform(0.0, 2 * LEASE_SECONDS))
            process.send_signal(signal.SIGCONT)
        else:
            process.wait(30)

    def _to_worker(self) -> None:
        """Disturb a worker at a task that no worker has ended over: the second one would make it fail."""
        running = self._running()
        if not running:
            return
        lease, pid = self.random.choice(running)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            if (lease, pid) not in self._running():  # it was done in this moment, and the next one may be another's
                os.kill(pid, signal.SIGCONT)
                return
            sent = self.random.choice(WORKER)
            self.sent[f"{sent.name} of a worker"] += 1
            if sent == signal.SIGSTOP:
                time.sleep(self.random.uniform(0.0, 2 * LEASE_SECONDS))
            else:
                os.kill(pid, sent)
            os.kill(pid, signal.SIGCONT)

    def _running(self) -> list[tuple[str, int]]:
        """Lease and process of every task that is being worked on for the first time."""
        rows = self._rows("SELECT lease, process FROM natsl_tasks WHERE state = 'running' AND attempts = 1")
        owners = [(lease, Owner.parse(process)) for lease, process in rows]
        return [(lease, owner.pid) for lease, owner in owners if owner is not None]

    def _children(self, parent: int) -> list[int]:
        """The workers of a controller."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(stat.parent.name))
        self.seen.update(found)
        return found

    def _rows(self, query: str) -> list[Any]:
        try:
            with contextlib.closing(sqlite3.connect(self.folder / "study.db", timeout=30)) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # there is no table yet
            return []

    def check(self, straight: dict[int, tuple[Any, ...]]) -> None:
        """Raise ``AssertionError`` unless the outcome is that of a search that nothing disturbed."""
        assert trials_of(self.folder) == straight
        assert self._rows("PRAGMA integrity_check") == [("ok",)]
        assert self._rows("SELECT count(*) FROM natsl_tasks WHERE state IN ('running', 'waiting', 'failed')") == [(0,)]
        end = time.monotonic() + 5
        while left := [pid for pid in self.seen if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < end, f"processes are left: {left}"
            time.sleep(0.1)
        repeated = Counter(line.rpartition(" ")[0] for line in (self.folder / "calls").read_text().splitlines())
        again = sum(repeated.values()) - len(repeated)
        assert again <= 2 * sum(self.sent.values()), f"{again} evaluations were made again"


def trials_of(folder: Path) -> dict[int, tuple[Any, ...]]:
    """The trials of a search by index: policy, values, share. ``AssertionError`` if one is there twice or failed."""
    study = optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name="first")
    found: dict[int, tuple[Any, ...]] = {}
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        assert trial.state is not TrialState.RUNNING
        if trial.state is TrialState.COMPLETE:
            assert attributes["index"] not in found, f"trial {attributes['index']} was made twice"
            found[attributes["index"]] = (attributes["policy"], trial.values, attributes.get("share"))
        else:
            assert "reason" not in attributes, f"trial {attributes['index']} failed: {attributes['reason']}"
    return found


def soak(folder: Path, kills: int, seed: int, trials: int, share: float = 0.2) -> str:
    """Searches under so many signals in all; a line that says what was survived."""
    rng, sent, rounds = random.Random(seed), Counter[str](), 0
    straight = folder / "straight"
    straight.mkdir()
    search(straight, SearchConfig(n_trials=trials, **{**OPTIONS, "workers": 1}), seconds=0.0)
    while sum(sent.values()) < kills:
        rounds += 1
        disturbed = folder / f"disturbed-{rounds}"
        disturbed.mkdir()
        one = Soak(disturbed, trials, rng, share)
        one.run(kills - sum(sent.values()))
        one.check(trials_of(straight))
        sent += one.sent
    survived = ", ".join(f"{count} {name}" for name, count in sorted(sent.items()))
    return f"{rounds} searches of {trials} trials survived {sum(sent.values())} signals ({survived})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Disturb searches at random and check what they find.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), arguments.kills, arguments.seed, arguments.trials), flush=True)


if __name__ == "__main__":
    main()
