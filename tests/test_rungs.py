"""Successive halving: who goes on, what the parts add up to, and what a study makes of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from natsl.data import Split
from natsl.evaluate import Evaluation, count, summary
from natsl.search.config import SearchConfig
from natsl.search.question import Queue
from natsl.search.rungs import FEWEST, Parts, goes_on, useful
from natsl.search.trial import Proposal, Work
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks.sequences import Batch
from tests.oracles import fill_calibration, tiny_model
from tests.search_helpers import searched, synthetic
from tests.task_helpers import make_data
from tests.test_study import opened, outcome

LINE = [(1 - i / 20, i / 20, 0.0) for i in range(20)]  # a front, none of which dominates another
WORSE = [(a + 0.1, b + 0.1, c) for a, b, c in LINE]
POLICIES = [
    RoutingPolicy((LayerPolicy(budget=0.3), LayerPolicy(Op.delta)), 8),
    RoutingPolicy((LayerPolicy(budget=0.6), LayerPolicy(Op.softmax)), 8),
]


def test_what_is_on_the_front_of_its_part_goes_on() -> None:
    assert goes_on((0.52, 0.42, 0.0), LINE[::2] + WORSE, LINE)


def test_what_many_are_better_than_stops() -> None:
    assert not goes_on((0.72, 0.72, 0.0), LINE + WORSE, LINE)
    assert not goes_on((0.52, 0.57, 1.0), LINE + WORSE, LINE)  # breaks a constraint


def test_what_no_complete_result_covers_goes_on_whatever_its_rank() -> None:
    """Many results on a part are equal, such as no error at all: the cheapest of them is not all that matters."""
    same = [(0.0, cost / 100, 0.0) for cost in range(1, 30)]
    assert goes_on((0.0, 0.29, 0.0), same, [(0.001, 0.1, 0.0), (0.0, 0.5, 0.0)])
    assert not goes_on((0.0, 0.29, 0.0), same, [(0.001, 0.1, 0.0), (0.0, 0.2, 0.0)])


def test_nothing_stops_before_there_is_anything_to_compare_with() -> None:
    assert goes_on((9.0, 9.0, 0.0), LINE[: FEWEST - 1], LINE)
    assert not goes_on((9.0, 9.0, 0.0), LINE[:FEWEST], LINE)


@pytest.mark.parametrize("sequences", [1, 2, 7], ids="{} sequences".format)
def test_parts_add_up_to_the_whole(sequences: int) -> None:
    data = make_data(tasks={"mqar": 1.0, "bytes": 1.0}, seq_len=96, search_sequences=sequences)
    model = tiny_model("rr", vocab_size=384)
    fill_calibration(model)
    sets = data.eval_sets(Split.search)
    parts = Parts(model, sets, [0.3, 0.5, 1.0], batch_size=32)
    for policy in POLICIES:
        first, whole = parts.judge(policy, 0.3), parts.judge(policy)
        rows = slice(0, max(1, -(-3 * sequences // 10)))
        assert first.errors == summary(count(model, policy, _rows(sets, rows)), model.kinds).errors
        straight = summary(count(model, policy, sets), model.kinds)
        assert whole.errors == straight.errors
        assert whole.kept_by_head == straight.kept_by_head
        assert whole.val_loss == pytest.approx(straight.val_loss, rel=1e-6)
        assert parts.judge(policy, 0.3) == first
    for policy, results in zip(POLICIES, parts.judge_each(POLICIES), strict=True):
        assert list(results) == [0.3, 0.5, 1.0]
        for share, result in results.items():
            alone = parts.judge(policy, share)
            assert result.errors == alone.errors
            assert result.kept_by_head == alone.kept_by_head


def test_a_study_judges_most_policies_on_a_part_only_and_knows_it_later(tmp_path: Path) -> None:
    calls: list[float] = []

    def evaluate(policy: RoutingPolicy, share: float) -> Evaluation:
        calls.append(share)
        return synthetic(policy, share)

    config = SearchConfig(n_trials=60, anchors=20, rungs=[0.2, 0.5, 1.0])
    study = opened(tmp_path, config)
    study.run(evaluate)
    shares = [record.share for record in study.records]
    assert set(shares) == {0.2, 0.5, 1.0}
    assert set(shares[:20]) == {1.0}  # the anchors
    assert all(len(record.parts) == [0.2, 0.5, 1.0].index(record.share) + 1 for record in study.records)
    assert all(record.share == 1 for record in study.front())
    assert all(record.result is None for record in study.records if record.share < 1)
    evaluated = [record for record in study.records if record.same_as is None]
    assert len(calls) == sum(len(record.parts) for record in evaluated)
    again = opened(tmp_path, config)
    assert again.records == study.records
    assert again.remaining == 0


def test_one_rung_judges_all_on_everything(tmp_path: Path) -> None:
    study = searched(tmp_path, SearchConfig(n_trials=20, rungs=[1.0]))
    assert {record.share for record in study.records} == {1.0}
    assert "rungs" not in study.fingerprint


def test_a_search_stopped_anywhere_goes_on_as_a_straight_one(tmp_path: Path) -> None:
    config = SearchConfig(n_trials=30, anchors=12, rungs=[0.25, 0.5, 1.0], constraints={"recall_error": 0.7})
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = opened(tmp_path / "straight", config)
    straight.run(synthetic)
    assert min(record.share for record in straight.records) < 1
    calls = 0

    def stopping(policy: RoutingPolicy, share: float) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return synthetic(policy, share)

    study = opened(tmp_path / "stopped", config)
    while study.remaining:
        with contextlib.suppress(KeyboardInterrupt):
            study.run(stopping)
        study.close()
        study = opened(tmp_path / "stopped", config)
    assert calls > 7
    assert outcome(study.records) == outcome(straight.records)
    assert [record.parts for record in study.records] == [record.parts for record in straight.records]


def test_a_first_policy_that_was_stopped_as_another_trial_is_judged_on_everything(tmp_path: Path) -> None:
    """It failed by a fault of the machine, came again as a trial of the sampler, and is then tried again itself."""
    config = SearchConfig(n_trials=40, anchors=20)
    study = opened(tmp_path, config)
    study.run(synthetic)
    stopped = next(record for record in study.records if record.share < 1)
    work = Work(Proposal(study._study.ask(), 5, stopped.policy, stopped, 99))
    study._open.append(work)
    assert study._advance(work, synthetic, lambda: None, Queue())
    assert (work.share, work.proposal.known) == (1.0, None)


@pytest.mark.parametrize(
    ("shares", "sequences", "left"),
    [([0.25, 1.0], 32, [0.25, 1.0]), ([0.25, 1.0], 1, [1.0]), ([0.1, 0.2, 0.5, 1.0], 4, [0.1, 0.5, 1.0])],
    ids=str,
)
def test_only_shares_that_add_a_sequence_are_used(shares: list[float], sequences: int, left: list[float]) -> None:
    assert useful(shares, sequences) == left


@pytest.mark.parametrize("rungs", [[], [0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [1.0, 0.5], [1.0, 2.0]], ids=str)
def test_rungs_rise_to_all_sequences(rungs: list[float]) -> None:
    with pytest.raises(ValueError, match=r"search.rungs = .* they must rise from above 0, and the last must be 1"):
        SearchConfig(rungs=rungs)


def _rows(sets: dict[str, Batch], rows: slice) -> dict[str, Batch]:
    return {task: batch.rows(rows) for task, batch in sets.items()}
