"""What a study knows, as arrays: the positions that were tried, their values, which of them are on the front.

Shapes: n trials, d numbers, m objectives, c constraints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import moocore
import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from natsl.space.space import DECIMALS, SNAP

Array = npt.NDArray[np.float64]
SHARE = "share"  # trial attribute: the part of the held-out data that it was judged on, if it was stopped
_OURS, _REASON = "policy", "reason"  # trial attributes: what a search has made has the one; the other, if it failed


class History:
    """Finished trials with the same parameters, in order.

    Trials without a result count as tried if there is a reason why; one that was cut off is proposed again as it was.
    ``space``: distributions of all parameters; ``numbers``: of those that are numbers.
    """

    def __init__(self, space: Mapping[str, BaseDistribution] | None = None) -> None:
        self.space = dict(space or {})
        self.numbers = {name: item for name, item in self.space.items() if isinstance(item, FloatDistribution)}
        self.trials: list[FrozenTrial] = []
        self.tried: set[bytes] = set()
        self._pending: list[bytes] = []
        self._rows: dict[str, _Rows] = {name: _Rows() for name in ("positions", "values", "broken", "whole")}
        self._constraints: list[str] = []

    def add(self, trial: FrozenTrial, objectives: int) -> None:
        """Append a finished trial."""
        self.__dict__.pop("front", None)
        position = self.position(trial.params)
        limits = trial.constraints
        if limits and not self._constraints:  # those before had no result, and so none of them
            self._constraints = list(limits)
            self._rows["broken"] = _Rows()
            for _ in self.trials:
                self._rows["broken"].add(np.full(len(limits), np.nan))
        self.trials.append(trial)
        self.tried.update(self.keys(position[None]))
        self._rows["positions"].add(position)
        self._rows["values"].add(np.array(trial.values or [np.nan] * objectives, dtype=np.float64))
        self._rows["broken"].add(np.array([limits.get(name, np.nan) for name in self._constraints], dtype=np.float64))
        self._rows["whole"].add(np.array([trial.user_attrs.get(SHARE, 1)], dtype=np.float64))

    def expect(self, trials: Sequence[FrozenTrial]) -> None:
        """Take these, which are being evaluated, for tried, and none of those of the last call any more."""
        self.tried.difference_update(self._pending)
        keys = [self.keys(self.position(trial.params)[None])[0] for trial in trials]
        self._pending = [key for key in dict.fromkeys(keys) if key not in self.tried]
        self.tried.update(self._pending)

    @property
    def positions(self) -> Array:
        """Numbers as shares of their ranges [n, d]."""
        return self._rows["positions"].array

    @property
    def values(self) -> Array:
        """Objectives [n, m]; not finite where there are none."""
        return self._rows["values"].array

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Which trials have a result [n]."""
        return np.asarray(np.isfinite(self.values).all(axis=1))

    @property
    def broken(self) -> Array:
        """By how much constraints are broken [n], as a share of what is seen of each; ≤ 0: all are kept."""
        table = np.nan_to_num(self._rows["broken"].array, nan=0.0)  # [n, c]
        if not table.size:
            return np.zeros(len(self.trials))
        largest = np.abs(table).max(axis=0)
        worst: Array = (table / np.where(largest > 0, largest, 1.0)).max(axis=1)
        return worst

    @cached_property
    def front(self) -> npt.NDArray[np.int64]:
        """Places of the trials on the front, of several with equal values one; what was judged on a part is not."""
        whole = self._rows["whole"].array.reshape(-1) >= 1
        places = np.flatnonzero(self.valid & whole & (self.broken <= 0))
        return places[moocore.is_nondominated(self.values[places])] if len(places) else places

    def position(self, params: Mapping[str, Any]) -> Array:
        """Where parameters are [d]."""
        return np.array([_share(params[name], item) for name, item in self.numbers.items()])

    def params(self, position: Array) -> dict[str, float]:
        """The numbers at a position [d]."""
        out = {}
        for (name, item), share in zip(self.numbers.items(), position.tolist(), strict=True):
            value = (
                item.low * (item.high / item.low) ** share if item.log else item.low + share * (item.high - item.low)
            )
            out[name] = min(max(value, item.low), item.high)
        return out

    def keys(self, positions: Array) -> list[bytes]:
        """Equal where positions [·, d] mean the same policy: ends of u are snapped, budgets have few decimals."""
        snapped = np.clip((positions - SNAP) / (1 - 2 * SNAP), 0.0, 1.0) ** 2
        budgets = np.array([name.startswith("u.") for name in self.numbers], dtype=bool)
        steps = np.rint(np.where(budgets, snapped, positions) * 10**DECIMALS).astype(np.int64)
        return [row.tobytes() for row in steps]


def span_of(values: Array) -> Array:
    """The range of each column, 1 where there is none."""
    span = np.ptp(values, axis=0)
    return np.where(span > 0, span, 1.0)


def _share(value: float, item: FloatDistribution) -> float:
    if item.high <= item.low:
        return 0.0
    if item.log:
        return float(np.log(value / item.low) / np.log(item.high / item.low))
    return (value - item.low) / (item.high - item.low)


class _Rows:
    """An array that grows."""

    def __init__(self) -> None:
        self._array, self._count = np.empty((0, 0)), 0

    def add(self, row: Array) -> None:
        """Append a row; rows that are longer or shorter than the first are refused by numpy."""
        if self._count == len(self._array):
            grown = np.empty((max(64, 2 * self._count), len(row)))
            grown[: self._count] = self._array[: self._count] if self._count else 0.0
            self._array = grown
        self._array[self._count] = row
        self._count += 1

    @property
    def array(self) -> Array:
        """All rows [n, ·]."""
        return self._array[: self._count]


class _Reader:
    """Reads a study's trials as they finish: a finished one never changes, so each is read once."""

    def __init__(self) -> None:
        self._groups: dict[tuple[bool, tuple[str, ...]], History] = {}
        self._open: list[int] = []
        self._seen = 0

    def read(self, study: Study) -> History:
        """The history without what something else has put into the study: the most frequent parameters of ours."""
        trials = study.get_trials(deepcopy=False)
        numbers, self._open = [*self._open, *range(self._seen, len(trials))], []
        self._seen = len(trials)
        for history in self._groups.values():
            history.expect([])
        for number in numbers:
            trial = trials[number]
            if not trial.state.is_finished():
                self._open.append(number)
            elif trial.state is TrialState.COMPLETE or _REASON in trial.user_attrs:
                group = (_OURS in trial.user_attrs, tuple(trial.params))
                if group[1]:
                    history = self._groups.setdefault(group, History(trial.distributions))
                    history.add(trial, len(study.directions))
        some = [item for item in self._groups.items() if item[0][0]] or list(self._groups.items())
        result = max((history for _, history in some), key=lambda history: len(history.trials), default=History())
        running = [trials[number] for number in self._open if _OURS in trials[number].user_attrs]
        result.expect([trial for trial in running if trial.params.keys() == result.space.keys()])
        return result


_READERS: WeakKeyDictionary[Study, _Reader] = WeakKeyDictionary()


def history_of(study: Study) -> History:
    """What the study knows by now."""
    return _READERS.setdefault(study, _Reader()).read(study)
