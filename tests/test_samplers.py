"""What every sampler promises; one that is listed in the registry is tested here without another line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from natsl.evaluate import Evaluation
from natsl.search import samplers
from natsl.search.config import SearchConfig
from natsl.search.samplers import Sampler, make_sampler
from natsl.search.samplers.history import SHARE, history_of
from natsl.search.samplers.model import Model
from natsl.search.samplers.moves import front_of
from natsl.search.samplers.near_knee import NearKneeSampler
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.search.trial import Record
from natsl.space.policy import RoutingPolicy
from natsl.space.space import Control, SearchSpace
from tests.search_helpers import CHUNK, ROUTED, problem, synthetic

ANCHORS = 13  # up to the sweeps with softmax
TRIALS = ANCHORS + 4


def opened(folder: Path, config: SearchConfig, seed: int = 0) -> PolicyStudy:
    folder.mkdir(exist_ok=True)
    return open_policy_study(folder / "study.db", "s", config, problem(config), seed, {})


def outcome(records: Sequence[Record]) -> list[tuple[object, ...]]:
    return [(r.index, r.policy.digest(), r.values, r.reason, r.same_as, r.feasible) for r in records]


def unlucky(policy: RoutingPolicy, share: float = 1.0) -> Evaluation:
    """The synthetic evaluation; one policy in five has none."""
    if int(policy.digest(), 16) % 5 == 0:
        raise RuntimeError("unlucky")
    return synthetic(policy, share)


def test_every_module_is_registered() -> None:
    names = {path.stem for path in Path(samplers.__file__).parent.glob("*.py")}
    assert names - {"__init__", "near_knee", "moves", "history", "model"} == {sampler.value for sampler in Sampler}


CASES: dict[str, dict[str, Any]] = {
    "one objective": {"objectives": ["recall_error"]},
    "two objectives": {},
    "three objectives under a constraint": {
        "objectives": ["val_loss", "decode_bytes", "recall_error"],
        "constraints": {"recall_error": 0.6},
    },
    "constraint that nothing keeps": {"constraints": {"recall_error": -1.0}},
    "thresholds and mix": {
        "space": SearchSpace(control=Control.threshold, mix_temperature_min=0.25, mix_temperature_max=4.0)
    },
    "narrow budgets under a cap": {"space": SearchSpace(budget_min=0.1, budget_max=0.3, cap=0.5, burst=1)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampler", Sampler)
def test_proposals_are_policies_of_the_space(sampler: Sampler, case: str, tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=TRIALS, sampler=sampler, max_failure_rate=1.0, **CASES[case])
    study = opened(tmp_path, config)
    study.run(unlucky)
    assert len(study.records) == TRIALS
    for record in study.records:
        record.policy.check(ROUTED, CHUNK)
        again = config.space.from_params(config.space.params(record.policy, ROUTED), ROUTED, CHUNK)
        assert again == record.policy
    fresh = {record.policy.digest() for record in study.records[ANCHORS:]}
    assert len(fresh) > 1


@pytest.mark.parametrize("case", ["one objective", "three objectives under a constraint"])
@pytest.mark.parametrize("sampler", Sampler)
def test_a_search_that_stops_after_every_trial_equals_a_straight_one(
    sampler: Sampler, case: str, tmp_path: Path
) -> None:
    """Proposals depend on (seed, index) and the results so far, so nothing of a sampler may live between trials."""
    config = SearchConfig(anchors=ANCHORS, n_trials=TRIALS, sampler=sampler, max_failure_rate=1.0, **CASES[case])
    straight = opened(tmp_path / "straight", config)
    straight.run(unlucky)
    assert any(record.reason is not None for record in straight.records)
    for n_trials in (1, *range(ANCHORS, TRIALS + 1)):
        study = opened(tmp_path / "stopped", replace(config, n_trials=n_trials))
        study.run(unlucky)
    assert outcome(study.records) == outcome(straight.records)


@pytest.mark.parametrize("sampler", Sampler)
def test_another_seed_draws_otherwise(sampler: Sampler, tmp_path: Path) -> None:
    config = SearchConfig(anchors=ANCHORS, n_trials=ANCHORS + 3, sampler=sampler, local_share=0.0)
    both = []
    for seed in (0, 1):
        study = opened(tmp_path / str(seed), config, seed)
        study.run(synthetic)
        both.append([record.policy.digest() for record in study.records[ANCHORS:]])
    assert both[0] != both[1]


def test_the_share_of_moves_is_spread_evenly() -> None:
    kinds = [type(make_sampler(Sampler.random, 0.35, 0, index)) for index in range(100)]
    places = [i for i, kind in enumerate(kinds) if kind is NearKneeSampler]
    assert len(places) == 35
    assert {b - a for a, b in pairwise(places)} == {2, 3}
    assert all(type(make_sampler(Sampler.random, 0.0, 0, index)) is RandomSampler for index in range(10))
    assert all(type(make_sampler(Sampler.random, 1.0, 0, index)) is NearKneeSampler for index in range(10))


class Fixed(BaseSampler):
    """Draws 0.5 for every number it is asked for, and counts how often it is asked for all that go together."""

    def __init__(self) -> None:
        self.relative = 0
        self.independent: list[str] = []

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: object) -> dict[str, Any]:
        self.relative += 1
        return {"z": 0.75, "far": 7.0}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        self.independent.append(param_name)
        return 0.5


def test_moves_leave_open_parameters_to_the_wrapped_sampler() -> None:
    base, study = Fixed(), optuna.create_study(directions=["minimize", "minimize"])
    study.sampler = NearKneeSampler(base, 0)
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5  # there is no front yet
    study.tell(trial, (0.0, 0.0))
    assert (base.relative, base.independent) == (1, ["x"])
    study.sampler = NearKneeSampler(base, 1)
    trial = study.ask()
    moved = trial.suggest_float("x", 0, 1)
    assert 0 < abs(moved - 0.5) < 0.5
    assert (base.relative, base.independent) == (1, ["x"]), "a whole move asks for nothing"
    assert trial.suggest_float("y", 0, 1) == 0.5
    assert trial.suggest_float("z", 0, 1) == 0.75
    assert trial.suggest_float("far", 0, 1) == 0.5, "what is out of range is drawn again"
    assert (base.relative, base.independent) == (2, ["x", "y", "far"])


@pytest.mark.parametrize("sampler", Sampler)
def test_a_move_that_was_enqueued_by_an_older_version_is_made(sampler: Sampler, tmp_path: Path) -> None:
    """Older versions enqueued the parameters of a move before they asked; a search cut off between is the same."""
    config = SearchConfig(anchors=ANCHORS, n_trials=TRIALS, sampler=sampler, local_share=1.0)
    straight = opened(tmp_path / "straight", config)
    straight.run(synthetic)
    at = TRIALS - 3
    opened(tmp_path / "old", replace(config, n_trials=at)).run(synthetic)
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/straight/study.db").trials
    old = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/old/study.db")
    old.enqueue_trial(trials[at].params)
    assert old.trials[at].state is TrialState.WAITING
    study = opened(tmp_path / "old", config)
    study.run(synthetic)
    assert outcome(study.records) == outcome(straight.records)


NAMES = tuple(f"u.{i}" for i in range(4))


def told(study: optuna.Study, index: int, **attributes: float) -> dict[str, Any]:
    """The parameters of the sweep's next trial, which is told a result: one number helps, the others cost."""
    study.sampler = make_sampler(Sampler.sweep, 0.0, 0, index)
    trial = study.ask()
    u = [trial.suggest_float(name, 0.0, 1.0) for name in NAMES]
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    trial.set_constraint("enough", 2.6 - sum(u[:3]) + u[3])
    study.tell(trial, ((1 - u[0]) ** 2 + 0.1 * u[3], sum(u) / 4))
    return trial.params


