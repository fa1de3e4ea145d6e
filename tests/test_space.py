"""The search space: parameters and their exact inverse, anchors, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest

from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import Control, Granularity, SearchSpace

KINDS = [Op.softmax, Op.routed, Op.delta, Op.routed, Op.routed]
ROUTED = [Op.routed] * 3
DELTA, SOFTMAX = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)


class RandomTrial:
    """Draws parameters uniformly, at the ends of the ranges now and then, and notes every range."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.params: dict[str, Any] = {}
        self.ranges: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert name not in self.params
        value = self.rng.choice([low, high, *[self.rng.uniform(low, high) for _ in range(6)]])
        self.params[name], self.ranges[name] = value, (low, high, log)
        return value


HEADS = 2
SPACES = {
    "default": SearchSpace(),
    "routed only": SearchSpace(ops=[Op.routed]),
    "no delta": SearchSpace(ops=[Op.softmax, Op.routed]),
    "static": SearchSpace(ops=[Op.delta, Op.softmax]),
    "narrow budgets": SearchSpace(budget_min=0.033, budget_max=0.617),
    "tenths": SearchSpace(budget_min=0.1, budget_max=0.7),
    "one budget": SearchSpace(budget_min=0.25, budget_max=0.25),
    "thresholds": SearchSpace(control=Control.threshold, threshold_min=-2.5, threshold_max=7.125),
    "one threshold": SearchSpace(control=Control.threshold, threshold_min=1, threshold_max=1),
    "mix": SearchSpace(mix_temperature_min=0.3, mix_temperature_max=3.0),
    "fixed mix": SearchSpace(mix_temperature_min=2.0, mix_temperature_max=2.0),
    "cap": SearchSpace(cap=0.4, burst=2),
    "heads": SearchSpace(granularity=Granularity.head),
    "heads, routed only": SearchSpace(ops=[Op.routed], granularity=Granularity.head),
    "heads, thresholds": SearchSpace(granularity=Granularity.head, control=Control.threshold),
    "heads under a cap": SearchSpace(granularity=Granularity.head, budget_max=0.6, cap=0.5, mix_temperature_max=2),
    "everything": SearchSpace(budget_max=0.6, mix_temperature_min=0.01, mix_temperature_max=10, cap=0.5, burst=1),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@each_space
def test_drawn_policies_are_legal_and_come_back_as_parameters(space: SearchSpace) -> None:
    ranges: dict[str, Any] = {}
    for seed in range(200):
        trial = RandomTrial(seed)
        policy = space.suggest(trial, KINDS, 16, HEADS)
        policy.check(KINDS, 16, HEADS)
        params = space.params(policy, KINDS, HEADS)
        assert params.keys() == trial.params.keys()
        assert space.from_params(params, KINDS, 16, HEADS) == policy
        assert RoutingPolicy.from_json(policy.to_json()) == policy
        json.dumps(params, allow_nan=False)
        assert ranges in ({}, trial.ranges), "samplers need the same parameters, with one range, in every trial"
        ranges = trial.ranges
        for layer in policy.layers:
            values = [layer.budget, layer.threshold] if layer.heads() is None else [*(layer.budget or layer.threshold)]  # type: ignore[misc]
            for value in (*values, layer.mix_temperature):
                assert value is None or math.isinf(value) or round(value, 3) == value  # type: ignore[arg-type]


@each_space
def test_every_op_of_the_space_is_drawn(space: SearchSpace) -> None:
    drawn = {space.suggest(RandomTrial(seed), [Op.routed], 16, 1).layers[0].op for seed in range(100)}
    assert drawn == set(space.ops) - ({Op.softmax} if space.cap is not None else set())


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("ops", [[Op.routed], list(Op)], ids=["routed only", "all"])
def test_every_budget_of_the_grid_comes_back(ops: list[Op], granularity: Granularity) -> None:
    for low, high in ((0.0, 1.0), (0.033, 0.617)):
        space = SearchSpace(ops, granularity, budget_min=low, budget_max=high)
        for thousandth in range(round(low * 1000), round(high * 1000) + 1):
            value = thousandth / 1000
            layer = LayerPolicy(budget=value if granularity is Granularity.layer else [value, low])  # type: ignore[arg-type]
            policy = RoutingPolicy((layer,), 16)
            if granularity is Granularity.head and value == low == 0 and Op.delta in ops:
                continue  # all heads at 0 are op delta
            params = space.params(policy, [Op.routed], 2)
            assert all(0 <= u <= 1 for u in params.values())
            assert space.from_params(params, [Op.routed], 16, 2) == policy


QUARTER = LayerPolicy(budget=0.3)  # a quarter of the way from .1 to .9, at half of the range


@pytest.mark.parametrize(
    ("ops", "u", "layer"),
    [
        (list(Op), 0.0, DELTA),
        (list(Op), 0.05, DELTA),
        (list(Op), 0.051, LayerPolicy(budget=0.1)),
        (list(Op), 0.5, QUARTER),
        (list(Op), 0.949, LayerPolicy(budget=0.898)),
        (list(Op), 0.95, SOFTMAX),
        (list(Op), 1.0, SOFTMAX),
        ([Op.routed], 0.0, LayerPolicy(budget=0.1)),
        ([Op.routed], 0.5, QUARTER),
        ([Op.routed], 1.0, LayerPolicy(budget=0.9)),
        ([Op.delta, Op.routed], 0.05, DELTA),
        ([Op.delta, Op.routed], 0.525, QUARTER),
        ([Op.delta, Op.routed], 1.0, LayerPolicy(budget=0.9)),
        ([Op.softmax, Op.routed], 0.475, QUARTER),
        ([Op.softmax, Op.routed], 0.95, SOFTMAX),
        ([Op.delta, Op.softmax], 0.49, DELTA),
        ([Op.delta, Op.softmax], 0.51, SOFTMAX),
    ],
)
def test_ends_are_snapped_and_budgets_are_squares(ops: list[Op], u: float, layer: LayerPolicy) -> None:
    space = SearchSpace(ops=ops, budget_min=0.1, budget_max=0.9)
    assert space.from_params({"u.0": u}, [Op.routed], 16).layers == (layer,)


def test_a_cap_leaves_no_softmax() -> None:
    space = SearchSpace(cap=0.4)
    assert space.from_params({"u.0": 1.0}, [Op.routed], 16).layers == (LayerPolicy(budget=1.0, cap=0.4),)
    with pytest.raises(ValueError, match=r"layers\[0\].op = 'softmax' .* search.space.cap"):
        space.params(RoutingPolicy((SOFTMAX,), 16), [Op.routed])


def test_thresholds_fall_as_more_is_kept() -> None:
    space = SearchSpace(control=Control.threshold, threshold_min=-1, threshold_max=3)
    for u, layer in (
        (0.0, DELTA),
        (0.5, LayerPolicy(threshold=1.0)),
        (0.725, LayerPolicy(threshold=0.0)),
        (1, SOFTMAX),
    ):
        assert space.from_params({"u.0": u}, [Op.routed], 16).layers == (layer,)


@pytest.mark.parametrize(
    ("control", "u", "layer"),
    [
        ("budget", (0, 0), DELTA),
        ("budget", (1, 1), SOFTMAX),
        ("budget", (0, 1), LayerPolicy(budget=[0, 1])),  # type: ignore[arg-type]
        ("budget", (0.5, 0), LayerPolicy(budget=[0.25, 0])),  # type: ignore[arg-type]
        ("threshold", (0, 0), DELTA),
        ("threshold", (1, 1), SOFTMAX),
        ("threshold", (0.5, 0), LayerPolicy(threshold=[0, float("inf")])),  # type: ignore[arg-type]
        ("threshold", (1, 0.5), LayerPolicy(threshold=[-float("inf"), 0])),  # type: ignore[arg-type]
    ],
)
def test_heads_have_numbers_of_their_own(control: str, u: tuple[float, float], layer: LayerPolicy) -> None:
    space = SearchSpace(granularity=Granularity.head, control=Control(control))
    params = {"u.0.0": u[0], "u.0.1": u[1]}
    policy = space.from_params(params, [Op.routed], 16, 2)
    assert policy.layers == (layer,)
    assert space.params(policy, [Op.routed], 2) == pytest.approx(params)
    with pytest.raises(ValueError, match="number of routing heads"):
        space.from_params(params, [Op.routed], 16)


@pytest.mark.parametrize(
    ("space", "layer", "names"),
    [
        ("default", LayerPolicy(budget=0.5), {"u.1"}),
        ("default", SOFTMAX, {"u.1"}),
        ("routed only", LayerPolicy(budget=0.5), {"u.1"}),
        ("one budget", LayerPolicy(budget=0.25), {"u.1"}),
        ("thresholds", LayerPolicy(threshold=0.5), {"u.1"}),
        ("mix", LayerPolicy(budget=0.5), {"u.1", "mix.1"}),
        ("mix", DELTA, {"u.1", "mix.1"}),
        ("fixed mix", LayerPolicy(Op.softmax, mix_temperature=2), {"u.1"}),
        ("heads", DELTA, {"u.1.0", "u.1.1"}),
        ("heads under a cap", DELTA, {"u.1.0", "u.1.1", "mix.1"}),
    ],
)
def test_parameters_are_the_same_in_every_trial(space: str, layer: LayerPolicy, names: set[str]) -> None:
    policy = RoutingPolicy((SOFTMAX, layer), 16)
    assert SPACES[space].params(policy, [Op.softmax, Op.routed], HEADS).keys() == names


def test_where_nothing_is_to_choose_there_are_no_parameters() -> None:
    for space, layer in (
        (SearchSpace(ops=[Op.delta]), DELTA),
        (SearchSpace(ops=[Op.softmax]), SOFTMAX),
        (SearchSpace(ops=[Op.routed], budget_min=0.2, budget_max=0.2), LayerPolicy(budget=0.2)),
    ):
        assert space.params(RoutingPolicy((layer,), 16), [Op.routed]) == {}
        assert space.from_params({}, [Op.routed], 16).layers == (layer,)


def test_layers_of_fixed_kind_need_no_parameters() -> None:
    kinds = [Op.delta, Op.softmax]
    assert SearchSpace().suggest(RandomTrial(0), kinds, 16) == RoutingPolicy((DELTA, SOFTMAX), 16)
    assert SearchSpace().params(RoutingPolicy((DELTA, SOFTMAX), 16), kinds) == {}
    assert SearchSpace().anchors(kinds, 16) == [RoutingPolicy((DELTA, SOFTMAX), 16)]


def test_the_order_of_ops_is_no_part_of_the_space() -> None:
    spaces = [SearchSpace(ops=ops) for ops in ([Op.routed, Op.delta], [Op.delta, Op.routed])]
    assert spaces[0] == spaces[1]
    assert spaces[0].fingerprint() == spaces[1].fingerprint()


FOREIGN: list[tuple[str, str, LayerPolicy, str]] = [
    ("budget too large", "narrow budgets", LayerPolicy(budget=0.7), r"layers\[0\].budget = 0.7 .* \[0.033, 0.617\]"),
    ("budget too small", "narrow budgets", LayerPolicy(budget=0.01), r"layers\[0\].budget = 0.01"),
    ("budget too fine", "default", LayerPolicy(budget=0.12345), "budget = 0.12345 .* at most 3 decimals"),
    ("other fixed budget", "one budget", LayerPolicy(budget=0.3), r"budget = 0.3 .* \[0.25, 0.25\]"),
    ("threshold for budget", "default", LayerPolicy(threshold=1.0), "budget = None"),
    ("budget for threshold", "thresholds", LayerPolicy(budget=0.5), "threshold = None"),
    ("threshold too large", "thresholds", LayerPolicy(threshold=9.0), r"threshold = 9.0 .* \[-2.5, 7.125\]"),
    ("threshold infinite", "thresholds", LayerPolicy(threshold=float("inf")), "threshold = inf"),
    ("no delta", "no delta", DELTA, r"layers\[0\].op = 'delta' .* softmax, routed"),
    ("a list", "default", LayerPolicy(budget=[0.5, 0.1]), "budget = .* one number per layer"),  # type: ignore[arg-type]
    ("one number for heads", "heads", LayerPolicy(budget=0.5), "budget = 0.5 .* one number per head"),
    ("other heads", "heads", LayerPolicy(budget=[0.5] * 3), "budget = .* has 2 routing heads"),  # type: ignore[arg-type]
    ("zeros for delta", "heads", LayerPolicy(budget=[0, 0]), "in this space it is {'op': 'delta'}"),  # type: ignore[arg-type]
    ("no routed", "static", LayerPolicy(budget=0.5), "op = 'routed' .* delta, softmax"),
    ("a cap", "default", LayerPolicy(budget=0.5, cap=0.5), "cap = 0.5 .* fixes it at None"),
    ("no cap", "cap", LayerPolicy(budget=0.5), "cap = None .* fixes it at 0.4"),
    ("other burst", "cap", LayerPolicy(budget=0.5, cap=0.4), "burst = 0 .* fixes it at 2"),
    ("mix out of range", "mix", LayerPolicy(budget=0.5, mix_temperature=5), r"mix_temperature = 5.0 .* \[0.3, 3\]"),
    ("mix not searched", "default", LayerPolicy(Op.softmax, mix_temperature=2), r"mix_temperature = 2.0 .* \[1, 1\]"),
    ("mix on delta", "mix", LayerPolicy(Op.delta, mix_temperature=2), r"layers\[0\] = .* in this space"),
]


@pytest.mark.parametrize(("space", "layer", "message"), [case[1:] for case in FOREIGN], ids=[c[0] for c in FOREIGN])
def test_policies_outside_the_space_are_refused(space: str, layer: LayerPolicy, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SPACES[space].params(RoutingPolicy((layer,), 16), [Op.routed], HEADS)
    assert "\n" not in str(caught.value)


def test_policies_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers = 1 .* 3 layers"):
        SearchSpace().params(RoutingPolicy((DELTA,), 16), ROUTED)
    with pytest.raises(ValueError, match="kind softmax"):
        SearchSpace().params(RoutingPolicy((DELTA,), 16), [Op.softmax])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"u.0": 1.5}, r"parameter u.0 = 1.5 .* \[0, 1\]"),
        ({"u.0": float("nan")}, "parameter u.0 = nan"),
        ({"u.0": "0.5"}, "parameter u.0 = '0.5'"),
        ({"u.0": 0.5, "u.1": 0.5}, "unknown parameter 'u.1': .* u.0"),
        ({"op.0": "delta", "u.0": 0.5}, "unknown parameter 'op.0'"),
        ({}, "parameter u.0 is missing"),
    ],
    ids=["range", "nan", "type", "unknown", "older form", "empty"],
)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace().from_params(params, [Op.routed], 16)


