"""The trials of an outer search: settings are proposed, supernets judged rung by rung. Cut off anywhere, it resumes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from natsl.search.fault import check_failures
from natsl.search.outer.config import OuterRunConfig
from natsl.search.outer.value import Measured
from natsl.search.storage import Identity, OpenStudy, open_study, reported_errors
from natsl.search.stored import INDEX, KNOWN, REASON, read_trials

SETTINGS = "settings"  # trial attribute: option → value; a trial that has it is made by whoever finds it
POINTS = "points"  # trial attribute: the front of each rung
OUT_OF_MEMORY = "out of memory"  # how the reason of a fault begins that may be the machine's
_STARTUP = 5  # random trials before the sampler's first estimate, the config's own settings among them


class State(Enum):
    """How a trial ended."""

    complete = "complete"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True)
class OuterRecord:
    """One finished trial. ``index`` counts them from 0.

    ``values``: its hypervolume at each rung that it reached; ``points``: the front of the last of them. ``reason``: why
    it failed. ``same_as``: index of the earlier trial of the same settings whose results were used.
    """

    index: int
    settings: dict[str, Any]
    state: State
    values: tuple[float, ...]
    points: tuple[Mapping[str, Any], ...] = ()
    reason: str | None = None
    same_as: int | None = None

    @property
    def id(self) -> str:
        """Name of the trial and of its run."""
        return trial_id(self.index)

    @property
    def value(self) -> float | None:
        """The hypervolume of the trained supernet (null: it was not trained to its end)."""
        return self.values[-1] if self.state is State.complete else None

    @property
    def transient(self) -> bool:
        """Whether it failed by a fault that may be the machine's: the next process tries it again."""
        return self.reason is not None and self.reason.startswith(OUT_OF_MEMORY)

    def outcome(self, rungs: Sequence[int]) -> str:
        """How it ended, in words; rungs: steps after which supernets are judged."""
        same = "" if self.same_as is None else f", as {trial_id(self.same_as)}, which has the same settings"
        if self.state is State.failed:
            return f"failed: {self.reason}{same}"
        value = f"hypervolume {self.values[-1]:.4f}"
        stopped = f"stopped after {rungs[len(self.values) - 1]} of {rungs[-1]} steps, "
        return f"{stopped if self.state is State.pruned else ''}{value}{same}"

    def to_plain(self, rungs: Sequence[int]) -> dict[str, Any]:
        """JSON-ready form; rungs: as in ``outcome``."""
        reached = [{"steps": step, "value": value} for step, value in zip(rungs, self.values, strict=False)]
        return {
            "id": self.id,
            "state": self.state.value,
            "settings": self.settings,
            "steps": rungs[-1],
            "rungs": reached,
            "reason": self.reason,
            "same_as": None if self.same_as is None else trial_id(self.same_as),
            "points": list(self.points),
        }


@dataclass
class OuterTrial:
    """A trial that is being made: its settings, and its value at each rung so far."""

    trial: optuna.Trial
    index: int
    settings: dict[str, Any]
    values: list[float]
    points: list[list[dict[str, Any]]]

    @property
    def id(self) -> str:
        """Name of the trial and of its run."""
        return trial_id(self.index)


def trial_id(index: int) -> str:
    """The name of a trial, the same however often the search was resumed."""
    return f"t{index:04d}"


def best_of(records: Sequence[OuterRecord]) -> OuterRecord | None:
    """The trial with the largest value of those trained to the end, the first one of equals."""
    done = [record for record in records if record.value is not None]
    return max(done, key=lambda record: record.value or 0.0, default=None)


def is_promoted(own: float, others: Sequence[float], keep: float) -> bool:
    """Whether a trial with this value at a rung trains on: it is in the best ``keep`` of those judged there so far.

    Asynchronous successive halving (Li et al. 2020): nobody waits, and the first one goes on. Optuna's pruner of that
    name stores that a rung was reached before its decision is known, so that a trial killed in between would go on.
    """
    return sum(other > own for other in others) < places(len(others), keep)


