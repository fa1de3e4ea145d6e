"""Faults of the machine during a search: they are never held against a policy, and the next process tries again."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch

from natsl.evaluate import Evaluation
from natsl.search.config import SearchConfig
from natsl.search.fault import DeviceLostError, SearchFailedError
from natsl.search.samplers import Sampler
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.search.trial import Record
from natsl.space.policy import RoutingPolicy
from natsl.space.space import SearchSpace
from tests.search_helpers import problem, synthetic

CONFIG = SearchConfig(n_trials=len(SearchSpace().anchors(problem(SearchConfig()).kinds, 16)) + 4, rungs=[1.0])
CUDA = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def opened(folder: Path, config: SearchConfig = CONFIG) -> PolicyStudy:
    return open_policy_study(folder / "study.db", "first", config, problem(config), 0, {"model": "m"})


def outcome(records: list[Record]) -> list[tuple[object, ...]]:
    return [(r.index, r.policy.digest(), r.values, r.reason, r.same_as, r.feasible) for r in records]


class Failing:
    """The synthetic evaluation, which raises ``error`` at the calls ``at`` (counted from 0); it notes what is asked."""

    def __init__(self, error: Exception, at: Callable[[int], bool] = lambda call: True) -> None:
        self.error, self.at = error, at
        self.policies: list[RoutingPolicy] = []

    def __call__(self, policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        self.policies.append(policy)
        if self.at(len(self.policies) - 1):
            raise self.error
        return synthetic(policy, share)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """A search in which nothing failed."""
    study = opened(tmp_path_factory.mktemp("straight"))
    study.run(synthetic)
    return study.records


@pytest.mark.parametrize("error", [CUDA, MEMORY, MemoryError(), OSError(errno.EIO, "Input/output error")], ids=repr)
def test_a_search_that_device_errors_stopped_goes_on_as_if_nothing_had_been(
    error: Exception, straight: list[Record], tmp_path: Path
) -> None:
    with pytest.raises(SearchFailedError, match=f"5 of 5 trials failed.*{type(error).__name__}"):
        opened(tmp_path).run(Failing(error))
    study = opened(tmp_path)
    assert study.remaining == CONFIG.n_trials
    study.run(synthetic)
    assert outcome(study.records) == outcome(straight)
    assert outcome(opened(tmp_path).records) == outcome(straight)


@pytest.mark.parametrize("error", [FloatingPointError("val_loss is nan"), ValueError("the model has 3 layers")])
def test_a_failure_of_the_policy_itself_is_not_tried_again(error: Exception, tmp_path: Path) -> None:
    opened(tmp_path).run(Failing(error, lambda call: call == 2))
    study, evaluate = opened(tmp_path), Failing(error)
    assert study.remaining == 0
    study.run(evaluate)
    assert evaluate.policies == []
    assert str(error) in (study.records[2].reason or "")


def test_one_fault_stops_neither_the_search_nor_another_trial_of_that_policy(tmp_path: Path) -> None:
    space = SearchSpace(ops=[problem(CONFIG).first[0].layers[0].op, problem(CONFIG).first[1].layers[0].op])
    config = SearchConfig(
        n_trials=20, space=space, sampler=Sampler.random, rungs=[1.0]
    )  # 8 policies: they come again and again
    study, evaluate = opened(tmp_path, config), Failing(MEMORY, lambda call: call == 1)
    study.run(evaluate)
    failed = [record for record in study.records if record.reason is not None]
    assert [record.index for record in failed] == [1]
    assert failed[0].transient
    assert evaluate.policies.count(failed[0].policy) == 2  # its failure was not taken for the policy's
    again = opened(tmp_path, config)
    assert again.remaining == 1
    again.run(Failing(MEMORY))  # nothing is left to be evaluated: the result is known by now
    assert again.records[1].values is not None
    assert [record.policy for record in again.records] == [record.policy for record in study.records]


def test_what_was_tried_again_in_vain_is_tried_by_every_process(tmp_path: Path) -> None:
    opened(tmp_path).run(Failing(MEMORY, lambda call: call in (1, 15)))
    for left in (2, 2):
        study, evaluate = opened(tmp_path), Failing(MEMORY)
        assert study.remaining == left
        study.run(evaluate)
        assert [study.records[1].policy, study.records[15].policy] == evaluate.policies
    study = opened(tmp_path)
    study.run(synthetic)
    assert [record.index for record in study.records] == list(range(CONFIG.n_trials))
    assert all(record.values is not None for record in study.records)


@pytest.mark.parametrize("moment", ["ask", "tell"])
def test_a_process_killed_while_it_tries_again_loses_nothing(
    moment: str, straight: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with pytest.raises(SearchFailedError):
        opened(tmp_path).run(Failing(CUDA))
    study = opened(tmp_path)
    monkeypatch.setattr(optuna.Study, moment, kill)
    with pytest.raises(Killed):
        study.run(synthetic)
    monkeypatch.undo()
    again = opened(tmp_path)
    again.run(synthetic)
    assert outcome(again.records) == outcome(straight)


def test_failures_are_counted_for_each_process(tmp_path: Path) -> None:
    opened(tmp_path).run(synthetic)
    more = SearchConfig(n_trials=CONFIG.n_trials + 20, rungs=[1.0])
    for _ in range(2):
        evaluate = Failing(MEMORY)
        with pytest.raises(SearchFailedError, match=r"5 of \d+ trials failed"):
            opened(tmp_path, more).run(evaluate)
        assert len(evaluate.policies) == 5


def test_a_device_that_stays_broken_ends_the_search_at_once(straight: list[Record], tmp_path: Path) -> None:
    def probe() -> None:
        raise CUDA

    evaluate = Failing(CUDA, lambda call: call == 3)
    with pytest.raises(DeviceLostError, match=r"AcceleratorError: CUDA error: an illegal memory .* same command again"):
        opened(tmp_path).run(evaluate, probe=probe)
    assert len(evaluate.policies) == 4
    study = opened(tmp_path)
    assert (len(study.records), study.cut_off) == (3, 1)
    study.run(synthetic)
    assert outcome(study.records) == outcome(straight)


def test_a_full_disk_ends_the_search_at_once(straight: list[Record], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        opened(tmp_path).run(Failing(OSError(errno.ENOSPC, "No space left on device"), lambda call: call == 3))
    study = opened(tmp_path)
    study.run(synthetic)
    assert outcome(study.records) == outcome(straight)


@pytest.mark.parametrize(
    ("reason", "remaining"),
    [
        ("RuntimeError: CUDA error: unspecified launch failure", 1),
        ("MemoryError: ", 1),
        ("val_loss is nan", 0),
        ("ValueError: the model has 3 layers", 0),
        ("objective recall_error is inf", 0),
    ],
)
def test_failures_in_an_older_study_are_judged_by_their_reason(reason: str, remaining: int, tmp_path: Path) -> None:
    opened(tmp_path).run(Failing(MEMORY, lambda call: call == 3))
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key IN ('transient', 'index')")
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'reason'", (json.dumps(reason),)
        )
    connection.close()
    study = opened(tmp_path)
    assert study.remaining == remaining
    assert study.records[3].reason == reason
    study.run(synthetic)
    assert (study.records[3].reason is None) == (remaining == 1)