@each_space
@pytest.mark.parametrize("kinds", [KINDS, ROUTED, [Op.routed]], ids=["hybrid", "routed", "single"])
def test_anchors_are_distinct_policies_of_the_space(space: SearchSpace, kinds: list[Op]) -> None:
    anchors = space.anchors(kinds, 16, HEADS)
    assert len({anchor.digest() for anchor in anchors}) == len(anchors)
    for anchor in anchors:
        anchor.check(kinds, 16, HEADS)
        assert space.from_params(space.params(anchor, kinds, HEADS), kinds, 16, HEADS) == anchor


def test_anchors_of_the_default_space() -> None:
    expected = [(DELTA,) * 3, (SOFTMAX,) * 3]
    expected += [(LayerPolicy(budget=budget),) * 3 for budget in (0.25, 0.5, 0.05, 0.1, 0.125)]
    for single in (0.25, None, 0.1, 0.05, 0.5, 0.025):
        layer = SOFTMAX if single is None else LayerPolicy(budget=single)
        expected += [(layer, DELTA, DELTA), (DELTA, layer, DELTA), (DELTA, DELTA, layer)]
    assert [anchor.layers for anchor in SearchSpace().anchors(ROUTED, 16)] == expected


def test_anchors_of_heads_have_one_head_that_keeps() -> None:
    texts = [anchor.describe() for anchor in SPACES["heads"].anchors([Op.delta, Op.routed], 16, 2)]
    assert texts[:3] == ["D D", "D S", "D [.25,.25]"]
    assert texts[7:11] == ["D [.25,0]", "D [0,.25]", "D [1,0]", "D [0,1]"]


