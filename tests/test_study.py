"""Trials: reproducible, resumable after any interruption, deduplicated, and clear about what went wrong."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.search.config import SearchConfig
from natsl.search.fault import SearchFailedError
from natsl.search.pareto import dominates
from natsl.search.samplers import Sampler
from natsl.search.study import PolicyStudy, first_policies, open_policy_study
from natsl.search.trial import Record
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import SearchSpace
from tests.search_helpers import CHUNK, ROUTED, problem, shapes, synthetic

ANCHORS = 13  # up to the sweeps with softmax
TRIALS = ANCHORS + 8


def opened(
    folder: Path, config: SearchConfig, seed: int = 0, made_from: dict[str, object] | None = None
) -> PolicyStudy:
    return open_policy_study(folder / "study.db", "first", config, problem(config), seed, made_from or {"model": "m"})


def outcome(records: list[Record]) -> list[tuple[object, ...]]:
    return [(r.index, r.policy.digest(), r.values, r.reason, r.same_as, r.feasible) for r in records]


class Counting:
    """The synthetic evaluation, counting calls; ``stop_at`` is the call that the user interrupts."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.policies: list[str] = []
        self.stop_at = stop_at

    def __call__(self, policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        self.policies.append(policy.digest())
        if len(self.policies) == self.stop_at:
            raise KeyboardInterrupt
        return synthetic(policy, share)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[Sampler, list[Record]]:
    """An unbroken search by every sampler."""
    found = {}
    for sampler in Sampler:
        study = opened(
            tmp_path_factory.mktemp(sampler.value),
            SearchConfig(anchors=ANCHORS, n_trials=TRIALS, sampler=sampler, rungs=[1.0]),
        )
        study.run(synthetic)
        found[sampler] = study.records
    return found


@pytest.mark.parametrize("sampler", Sampler)
def test_a_search_finds_better_policies_than_its_anchors(
    sampler: Sampler, straight: dict[Sampler, list[Record]]
) -> None:
    records = straight[sampler]
    assert [record.index for record in records] == list(range(TRIALS))
    names = ["recall_error", "kept_fraction"]
    anchors = [record.values for record in records[:ANCHORS] if record.values is not None]
    fresh = [record.values for record in records[ANCHORS:] if record.values is not None]
    free = [v for v in fresh if not any(dominates(anchor, v, names) for anchor in anchors)]
    assert len(free) >= 2


@pytest.mark.parametrize(
    ("sampler", "stop_at"),
    [(Sampler.tpe, 1), *((sampler, at) for sampler in Sampler for at in (ANCHORS + 4, ANCHORS + 5))],
    ids=lambda x: f"interrupted at {x}" if isinstance(x, int) else str(x),
)
def test_a_resumed_search_equals_a_straight_one(
    sampler: Sampler, stop_at: int, straight: dict[Sampler, list[Record]], tmp_path: Path
) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=TRIALS, sampler=sampler, rungs=[1.0])
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, config).run(Counting(stop_at))
    study = opened(tmp_path, config)
    assert study.cut_off == 1
    study.run(synthetic)
    assert outcome(study.records) == outcome(straight[sampler])


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Databases of searches that stand after so many trials."""

    @functools.cache
    def make(trials: int) -> Path:
        folder = tmp_path_factory.mktemp("beginning")
        opened(folder, SearchConfig(anchors=ANCHORS, n_trials=trials, sampler=Sampler.tpe, rungs=[1.0])).run(synthetic)
        with sqlite3.connect(folder / "study.db") as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return folder / "study.db"

    return make


@pytest.mark.parametrize("moment", ["enqueued", "asked", "proposed", "evaluated", "told"])
@pytest.mark.parametrize("at", [2, ANCHORS + 4, ANCHORS + 5], ids=lambda n: f"trial {n}")
def test_a_search_killed_at_any_step_equals_a_straight_one(
    moment: str,
    at: int,
    straight: dict[Sampler, list[Record]],
    beginnings: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is gone: nothing after the given step of a trial is stored, and nothing is cleaned up."""

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    shutil.copy(beginnings(at), tmp_path / "study.db")
    config = SearchConfig(anchors=ANCHORS, n_trials=at + 3, sampler=Sampler.tpe, rungs=[1.0])
    study = opened(tmp_path, config)
    if moment == "enqueued":
        monkeypatch.setattr(optuna.Study, "ask", kill)
    elif moment == "asked":
        monkeypatch.setattr(SearchSpace, "suggest", kill)
    elif moment == "evaluated":
        monkeypatch.setattr(optuna.Study, "tell", kill)
    try:
        proposal = study.propose()
        if moment != "proposed":
            study.tell(proposal, synthetic(proposal.policy))
    except Killed:
        pass
    monkeypatch.undo()
    again = opened(tmp_path, config)
    assert len(again.records) == at + (moment == "told")
    again.run(synthetic)
    assert outcome(again.records) == outcome(straight[Sampler.tpe][: at + 3])


