"""Scoring a front and its baselines on the test split, and comparing them with each other."""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from natsl.counts import Counts
from natsl.evaluate import Evaluation, summary
from natsl.search.baseline import Named
from natsl.search.bootstrap import resampled, standard_error
from natsl.search.config import SearchConfig
from natsl.search.controls.comparison import LEARNED, spread_out
from natsl.search.controls.static import Shape, greedy_heads
from natsl.search.families import Family, Swept
from natsl.search.front import Baseline, FamilyFront, Kind, KneeChoice, Point, amount
from natsl.search.judge import Judge
from natsl.search.objective import OBJECTIVES, QUALITY, measure
from natsl.search.pareto import Scale, dominates, family_dominates, non_dominated
from natsl.search.question import Method, Question
from natsl.search.study import Problem
from natsl.search.trial import Record
from natsl.space.policy import Op, RoutingPolicy
from natsl.tree import common_order

R = TypeVar("R")

RANDOM_POINTS = 8  # of a front beside which random routing stands
RANDOM_UNIFORM = 3  # uniform baselines beside which it stands


class Scorer:
    """Scores policies on both splits, each at most once."""

    def __init__(
        self, judge: Judge, problem: Problem, config: SearchConfig, seed: int, records: Sequence[Record] = ()
    ) -> None:
        self._judge = judge
        self._problem = problem
        self.names = tuple(item.name for item in problem.objectives)
        self._bounds = config.constraints
        self._seed = seed
        self._draws = config.random_draws
        self._group = config.batch_size
        self._mix_temperature = config.space.neutral_mix
        self._search = {r.policy.digest(): r.evaluation for r in records if r.evaluation is not None and r.complete}
        self._test: dict[str, dict[str, Counts]] = {}
        self._drawn = 0
        self._of_families: set[str] = set()  # policies that only families asked for, on the search split
        self._passes: dict[str, list[list[RoutingPolicy]]] = {}  # by the name of a family
        self._repeated = 0  # policies in them that trials, or whole heads, had asked for too
        self.problems: list[str] = []  # policies that could not be scored, and why

    def on_search(self, policy: RoutingPolicy) -> Evaluation:
        """The policy on the search split."""
        return _cached(self._search, policy, lambda policy: self._judge.search(policy, 1.0))

    def on_share(self, policy: RoutingPolicy, share: float) -> Evaluation:
        """The policy on a share of the search split's sequences."""
        return self.on_search(policy) if share == 1 else self._judge.search(policy, share)

    def prepare(
        self,
        policies: Sequence[RoutingPolicy],
        on_step: Callable[[int, str], None] = lambda done, text: None,
        *,
        trials: bool = False,
    ) -> None:
        """Score policies on the search split, several in a pass, so that asking for them later costs nothing.

        ``trials``: they are trials of the search. What cannot be scored is left to be asked for by itself.
        """
        self._prepare(self._groups(policies), on_step, trials)

    def _prepare(
        self, groups: Sequence[Sequence[RoutingPolicy]], on_step: Callable[[int, str], None], trials: bool
    ) -> None:
        self._judge.queue.ahead([Question(Method.search_each, tuple(group), (trials,)) for group in groups])
        done = 0
        for group in groups:
            with contextlib.suppress(ValueError, MemoryError, RuntimeError):
                for policy, results in zip(group, self._judge.search_each(group, trials), strict=True):
                    if results:
                        self._search.setdefault(policy.digest(), results[1.0])
            done += len(group)
            on_step(done, "")

    def _groups(self, policies: Sequence[RoutingPolicy]) -> list[list[RoutingPolicy]]:
        """Distinct policies as they share passes."""
        wanted = sorted(set(policies), key=common_order)
        return [wanted[first : first + self._group] for first in range(0, len(wanted), self._group)]

    def expect_sweeps(
        self, families: Sequence[tuple[Family, Sequence[Named]]], first: Sequence[RoutingPolicy], later: bool = False
    ) -> None:
        """Say which families ``sweep`` will be given, ``later`` or next.

        What shares a pass depends only on them and on ``first``, the policies that the search tries before its sampler
        draws: whatever the trials find, and whenever it is asked, the results are the same.
        """
        known, questions = set(first), []
        for family, members in families:
            unknown = [named.policy for named in members if named.policy not in known]
            known.update(unknown)
            groups = self._passes[family.name] = self._groups(unknown)
            questions += [Question(Method.search_each, tuple(group), (False,)) for group in groups]
        ask = self._judge.queue.later if later else self._judge.queue.ahead
        ask(questions)

    def expect_search(self, policies: Iterable[RoutingPolicy]) -> None:
        """Say which policies ``on_search`` will be asked about."""
        unknown = [policy for policy in policies if policy.digest() not in self._search]
        self._judge.queue.ahead([Question.search(policy, 1.0) for policy in unknown])

    def expect_test(self, policies: Iterable[RoutingPolicy], later: bool = False) -> None:
        """Say which policies ``on_test`` will be asked about, ``later`` or next."""
        unknown = [Question.test(policy) for policy in policies if policy.digest() not in self._test]
        if later:
            self._judge.queue.later(unknown)
        else:
            self._judge.queue.ahead(unknown)

    def expect_random(self, items: Iterable[Point | Baseline]) -> None:
        """Say which policies ``random`` will be asked about."""
        draws = [(item.policy, self._random_draws(item)) for item in items]
        self._judge.queue.ahead([Question(Method.random, (policy,), draw) for policy, some in draws for draw in some])

    def _random_draws(self, of: Point | Baseline) -> list[tuple[tuple[float, ...], int]]:
        """Kept fractions and seeds of the draws of random routing where a policy routes."""
        if all(layer.op is not Op.routed for layer in of.policy.layers):
            return []
        fractions = Evaluation.from_dict(of.measured).kept_by_layer
        return [(fractions, _seed(self._seed, of.policy, draw)) for draw in range(self._draws)]

    def on_test(self, policy: RoutingPolicy) -> Evaluation:
        """The policy on the test split."""
        return summary(self.counts(policy, LEARNED, 0), self._problem.kinds)

    def counts(self, policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
        """What is counted on the test split under a control (``LEARNED``: under the policy itself)."""
        if name == LEARNED:
            return _cached(self._test, policy, self._judge.test)
        return self._judge.control(policy, name, draw)

    def scale(self) -> Scale:
        """The scale from all-softmax to all-delta on the search split."""
        return Scale.between(self.names, *self._ends())

    def _ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """The objectives of all-softmax and of all-delta on the search split."""
        kinds, chunk = self._problem.kinds, self._problem.chunk_size
        softmax, delta = RoutingPolicy.all_softmax(kinds, chunk), RoutingPolicy.all_delta(kinds, chunk)
        return self._values(self.on_search(softmax), softmax), self._values(self.on_search(delta), delta)

    def no_use_of_softmax(self) -> str | None:
        """A line if all-softmax is in no objective of quality better than all-delta on the search split (else None)."""
        softmax, delta = self._ends()
        names = [name for name in self.names if name in QUALITY]
        if not names or any(softmax[name] < delta[name] for name in names):
            return None
        return (
            f"all-softmax is no better than all-delta in {' and '.join(names)}: the supernet has not learned what "
            "softmax is of use for, as after too few train.steps, and the front says nothing about routing"
        )

    def evaluations(self, records: Sequence[Record]) -> dict[str, float]:
        """How many evaluations were made: of the trials, beside them on the search split, and on the test split.

        A trial that was judged on a part of the sequences counts as that part. Stored results count as well. Those of
        families are their own, the others beside the trials are of baselines.
        """
        tried = {record.policy.digest(): record.share for record in records if record.evaluation is not None}
        complete = {digest for digest, share in tried.items() if share == 1}
        return {
            "trials": round(sum(tried.values()), 2),
            "search split": len(self._search.keys() - complete - self._of_families),
            "families": len(self._of_families - complete) + self._repeated,
            "test split": len(self._test) + self._drawn,
        }

    def static_heads(self, on_step: Callable[[str], None]) -> list[Named]:
        """Whole heads, one more in each, which nothing cheaper among them beats on the search split."""
        problem, quality = self._problem, self._quality()
        kinds = problem.kinds
        shape = Shape(kinds, problem.heads, problem.chunk_size, self._mix_temperature)

        def judge(policy: RoutingPolicy) -> tuple[float, ...]:
            try:
                evaluation = self.on_search(policy)
            except FloatingPointError:
                return (math.inf,)
            values = [OBJECTIVES[name].value(evaluation, policy, problem.costs) for name in (quality, "val_loss")]
            return tuple(math.inf if value is None else value for value in values)

        def step(policy: RoutingPolicy) -> tuple[float, ...]:
            value = judge(policy)
            on_step(policy.describe())
            return value

        best, found = judge(RoutingPolicy.all_delta(kinds, problem.chunk_size)), []
        for i, policy in enumerate(greedy_heads(shape, step, self.expect_search)):
            if judge(policy) < best:
                best = judge(policy)
                found.append(Named(f"static-{i + 1}", Kind.static, policy))
        return found

    def sweep(self, family: Family, policies: Sequence[Named], on_step: Callable[[str], None]) -> Swept:
        """A family on the search split, from all of its policies; what cannot be scored is left out and noted."""
        good: list[tuple[Named, dict[str, float]]] = []
        failed: list[str] = []
        groups = self._passes.get(family.name)
        if groups is None:
            groups = self._groups([item.policy for item in policies if item.policy.digest() not in self._search])
        wanted = {policy.digest() for group in groups for policy in group}
        self._of_families |= wanted - self._search.keys()
        self._repeated += len(wanted & self._search.keys())
        self._prepare(groups, lambda done, text: None, trials=False)
        for named in policies:
            try:
                evaluation = self.on_search(named.policy)
                values = self._values(evaluation, named.policy)
                if self._feasible(evaluation, named.policy):
                    good.append((named, values))
            except FloatingPointError as error:
                failed.append(f"{named.name}: {error}")
            on_step(named.name)
        if failed:
            self.problems.append(f"{len(failed)} policies of family {family.name} failed, the last one {failed[-1]}")
        kept = [good[i] for i in non_dominated([values for _, values in good], self.names)]
        volume = self.scale().hypervolume([values for _, values in kept])
        return Swept(family, tuple(named for named, _ in kept), volume)

    def _quality(self) -> str:
        """The measure of quality by which heads are chosen: the first objective that is one, else the first known."""
        named = [name for name in self.names if name in QUALITY]
        softmax = RoutingPolicy.all_softmax(self._problem.kinds, self._problem.chunk_size)
        known = self.on_search(softmax)
        measured = [name for name in QUALITY if OBJECTIVES[name].value(known, softmax, self._problem.costs) is not None]
        return (named or measured)[0]

    def point(self, record: Record) -> Point | None:
        """A point of the front, without comparisons; None (and a problem noted) if its test score is not finite."""
        assert record.values is not None, "a record without values is not on the front"
        try:
            tested = self.on_test(record.policy)
            values = self._values(tested, record.policy)
        except FloatingPointError as error:
            self.problems.append(f"{record.id}: {error} on the test split")
            return None
        return Point(record.id, record.policy, values, record.values, tested.to_dict())

    def baseline(self, named: Named) -> Baseline | None:
        """A baseline on both splits; None (and a problem noted) if a score is not finite."""
        try:
            tested = self.on_test(named.policy)
            values = self._values(tested, named.policy)
            searched = self._values(self.on_search(named.policy), named.policy)
            feasible = self._feasible(tested, named.policy)
        except FloatingPointError as error:
            self.problems.append(f"{named.name}: {error}")
            return None
        return Baseline(named.name, named.kind, named.policy, values, tested.to_dict(), searched, feasible=feasible)

    def random(self, of: Point | Baseline) -> Baseline | None:
        """Random routing where this policy routes, at its kept fractions and costs; None if it routes nowhere."""
        policy, name, planned = of.policy, of.name, self._random_draws(of)
        if not planned:
            return None
        model = Evaluation.from_dict(of.measured)
        self.expect_random([of])
        try:
            draws = [self._judge.random(policy, *draw) for draw in planned]
            self._drawn += len(draws)
            mean = Evaluation.from_dict(_mean([evaluation.to_dict() for evaluation in draws]))
            # equal by construction; taken over so that the order of additions decides no comparison
            mean = replace(mean, kept_fraction=model.kept_fraction, kept_by_layer=model.kept_by_layer)
            values, feasible = self._values(mean, policy), self._feasible(mean, policy)
        except FloatingPointError as error:
            self.problems.append(f"random@{name}: {error}")
            return None
        return Baseline(
            name=f"random@{name}",
            kind=Kind.random,
            policy=policy,
            values=values,
            measured=mean.to_dict(),
            std=self._spread(draws, policy),
            draws=self._draws,
            of=name,
            feasible=feasible,
        )

    def _spread(self, draws: Sequence[Evaluation], policy: RoutingPolicy) -> dict[str, float]:
        """The standard deviation of every measure of quality that the draws have."""
        spread = {}
        for name in QUALITY:
            values = [OBJECTIVES[name].value(evaluation, policy, self._problem.costs) for evaluation in draws]
            numbers = [value for value in values if value is not None]
            if numbers:
                spread[name] = statistics.stdev(numbers)
        return spread

    def family_fronts(
        self, points: Sequence[Point], swept: Sequence[Swept], members: Mapping[str, Baseline]
    ) -> tuple[FamilyFront, ...]:
        """The families beside the front of these points, from their members on the test split by digest."""
        scale, cost = self.scale(), next((name for name in self.names if name not in QUALITY), "kept_fraction")
        found = [[members[m.policy.digest()] for m in item.members if m.policy.digest() in members] for item in swept]
        found = [sorted(items, key=lambda item: amount(item, cost) or 0.0) for items in found]
        scored: list[Point | Baseline] = [*points, *(item for items in found for item in items)]
        policies = list(dict.fromkeys(item.policy for item in scored))
        place = {policy: i for i, policy in enumerate(policies)}
        tested = [(policy, self.counts(policy, LEARNED, 0)) for policy in policies]
        draws = resampled(tested, self._problem, self._seed) if swept else []

        def volumes(items: Sequence[Point | Baseline]) -> tuple[float, list[float]]:
            """The hypervolume on the test split, and in every draw of its sequences."""
            places = [place[item.policy] for item in items]
            drawn = [scale.hypervolume([draw[i] for i in places]) for draw in draws]
            return scale.hypervolume([item.values for item in items]), drawn

        front, front_draws = volumes(points)
        families = []
        for item, items in zip(swept, found, strict=True):
            volume, drawn = volumes(items)
            error = standard_error([a - b for a, b in zip(front_draws, drawn, strict=True)])
            family, search = item.family, item.hypervolume
            families.append(FamilyFront(family.name, family.label, tuple(items), search, volume, front - volume, error))
        return tuple(families)

    def _values(self, evaluation: Evaluation, policy: RoutingPolicy) -> dict[str, float]:
        return measure(self.names, evaluation, policy, self._problem.costs)

    def _feasible(self, evaluation: Evaluation, policy: RoutingPolicy) -> bool:
        limited = measure(list(self._bounds), evaluation, policy, self._problem.costs)
        return all(value <= self._bounds[name] for name, value in limited.items())


def steps_to_score(records: Sequence[Record], fixed: Sequence[Named], swept: Sequence[Swept]) -> int:
    """How often ``score`` calls ``on_step`` at most."""
    points = len(records) + min(len(records), RANDOM_POINTS)
    members = sum(len(item.members) for item in swept)
    return points + len(fixed) + min(sum(item.kind is Kind.uniform for item in fixed), RANDOM_UNIFORM) + members


def score(
    scorer: Scorer,
    records: Sequence[Record],
    fixed: Sequence[Named],
    swept: Sequence[Swept],
    on_step: Callable[[str], None],
    on_points: Callable[[Sequence[Point], int | None], None] = lambda points, knee: None,
) -> tuple[tuple[Point, ...], tuple[Baseline, ...], tuple[FamilyFront, ...]]:
    """The front, its baselines and the families of baselines on the test split, compared with each other.

    Random routing stands beside uniform budgets and points; of many beside ``RANDOM_UNIFORM`` and ``RANDOM_POINTS``,
    the ends among them, and the knee. Points come in order of the fraction kept. What cannot be scored is left out and
    noted in ``scorer.problems``. ``on_points`` is called with the points, and which one is the knee, as soon as they
    are scored: what follows of them can be asked for while their baselines are.
    """
    single = [named.policy for named in fixed]
    of_families = [member.policy for item in swept for member in item.members]
    scorer.expect_test([*single, *(record.policy for record in records), *of_families])
    scorer.expect_search([*single, *of_families])
    others: list[Baseline] = []
    for named in fixed:
        baseline = scorer.baseline(named)
        on_step(named.name)
        if baseline is not None:
            others.append(baseline)
    uniform = [item for item in others if item.kind is Kind.uniform]
    beside: list[Point | Baseline] = [uniform[place] for place in spread_out(len(uniform), RANDOM_UNIFORM)]
    scorer.expect_random(beside)
    points: list[Point] = []
    for record in records:
        point = scorer.point(record)
        on_step(record.id)
        if point is not None:
            points.append(point)
    points.sort(key=lambda point: (point.measured["kept_fraction"], point.id))
    knee = scorer.scale().knee([point.search_values for point in points])
    beside += [points[place] for place in spread_out(len(points), RANDOM_POINTS, knee)]
    scorer.expect_random(beside)
    on_points(points, knee)
    members = _members(scorer, others, swept, on_step)
    for item in beside:
        control = scorer.random(item)
        on_step(f"random routing beside {item.name}")
        if control is not None:
            others.append(control)
    families = scorer.family_fronts(points, swept, members)
    digests = {named.policy.digest() for item in swept for named in item.members}
    alone = [item for item in others if item.kind is Kind.random or item.policy.digest() not in digests]
    return tuple(_compared(point, alone, families, scorer.names) for point in points), tuple(others), families


def knee_choice(points: Sequence[Point], knee: int, scale: Scale) -> KneeChoice:
    """The knee beside the point that has the least sum of scaled objectives on the test split."""
    sums = [float(total) for total in scale.apply([point.values for point in points]).sum(axis=1)]
    best = min(range(len(points)), key=lambda i: (sums[i], i != knee))
    return KneeChoice(points[knee].id, sums[knee], points[best].id, sums[best])


def _members(
    scorer: Scorer, others: Sequence[Baseline], swept: Sequence[Swept], on_step: Callable[[str], None]
) -> dict[str, Baseline]:
    """The members of families on the test split by digest, under the names that they have as single baselines."""
    known = {item.policy.digest(): item for item in others}
    for named in (named for item in swept for named in item.members):
        if named.policy.digest() not in known:
            baseline = scorer.baseline(named)
            if baseline is not None:
                known[named.policy.digest()] = baseline
        on_step(named.name)
    return known


def _compared(point: Point, others: Sequence[Baseline], families: Sequence[FamilyFront], names: Sequence[str]) -> Point:
    """The point with what dominates it and what it gains over random routing."""
    better = [
        family.name
        for family in families
        if family_dominates([item.values for item in family.members if item.feasible], point.values, names)
    ]
    better += [item.name for item in others if item.feasible and dominates(item.values, point.values, names)]
    control = next((item for item in others if item.of == point.id), None)
    gain = None if control is None else _gain(point, control)
    return replace(point, dominated_by=tuple(better), gain_over_random=gain)


def _gain(learned: Point, control: Baseline) -> dict[str, float]:
    """By how much the control is worse, in every measure of quality that both have."""
    pairs = {name: (amount(learned, name), amount(control, name)) for name in QUALITY}
    return {name: theirs - ours for name, (ours, theirs) in pairs.items() if ours is not None and theirs is not None}


def _cached(cache: dict[str, R], policy: RoutingPolicy, evaluate: Callable[[RoutingPolicy], R]) -> R:
    digest = policy.digest()
    if digest not in cache:
        cache[digest] = evaluate(policy)
    return cache[digest]


def _mean(values: Sequence[Any]) -> Any:
    """Mean of numbers, or of nested tuples and mappings of them, or None where there is none.

    A mapping keeps the keys that all have: a draw that an older version has stored may lack some.
    """
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first if all(key in value for value in values)}
    if isinstance(first, tuple):
        return tuple(_mean([value[i] for value in values]) for i in range(len(first)))
    return statistics.fmean(values)


def _seed(seed: int, policy: RoutingPolicy, draw: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{policy.digest()}:{draw}".encode()).digest()[:4], "big")
