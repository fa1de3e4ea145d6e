"""The tasks that a supernet is trained and judged on, and their options. Imports no torch.

A new task is a file beside this one, an entry of ``TASKS`` and, if it has options, a field of ``DataConfig`` with the
task's name.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from natsl.space.check import check, check_counts
from natsl.tasks.bytes import BytesTask
from natsl.tasks.mqar import MqarConfig, MqarTask
from natsl.tasks.needle import NeedleConfig, NeedleTask
from natsl.tasks.task import Task
from natsl.text import TextRules, absolute

TASKS: dict[str, type[Task[Any]]] = {task.name: task for task in (BytesTask, MqarTask, NeedleTask)}


def metrics() -> dict[str, str]:
    """Task → name of the error that is reported for it, of every task that has one, in the order of ``TASKS``."""
    return {name: task.metric for name, task in TASKS.items() if task.metric is not None}


@dataclass
class DataConfig:
    """What the supernet is trained and judged on.

    ``path``: a text file or a folder of them (null: the sources of Python's standard library), or a ``.npy`` file with
    the ids of a tokenizer, one-dimensional. ``tasks``: weight of each task (``bytes``, ``mqar``, ``needle``) in the
    training batches. ``keys``: how many different keys the recall tasks have; beyond 64 each needs a token more in the
    vocabulary. ``search_sequences`` / ``test_sequences``: held-out sequences per task for judging trials and for the
    report. ``include`` / ``exclude``: patterns such as ``*.md`` or ``drafts/*`` for names below the folder (``*``
    matches ``/`` too): only files that match one of the former (none: all) and none of the latter are read. ``field``:
    which field of each line of a ``.jsonl`` file is text (null: such files are left out; empty: they are read as they
    are). ``split_depth``: files of a folder are split by so many of the folders in their names instead of by the whole
    name (0), so that a part holds whole packages and long sequences stay in one.
    """

    path: str | None = None
    tasks: dict[str, float] = field(default_factory=lambda: {"mqar": 1.0})
    seq_len: int = 384
    keys: int = 64
    search_sequences: int = 32
    test_sequences: int = 64
    mqar: MqarConfig = field(default_factory=MqarConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    split_depth: int = 0
    field: str | None = None  # the last one: above it, `field` is the function

    def __post_init__(self) -> None:
        check(
            len(self.tasks) > 0 and any(w > 0 for w in self.tasks.values()),
            "data.tasks",
            self.tasks,
            "at least one task needs a weight > 0",
        )
        for name, weight in self.tasks.items():
            check(name in TASKS, "data.tasks", name, f"the tasks are {', '.join(TASKS)}")
            check(math.isfinite(weight) and weight >= 0, f"data.tasks.{name}", weight, "it must be ≥ 0")
        check_counts(2, {"data.seq_len": self.seq_len})
        check_counts(1, {"data.keys": self.keys})
        check_counts(
            1,
            {"data.search_sequences": self.search_sequences, "data.test_sequences": self.test_sequences},
        )
        check_counts(0, {"data.split_depth": self.split_depth})
        _check_patterns(self.include, self.exclude)
        if self.path is not None:
            self.path = absolute(self.path)

    def text_rules(self, *runs: str) -> TextRules:
        """Which files are text; ``runs``: folders of runs, which are never entered."""
        folders = tuple(map(os.path.expanduser, runs))
        return TextRules(tuple(self.include), tuple(self.exclude), self.field, folders, self.split_depth)

    def build(self, task: str) -> Task[Any]:
        """A task with its options; ``ValueError`` for an unknown name."""
        check(task in TASKS, "task", task, f"the tasks are {', '.join(TASKS)}")
        return TASKS[task](getattr(self, task, None), self.seq_len, self.keys)


@dataclass
class OtherTextConfig:
    """Text to use instead of that of the run.

    ``path``: a text file or a folder of them (null: the run's own text); a ``.npy`` file of token ids for a run that
    was trained on such. ``include``, ``exclude``, ``field``: what of it is read, as in the options of training; they go
    with ``path``. A folder is split by as many folders as the run's.
    """

    path: str | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    field: str | None = None  # the last one: above it, `field` is the function

    def __post_init__(self) -> None:
        _check_patterns(self.include, self.exclude)
        for name in ("include", "exclude", "field"):
            value = getattr(self, name)
            check(self.path is not None or not value, f"data.{name}", value, "it goes with data.path")


@dataclass
class CalibrationDataConfig(OtherTextConfig):
    """What to calibrate on.

    ``path``: a text file or a folder of them (null: the run's own text), of which the part for the search is used.
    ``include``, ``exclude``, ``field``: what of it is read; they go with ``path``. ``tasks``: weight of each task ({}:
    those of the run). All else is as in the run.
    """

    tasks: dict[str, float] = field(default_factory=dict)


def _check_patterns(include: list[str], exclude: list[str]) -> None:
    for name, patterns in (("data.include", include), ("data.exclude", exclude)):
        check(all(patterns), name, patterns, "a pattern must not be empty")


# Options of ``DataConfig`` that choose text: what they have read is what counts, not how they were given.
TEXT_OPTIONS = ("path", "include", "exclude", "field", "split_depth")
# Options that came later → the value that makes the sequences of before, which runs that did not store them have.
NEWER: dict[tuple[str, str], Any] = {("mqar", "shift"): False, ("needle", "alphabet"): "tokens"}


def drop_newer(plain: dict[str, Any]) -> None:
    """Take newer options with their older values out of plain data settings: such runs keep their fingerprints."""
    for (task, name), older in NEWER.items():
        if plain[task][name] == older:
            del plain[task][name]