def test_another_seed_proposes_other_policies(straight: dict[Sampler, list[Record]], tmp_path: Path) -> None:
    study = opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=ANCHORS + 3, sampler=Sampler.tpe), seed=1)
    study.run(synthetic)
    same = [a.policy == b.policy for a, b in zip(study.records, straight[Sampler.tpe], strict=False)]
    assert all(same[:ANCHORS])
    assert not all(same[ANCHORS:])


def test_no_proposal_repeats_a_sample_after_a_resume(tmp_path: Path) -> None:
    policies = []
    for n_trials in (ANCHORS + 4, ANCHORS + 8, ANCHORS + 12):
        study = opened(
            tmp_path, SearchConfig(anchors=ANCHORS, n_trials=n_trials, sampler=Sampler.random, local_share=0)
        )
        study.run(synthetic)
        assert len(study.records) == n_trials
        policies = [
            record.policy for record in study.records[ANCHORS:] if Op.routed in [x.op for x in record.policy.layers]
        ]
    assert len({policy.digest() for policy in policies}) == len(policies)


def test_a_finished_study_evaluates_nothing(tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=4)
    opened(tmp_path, config).run(synthetic)
    study, counting = opened(tmp_path, config), Counting()
    assert study.remaining == 0
    study.run(counting)
    assert counting.policies == []


def test_a_policy_proposed_twice_is_evaluated_once(tmp_path: Path) -> None:
    space = SearchSpace(ops=[Op.delta, Op.softmax])  # 8 policies
    config, counting = SearchConfig(anchors=ANCHORS, n_trials=20, space=space, rungs=[1.0]), Counting()
    study = opened(tmp_path, config)
    study.run(counting)
    assert len(counting.policies) == len(set(counting.policies)) <= 8
    repeated = [record for record in study.records if record.same_as is not None]
    assert len(repeated) == 20 - len(counting.policies)
    for record in repeated:
        assert record.values == study.records[record.same_as or 0].values
    assert outcome(opened(tmp_path, config).records) == outcome(study.records)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_value_that_is_not_finite_fails_the_trial(bad: float, tmp_path: Path) -> None:
    target = problem(SearchConfig()).first[3]

    def evaluate(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        found = synthetic(policy)
        return replace(found, errors={"recall_error": bad}) if policy == target else found

    config = SearchConfig(anchors=ANCHORS, n_trials=8)
    study = opened(tmp_path, config)
    study.run(evaluate)
    assert study.records[3].reason == f"objective recall_error is {bad}"
    assert study.records[3] not in study.front()
    assert study.front()
    assert outcome(opened(tmp_path, config).records) == outcome(study.records)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FloatingPointError("val_loss is nan"), "val_loss is nan"),
        (RuntimeError("CUDA out of memory\nmore"), "RuntimeError: CUDA out of memory more"),
        (MemoryError(), "MemoryError: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_evaluation_that_raises_fails_the_trial(error: Exception, reason: str, tmp_path: Path) -> None:
    first = problem(SearchConfig()).first[0]

    def evaluate(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        if policy == first:
            raise error
        return synthetic(policy, share)

    study = opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=5))
    study.run(evaluate)
    assert [record.reason for record in study.records] == [reason, None, None, None, None]


