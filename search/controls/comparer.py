"""Comparing a policy with its controls on the test split, task by task, at the cost that it has there."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from natsl.counts import Counts
from natsl.search.controls.comparison import (
    LEARNED,
    Comparison,
    InTask,
    Rival,
    Share,
    Trained,
    floor_of,
    selection_share,
)
from natsl.search.controls.registry import CONTROLS
from natsl.search.controls.static import mixture
from natsl.search.fault import WorkerError, describe
from natsl.search.question import Method, Question, Queue
from natsl.space.cost import LayerShape, kv_token_bytes
from natsl.space.policy import Op, RoutingPolicy
from natsl.supernet import seed_of
from natsl.tasks import metrics

ControlCounts: TypeAlias = Callable[[RoutingPolicy, str, int], dict[str, Counts]]

SHUFFLES = 5  # sequences whose routes are borrowed, one after another
STATIC = "static"
_STATIC_LABEL = "whole heads, chosen on the search split by the first objective of quality"


@dataclass(frozen=True)
class Rules:
    """How controls are drawn and told: the seed, draws of random routing, the noise on routes in training."""

    seed: int
    draws: int
    route_noise: float


class Comparer:
    """Compares policies with their controls; counts what that takes, in evaluations (``passes``).

    ``counts`` knows the policies themselves already: only their controls are evaluated, after one pass that records
    what the router does. ``family``: static policies in ascending cost, all-delta first and all-softmax last. A control
    whose results are not finite is left out and noted in ``problems``.
    """

    def __init__(
        self,
        counts: ControlCounts,
        shapes: Sequence[LayerShape],
        family: Sequence[RoutingPolicy],
        rules: Rules,
        queue: Queue | None = None,
    ) -> None:
        self._counts, self._queue = counts, queue or Queue()
        self._chunk = family[0].chunk_size
        self._shapes = shapes
        self._routed = [i for i, shape in enumerate(shapes) if shape.kind is Op.routed]
        self._family = family
        self._rules = rules
        self._static: list[dict[str, Counts]] | None = None
        self.passes = 0
        self.problems: list[str] = []

    def planned(self, hindsight: Iterable[bool]) -> int:
        """``passes`` after so many comparisons, each with hindsight or without, at most."""
        draws = {"shuffled": SHUFFLES, "random_heads": self._rules.draws}
        without, more = 1, 0
        for name, control in CONTROLS.items():
            passes = draws.get(name, 1) * control.passes
            without, more = without + passes * (not control.in_hindsight), more + passes * control.in_hindsight
        return sum(without + more * seen for seen in hindsight)

    def compare(
        self, of: str, policy: RoutingPolicy, hindsight: bool, on_step: Callable[[str], None] = lambda _: None
    ) -> Comparison | None:
        """The point ``of`` beside all controls (None, and a problem noted, if it cannot be scored)."""
        found: dict[str, list[dict[str, Counts]]] = {}
        learned = self._ask(of, policy, LEARNED, 0)
        if learned is None:
            return None
        self.passes += 1
        for name, draws in self._draws(policy, learned, hindsight).items():
            parts = [self._ask(of, policy, name, draw) for draw in draws]
            found[name] = [part for part in parts if part is not None]
            on_step(f"{name}@{of}")
        tasks = [self._in_task(task, counts, found) for task, counts in learned.items()]
        return Comparison(of, tuple(item for item in tasks if item is not None))

    def expect(self, policies: Mapping[RoutingPolicy, bool]) -> None:
        """Say which policies will be compared, each with hindsight or without, so that it can be done at once."""
        questions = []
        for policy, hindsight in policies.items():
            with contextlib.suppress(FloatingPointError):
                learned = self._counts(policy, LEARNED, 0)
                draws = self._draws(policy, learned, hindsight)
                questions += [
                    Question(Method.control, (policy,), (name, n)) for name, some in draws.items() for n in some
                ]
        self._queue.ahead(questions)

    def _draws(self, policy: RoutingPolicy, learned: Mapping[str, Counts], hindsight: bool) -> dict[str, list[int]]:
        """The draws of each control of a policy."""
        shuffles = min(SHUFFLES, min(map(len, learned.values())) - 1)
        seeds = [seed_of("control", self._rules.seed, policy.digest(), draw) >> 31 for draw in range(self._rules.draws)]
        draws = {"shuffled": [*range(1, shuffles + 1)], "random_heads": seeds}
        wanted = [name for name, control in CONTROLS.items() if hindsight or not control.in_hindsight]
        return {name: draws.get(name, [0]) for name in wanted}

    def _ask(self, of: str, policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts] | None:
        self.passes += 0 if name == LEARNED else CONTROLS[name].passes
        try:
            return self._counts(policy, name, draw)
        except (FloatingPointError, torch.OutOfMemoryError, WorkerError) as error:
            backward = name != LEARNED and CONTROLS[name].in_hindsight
            if not isinstance(error, FloatingPointError) and not backward:
                raise
            self.problems.append(f"{name}@{of}: {describe(error)}")
            return None

    def _in_task(
        self, task: str, learned: Counts, found: Mapping[str, Sequence[Mapping[str, Counts]]]
    ) -> InTask | None:
        metric, wrong, weights = task_quality(task, learned)
        if not float(weights.sum()):
            return None  # nothing is scored
        of_task = {name: [part[task] for part in parts if task in part] for name, parts in found.items()}
        rivals = [self._rival(name, task, parts) for name, parts in of_task.items() if parts]
        share: Share | None = None
        if of_task["shuffled"] and of_task.get("hindsight"):
            shuffled, hindsight = (_mean_amounts(task, of_task[name]) for name in ("shuffled", "hindsight"))
            sums = shuffled.numpy(), wrong.numpy(), hindsight.numpy(), weights.numpy()
            share = selection_share(*sums, floor_of(metric))
        own = self._rival(LEARNED, task, [learned])
        return InTask(task, metric, own, (*self._mixed(task, own), *rivals), share)

    def _rival(self, name: str, task: str, parts: Sequence[Counts]) -> Rival:
        values = [task_value(task, part) for part in parts]
        control = CONTROLS.get(name)
        trained = Trained.always if control is None else control.trained
        return Rival(
            name=name,
            label="learned router" if control is None else control.label,
            value=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else 0.0,
            draws=len(values),
            kept=statistics.fmean(self._kept(part) for part in parts),
            bytes=statistics.fmean(self._bytes(part) for part in parts),
            trained=trained.covers(self._rules.route_noise),
        )

    def _mixed(self, task: str, learned: Rival) -> list[Rival]:
        """Static heads at the cost of the learned router: two neighbours of the family, each for a part of requests."""
        if self._static is None:
            results = [self._ask(policy.describe(), policy, LEARNED, 0) for policy in self._family]
            self._static = [counts for counts in results if counts is not None]
        family = [counts[task] for counts in self._static]
        if not family:
            return []
        i, j, weight = mixture([self._kept(part) for part in family], learned.kept)

        def mixed(amount: Callable[[Counts], float]) -> float:
            return (1 - weight) * amount(family[i]) + weight * amount(family[j])

        value, kept, size = mixed(lambda part: task_value(task, part)), mixed(self._kept), mixed(self._bytes)
        return [replace(learned, name=STATIC, label=_STATIC_LABEL, value=value, kept=kept, bytes=size)]

    def _kept(self, counts: Counts) -> float:
        """Fraction of the complete chunks, over the layers with a router."""
        kept = counts.kept[:, self._routed].double().mean()
        return float(kept) / max(counts.chunks, 1)

    def _bytes(self, counts: Counts) -> float:
        """Bytes of the keys and values of the kept complete chunks of a sequence."""
        kept = counts.kept.double().mean((0, 2))  # [L], of a head
        return sum(float(kept[i]) * kv_token_bytes(self._shapes[i]) * self._chunk for i in self._routed)


def task_quality(task: str, counts: Counts) -> tuple[str, Tensor, Tensor]:
    """A task's own measure, with amounts and weights per sequence, float64 [B]: wrong answers, else nats of text."""
    if task in metrics() and bool(counts.asked.any()):
        return metrics()[task], (counts.asked - counts.right).double(), counts.asked.double()
    return "val_loss", counts.nats, counts.tokens.double()


def task_value(task: str, counts: Counts) -> float:
    """A task's own measure of quality, over all its sequences; smaller is better."""
    _, amounts, weights = task_quality(task, counts)
    return float(amounts.sum() / weights.sum())


def _mean_amounts(task: str, parts: Sequence[Counts]) -> Tensor:
    return torch.stack([task_quality(task, part)[1] for part in parts]).mean(0)