def two_objectives() -> optuna.Study:
    return optuna.create_study(directions=["minimize", "minimize"])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_sweep_goes_to_where_constraints_are_kept() -> None:
    study = two_objectives()
    for index in range(40):
        told(study, index)
    broken = [trial.constraints["enough"] for trial in study.trials]
    assert min(broken[:10]) > 0, "nothing keeps the constraint at first"
    assert sum(value <= 0 for value in broken[20:]) >= 10


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=["one constraint", "two constraints"])
def test_a_first_trial_that_failed_hides_no_constraint(names: tuple[str, ...]) -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    for index in range(12):
        trial = study.ask()
        for name in NAMES:
            trial.suggest_float(name, 0.0, 1.0)
        if index == 0:
            trial.set_user_attr("reason", "it failed")
            study.tell(trial, state=TrialState.FAIL)
            continue
        for name in names:
            trial.set_constraint(name, 1.0)
        study.tell(trial, (index / 12, 1 - index / 12))
    history = history_of(study)
    assert len(history.trials) == 12
    assert len(history.front) == 0
    assert history.broken.tolist() == [0.0, *[1.0] * 11]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_what_else_is_in_the_study_does_not_disturb_the_sweep() -> None:
    alone, shared = two_objectives(), two_objectives()
    far = optuna.distributions.FloatDistribution(5.0, 9.0)
    for params in ({"other": 6.0}, {"u.0": 7.0}):
        space: dict[str, BaseDistribution] = dict.fromkeys(params, far)
        shared.add_trial(optuna.create_trial(params=params, distributions=space, values=[-1.0, -1.0]))
    for index in range(25):
        assert told(shared, index, policy=0) == told(alone, index, policy=0)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_trial_judged_on_a_part_of_the_data_is_not_on_the_front_but_was_tried() -> None:
    study = two_objectives()
    for value, share in ((0.5, None), (0.1, 0.25), (0.2, 1.0)):
        study.enqueue_trial(dict.fromkeys(NAMES, value))
        trial = study.ask()
        for name in NAMES:
            trial.suggest_float(name, 0.0, 1.0)
        if share is not None:
            trial.set_user_attr(SHARE, share)
        study.tell(trial, (value, 1 - value if value > 0.15 else 0.0))
    front, _ = front_of(study)
    assert [trial.number for trial in front] == [0, 2]
    history = history_of(study)
    assert set(history.keys(np.full((1, 4), 0.1))) <= history.tried