def test_a_search_in_which_every_trial_fails_stops(tmp_path: Path) -> None:
    def evaluate(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
        raise FloatingPointError("val_loss is nan")

    config = SearchConfig(anchors=ANCHORS, n_trials=50)
    with pytest.raises(
        SearchFailedError, match=r"5 of 5 trials failed, more than .* = 0.5; the last one: val_loss is nan"
    ):
        opened(tmp_path, config).run(evaluate)
    counting = Counting()
    with pytest.raises(SearchFailedError, match="5 of 5 trials failed"):
        opened(tmp_path, config).run(counting)
    assert counting.policies == []
    assert opened(tmp_path, config).front() == []


def test_constraints_keep_policies_off_the_front(tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=ANCHORS, constraints={"recall_error": 0.5})
    study = opened(tmp_path, config)
    study.run(synthetic)
    feasible = [record.values["recall_error"] <= 0.5 for record in study.records if record.values is not None]
    assert feasible == [record.feasible for record in study.records]
    assert not all(feasible)
    assert all(record.values is not None and record.values["recall_error"] <= 0.5 for record in study.front())
    assert outcome(opened(tmp_path, config).records) == outcome(study.records)
    impossible = opened(tmp_path / "..", SearchConfig(anchors=ANCHORS, n_trials=3, constraints={"recall_error": -1.0}))
    impossible.run(synthetic)
    assert impossible.front() == []


CHANGES = {
    "objectives": ({"objectives": ["kept_fraction", "recall_error", "val_loss"]}, {}, r"objectives.val_loss: absent"),
    "fewer objectives": ({"objectives": ["recall_error"]}, {}, r"objectives.kept_fraction: \"minimize\" → absent"),
    "space": ({"space": SearchSpace(budget_max=0.5)}, {}, r"space.budget_max: 1.0 → 0.5"),
    "constraint": ({"constraints": {"val_loss": 2.0}}, {}, r"constraints.*val_loss"),
    "sampler": ({"sampler": Sampler.random}, {}, r"sampler: \"sweep\" → \"random\""),
    "local share": ({"local_share": 0.5}, {}, r"local_share: 0.35 → 0.5"),
    "model": ({}, {"model": "other"}, r"model: \"m\" → \"other\""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_resume_under_other_settings_is_refused(case: str, tmp_path: Path) -> None:
    with contextlib.closing(
        opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=3))
    ) as study:  # all of it is in the file afterwards
        study.run(synthetic)
    before = (tmp_path / "study.db").read_bytes()
    settings, made_from, text = CHANGES[case]
    with pytest.raises(UserError, match=text):
        opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=3, **settings), made_from=made_from)  # type: ignore[arg-type]
    assert (tmp_path / "study.db").read_bytes() == before


def test_a_study_of_another_version_names_the_version_that_it_needs(tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=2)
    opened(tmp_path, config, made_from={"natsl": "0.0.9", "model": "m"}).close()
    with pytest.raises(UserError, match=r'natsl: "0.0.9" → "0.1.0"\): use natsl 0.0.9 or choose another name'):
        opened(tmp_path, config, made_from={"natsl": "0.1.0", "model": "m"})
    with pytest.raises(UserError, match=r'natsl: .*; model: "m" → "x"\): restore them or choose another name'):
        opened(tmp_path, config, made_from={"natsl": "0.1.0", "model": "x"})


def test_a_study_with_another_direction_is_refused(tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=2)
    opened(tmp_path, config).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("UPDATE study_directions SET direction = 'MAXIMIZE' WHERE objective = 1")
    with pytest.raises(UserError, match=r'directions: \["minimize", "maximize"\] → \["minimize", "minimize"\]'):
        opened(tmp_path, config)


def test_a_study_with_an_op_and_a_budget_per_layer_is_refused(tmp_path: Path) -> None:
    """As older versions made them: their parameters mean something else."""
    config = SearchConfig(anchors=ANCHORS, n_trials=3)
    opened(tmp_path, config).run(synthetic)
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="first")
    old = study.user_attrs["natsl_fingerprint"]
    del old["space"]["parameters"], old["space"]["granularity"]
    study.set_user_attr("natsl_fingerprint", old | {"space": old["space"] | {"budget_scale": "u^2"}})
    with pytest.raises(UserError, match=r'space.parameters: absent → "one number, its ends snapped"'):
        opened(tmp_path, config)


def test_the_number_of_anchors_is_chosen_once(tmp_path: Path) -> None:
    """More trials do not change the anchors of a search that has begun."""
    begun = opened(tmp_path, SearchConfig(n_trials=12))
    assert len(begun.fingerprint["first"]) == 3
    begun.close()
    assert opened(tmp_path, SearchConfig(n_trials=250)).fingerprint == begun.fingerprint


def test_at_most_a_quarter_of_the_trials_are_anchors(tmp_path: Path) -> None:
    mine = RoutingPolicy((LayerPolicy(budget=0.333),) * 3, CHUNK)
    config = SearchConfig(n_trials=12)
    first = first_policies(config, shapes(ROUTED), CHUNK, [mine])
    asked = replace(problem(config), first=first, given=1)
    study = open_policy_study(tmp_path / "study.db", "first", config, asked, 0, {})
    study.run(synthetic)
    policies = [record.policy for record in study.records]
    assert policies[:4] == list(first[:4])
    assert policies[4] != first[4]


def test_a_resume_with_another_seed_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=3), seed=4).run(synthetic)
    with pytest.raises(UserError, match=r"seed: 4 → 5"):
        opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=3), seed=5)


