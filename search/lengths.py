"""Policies of a front measured again on longer sequences, which hold more to recall. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from natsl.errors import UserError
from natsl.search.objective import OBJECTIVES, CostContext, Role
from natsl.search.question import Method, Question
from natsl.space.policy import RoutingPolicy

if TYPE_CHECKING:
    from natsl.data import TaskData
    from natsl.evaluate import Evaluation
    from natsl.model import RoutedLM
    from natsl.search.config import SearchConfig
    from natsl.search.judge import Judge
    from natsl.tasks.sequences import Batch


@dataclass(frozen=True)
class Planted:
    """Pairs or needles of a sequence, and how many it would hold with keys enough."""

    count: int
    wanted: int


@dataclass(frozen=True)
class AtLength:
    """What was measured on test sequences of ``tokens`` tokens, ``sequences`` of each task.

    ``planted``: of the tasks that plant something. ``measured``: name of a policy → its evaluation, as ``to_dict`` of
    ``Evaluation``; ``costs``: name → every cost objective, billed at this length. ``left_out``: task or policy → why.
    """

    tokens: int
    sequences: int
    planted: dict[str, Planted]
    measured: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, float]]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "planted": {task: {"count": item.count, "wanted": item.wanted} for task, item in self.planted.items()},
            "policies": {
                name: {"measured": measured, "costs": self.costs[name]} for name, measured in self.measured.items()
            },
            "left_out": self.left_out,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> AtLength:
        """The inverse of ``to_dict``, also after JSON."""
        policies = plain["policies"]
        return cls(
            plain["tokens"],
            plain["sequences"],
            {task: Planted(**item) for task, item in plain["planted"].items()},
            {name: item["measured"] for name, item in policies.items()},
            {name: item["costs"] for name, item in policies.items()},
            plain["left_out"],
        )


@dataclass(frozen=True)
class Lengths:
    """At which lengths, in tokens, policies were searched (``searched_at``), billed and measured again, ascending."""

    searched_at: int
    billed_at: int
    measured: tuple[AtLength, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "searched_at": self.searched_at,
            "billed_at": self.billed_at,
            "measured": [item.to_dict() for item in self.measured],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Lengths:
        """The inverse of ``to_dict``, also after JSON."""
        measured = tuple(map(AtLength.from_dict, plain["measured"]))
        return cls(plain["searched_at"], plain["billed_at"], measured)


class LengthJudge:
    """Evaluates policies of a supernet on test sequences of other lengths; those of one length are remembered."""

    def __init__(self, model: RoutedLM, data: TaskData, batch_size: int) -> None:
        self._model, self._data, self._batch_size = model, data, batch_size
        self._known: tuple[tuple[int, int, tuple[str, ...]], dict[str, Batch]] | None = None

    def __call__(self, policy: RoutingPolicy, tokens: int, count: int, tasks: tuple[str, ...]) -> Evaluation:
        """The policy on ``count`` sequences of ``tokens`` tokens of each of these tasks."""
        from natsl.evaluate import evaluate

        of = (tokens, count, tasks)
        if self._known is None or self._known[0] != of:
            self._known = of, {task: _sequences(self._data, task, tokens, count) for task in tasks}
        own = self._data.config.seq_len
        at_once = max(1, self._batch_size * own // tokens)  # tokens of a pass stay as many
        return evaluate(self._model, policy, self._known[1], batch_size=at_once)


class LengthRunner:
    """Measures policies of a supernet at the lengths that a search names.

    On a GPU costs may be billed at a length of their own, ``search.context``: policies are measured there as well.
    """

    def __init__(self, judge: Judge, data: TaskData, config: SearchConfig, costs: CostContext, on_gpu: bool) -> None:
        self._judge, self._data, self._costs = judge, data, costs
        own = data.config.seq_len
        lengths = {factor * own for factor in config.lengths}
        if on_gpu and costs.context != own:
            lengths.add(costs.context)
        self.lengths = tuple(sorted(lengths))
        self._known: dict[int, tuple[int, tuple[str, ...], dict[str, str]]] = {}  # by length, as of ``_tasks``

    def expect(self, policies: Collection[RoutingPolicy]) -> None:
        """Say which policies ``measure`` will be given."""
        for tokens in self.lengths:
            count, tasks, _ = self._tasks(tokens)
            if tasks and tokens != self._data.config.seq_len:
                asked = [Question(Method.length, (policy,), (tokens, count, tasks)) for policy in policies]
                self._judge.queue.ahead(asked)

    def measure(
        self,
        policies: Mapping[str, RoutingPolicy],
        tested: Callable[[RoutingPolicy], Evaluation],
        on_step: Callable[[str], None],
    ) -> Lengths:
        """The policies, by name, at every length; ``tested`` knows them at that of the search.

        ``on_step`` is called after each of them.
        """
        own = self._data.config.seq_len
        self.expect(policies.values())
        measured = tuple(
            self._at(tokens, policies, tested if tokens == own else None, on_step) for tokens in self.lengths
        )
        return Lengths(self._data.config.seq_len, self._costs.context, measured)

    def _at(
        self,
        tokens: int,
        policies: Mapping[str, RoutingPolicy],
        tested: Callable[[RoutingPolicy], Evaluation] | None,
        on_step: Callable[[str], None],
    ) -> AtLength:
        from natsl.search.fault import describe

        count, tasks, without = self._tasks(tokens)
        left_out = dict(without)
        found: dict[str, Evaluation] = {}
        for name, policy in policies.items() if tasks else ():
            try:
                found[name] = self._judge.length(policy, tokens, count, tasks) if tested is None else tested(policy)
            except UserError:  # the search cannot go on
                raise
            except (ArithmeticError, ValueError, MemoryError, RuntimeError) as error:  # the report goes without it
                left_out[name] = describe(error)
            on_step(f"{name} at {tokens} tokens")
        at = replace(self._costs, context=tokens)
        costs = {name: _costs(evaluation, policies[name], at) for name, evaluation in found.items()}
        planted = {task: Planted(*self._data.config.build(task).planted(tokens)) for task in tasks}
        return AtLength(
            tokens=tokens,
            sequences=count,
            planted={task: item for task, item in planted.items() if item.wanted},
            measured={name: evaluation.to_dict() for name, evaluation in found.items()},
            costs=costs,
            left_out=left_out,
        )

    def _tasks(self, tokens: int) -> tuple[int, tuple[str, ...], dict[str, str]]:
        """Test sequences of this length of a task, the tasks that have some, and why others have none."""
        if tokens not in self._known:
            from natsl.answers import sequences_at

            count, tasks, left_out = sequences_at(tokens, self._data.config), [], {}
            for task in self._data.tasks:
                try:
                    _sequences(self._data, task, tokens, count)
                    tasks.append(task)
                except ValueError as error:
                    left_out[task] = str(error)
            self._known[tokens] = count, tuple(tasks), left_out
        return self._known[tokens]


def _sequences(data: TaskData, task: str, tokens: int, count: int) -> Batch:
    from natsl.data import Split

    return data.batch(task, Split.test, count, seed=0, length=tokens, grow=True)


def _costs(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> dict[str, float]:
    values = {name: item.value(evaluation, policy, at) for name, item in OBJECTIVES.items() if item.role is Role.cost}
    return {name: value for name, value in values.items() if value is not None}
