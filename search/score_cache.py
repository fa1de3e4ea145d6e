"""Results of evaluations, stored as they are made: what was scored before a search was cut off is not scored again.

``scores.jsonl`` holds a line per evaluation: what it belongs to (supernet, data), its split, the policy, the control
with its draw, and the measured values, of policies and controls on the test split what was counted in every sequence.
A line that a killed process left half written does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from natsl.counts import Counts
from natsl.data import Split
from natsl.evaluate import Evaluation
from natsl.files import append_line
from natsl.search.controls.comparison import LEARNED
from natsl.search.judge import Judge
from natsl.search.question import Method, Question, Queue
from natsl.space.policy import RoutingPolicy

R = TypeVar("R")


class ScoreCache:
    """The stored results of one supernet on one set of data.

    ``made_from``: what else decides a result; those of another one stay in the file and are not used.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self._path = path
        self._of = _digest(made_from)
        self._stored: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                if "counts" in row:
                    result: Any = {task: Counts.from_dict(counts) for task, counts in row.pop("counts").items()}
                else:
                    result = Evaluation.from_dict(row.pop("evaluation"))
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
            self._stored[_key(row)] = result

    def judge(self, judge: Judge) -> Judge:
        """A judge that asks ``judge`` for what is not stored, and stores it."""

        def search(policy: RoutingPolicy, share: float) -> Evaluation:
            return self._evaluation(Split.search, policy, _part(share), lambda: judge.search(policy, share))

        def search_each(policies: Sequence[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
            # What is in a pass decides how it rounds: what is no trial is kept apart, and passes are made as a whole.
            rows = [self._row(Split.search, policy, _each(1.0, trials)) for policy in policies]
            stored = [self._stored.get(_key(row)) for row in rows]
            if None not in stored:
                return [{1.0: evaluation} for evaluation in stored if evaluation is not None]
            results = judge.search_each(policies, trials)
            return [
                {
                    share: self._evaluation(Split.search, policy, _each(share, trials), partial(_same, result))
                    for share, result in sorted(of_policy.items())  # all sequences last: then the parts are stored too
                }
                for policy, of_policy in zip(policies, results, strict=True)
            ]

        def test(policy: RoutingPolicy) -> dict[str, Counts]:
            return self._counts(policy, LEARNED, 0, lambda: judge.test(policy))

        def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
            control = _random(fractions, seed)
            return self._evaluation(Split.test, policy, control, lambda: judge.random(policy, fractions, seed))

        def control(policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
            return self._counts(policy, name, draw, lambda: judge.control(policy, name, draw))

        def length(policy: RoutingPolicy, tokens: int, count: int, tasks: tuple[str, ...]) -> Evaluation:
            of = _length(tokens, count, tasks)
            return self._evaluation(Split.test, policy, of, lambda: judge.length(policy, tokens, count, tasks))

        def ahead(questions: Sequence[Question]) -> None:
            judge.queue.ahead([question for question in questions if not self._has(question)])

        def later(questions: Sequence[Question]) -> None:
            judge.queue.later([question for question in questions if not self._has(question)])

        def ready(question: Question) -> bool:
            return self._has(question) or judge.queue.ready(question)

        queue = Queue(ahead, later, ready, judge.queue.wait, judge.queue.history)
        return Judge(search, search_each, test, random, control, length, queue)

    def _has(self, question: Question) -> bool:
        """Whether the answer is stored."""
        of, split = question.arguments, Split.test
        match question.method:
            case Method.search:
                split, control = Split.search, _part(*of)
            case Method.search_each:
                split, control = Split.search, _each(1.0, *of)
            case Method.test:
                control = _control(LEARNED, 0)
            case Method.random:
                control = _random(*of)
            case Method.control:
                control = _control(*of)
            case Method.length:
                control = _length(*of)
        return all(_key(self._row(split, policy, control)) in self._stored for policy in question.policies)

    def _evaluation(
        self,
        split: Split,
        policy: RoutingPolicy,
        control: Mapping[str, Any] | None,
        evaluate: Callable[[], Evaluation],
    ) -> Evaluation:
        row = self._row(split, policy, control)
        return self._get(row, evaluate, lambda evaluation: {"evaluation": evaluation.to_dict()})

    def _counts(
        self, policy: RoutingPolicy, name: str, draw: int, make: Callable[[], dict[str, Counts]]
    ) -> dict[str, Counts]:
        row = self._row(Split.test, policy, _control(name, draw))
        return self._get(row, make, _plain_counts)

    def _row(self, split: Split, policy: RoutingPolicy, control: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"of": self._of, "split": split.value, "policy": policy.digest(), "control": control}

    def _get(self, row: dict[str, Any], make: Callable[[], R], plain: Callable[[R], dict[str, Any]]) -> R:
        key = _key(row)
        if key not in self._stored:
            made = make()
            append_line(self._path, json.dumps(row | plain(made)))
            self._stored[key] = made
        result: R = self._stored[key]
        return result


def _same(result: R) -> R:
    return result


def _part(share: float) -> dict[str, Any] | None:
    """What a row says of a result on a part of the sequences."""
    return None if share == 1 else {"kind": "part", "share": share}


def _each(share: float, trials: bool) -> dict[str, Any] | None:
    """The same of one that was made in a pass with others."""
    return _part(share) if trials else {"kind": "family", "share": share}


def _random(fractions: tuple[float, ...], seed: int) -> dict[str, Any]:
    return {"kind": "random", "draw": seed, "fractions": _digest(fractions)}


def _control(name: str, draw: int) -> dict[str, Any]:
    return {"kind": name, "draw": draw, "by": "sequence"}


def _length(tokens: int, count: int, tasks: Sequence[str]) -> dict[str, Any]:
    return {"kind": "length", "tokens": tokens, "sequences": count, "tasks": sorted(tasks)}


def _plain_counts(counts: Mapping[str, Counts]) -> dict[str, Any]:
    return {"counts": {task: item.to_dict() for task, item in counts.items()}}


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
