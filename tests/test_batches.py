"""Trials in batches: the same ones in whatever order evaluations end, and however often the search is cut off."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from natsl.evaluate import Evaluation
from natsl.search.config import SearchConfig
from natsl.search.question import Method, Question, Queue, from_plain, to_plain
from natsl.search.samplers import Sampler
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.search.trial import Record
from natsl.space.policy import LayerPolicy, RoutingPolicy
from natsl.space.space import SearchSpace
from tests.search_helpers import CHUNK, problem, synthetic, synthetic_counts

# Of the search below by the natsl that evaluated in its own process, one policy after another.
SERIAL = "93d19078578e3192"


def opened(folder: Path, config: SearchConfig, workers: int = 1) -> PolicyStudy:
    return open_policy_study(folder / "study.db", "first", config, problem(config), 0, {"model": "m"}, workers)


def outcome(records: Sequence[Record]) -> list[tuple[object, ...]]:
    return [(r.index, r.policy.digest(), r.values, r.share, r.same_as, r.feasible, r.reason) for r in records]


class Workers:
    """Workers whose answers come in a random order.

    ``done``: keys of answers that are stored. ``stop_after``: so many answers the search is cut off.
    """

    def __init__(self, seed: int, count: int = 2, done: set[str] | None = None, stop_after: int = -1) -> None:
        self._random, self._count = random.Random(seed), count
        self._waiting: list[Question] = []
        self._done = set() if done is None else done
        self._left = stop_after
        self.asked: list[Question] = []

    def ahead(self, questions: Sequence[Question]) -> None:
        for question in questions:
            if question.key not in self._done | {item.key for item in self.asked}:
                self.asked.append(question)
                self._waiting.append(question)

    def ready(self, question: Question) -> bool:
        return question.key in self._done

    def wait(self) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        place = self._random.randrange(min(self._count, len(self._waiting)))
        self._done.add(self._waiting.pop(place).key)

    def evaluate(self, policy: RoutingPolicy, share: float) -> Evaluation:
        assert Question.search(policy, share).key in self._done, "asked for an answer that is not there"
        return synthetic(policy, share)

    def run(self, study: PolicyStudy) -> None:
        study.run(self.evaluate, queue=Queue(ahead=self.ahead, ready=self.ready, wait=self.wait))


def test_batches_of_one_are_the_serial_search(tmp_path: Path) -> None:
    config = SearchConfig(n_trials=60, anchors=20, constraints={"recall_error": 0.9})
    study = opened(tmp_path, config)
    study.run(synthetic)
    trials = [(r.index, r.policy.to_dict(), r.values, r.share, r.parts, r.same_as) for r in study.records]
    assert hashlib.sha256(json.dumps(trials).encode()).hexdigest()[:16] == SERIAL
    assert "batch" not in study.fingerprint, "a study from before there were batches goes on"


@pytest.mark.parametrize("sampler", [Sampler.sweep, Sampler.tpe])
def test_the_trials_are_the_same_with_any_workers(sampler: Sampler, tmp_path: Path) -> None:
    config = SearchConfig(n_trials=60, anchors=8, batch=15, sampler=sampler, rungs=[0.2, 0.5, 1.0])
    found = []
    for seed, count in ((0, 1), (1, 4), (2, 12)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        study = opened(folder, config)
        Workers(seed, count).run(study)
        assert [record.index for record in study.records] == list(range(60))
        found.append(outcome(study.records))
    assert found[1:] == found[:-1]
    assert {item[3] for item in found[0]} >= {0.2, 1.0}


@pytest.mark.parametrize("synchronous", [True, False], ids=["in batches", "as workers get free"])
def test_a_search_that_is_cut_off_again_and_again_loses_and_repeats_nothing(synchronous: bool, tmp_path: Path) -> None:
    config = SearchConfig(n_trials=30, anchors=10, batch=5, synchronous=synchronous)
    straight = tmp_path / "straight"
    straight.mkdir()
    whole = opened(straight, config)
    Workers(0).run(whole)
    proposed: dict[int, str] = {}
    done: set[str] = set()
    for seed in range(100):
        study = opened(tmp_path, config)
        if not study.remaining:
            break
        for work in study._open:  # what was proposed is made, whatever has become known since
            assert proposed.setdefault(work.proposal.index, work.proposal.policy.digest())
            assert proposed[work.proposal.index] == work.proposal.policy.digest()
        try:
            Workers(seed, 2, done, stop_after=7).run(study)
        except KeyboardInterrupt:
            proposed |= {work.proposal.index: work.proposal.policy.digest() for work in study._open}
        study.close()
    assert seed > 3
    records = opened(tmp_path, config).records
    assert [record.index for record in records] == list(range(30))
    assert {index: records[index].policy.digest() for index in proposed} == proposed
    if synchronous:
        assert outcome(records) == outcome(whole.records)


def test_a_policy_that_comes_twice_in_a_batch_is_evaluated_once(tmp_path: Path) -> None:
    space = SearchSpace(
        ops=[problem(SearchConfig()).first[0].layers[0].op, problem(SearchConfig()).first[1].layers[0].op]
    )
    config = SearchConfig(n_trials=30, anchors=2, space=space, sampler=Sampler.random, batch=15, rungs=[1.0])
    study, workers = opened(tmp_path, config), Workers(0)
    workers.run(study)
    assert len(workers.asked) == len({record.policy for record in study.records}) < 30
    same = [record for record in study.records if record.same_as is not None]
    assert len(same) == 30 - len(workers.asked)
    assert all(study.records[item.same_as or 0].policy == item.policy for item in same)


def test_a_sweep_proposes_nothing_that_is_being_evaluated(tmp_path: Path) -> None:
    config = SearchConfig(n_trials=40, anchors=8, batch=8, local_share=0.0)
    study = opened(tmp_path, config)
    study.run(synthetic)
    assert all(record.same_as is None for record in study.records)


def test_the_size_of_batches_is_chosen_once(tmp_path: Path) -> None:
    study = opened(tmp_path, SearchConfig(n_trials=3), workers=2)
    assert (study.batch, study.fingerprint["batch"]) == (8, 8)
    study.close()
    study = opened(tmp_path, SearchConfig(n_trials=3), workers=1)
    assert study.batch == 8
    study.close()
    with pytest.raises(ValueError, match="batch: 8 → 4"):
        opened(tmp_path, SearchConfig(n_trials=3, batch=4))
    with pytest.raises(ValueError, match="synchronous: absent → false"):
        opened(tmp_path, SearchConfig(n_trials=3, synchronous=False))


POLICY = RoutingPolicy(
    (LayerPolicy(threshold=float("inf")), LayerPolicy(budget=(0.1, 1.0)), LayerPolicy(budget=0.3)), CHUNK
)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (Question.search(POLICY, 0.25), synthetic(POLICY, 0.25)),
        (Question(Method.search_each, (POLICY,), (True,)), [{0.25: synthetic(POLICY, 0.25)}, {}]),
        (Question(Method.random, (POLICY,), ((0.1, 0.2, 1.0), 7)), synthetic(POLICY, "random")),
    ],
    ids=lambda item: item.method.value if isinstance(item, Question) else "",
)
def test_questions_and_answers_survive_json(question: Question, answer: object) -> None:
    again = Question.from_dict(json.loads(json.dumps(question.to_dict())))
    assert again == question
    assert again.key == question.key
    assert from_plain(question.method, json.loads(json.dumps(to_plain(question.method, answer)))) == answer


def test_counts_survive_json() -> None:
    counts = synthetic_counts(POLICY, "window", 0)
    again = from_plain(Method.control, json.loads(json.dumps(to_plain(Method.control, counts))))
    assert {task: item.to_dict() for task, item in again.items()} == {t: c.to_dict() for t, c in counts.items()}
