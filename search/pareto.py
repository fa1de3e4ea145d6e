"""Which of several policies nothing beats, how good they are together, and which of them to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import moocore
import numpy as np
import numpy.typing as npt

_ROUNDING = 1e-9  # a gain that is smaller, relative to values above 1, is none

T = TypeVar("T")
Values = Mapping[str, float]  # objective → value, smaller is better


def covers(first: Values, second: Values, names: Sequence[str]) -> bool:
    """Whether the first is at least as good as the second in every objective."""
    return all(first[name] <= second[name] for name in names)


def dominates(first: Values, second: Values, names: Sequence[str]) -> bool:
    """Whether the first is at least as good in every objective and better in one."""
    return covers(first, second, names) and any(first[name] < second[name] for name in names)


def non_dominated(values: Sequence[Values], names: Sequence[str]) -> list[int]:
    """Indices of those that no other dominates, in order; of several with equal values only the first."""
    if not values:
        return []
    rows = np.array([[item[name] for name in names] for item in values], dtype=np.float64)
    return [int(i) for i in np.flatnonzero(moocore.is_nondominated(rows, keep_weakly=False))]


def mixture_dominates(first: Values, second: Values, other: Values, names: Sequence[str]) -> bool:
    """Whether some mixture of requests under the first two is at least as good as the other, and better in something.

    With the share t of the second, an objective is first + t·(second − first): each allows an interval of t.
    """
    low, high = 0.0, 1.0
    for name in names:
        step, room = second[name] - first[name], other[name] - first[name]
        if step > 0:
            high = min(high, room / step)
        elif step < 0:
            low = max(low, room / step)
        elif room < 0:
            return False
    if low > high:
        return False
    # What is gained is linear in t, so that an end of the interval has the most of it.
    ends = [[other[n] - first[n] - t * (second[n] - first[n]) for n in names] for t in (low, high)]
    return any(
        gain > _ROUNDING * max(1.0, abs(other[n])) for gains in ends for n, gain in zip(names, gains, strict=True)
    )


def family_dominates(members: Sequence[Values], other: Values, names: Sequence[str]) -> bool:
    """Whether a member of a family, in order of cost, or a mixture of two neighbours dominates another policy."""
    neighbours = zip(members, members[1:] or members, strict=False)
    return any(mixture_dominates(first, second, other, names) for first, second in neighbours)


def dominated_volume(points: npt.NDArray[np.float64]) -> float:
    """Volume that points [n, objectives] dominate, up to 1 in every objective."""
    inside = points[(points < 1).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=1.0)) if len(inside) else 0.0


@dataclass(frozen=True)
class Scale:
    """Maps objectives so that 0 is the better and 1 the worse of two reference policies (all-softmax and all-delta)."""

    names: tuple[str, ...]
    best: tuple[float, ...]
    worst: tuple[float, ...]

    @classmethod
    def between(cls, names: Sequence[str], first: Values, second: Values) -> Scale:
        """The scale whose ends are the two policies with these values."""
        best = tuple(min(first[name], second[name]) for name in names)
        return cls(tuple(names), best, tuple(max(first[name], second[name]) for name in names))

    def apply(self, values: Sequence[Values]) -> npt.NDArray[np.float64]:
        """Scaled values [policies, objectives].

        Where the references agree both are the worse one, at 1: only what is better than both counts as a gain.
        """
        raw = np.array([[item[name] for name in self.names] for item in values], dtype=np.float64)
        best, worst = np.array(self.best), np.array(self.worst)
        span = np.where(worst > best, worst - best, 1.0)
        scaled: npt.NDArray[np.float64] = (raw.reshape(len(values), len(self.names)) - best) / span
        return scaled + (worst <= best)

    def hypervolume(self, values: Sequence[Values]) -> float:
        """Volume dominated by these policies, up to the worse of the two references in every objective.

        The unit is the box between the two: a policy as good as the better reference in every objective at once has 1,
        and those that are better than it in some objective can have more.
        """
        return dominated_volume(self.apply(values))

    def knee(self, values: Sequence[Values]) -> int | None:
        """Index of the policy with the least sum of scaled objectives (null: there is none)."""
        return int(np.argmin(self.apply(values).sum(axis=1))) if values else None


class Archive(Generic[T]):
    """What nothing beats of the items that were added so far; of several with equal values only the first."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.values: tuple[Values, ...] = ()
        self.items: tuple[T, ...] = ()

    def add(self, values: Values | None, item: T) -> bool:
        """Whether the item is one of them (null: one without a result, or that breaks a constraint)."""
        if values is None or any(covers(other, values, self._names) for other in self.values):
            return False
        pairs = zip(self.values, self.items, strict=True)
        kept = [pair for pair in pairs if not covers(values, pair[0], self._names)]
        self.values, self.items = (*(pair[0] for pair in kept), values), (*(pair[1] for pair in kept), item)
        return True


class Volume:
    """Hypervolume of what was added so far."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._front = np.empty((0, len(scale.names)))  # scaled [policies, objectives], of what nothing else covers
        self.now = 0.0

    def add(self, values: Values | None) -> float:
        """The hypervolume after one more trial (null: one without a result, or that breaks a constraint)."""
        if values is None:
            return self.now
        row = self._scale.apply([values])
        if not (self._front <= row).all(axis=1).any():
            # What the row adds is its own box without what the front dominates inside of it: the volume of the whole
            # front, which costs more with every objective, is never needed.
            shared = dominated_volume(np.maximum(self._front, row))
            self.now += max(0.0, dominated_volume(row) - shared)
            self._front = np.vstack([self._front[~(self._front >= row).all(axis=1)], row])
        return self.now