def places(others: int, keep: float) -> int:
    """How many of the best trials at a rung train on, where so many ``others`` were judged before."""
    return max(1, math.ceil(keep * (others + 1)))


class OuterStudy:
    """A study over settings of a training. One process owns it at a time, until it is closed or the process ends."""

    def __init__(self, opened: OpenStudy, config: OuterRunConfig, rungs: Sequence[int]) -> None:
        self._opened, self._config, self._rungs = opened, config, rungs
        self._study = study = opened.study
        self.records: list[OuterRecord] = []
        self._open: OuterTrial | None = None
        remains = read_trials(study, lambda trial: self._store(self._read(trial)))
        self.foreign = remains.foreign
        self._again = {record.index for record in self.records if record.transient}  # to be tried again
        for trial in remains.running:  # its process is gone: this one owns the study
            self._adopt(trial)

    @property
    def remaining(self) -> int:
        """Trials that are still to be finished."""
        return max(0, self._config.outer.n_trials - len(self.records)) + len(self._again)

    def next(self) -> OuterTrial:
        """The trial that was cut off, one that failed by a fault of the machine before, or a new one.

        The config's own settings come first, if the space holds them; draws depend on (seed, index, results so far).
        """
        if self._open is not None:
            return self._open
        self._opened.check_owner()
        config, study = self._config, self._study
        index = min(self._again, default=len(self.records))
        failed = self.records[index] if index in self._again else None
        number = int.from_bytes(hashlib.sha256(f"{config.seed}:{index}".encode()).digest()[:4], "big")
        study.sampler = TPESampler(seed=number, n_startup_trials=_STARTUP)
        own = config.outer.space.own(config) if index == 0 else None
        first = own if failed is None else failed.settings
        if first is not None:
            study.enqueue_trial(first)
        trial = study.ask()
        settings = config.outer.space.suggest(trial)
        trial.set_user_attr(INDEX, index)
        self._open = OuterTrial(trial, index, settings, [], [])
        if failed is not None and failed.values:  # its checkpoints are past these rungs
            for value, step in zip(failed.values, self._rungs, strict=False):
                trial.report(value, step)
            self._open.values.extend(failed.values)
            fronts = [*([] for _ in failed.values[1:]), list(map(dict, failed.points))]  # the last one is read
            self._open.points.extend(fronts)
            trial.set_user_attr(POINTS, self._open.points)
        trial.set_user_attr(SETTINGS, settings)  # the last one
        return self._open

    def known(self, trial: OuterTrial) -> OuterRecord | None:
        """An earlier trial of the same settings, unless it is to be tried again."""
        earlier = (record for record in self.records[: trial.index] if record.index not in self._again)
        same = (record for record in earlier if record.settings == trial.settings and record.same_as is None)
        return next(same, None)

    def report(self, trial: OuterTrial, value: float, points: Sequence[Measured]) -> None:
        """Store the value of a supernet at the next rung, and its front."""
        self._opened.check_owner()
        front = [{"policy": item.policy.to_dict(), "values": item.values} for item in points]
        trial.points.append(front)
        trial.trial.set_user_attr(POINTS, trial.points)
        trial.trial.report(value, self._rungs[len(trial.values)])  # the last one: with it the rung is done
        trial.values.append(value)

    def stops(self, trial: OuterTrial) -> bool:
        """Whether a trial is not worth another rung."""
        reached = len(trial.values)
        if reached in (0, len(self._rungs)):
            return False
        others = [r.values[reached - 1] for r in self.records if r.same_as is None and len(r.values) >= reached]
        return not is_promoted(trial.values[-1], others, self._config.outer.keep)

    def finish(self, trial: OuterTrial) -> OuterRecord:
        """Store that a trial is at its end, or was stopped before."""
        self._opened.check_owner()
        if len(trial.values) == len(self._rungs):
            self._study.tell(trial.trial, trial.values[-1])
            return self._add(trial, State.complete)
        self._study.tell(trial.trial, state=TrialState.PRUNED)
        return self._add(trial, State.pruned)

    def fail(self, trial: OuterTrial, reason: str) -> OuterRecord:
        """Store that a supernet could not be trained or judged, and why."""
        self._opened.check_owner()
        trial.trial.set_user_attr(REASON, reason)
        self._study.tell(trial.trial, state=TrialState.FAIL)
        return self._add(trial, State.failed, reason)

    def copy(self, trial: OuterTrial, known: OuterRecord) -> OuterRecord:
        """Store the results of an earlier trial of the same settings."""
        trial.trial.set_user_attr(KNOWN, known.index)
        if known.state is State.failed:
            return self.fail(trial, known.reason or "")
        for step, value in zip(self._rungs[len(trial.values) :], known.values[len(trial.values) :], strict=False):
            trial.trial.report(value, step)
        trial.values[:] = known.values
        trial.points.clear()  # they are that trial's
        return self.finish(trial)

    def check_failures(self) -> None:
        """Raise ``SearchFailedError`` once too many trials have failed; those to be tried again do not count."""
        reasons = [item.reason for item in self.records if item.reason is not None and item.index not in self._again]
        check_failures(reasons, len(self.records), self._config.search)

    def close(self) -> None:
        """Give the study up: only ``records`` can be used afterwards."""
        self._opened.close()

    def _add(self, trial: OuterTrial, state: State, reason: str | None = None) -> OuterRecord:
        points = tuple(trial.points[-1]) if trial.points else ()
        same = self.known(trial)
        record = OuterRecord(
            trial.index,
            trial.settings,
            state,
            tuple(trial.values),
            points,
            reason,
            None if same is None else same.index,
        )
        self._store(record)
        self._again.discard(record.index)  # also if it failed: the next try is another process's
        self._open = None
        return record

    def _store(self, record: OuterRecord) -> None:
        """Add a record, or replace the failed one that was tried again."""
        self.records[record.index : record.index + 1] = [record]

    def _adopt(self, trial: FrozenTrial) -> None:
        """Go on with a trial that a process has left; one without its settings fails without a reason."""
        attributes, index = trial.user_attrs, trial.user_attrs.get(INDEX)
        expected = index in self._again or index == len(self.records)
        if SETTINGS not in attributes or not expected or self._open is not None:
            self._study.tell(trial.number, state=TrialState.FAIL)
            return
        self._study.sampler = RandomSampler()  # no draw is left
        values = [trial.intermediate_values[step] for step in self._rungs if step in trial.intermediate_values]
        again = optuna.Trial(self._study, trial._trial_id)
        points = list(attributes.get(POINTS, []))[: len(values)]
        self._open = OuterTrial(again, attributes[INDEX], attributes[SETTINGS], values, points)

    def _read(self, trial: FrozenTrial) -> OuterRecord:
        """The record of a finished trial; KeyError, TypeError or ValueError if it is not one of ours."""
        attributes = trial.user_attrs
        index, count = attributes[INDEX], len(self.records)
        if index != count and not (0 <= index < count and self.records[index].transient):
            raise ValueError(f"there is no record {index}")
        states = {TrialState.COMPLETE: State.complete, TrialState.PRUNED: State.pruned, TrialState.FAIL: State.failed}
        points = attributes.get(POINTS, [])
        return OuterRecord(
            index,
            attributes[SETTINGS],
            states[trial.state],
            tuple(trial.intermediate_values[step] for step in self._rungs if step in trial.intermediate_values),
            tuple(points[-1]) if points else (),
            attributes.get(REASON),
            attributes.get(KNOWN),
        )


def open_outer_study(
    path: Path, config: OuterRunConfig, rungs: Sequence[int], made_from: Mapping[str, Any]
) -> OuterStudy:
    """The study of an outer search, new or resumed.

    path: the SQLite file, unless ``search.storage`` names a database. rungs: steps after which supernets are judged.
    made_from: what else the trials depend on. ``UserError`` as ``open_study``.
    """
    identity = Identity(config.name, ["maximize"], lambda stored: made_from)
    opened = open_study(path, config.search.storage, identity)
    try:
        with reported_errors(opened.where):
            return OuterStudy(opened, config, rungs)
    except BaseException:
        opened.close()
        raise
