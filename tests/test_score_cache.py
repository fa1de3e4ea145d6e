"""Stored results of evaluations: used again only for exactly what they were made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

from natsl.counts import Counts
from natsl.evaluate import Evaluation
from natsl.search.controls.comparison import LEARNED
from natsl.search.judge import Judge
from natsl.search.score_cache import ScoreCache
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import CHUNK, synthetic, synthetic_judge

POLICY = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.2), LayerPolicy(Op.softmax)), CHUNK)
OTHER = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.3), LayerPolicy(Op.softmax)), CHUNK)
MADE_FROM = {"supernet": "s", "data": "d"}
FRACTIONS = (0.0, 0.1 + 0.2, 1.0)


R = TypeVar("R")
Result: TypeAlias = Evaluation | dict[str, Counts]


class Counting:
    """A judge that counts what it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def judge(self) -> Judge:
        inner = synthetic_judge()

        def random(policy: RoutingPolicy, fractions: tuple[float, ...], seed: int) -> Evaluation:
            self.calls += 1
            return inner.random(policy, fractions, seed)

        def control(policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
            self.calls += 1
            return inner.control(policy, name, draw)

        def search(policy: RoutingPolicy, share: float) -> Evaluation:
            self.calls += 1
            return inner.search(policy, share)

        def search_each(policies: Sequence[RoutingPolicy], trials: bool) -> list[dict[float, Evaluation]]:
            self.calls += 1
            return inner.search_each(policies, trials)

        def test(policy: RoutingPolicy) -> dict[str, Counts]:
            self.calls += 1
            return inner.test(policy)

        return Judge(search, search_each, test, random, control, inner.length)


def judged(path: Path, counting: Counting, made_from: dict[str, str] | None = None) -> Judge:
    return ScoreCache(path, made_from or MADE_FROM).judge(counting.judge())


def plain(result: Result) -> dict[str, Any]:
    """A result in a form that can be compared."""
    if isinstance(result, Evaluation):
        return result.to_dict()
    return {task: item.to_dict() for task, item in result.items()}


def ask_all(judge: Judge) -> list[dict[str, Any]]:
    return [plain(judge.search(POLICY, 1.0)), plain(judge.test(POLICY)), plain(judge.random(POLICY, FRACTIONS, 7))]


def test_a_later_process_evaluates_nothing_again(tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    first = ask_all(judged(path, counting))
    assert counting.calls == 3
    assert ask_all(judged(path, counting)) == first == ask_all(synthetic_judge())
    assert counting.calls == 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda judge: judge.search(OTHER, 1.0),
        lambda judge: judge.test(OTHER),
        lambda judge: judge.random(POLICY, FRACTIONS, 8),
        lambda judge: judge.random(POLICY, (0.0, 0.3, 1.0), 7),
        lambda judge: judge.random(OTHER, FRACTIONS, 7),
    ],
    ids=["other policy", "other policy tested", "other draw", "other fractions", "other policy at random"],
)
def test_another_question_is_evaluated(ask: Callable[[Judge], Result], tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    ask_all(judged(path, counting))
    assert plain(ask(judged(path, counting))) == plain(ask(synthetic_judge()))
    assert counting.calls == 4


@pytest.mark.parametrize("change", [{"supernet": "t"}, {"data": "e"}], ids=lambda change: next(iter(change)))
def test_results_of_another_supernet_or_other_data_are_not_used(change: dict[str, str], tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    ask_all(judged(path, counting))
    ask_all(judged(path, counting, MADE_FROM | change))
    assert counting.calls == 6
    ask_all(judged(path, counting))
    assert counting.calls == 6


def test_fractions_of_tasks_are_stored_and_older_lines_have_none(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    heads = ((0.0, 0.0), (0.1, 0.3), (1.0, 1.0))

    def search(policy: RoutingPolicy, share: float) -> Evaluation:
        return replace(synthetic(policy), kept_fraction_by_task={"mqar": 0.4}, kept_by_task={"mqar": heads})

    judge = replace(synthetic_judge(), search=search)
    old, new = ScoreCache(path, MADE_FROM).judge(synthetic_judge()), ScoreCache(path, MADE_FROM).judge(judge)
    stored = old.search(POLICY, 1.0), new.search(OTHER, 1.0)
    assert "kept_by_task" not in path.read_text().splitlines()[0]
    counting = Counting()
    again = judged(path, counting)
    assert (again.search(POLICY, 1.0), again.search(OTHER, 1.0)) == stored
    assert counting.calls == 0
    assert stored[0].kept_by_task == {}
    assert stored[1].kept_by_task == {"mqar": heads}


def test_several_policies_at_once_are_stored_with_their_parts_or_made_together_again(tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    first = judged(path, counting)
    assert first.search_each([POLICY], True) == synthetic_judge().search_each([POLICY], True)
    assert first.search_each([POLICY], True) == [{1.0: first.search(POLICY, 1.0)}]
    assert counting.calls == 1
    assert first.search(POLICY, 0.25) != first.search(POLICY, 1.0)
    assert counting.calls == 1
    assert first.search_each([POLICY, OTHER], True) == synthetic_judge().search_each([POLICY, OTHER], True)
    later = judged(path, counting)
    assert [later.search(policy, 0.25) for policy in (POLICY, OTHER)] == [
        synthetic_judge().search(policy, 0.25) for policy in (POLICY, OTHER)
    ]
    assert counting.calls == 2


def test_what_families_are_judged_by_is_no_result_of_a_trial(tmp_path: Path) -> None:
    """Passes of several policies round otherwise, and what is in one depends on more than the policy."""
    path, counting = tmp_path / "scores.jsonl", Counting()
    judge = judged(path, counting)
    judge.search_each([POLICY], False)
    assert counting.calls == 1
    judge.search(POLICY, 1.0)
    assert counting.calls == 2
    assert judged(path, counting).search_each([POLICY], False) == judge.search_each([POLICY], False)
    assert counting.calls == 2


@pytest.mark.parametrize("left", ["half a line", "nothing", "no JSON", "other JSON"])
def test_a_damaged_line_is_evaluated_again(left: str, tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    first = ask_all(judged(path, counting))
    lines = path.read_text().splitlines(keepends=True)
    damaged = {"half a line": lines[-1][:50], "nothing": "", "no JSON": "\0\0\n", "other JSON": '["evaluation"]\n'}
    path.write_text("".join(lines[:-1]) + damaged[left])
    assert ask_all(judged(path, counting)) == first
    assert counting.calls == 4
    assert ask_all(judged(path, counting)) == first
    assert counting.calls == 4


def test_what_is_not_finite_is_stored_as_it_is(tmp_path: Path) -> None:
    judge = replace(synthetic_judge(), search=lambda policy, share: replace(synthetic(policy), val_loss=math.nan))
    for _ in range(2):
        loss = ScoreCache(tmp_path / "scores.jsonl", MADE_FROM).judge(judge).search(POLICY, 1.0).val_loss
        assert loss is not None
        assert math.isnan(loss)


def test_an_evaluation_that_raises_is_not_stored(tmp_path: Path) -> None:
    def test(policy: RoutingPolicy) -> dict[str, Counts]:
        raise FloatingPointError("logits are not finite")

    cache = ScoreCache(tmp_path / "scores.jsonl", MADE_FROM)
    with pytest.raises(FloatingPointError):
        cache.judge(replace(synthetic_judge(), test=test)).test(POLICY)
    assert not (tmp_path / "scores.jsonl").exists()


def test_counts_of_controls_are_stored_by_name_and_draw(tmp_path: Path) -> None:
    path, counting = tmp_path / "scores.jsonl", Counting()
    asked = [(POLICY, LEARNED, 0), (POLICY, "shuffled", 1), (POLICY, "shuffled", 2), (OTHER, "shuffled", 1)]
    first = [judged(path, counting).control(*question) for question in asked]
    again = [judged(path, counting).control(*question) for question in asked]
    assert counting.calls == 4
    assert list(map(plain, first)) == list(map(plain, again))
    judged(path, counting).test(POLICY)
    assert counting.calls == 4, "the learned router is the policy itself"
    judged(path, counting, MADE_FROM | {"supernet": "t"}).control(*asked[0])
    assert counting.calls == 5