@pytest.mark.parametrize(
    ("space", "texts"),
    [
        ("default", ["D", "S", ".25", ".5", ".05", ".1", ".125", ".025"]),
        ("routed only", [".25", ".5", ".05", ".1", ".125", ".025"]),
        ("no delta", ["S", ".25", ".5", ".05", ".1", ".125", ".025"]),
        ("static", ["D", "S"]),
        ("tenths", ["D", "S", ".25", ".5", ".1", ".125"]),
        ("thresholds", ["D", "S"]),
        ("fixed mix", ["D", "S/2", ".25/2", ".5/2", ".05/2", ".1/2", ".125/2", ".025/2"]),
        ("cap", ["D", *[budget + "≤.4+2" for budget in (".25", ".5", ".05", ".1", ".125", ".025")]]),
    ],
)
def test_anchors_are_those_that_the_space_can_express(space: str, texts: list[str]) -> None:
    assert [anchor.describe() for anchor in SPACES[space].anchors([Op.routed], 16)] == texts


def test_single_layer_anchors_need_delta() -> None:
    assert all(len(set(anchor.layers)) == 1 for anchor in SPACES["no delta"].anchors(ROUTED, 16))


BAD_SPACES: list[tuple[str, dict[str, Any], str]] = [
    ("no ops", {"ops": []}, "space.ops = .* at least one"),
    ("unknown op", {"ops": ["linear"]}, "space.ops = 'linear' .* delta, softmax, routed"),
    ("op twice", {"ops": [Op.delta, Op.delta]}, "each op may come once"),
    ("ops text", {"ops": "delta"}, "space.ops = 'delta'"),
    ("budget above 1", {"budget_max": 1.2}, r"space.budget_max = 1.2 .* \[0, 1\]"),
    ("budget below 0", {"budget_min": -0.1}, r"space.budget_min = -0.1 .* \[0, 1\]"),
    ("budgets crossed", {"budget_min": 0.6, "budget_max": 0.5}, "space.budget_min = 0.6 .* ≤ budget_max = 0.5"),
    ("budget too fine", {"budget_min": 0.0005}, "budget_min = 0.0005 .* 3 decimals"),
    ("budget nan", {"budget_max": float("nan")}, "budget_max = nan"),
    ("budget none", {"budget_max": None}, "budget_max = None"),
    ("threshold infinite", {"threshold_max": float("inf")}, "threshold_max = inf .* finite"),
    ("thresholds crossed", {"threshold_min": 5}, "threshold_min = 5.0 .* ≤ threshold_max = 4"),
    ("mix zero", {"mix_temperature_min": 0}, "mix_temperature_min = 0"),
    ("mix infinite", {"mix_temperature_max": float("inf")}, "mix_temperature_max = inf .* finite"),
    ("mix crossed", {"mix_temperature_min": 2}, "mix_temperature_min = 2.0 .* ≤ mix_temperature_max = 1"),
    ("cap above 1", {"cap": 1.5}, r"space.cap = 1.5 .* \[0, 1\]"),
    ("cap without routed", {"ops": [Op.delta], "cap": 0.5}, "space.cap = 0.5 .* only op routed"),
    ("heads without routed", {"ops": [Op.delta, Op.softmax], "granularity": "head"}, "space.ops = .* need op routed"),
    ("unknown granularity", {"granularity": "chunk"}, "space.granularity = 'chunk' .* layer, head"),
    ("burst without cap", {"burst": 1}, "space.burst = 1 .* without a cap"),
    ("burst negative", {"cap": 0.5, "burst": -1}, "space.burst = -1"),
    ("unknown control", {"control": "topk"}, "space.control = 'topk' .* budget, threshold"),
]