def test_numbers_that_mean_the_same_policy_are_not_new() -> None:
    study = two_objectives()
    study.enqueue_trial(dict.fromkeys(NAMES, 0.0))
    trial = study.ask()
    for name in NAMES:
        trial.suggest_float(name, 0.0, 1.0)
    study.tell(trial, (0.0, 0.0))
    history = history_of(study)
    same, also, other = history.keys(np.array([[0.0, 0.04, 0.02, 0.05], [0, 0, 0, 0.06], [0, 0, 0, 0.1]]))
    assert {same, also} == history.tried, "ends are snapped, and budgets below half of a thousandth are rounded to 0"
    assert other not in history.tried


def test_the_history_grows_as_the_study_does() -> None:
    """It is kept between proposals: what it has then must be what another process reads at once."""
    study = two_objectives()
    space: dict[str, BaseDistribution] = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in NAMES}
    for index in range(150):
        u = [(index * step) % 100 / 100 for step in (1, 3, 7, 9)]
        params = dict(zip(NAMES, u, strict=True))
        study.add_trial(optuna.create_trial(params=params, distributions=space, values=[u[0], 1 - u[1]]))
        grown = history_of(study)
    again = two_objectives()
    again.add_trials(study.get_trials())
    fresh = history_of(again)
    assert (grown.positions == fresh.positions).all()
    assert grown.positions.shape == (150, 4)
    assert (grown.values == fresh.values).all()
    assert grown.tried == fresh.tried
    assert grown.front.tolist() == fresh.front.tolist()


def test_the_model_interpolates_and_is_less_sure_far_away() -> None:
    random = np.random.default_rng(0)
    points = random.random((60, 3)) * 0.5
    targets = np.stack(((points - 0.2) ** 2 @ [1.0, 2.0, 0.0], points[:, 0] * points[:, 1]), axis=1)
    model = Model(points[:50], targets[:50])
    mean, deviation = model.predict(points[50:])
    assert np.abs(mean - targets[50:]).mean(axis=0) == pytest.approx(np.zeros(2), abs=0.03 * np.ptp(targets))
    assert (model.predict(np.ones((1, 3)))[1] > deviation.max(axis=0)).all()
