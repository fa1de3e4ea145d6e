"""Results of evaluations, stored as they are made: what was scored before a search was cut off is not scored again.

``scores.jsonl`` holds a line per evaluation: what it belongs to (supernet, data), its split, the policy, the control
with its draw, and the measured values. A line that a killed process left half written does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from natsl.data import Split
from natsl.evaluate import Evaluation
from natsl.files import append_line
from natsl.search.score import Judge
from natsl.space.policy import RoutingPolicy


class ScoreCache:
    """The stored results of one supernet on one set of data.

    ``made_from``: what else decides a result; those of another one stay in the file and are not used.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self._path = path
        self._of = _digest(made_from)
        self._stored: dict[str, Evaluation] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                evaluation = Evaluation.from_dict(row.pop("evaluation"))
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
            self._stored[_key(row)] = evaluation

    def judge(self, judge: Judge) -> Judge:
        """A judge that asks ``judge`` for what is not stored, and stores it."""

        def search(policy: RoutingPolicy) -> Evaluation:
            return self._get(Split.search, policy, None, lambda: judge.search(policy))

        def test(policy: RoutingPolicy) -> Evaluation:
            return self._get(Split.test, policy, None, lambda: judge.test(policy))

        def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
            control = {"kind": "random", "draw": seed, "fractions": _digest(fractions)}
            return self._get(Split.test, policy, control, lambda: judge.random(policy, fractions, seed))

        return Judge(search, test, random)

    def _get(
        self,
        split: Split,
        policy: RoutingPolicy,
        control: Mapping[str, Any] | None,
        evaluate: Callable[[], Evaluation],
    ) -> Evaluation:
        row = {"of": self._of, "split": split.value, "policy": policy.digest(), "control": control}
        key = _key(row)
        if key not in self._stored:
            evaluation = evaluate()
            append_line(self._path, json.dumps(row | {"evaluation": evaluation.to_dict()}))
            self._stored[key] = evaluation
        return self._stored[key]


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
