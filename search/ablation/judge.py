"""Judging the router of a trained supernet: policies beside their controls, task by task, at several lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from natsl.answers import sequences_at
from natsl.counts import Counts
from natsl.data import Split, TaskData
from natsl.evaluate import count, summary
from natsl.model import RoutedLM
from natsl.search.ablation.allocation import Measured, allocate
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.record import Spread, plain_task, rounded
from natsl.search.controls.comparer import Comparer, Rules, task_quality, task_value
from natsl.search.controls.comparison import LEARNED
from natsl.search.controls.learned import Subject, follow
from natsl.search.controls.registry import ControlRunner
from natsl.search.controls.static import Shape, greedy_heads
from natsl.search.headroom import headroom
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.bytes import BytesTask
from natsl.tasks.sequences import Batch


class Sequences:
    """Counts what policies do on some sequences, each policy once; controls are made anew."""

    def __init__(self, model: RoutedLM, sets: Mapping[str, Batch], batch_size: int) -> None:
        self._subject = Subject(model, sets, batch_size)
        self._control = ControlRunner(self._subject)
        self._known: dict[str, dict[str, Counts]] = {}

    def counts(self, policy: RoutingPolicy, name: str = LEARNED, draw: int = 0) -> dict[str, Counts]:
        """Counts of each task under a policy, or a control of it; ``FloatingPointError`` if they are not finite."""
        if name != LEARNED:
            return self._control(policy, name, draw)
        digest, subject = policy.digest(), self._subject
        if digest not in self._known:
            self._known[digest] = count(subject.model, policy, subject.sets, batch_size=subject.batch_size)
        return self._known[digest]


class Judge:
    """Chooses policies of a supernet on the search split and compares them with their controls on the test split.

    Static heads are chosen by the first task, the layers that get the budget by the loss of text if the data has the
    task ``bytes``, else by the first task too.
    """

    def __init__(self, model: RoutedLM, data: TaskData, config: AblationConfig, rules: Rules) -> None:
        self._model, self._data, self._config, self._rules = model, data, config, rules
        self._first = data.tasks[0]
        self._allocated_by = BytesTask.name if BytesTask.name in data.tasks else self._first
        sets = data.eval_sets(Split.search)
        self._search = {
            task: Sequences(model, {task: sets[task]}, config.batch_size) for task in {self._first, self._allocated_by}
        }
        self._problems: list[str] = []

    def judge(self) -> dict[str, Any]:
        """The results, JSON-ready; what could not be scored is named in ``problems``."""
        family = self.static_family()
        policies = self.policies(family)
        lengths = [self._at(factor, policies, family) for factor in self._config.factors]
        return {
            "static": [policy.describe() for policy in family[1:-1]],
            "lengths": lengths,
            "headroom": self._headroom(policies) if self._config.headroom_sequences else [],
            "sample": self._sample(policies),
            "problems": self._problems,
        }

    def _sample(self, policies: Mapping[tuple[Spread, float], RoutingPolicy]) -> dict[str, Any] | None:
        """One sequence of test text and what is kept of it at the smallest budget, in the best layers.

        ``text``: a string per complete chunk. ``kept``: for each of them the names (layer.head) of the heads that keep
        it, out of ``heads``, those that keep any. None for token ids, without the task ``bytes``, without a routed
        layer or a finite result.
        """
        if not policies or BytesTask.name not in self._data.tasks or self._data.corpus.tokens:
            return None
        budget = min(self._config.budgets)
        policy = policies[Spread.layers, budget]
        batch = self._data.eval_sets(Split.test)[BytesTask.name].rows(slice(0, 1))
        try:
            (routes,) = follow(Subject(self._model, {"text": batch}, 1), policy).routes.values()
        except FloatingPointError:
            return None  # noted where the router was compared
        C = policy.chunk_size
        rows = [bytes(row) for row in batch.tokens[0, : len(batch.tokens[0]) // C * C].view(-1, C).tolist()]
        kept = {
            f"{i}.{head}": route[0, : len(rows), head].tolist()
            for i, route in enumerate(routes)
            if route is not None
            for head in range(route.shape[2])
        }
        heads = [name for name, row in kept.items() if any(row)]
        return {
            "budget": budget,
            "text": [row.decode("utf-8", "replace") for row in rows],
            "heads": heads,
            "kept": [[name for name in heads if kept[name][n]] for n in range(len(rows))],
        }

    def _headroom(self, policies: Mapping[tuple[Spread, float], RoutingPolicy]) -> list[dict[str, Any]]:
        """What predictors of gains get of the headroom of text, at every uniform budget."""
        number, size = self._config.headroom_sequences, max(1, self._config.batch_size // 4)
        train = self._data.batch(BytesTask.name, Split.train, number, seed=0)
        test = self._data.eval_sets(Split.test)[BytesTask.name]
        found = []
        for (spread, budget), policy in policies.items():
            if spread is not Spread.uniform:
                continue
            try:
                found.append({"budget": budget, **rounded(headroom(self._model, policy, train, test, size))})
            except FloatingPointError as error:
                self._problems.append(f"headroom at {budget:g}: {error}")
        return found

    def static_family(self) -> list[RoutingPolicy]:
        """All-delta, whole heads that nothing cheaper among them beats on the search split, and all-softmax."""
        kinds, chunk = self._model.kinds, self._model.config.chunk_size
        ends = RoutingPolicy.all_delta(kinds, chunk), RoutingPolicy.all_softmax(kinds, chunk)
        best, chosen = self._quality(ends[0]), []
        for policy in greedy_heads(Shape(tuple(kinds), self._model.config.heads, chunk), self._quality):
            if self._quality(policy) < best:
                best = self._quality(policy)
                chosen.append(policy)
        return [ends[0], *chosen, ends[1]]

    def _quality(self, policy: RoutingPolicy) -> tuple[float, float]:
        """The first task's own quality, then the loss of its text, on the search split; smaller is better."""
        try:
            counts = self._search[self._first].counts(policy)[self._first]
        except FloatingPointError:
            return math.inf, math.inf
        text = float(counts.nats.sum()) / max(int(counts.tokens.sum()), 1)
        return task_value(self._first, counts), text

    def policies(self, family: list[RoutingPolicy]) -> dict[tuple[Spread, float], RoutingPolicy]:
        """The policies that are judged at each budget (none where nothing is routed: only the anchors are measured)."""
        kinds, chunk = self._model.kinds, self._model.config.chunk_size
        if Op.routed not in kinds:
            return {}
        static = [item for item in map(self._measure, family) if math.isfinite(item.quality)]
        chosen = {}
        for budget in self._config.budgets:
            chosen[Spread.layers, budget] = allocate(kinds, chunk, budget, self._measure, static)
            chosen[Spread.uniform, budget] = RoutingPolicy.uniform(kinds, chunk, budget)
        return chosen

    def _measure(self, policy: RoutingPolicy) -> Measured:
        """A policy in the task that decides the allocation, on the search split."""
        task = self._allocated_by
        try:
            counts = self._search[task].counts(policy)
        except FloatingPointError:
            return Measured(math.inf, 0.0)
        kept = summary(counts, self._model.kinds).kept_fraction_by_task[task]
        return Measured(task_value(task, counts[task]), kept)

    def _at(
        self, factor: int, policies: Mapping[tuple[Spread, float], RoutingPolicy], family: list[RoutingPolicy]
    ) -> dict[str, Any]:
        """The policies on test sequences of ``factor`` times the length of the data."""
        data, settings = self._data, self._config
        tokens = factor * data.config.seq_len
        if factor == 1:
            sets = data.eval_sets(Split.test)
        else:
            number = sequences_at(tokens, data.config)
            sets = {task: data.batch(task, Split.test, number, seed=0, length=tokens, grow=True) for task in data.tasks}
        sequences = Sequences(self._model, sets, max(1, settings.batch_size // factor))
        comparer = Comparer(sequences.counts, self._model.config.layer_shapes(), family, self._rules)
        tasks: dict[str, dict[str, Any]] = {}  # by policy: two budgets may come to the same one
        for (spread, budget), policy in policies.items():
            if policy.digest() not in tasks:
                name = f"{spread.value} {budget:g} at {tokens} tokens"
                tasks[policy.digest()] = self._compared(name, policy, comparer, sequences)
        self._problems += comparer.problems
        return {
            "length": factor,
            "tokens": tokens,
            "sequences": len(next(iter(sets.values()))),
            "anchors": self._anchors(family[-1], family[0], sequences),
            "policies": [
                {
                    "spread": spread.value,
                    "budget": budget,
                    "policy": policy.describe(),
                    "tasks": tasks[policy.digest()],
                }
                for (spread, budget), policy in policies.items()
            ],
        }

    def _compared(self, name: str, policy: RoutingPolicy, comparer: Comparer, sequences: Sequences) -> dict[str, Any]:
        comparison = comparer.compare(name, policy, hindsight=self._config.hindsight)
        if comparison is None:
            return {}
        heads = summary(sequences.counts(policy), self._model.kinds).kept_by_task
        plain: dict[str, Any] = rounded({item.task: plain_task(item, heads[item.task]) for item in comparison.tasks})
        return plain

    def _anchors(self, softmax: RoutingPolicy, delta: RoutingPolicy, sequences: Sequences) -> dict[str, Any]:
        """Quality of all-softmax and of all-delta in each task (None: not finite)."""
        found: dict[str, Any] = {}
        for name, policy in (("softmax", softmax), ("delta", delta)):
            try:
                counts = sequences.counts(policy)
            except FloatingPointError:
                continue  # noted where the router was compared
            for task, own in counts.items():
                metric, _, weights = task_quality(task, own)
                if float(weights.sum()):
                    entry = found.setdefault(task, {"metric": metric, "softmax": None, "delta": None})
                    entry[name] = rounded(task_value(task, own))
        return found
