"""The outcome of a search: which policies nothing beats, which one to take, and the files that say so."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from natsl.search.controls.comparison import Comparison
from natsl.search.lengths import Lengths
from natsl.search.objective import OBJECTIVES, QUALITY
from natsl.space.policy import RoutingPolicy


class Kind(Enum):
    """What a baseline is."""

    extreme = "extreme"  # all-softmax, all-delta
    uniform = "uniform"  # the learned router with one budget in every layer
    depth = "depth"  # a schedule over depth that looks at no input, or budgets that rise or fall with depth
    single = "single"  # one layer all-softmax, the others delta
    static = "static"  # whole heads keep everything, the others nothing
    family = "family"  # of a sweep that the front is compared with as a whole
    random = "random"  # as many chunks as a learned router keeps, chosen at random


@dataclass(frozen=True)
class Baseline:
    """A policy that the front has to beat.

    ``values``: objectives on the test split, ``search_values`` on the search split. ``measured``: the evaluation on the
    test split (kept fractions, every quality). ``feasible``: keeps all constraints there. Random routing is a mean over
    ``draws``, with ``std`` per measure of quality, and ``of`` names the point or baseline whose kept fraction per
    layer, and so whose costs, it has.
    """

    name: str
    kind: Kind
    policy: RoutingPolicy
    values: dict[str, float]
    measured: dict[str, Any]
    search_values: dict[str, float] | None = None
    std: dict[str, float] = field(default_factory=dict)
    draws: int = 1
    of: str | None = None
    feasible: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plain: dict[str, Any] = {"name": self.name, "kind": self.kind.value, "policy": self.policy.to_dict()}
        plain |= {"values": self.values, "search_values": self.search_values, "measured": self.measured}
        plain["feasible"] = self.feasible
        if self.of is not None:
            plain |= {"of": self.of, "draws": self.draws, "std": self.std}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Baseline:
        """The inverse of ``to_dict``, also after JSON."""
        options = {name: plain[name] for name in ("std", "draws", "of", "feasible") if name in plain}
        policy = RoutingPolicy.from_dict(plain["policy"])
        return cls(
            plain["name"],
            Kind(plain["kind"]),
            policy,
            plain["values"],
            plain["measured"],
            plain["search_values"],
            **options,
        )


@dataclass(frozen=True)
class FamilyFront:
    """A family of baselines beside the front: the members that nothing in it dominates on the search split.

    ``members`` in order of cost on the test split. ``gain``: hypervolume of the front − that of the family, on the test
    split, with its standard error over test sequences, which are paired (null: fewer than two sequences).
    """

    name: str
    label: str
    members: tuple[Baseline, ...]
    hypervolume_search: float
    hypervolume_test: float
    gain: float
    gain_error: float | None

    @property
    def is_beaten(self) -> bool | None:
        """Whether the front is better by more than one standard error (null: that is not known)."""
        return None if self.gain_error is None else self.gain > self.gain_error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        names = ("name", "label", "hypervolume_search", "hypervolume_test", "gain", "gain_error")
        return {name: getattr(self, name) for name in names} | {"points": [item.to_dict() for item in self.members]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FamilyFront:
        """The inverse of ``to_dict``, also after JSON. Members of older versions get the name of the family."""
        older = {"name": plain["name"], "kind": Kind.family.value, "measured": {}}
        members = tuple(Baseline.from_dict(older | item) for item in plain["points"])
        return cls(members=members, **{name: value for name, value in plain.items() if name != "points"})


@dataclass(frozen=True)
class KneeChoice:
    """What choosing the knee on the search split costs: sums of the scaled objectives on the test split.

    ``sum`` of the knee ``point``; ``best_sum`` of ``best``, the point of the front that has the least.
    """

    point: str
    sum: float
    best: str
    best_sum: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**vars(self), "cost": self.sum - self.best_sum}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> KneeChoice:
        """The inverse of ``to_dict``."""
        return cls(plain["point"], plain["sum"], plain["best"], plain["best_sum"])


@dataclass(frozen=True)
class Point:
    """A policy of the front, chosen on the search split and scored again on the test split.

    ``dominated_by``: families with a member or a mixture of two neighbours, and baselines of no family, that are at
    least as good in every objective and better in one, on the test split, and break no constraint.
    ``gain_over_random``: by how much random routing at the same kept fraction per layer is worse, per measure of
    quality (null: the policy routes nothing).
    """

    id: str
    policy: RoutingPolicy
    values: dict[str, float]
    search_values: dict[str, float]
    measured: dict[str, Any]
    dominated_by: tuple[str, ...] = ()
    gain_over_random: dict[str, float] | None = None

    @property
    def name(self) -> str:
        """The id, under the name that baselines have."""
        return self.id

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "id": self.id,
            "digest": self.policy.digest(),
            "policy": self.policy.to_dict(),
            "values": self.values,
            "search_values": self.search_values,
            "measured": self.measured,
            "dominated_by": list(self.dominated_by),
            "gain_over_random": self.gain_over_random,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Point:
        """The inverse of ``to_dict``, also after JSON."""
        return cls(
            plain["id"],
            RoutingPolicy.from_dict(plain["policy"]),
            plain["values"],
            plain["search_values"],
            plain["measured"],
            tuple(plain["dominated_by"]),
            plain["gain_over_random"],
        )


def amount(item: Point | Baseline, name: str) -> float | None:
    """A measure of a point or baseline on the test split, be it an objective or not."""
    value = item.values.get(name, item.measured.get(name))
    return None if value is None else float(value)


def kept_in(item: Point | Baseline, task: str) -> float | None:
    """The fraction kept in the sequences of one task (None: an older evaluation, which has only that of all)."""
    kept = item.measured.get("kept_by_task", {}).get(task)
    return None if kept is None else float(kept["kept_fraction"])


@dataclass(frozen=True)
class Front:
    """Everything that a report shows.

    ``points`` are sorted by the fraction kept on the test split; ``knee`` is the id of one of them (null: none).
    ``hypervolume`` is that of the search split after the last trial, ``history`` after each; ``hypervolume_test`` that
    of the points on the test split, on the same scale (null: a front of an older version). ``facts``: what else is
    worth telling (counts of trials, seconds), shown as it is. ``comparisons``: some points beside their controls, in
    order of the fraction kept. ``families``: what the front is compared with as a whole. ``lengths``: what is billed,
    and what was measured again on longer sequences.
    """

    run: str
    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    baselines: tuple[Baseline, ...]
    knee: str | None
    hypervolume: float
    history: tuple[float, ...]
    fingerprint: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    families: tuple[FamilyFront, ...] = ()
    hypervolume_test: float | None = None
    knee_choice: KneeChoice | None = None
    lengths: Lengths | None = None

    @property
    def rows(self) -> list[Point | Baseline]:
        """Points, then baselines, then the members of families that are not among the baselines, each once."""
        known = {item.policy for item in self.baselines}
        swept = {item.policy: item for family in self.families for item in family.members if item.policy not in known}
        return [*self.points, *self.baselines, *swept.values()]

    @property
    def best_family(self) -> FamilyFront | None:
        """The family with the largest hypervolume on the test split (null: there is none)."""
        return max(self.families, key=lambda family: family.hypervolume_test, default=None)

    def point(self, name: str) -> Point:
        """The point with this id."""
        return next(point for point in self.points if point.id == name)

    @property
    def quality(self) -> str:
        """The measure of quality that comparisons use: the first among the objectives, else the first measured."""
        named = [name for name in self.objectives if name in QUALITY]
        measured = [name for name in QUALITY if self.rows and amount(self.rows[0], name) is not None]
        return (named or measured or [QUALITY[0]])[0]

    @property
    def cost(self) -> str:
        """The cost that comparisons use: the first cost among the objectives, else the kept fraction."""
        return next((name for name in self.objectives if name not in QUALITY), "kept_fraction")

    def comparison(self, name: str | None) -> Comparison | None:
        """The point of this name beside its controls, if it was compared."""
        return next((item for item in self.comparisons if item.of == name), None)

    def random_of(self, name: str) -> Baseline | None:
        """Random routing at the kept fractions of the point or baseline of this name."""
        return next((item for item in self.baselines if item.of == name), None)

    def beats_random(self, point: Point) -> bool | None:
        """Whether a point is better than random routing by more than the spread of its draws (null: no comparison)."""
        control = self.random_of(point.id)
        if control is None or point.gain_over_random is None or self.quality not in point.gain_over_random:
            return None
        return point.gain_over_random[self.quality] > control.std.get(self.quality, 0.0)

    @property
    def measures(self) -> list[str]:
        """What a table of a front shows: the objectives, the fraction kept, the measure of quality."""
        return list(dict.fromkeys([*self.objectives, "kept_fraction", self.quality]))

    @property
    def tasks(self) -> list[str]:
        """The tasks whose kept fractions are shown beside each other; none if there are fewer than two."""
        names = list(dict.fromkeys(task for item in self.rows for task in item.measured.get("kept_by_task", {})))
        return names if len(names) > 1 else []

    def to_dict(self) -> dict[str, Any]:
        """``front.json``."""
        return {
            "run": self.run,
            "objectives": [{"name": name, "direction": OBJECTIVES[name].direction} for name in self.objectives],
            "points": [point.to_dict() for point in self.points],
            "baselines": [item.to_dict() for item in self.baselines],
            "families": [item.to_dict() for item in self.families],
            "controls": [item.to_dict() for item in self.comparisons],
            "lengths": None if self.lengths is None else self.lengths.to_dict(),
            "knee": self.knee,
            "knee_choice": None if self.knee_choice is None else self.knee_choice.to_dict(),
            "hypervolume": self.hypervolume,
            "hypervolume_test": self.hypervolume_test,
            "hypervolume_history": list(self.history),
            "fingerprint": self.fingerprint,
            "facts": self.facts,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Front:
        """The inverse of ``to_dict``, also after JSON; what older versions did not write is left out."""
        choice, lengths = plain.get("knee_choice"), plain.get("lengths")
        return cls(
            run=plain["run"],
            objectives=tuple(item["name"] for item in plain["objectives"]),
            points=tuple(map(Point.from_dict, plain["points"])),
            baselines=tuple(map(Baseline.from_dict, plain["baselines"])),
            knee=plain["knee"],
            hypervolume=plain["hypervolume"],
            history=tuple(plain["hypervolume_history"]),
            fingerprint=plain["fingerprint"],
            facts=plain.get("facts", {}),
            comparisons=tuple(map(Comparison.from_dict, plain.get("controls", ()))),
            families=tuple(map(FamilyFront.from_dict, plain.get("families", ()))),
            hypervolume_test=plain.get("hypervolume_test"),
            knee_choice=None if choice is None else KneeChoice.from_dict(choice),
            lengths=None if lengths is None else Lengths.from_dict(lengths),
        )

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Names of the columns, and one row per point and baseline; with several tasks ``kept_<task>`` of each."""
        measures = list(dict.fromkeys([*self.objectives, "kept_fraction", *QUALITY]))
        head = ["name", "kind", "digest", "policy", *measures]
        head += [f"kept_{task}" for task in self.tasks]
        head += [f"search_{name}" for name in self.objectives] + [f"std_{name}" for name in measures]
        rows = []
        for item in self.rows:
            std = {} if isinstance(item, Point) else item.std
            row: list[Any] = [item.name, "front" if isinstance(item, Point) else item.kind.value]
            row += [item.policy.digest(), item.policy.describe()]
            row += [amount(item, name) for name in measures]
            row += [kept_in(item, task) for task in self.tasks]
            row += [(item.search_values or {}).get(name) for name in self.objectives]
            row += [std.get(name) for name in measures]
            row.append(" ".join(item.dominated_by) if isinstance(item, Point) else None)
            rows.append([*row, "knee" if isinstance(item, Point) and item.id == self.knee else None])
        return [*head, "dominated_by", "knee"], rows

    def to_csv(self) -> str:
        """``front.csv``: the table."""
        head, rows = self.table()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *rows])
        return text.getvalue()
