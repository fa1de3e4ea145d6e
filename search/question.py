"""What a judge is asked, as a value that can be sent, stored and compared, and its answer as plain JSON. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from natsl.space.policy import RoutingPolicy


class Method(Enum):
    """A method of ``natsl.search.judge.Judge``."""

    search = "search"  # a policy, the share of the sequences
    search_each = "search_each"  # policies, whether they are trials
    test = "test"  # a policy
    random = "random"  # a policy, the fraction that each layer keeps, the seed
    control = "control"  # a policy, the name of the control, the number of the draw
    length = "length"  # a policy, the tokens of a sequence


@dataclass(frozen=True)
class Question:
    """One call of a judge. ``arguments`` follow the policies and are JSON-ready."""

    method: Method
    policies: tuple[RoutingPolicy, ...]
    arguments: tuple[Any, ...] = ()

    @cached_property
    def key(self) -> str:
        """What tells it from others: the same for the same question in every process."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        policies = [policy.to_dict() for policy in self.policies]
        return {"method": self.method.value, "policies": policies, "arguments": self.arguments}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Question:
        """The inverse of ``to_dict``, also after JSON."""
        policies = tuple(map(RoutingPolicy.from_dict, plain["policies"]))
        arguments = tuple(tuple(item) if isinstance(item, list) else item for item in plain["arguments"])
        return cls(Method(plain["method"]), policies, arguments)

    @classmethod
    def search(cls, policy: RoutingPolicy, share: float) -> Question:
        """The policy on a share of the search split's sequences."""
        return cls(Method.search, (policy,), (share,))

    @classmethod
    def test(cls, policy: RoutingPolicy) -> Question:
        """The policy on the test split."""
        return cls(Method.test, (policy,))


@dataclass(frozen=True)
class Queue:
    """How questions are asked before their answers are needed, where others answer them.

    ``ahead`` has them answered in this order, if nobody has asked before; ``later`` when nothing else is left to do, if
    there are several who can; ``ready`` says whether an answer is there, so
    that asking the judge takes no time; ``wait`` returns once another answer is there; ``history`` tells what went
    wrong before an answer came. As they are, a judge answers when it is asked.
    """

    ahead: Callable[[Sequence[Question]], None] = lambda questions: None
    later: Callable[[Sequence[Question]], None] = lambda questions: None
    ready: Callable[[Question], bool] = lambda question: True
    wait: Callable[[], None] = lambda: None
    history: Callable[[Question], Sequence[str]] = lambda question: ()


def to_plain(method: Method, answer: Any) -> Any:
    """The answer to a question of this method, JSON-ready; numbers that are not finite stay as they are."""
    if method in (Method.test, Method.control):
        return {task: counts.to_dict() for task, counts in answer.items()}
    if method is Method.search_each:
        return [[[share, item.to_dict()] for share, item in of_policy.items()] for of_policy in answer]
    return answer.to_dict()


def from_plain(method: Method, plain: Any) -> Any:
    """The inverse of ``to_plain``, also after JSON."""
    from natsl.counts import Counts
    from natsl.evaluate import Evaluation

    if method in (Method.test, Method.control):
        return {task: Counts.from_dict(counts) for task, counts in plain.items()}
    if method is Method.search_each:
        return [{share: Evaluation.from_dict(item) for share, item in of_policy} for of_policy in plain]
    return Evaluation.from_dict(plain)