@pytest.mark.parametrize(("fields", "message"), [case[1:] for case in BAD_SPACES], ids=[c[0] for c in BAD_SPACES])
def test_illegal_spaces_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SearchSpace(**fields)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_spaces_apart_and_survives_json() -> None:
    prints = [json.dumps(space.fingerprint(), sort_keys=True, allow_nan=False) for space in SPACES.values()]
    assert len(set(prints)) == len(prints)
    for space in SPACES.values():
        assert json.loads(json.dumps(space.fingerprint())) == space.fingerprint()
        assert dataclasses.replace(space).fingerprint() == space.fingerprint()
    assert SearchSpace(budget_max=1).fingerprint() == SearchSpace(budget_max=1.0).fingerprint()
    by_name = SearchSpace(ops=["delta", "routed"], control="budget")  # type: ignore[list-item,arg-type]
    assert by_name == SearchSpace(ops=[Op.delta, Op.routed])


@pytest.mark.filterwarnings("ignore:Argument ``multivariate``")
@each_space
def test_optuna_draws_and_enqueues_policies(space: SearchSpace) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=4, seed=0)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    anchors = space.anchors(ROUTED, 16, HEADS)[:3]
    for anchor in anchors:
        study.enqueue_trial(space.params(anchor, ROUTED, HEADS))
    seen = []
    for number in range(len(anchors) + 8):
        trial = study.ask()
        policy = space.suggest(trial, ROUTED, 16, HEADS)
        assert space.from_params(space.params(policy, ROUTED, HEADS), ROUTED, 16, HEADS) == policy
        assert space.from_params(trial.params, ROUTED, 16, HEADS) == policy
        seen.append(policy)
        study.tell(trial, [float(number), -float(number)])
    assert seen[: len(anchors)] == anchors


def test_an_optuna_trial_is_a_trial() -> None:
    from optuna.trial import FixedTrial, Trial

    def propose(trial: Trial | FixedTrial) -> RoutingPolicy:  # what matters is that this passes the type checker
        return SearchSpace().suggest(trial, [Op.routed], 16)

    assert propose(FixedTrial({"u.0": 0.5})).layers == (LayerPolicy(budget=0.25),)


def test_hydra_can_read_the_space() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    schema = omegaconf.OmegaConf.structured(SearchSpace)
    merged = omegaconf.OmegaConf.merge(schema, {"ops": ["routed", "delta"], "control": "threshold", "cap": 0.5})
    space = omegaconf.OmegaConf.to_object(merged)
    assert space == SearchSpace(ops=[Op.delta, Op.routed], control=Control.threshold, cap=0.5)
    with pytest.raises(omegaconf.errors.OmegaConfBaseException):
        omegaconf.OmegaConf.merge(schema, {"ops": ["linear"]})


def test_the_space_loads_only_the_standard_library() -> None:
    code = "import sys; old = set(sys.modules); import natsl.space; print(*(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    roots = {name.partition(".")[0] for name in done.stdout.split()} - {"natsl"}
    assert roots <= sys.stdlib_module_names
