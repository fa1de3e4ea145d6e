"""Who evaluates policies: a supernet on held-out sequences. No optuna at import: every worker has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from natsl.counts import Counts
from natsl.data import Split, TaskData
from natsl.evaluate import Evaluation, RandomRouting, count, evaluate
from natsl.model import RoutedLM
from natsl.search.config import SearchConfig
from natsl.search.controls.comparer import ControlCounts
from natsl.search.controls.learned import Subject
from natsl.search.controls.registry import ControlRunner
from natsl.search.lengths import LengthJudge
from natsl.search.question import Queue
from natsl.search.rungs import Parts
from natsl.space.policy import RoutingPolicy


@dataclass(frozen=True)
class Judge:
    """Evaluates policies: on the search split, on the test split, and there with random routing and other controls.

    ``search`` takes the policy and the share of the sequences, one of ``search.rungs``; ``search_each`` several
    policies at once, trials or not, and gives the results of each by share (none if they are not finite). ``test``
    gives what is counted in each task's sequences, of which an evaluation is the sum. ``random`` takes the policy, the
    fraction of chunks that each layer keeps, and a seed; ``control`` the policy, the name of a control and the number
    of a draw; ``length`` takes the policy, the tokens of a test sequence, how many of each task, and the tasks.
    ``queue``: as there.
    """

    search: Callable[[RoutingPolicy, float], Evaluation]
    search_each: Callable[[Sequence[RoutingPolicy], bool], list[dict[float, Evaluation]]]
    test: Callable[[RoutingPolicy], dict[str, Counts]]
    random: Callable[[RoutingPolicy, tuple[float, ...], int], Evaluation]
    control: ControlCounts
    length: Callable[[RoutingPolicy, int, int, tuple[str, ...]], Evaluation]
    queue: Queue = field(default_factory=Queue)


def make_judge(model: RoutedLM, data: TaskData, config: SearchConfig) -> Judge:
    """A judge of a supernet's policies. Random routing sees the same test sequences in every draw."""
    batch_size, test = config.batch_size, data.eval_sets(Split.test)
    search = Parts(model, data.eval_sets(Split.search), config.rungs, batch_size)

    def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
        return evaluate(model, policy, test, random_routing=RandomRouting(seed, fractions), batch_size=batch_size)

    return Judge(
        search.judge,
        search.judge_each,
        lambda policy: count(model, policy, test, batch_size=batch_size),
        random,
        ControlRunner(Subject(model, test, batch_size)),
        LengthJudge(model, data, batch_size),
    )