@pytest.mark.parametrize("sampler", Sampler)
def test_foreign_trials_in_the_study_are_skipped(sampler: Sampler, tmp_path: Path) -> None:
    opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=3, sampler=sampler)).run(synthetic)
    theirs = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="first")
    for attributes in ({}, {"policy": "mine", "evaluation": 1}):
        theirs.add_trial(optuna.trial.create_trial(values=[0.0, 0.0], user_attrs=attributes))
    failed = optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"reason": "bad luck"})
    theirs.add_trial(failed)
    config = SearchConfig(anchors=ANCHORS, n_trials=ANCHORS + 3, sampler=sampler)
    study = opened(tmp_path, config)
    assert study.foreign == [3, 4, 5]
    assert len(study.records) == 3
    study.run(synthetic)
    assert [record.index for record in study.records] == list(range(ANCHORS + 3))
    assert outcome(opened(tmp_path, config).records) == outcome(study.records)


def text_file(path: Path) -> None:
    path.write_text("these are not trials")


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()


def other_study(path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{path}", study_name="cats")


def own_name_other_maker(path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{path}", study_name="first", directions=["minimize"])


def damaged(path: Path) -> None:
    opened(path.parent, SearchConfig(anchors=ANCHORS, n_trials=2)).run(synthetic)
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4096)
    path.write_bytes(data)


def truncated(path: Path) -> None:
    opened(path.parent, SearchConfig(anchors=ANCHORS, n_trials=2)).run(synthetic)
    path.write_bytes(path.read_bytes()[:6000])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (text_file, "it is no SQLite database"),
        (other_database, "it was not made by Optuna"),
        (other_study, "it holds 'cats', not 'first'"),
        (own_name_other_maker, "was not made by natsl"),
        (damaged, "it is damaged"),
        (truncated, "it is damaged"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_corrupt_or_foreign_database_is_left_alone(make: Callable[[Path], None], text: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=text) as caught:
        opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=2))
    assert "\n" not in str(caught.value)
    assert "choose another name" in str(caught.value)
    assert path.read_bytes() == before


def test_an_interrupted_creation_leaves_no_half_database(tmp_path: Path) -> None:
    (tmp_path / "study.db.new").write_bytes(b"SQLite format 3\0half")
    (tmp_path / "study.db").touch()
    opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=2)).run(synthetic)
    assert len(opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=2)).records) == 2
    assert not (tmp_path / "study.db.new").exists()


def test_the_database_is_in_wal_mode(tmp_path: Path) -> None:
    study = opened(tmp_path, SearchConfig(anchors=ANCHORS, n_trials=1))
    study.run(synthetic)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_users_policies_are_tried_first(tmp_path: Path) -> None:
    mine = RoutingPolicy((LayerPolicy(budget=0.333), LayerPolicy(Op.delta), LayerPolicy(Op.softmax)), CHUNK)
    config = SearchConfig(anchors=ANCHORS, n_trials=2)
    first = first_policies(config, shapes(ROUTED), CHUNK, [mine])
    asked = replace(problem(config), first=first)
    study = open_policy_study(tmp_path / "study.db", "first", config, asked, 0, {})
    study.run(synthetic)
    assert study.records[0].policy == mine
    assert study.records[1].policy == first[1]


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (RoutingPolicy((LayerPolicy(budget=0.9),) * 3, CHUNK), "budget = 0.9 is not allowed"),
        (RoutingPolicy((LayerPolicy(threshold=0.5),) * 3, CHUNK), "budget"),
        (RoutingPolicy((LayerPolicy(Op.delta),) * 2, CHUNK), "the model has 3 layers"),
        (RoutingPolicy((LayerPolicy(Op.delta),) * 3, 64), "the model's chunk size is 16"),
    ],
    ids=["out of range", "other control", "other depth", "other chunk size"],
)
def test_a_first_policy_outside_the_space_is_rejected(policy: RoutingPolicy, text: str) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=2, space=SearchSpace(budget_max=0.5))
    with pytest.raises(ValueError, match=text):
        first_policies(config, shapes(ROUTED), CHUNK, [policy])


@pytest.mark.parametrize("kinds", [(Op.routed,), (Op.delta, Op.routed, Op.softmax)], ids=["one layer", "hybrid"])
@pytest.mark.parametrize("sampler", Sampler)
def test_other_models_can_be_searched(kinds: tuple[Op, ...], sampler: Sampler, tmp_path: Path) -> None:
    config = SearchConfig(
        anchors=ANCHORS, n_trials=ANCHORS + 3, sampler=sampler, objectives=["val_loss", "decode_bytes", "recall_error"]
    )
    study = open_policy_study(tmp_path / "study.db", "first", config, problem(config, kinds), 0, {})
    study.run(synthetic)
    assert len(study.records) == ANCHORS + 3
    assert study.front()
    for record in study.records:
        record.policy.check(kinds, CHUNK)
