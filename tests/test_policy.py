"""Policies: what is legal, the canonical JSON and its digest, and the errors of bad ones."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
from typing import Any

import pytest

from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

KINDS = [Op.softmax, Op.routed, Op.delta, Op.routed]


def random_layer(rng: random.Random) -> LayerPolicy:
    """Any legal layer policy, with numbers of awkward precision."""
    mix = rng.choice([1.0, 1, rng.uniform(1e-3, 10), 0.1 + 0.2])
    op = rng.choice(list(Op))
    if op is not Op.routed:
        return LayerPolicy(op, mix_temperature=mix)
    cap = rng.choice([None, 0, 1, rng.random()])
    burst = rng.randrange(5) if cap is not None else 0
    if rng.random() < 0.5:
        budget = rng.choice([0, 1, 0.1, 1e-7, rng.random()])
        return LayerPolicy(op, budget=budget, cap=cap, burst=burst, mix_temperature=mix)
    threshold = rng.choice([0, -0.0, 3, rng.gauss(0, 1e6), math.inf, -math.inf, 5e-324])
    return LayerPolicy(op, threshold=threshold, cap=cap, burst=burst, mix_temperature=mix)


def random_policy(rng: random.Random) -> RoutingPolicy:
    return RoutingPolicy(tuple(random_layer(rng) for _ in range(rng.randint(1, 8))), rng.choice([1, 16, 64]))


def test_json_gives_back_any_policy() -> None:
    rng = random.Random(0)
    digests: dict[str, RoutingPolicy] = {}
    for _ in range(500):
        policy = random_policy(rng)
        text = policy.to_json()
        again = RoutingPolicy.from_json(text)
        assert again == policy
        assert again.to_json() == text
        assert again.digest() == policy.digest()
        assert hash(again) == hash(policy)
        # strict JSON: what another reader and writer of JSON passes on is the same policy
        spaced = json.dumps(json.loads(text, parse_constant=pytest.fail), indent=2)
        assert RoutingPolicy.from_json(spaced) == policy
        assert RoutingPolicy.from_dict(policy.to_dict()) == policy
        assert digests.setdefault(policy.digest(), policy) == policy
    assert len(digests) > 450


def test_json_is_short_and_canonical() -> None:
    layers = (LayerPolicy(Op.softmax), LayerPolicy(budget=0.25, cap=0.5), LayerPolicy(Op.delta))
    expected = '{"chunk_size":64,"layers":[{"op":"softmax"},{"budget":0.25,"cap":0.5,"op":"routed"},{"op":"delta"}]}'
    assert RoutingPolicy(layers, 64).to_json() == expected


def test_digest_is_stable() -> None:
    """Stored studies and exports name policies by it: it may never change."""
    policy = RoutingPolicy((LayerPolicy(Op.softmax), LayerPolicy(budget=0.25), LayerPolicy(Op.delta)), 64)
    assert policy.digest() == "2b7be9d75aa9"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LayerPolicy(budget=1), LayerPolicy(budget=1.0)),
        (LayerPolicy(budget=-0.0), LayerPolicy(budget=0)),
        (LayerPolicy(threshold=-0.0), LayerPolicy(threshold=0.0)),
        (LayerPolicy(budget=0.5, cap=1), LayerPolicy(budget=0.5, cap=1.0)),
        (LayerPolicy(Op.delta, mix_temperature=1), LayerPolicy(Op.delta)),
        (LayerPolicy("delta"), LayerPolicy(Op.delta)),  # type: ignore[arg-type]
    ],
    ids=["int budget", "minus zero budget", "minus zero threshold", "int cap", "int mix", "op by name"],
)
def test_equal_policies_have_equal_digests(one: LayerPolicy, other: LayerPolicy) -> None:
    assert one == other
    assert RoutingPolicy((one,), 16).digest() == RoutingPolicy((other,), 16).digest()


def test_float_subclasses_are_stored_as_plain_floats() -> None:
    numpy = pytest.importorskip("numpy")
    policy = RoutingPolicy((LayerPolicy(budget=numpy.float64(0.1)),), 16)
    assert type(policy.layers[0].budget) is float
    assert policy.digest() == RoutingPolicy((LayerPolicy(budget=0.1),), 16).digest()


@pytest.mark.parametrize(
    "change",
    [{"budget": 0.3}, {"cap": 0.5}, {"cap": 0.4, "burst": 1}, {"mix_temperature": 2.0}, {"budget": 0.25 + 2**-50}],
    ids=["budget", "cap", "burst", "mix", "last bits of the budget"],
)
def test_every_field_changes_the_digest(change: dict[str, Any]) -> None:
    base = LayerPolicy(budget=0.25, cap=0.4)
    other = dataclasses.replace(base, **change)
    assert RoutingPolicy((base,), 16).digest() != RoutingPolicy((other,), 16).digest()
    assert RoutingPolicy((base,), 16).digest() != RoutingPolicy((base,), 32).digest()


def test_policies_are_frozen_values() -> None:
    policy = RoutingPolicy.uniform(KINDS, 16, 0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.chunk_size = 32  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.layers[0].op = Op.delta  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(policy)) == policy
    listed = RoutingPolicy(list(policy.layers), 16)  # type: ignore[arg-type]
    assert listed == policy
    assert isinstance(listed.layers, tuple)


def test_one_number_per_head() -> None:
    layers = (
        LayerPolicy(budget=[0.1, 0, 1]),  # type: ignore[arg-type]
        LayerPolicy(threshold=(-math.inf, 0.5, math.inf)),
        LayerPolicy(budget=(0.25,)),
    )
    policy = RoutingPolicy(layers, 16)
    assert layers[0].budget == (0.1, 0.0, 1.0)
    assert policy.describe() == "[.1,0,1] θ[-inf,.5,inf] [.25]"
    assert policy.to_dict()["layers"][0] == {"op": "routed", "budget": [0.1, 0.0, 1.0]}
    assert '"threshold":["-inf",0.5,"inf"]' in policy.to_json()
    assert RoutingPolicy.from_json(policy.to_json()) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert LayerPolicy(budget=(0.25, 0.25)) != LayerPolicy(budget=0.25)
    assert [layer.heads() for layer in layers] == [3, 3, 1]
    assert [layer.needs_calibration() for layer in layers] == [True, False, True]
    assert not LayerPolicy(budget=(0.0, 1.0)).needs_calibration()
    policy.check([Op.routed] * 3, 16)
    with pytest.raises(ValueError, match=r"layers\[2\].budget = \(0.25,\) .* 3 routing heads, not 1"):
        policy.check([Op.routed] * 3, 16, 3)


def test_policies_of_one_number_keep_their_json() -> None:
    """Digests name points of fronts and folders of exports: those of before lists must stay."""
    layers = (LayerPolicy(budget=0.25, cap=0.5, burst=2), LayerPolicy(threshold=math.inf), LayerPolicy(Op.softmax))
    policy = RoutingPolicy(layers, 16)
    assert policy.to_json() == (
        '{"chunk_size":16,"layers":[{"budget":0.25,"burst":2,"cap":0.5,"op":"routed"},'
        '{"op":"routed","threshold":"inf"},{"op":"softmax"}]}'
    )


NAN = math.nan
BAD_LAYERS: list[tuple[str, dict[str, Any], str]] = [
    ("budget above 1", {"budget": 1.2}, r"budget = 1.2 .* \[0, 1\]"),
    ("budget below 0", {"budget": -0.1}, r"budget = -0.1 .* \[0, 1\]"),
    ("budget nan", {"budget": NAN}, "budget = nan"),
    ("budget infinite", {"budget": math.inf}, "budget = inf"),
    ("budget text", {"budget": "0.5"}, "budget = '0.5'"),
    ("budget bool", {"budget": True}, "budget = True"),
    ("budget huge int", {"budget": 10**400}, "budget = 1000"),
    ("no control", {}, "op routed needs a budget or a threshold"),
    ("both controls", {"budget": 0.5, "threshold": 1.0}, "threshold = 1.0 .* budget = 0.5 is set"),
    ("threshold nan", {"threshold": NAN}, "threshold = nan"),
    ("threshold huge int", {"threshold": 10**400}, "threshold = 1000"),
    ("threshold in a list", {"threshold": [1, NAN]}, r"threshold\[1\] = nan .* a number"),
    ("list in a list", {"threshold": [[1]]}, r"threshold\[0\] = \[1\] .* a number"),
    ("empty list", {"budget": []}, r"budget = \[\] .* one number for each routing head"),
    ("budget in a list", {"budget": [0.1, 1.2]}, r"budget\[1\] = 1.2 .* \[0, 1\]"),
    ("budget on delta", {"op": Op.delta, "budget": 0.5}, "budget = 0.5 .* op delta takes none"),
    ("budget 0 on delta", {"op": Op.delta, "budget": 0.0}, "budget = 0.0 .* op delta takes none"),
    ("threshold on softmax", {"op": Op.softmax, "threshold": 0.0}, "threshold = 0.0 .* op softmax takes none"),
    ("cap on softmax", {"op": Op.softmax, "cap": 1.0}, "cap = 1.0 .* op softmax takes none"),
    ("cap above 1", {"budget": 0.5, "cap": 1.5}, r"cap = 1.5 .* \[0, 1\]"),
    ("burst without cap", {"budget": 0.5, "burst": 1}, "burst = 1 .* without a cap"),
    ("burst negative", {"budget": 0.5, "cap": 0.5, "burst": -1}, "burst = -1 .* ≥ 0"),
    ("burst fraction", {"budget": 0.5, "cap": 0.5, "burst": 1.5}, "burst = 1.5 .* integer"),
    ("burst bool", {"budget": 0.5, "cap": 0.5, "burst": True}, "burst = True .* integer"),
    ("mix zero", {"budget": 0.5, "mix_temperature": 0}, "mix_temperature = 0.0 .* > 0"),
    ("mix negative", {"op": Op.softmax, "mix_temperature": -1}, "mix_temperature = -1.0 .* > 0"),
    ("mix infinite", {"budget": 0.5, "mix_temperature": math.inf}, "mix_temperature = inf .* finite"),
    ("mix none", {"budget": 0.5, "mix_temperature": None}, "mix_temperature = None"),
    ("unknown op", {"op": "linear"}, "op = 'linear' .* one of delta, softmax, routed"),
    ("op number", {"op": 1}, "op = 1 .* one of delta"),
]


@pytest.mark.parametrize(("fields", "message"), [case[1:] for case in BAD_LAYERS], ids=[case[0] for case in BAD_LAYERS])
def test_illegal_layer_policies_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LayerPolicy(**fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


BAD_DICTS: list[tuple[str, Any, str]] = [
    ("unknown key", {"chunk_size": 16, "layers": [{"op": "delta"}], "extra": 1}, "unknown key 'extra' .* chunk_size"),
    ("unknown layer key", {"chunk_size": 16, "layers": [{"op": "delta", "x": 1}]}, r"layers\[0\]: unknown key 'x'"),
    ("key no text", {"chunk_size": 16, "layers": [{"op": "delta", 3: 1}]}, "unknown key 3"),
    ("no layers", {"chunk_size": 16}, "policy has no 'layers'"),
    ("no chunk size", {"layers": [{"op": "delta"}]}, "policy has no 'chunk_size'"),
    ("empty layers", {"chunk_size": 16, "layers": []}, "at least one LayerPolicy"),
    ("layers a mapping", {"chunk_size": 16, "layers": {"op": "delta"}}, "must be a list"),
    ("layers text", {"chunk_size": 16, "layers": "delta"}, "policy.layers = 'delta' .* must be a list"),
    ("layer text", {"chunk_size": 16, "layers": ["delta"]}, r"layers\[0\]: layer policy = 'delta' .* a mapping"),
    ("layer null", {"chunk_size": 16, "layers": [None]}, "layer policy = None"),
    ("bad value", {"chunk_size": 16, "layers": [{"op": "delta"}, {"budget": 1.2}]}, r"layers\[1\]: budget = 1.2"),
    ("threshold text", {"chunk_size": 16, "layers": [{"threshold": "nan"}]}, "threshold = 'nan' .* 'inf' or '-inf'"),
    ("budget text", {"chunk_size": 16, "layers": [{"budget": "inf"}]}, "budget = 'inf'"),
    ("chunk size 0", {"chunk_size": 0, "layers": [{"op": "delta"}]}, "chunk_size = 0 .* ≥ 1"),
    ("chunk size float", {"chunk_size": 16.0, "layers": [{"op": "delta"}]}, "chunk_size = 16.0 .* integer"),
    ("chunk size bool", {"chunk_size": True, "layers": [{"op": "delta"}]}, "chunk_size = True"),
    ("a list", [], r"policy = \[\] .* a mapping"),
    ("null", None, "policy = None .* a mapping"),
    ("long value", {"chunk_size": "9" * 10**5, "layers": [{"op": "delta"}]}, r"\.\.\. is not allowed"),
]


@pytest.mark.parametrize(("plain", "message"), [case[1:] for case in BAD_DICTS], ids=[case[0] for case in BAD_DICTS])
def test_malformed_policies_are_refused(plain: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RoutingPolicy.from_dict(plain)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


BAD_JSON: list[tuple[str, str, str]] = [
    ("empty", "", "cannot be read"),
    ("torn", '{"chunk_size":16,"layers":[{"op":', "cannot be read"),
    ("nan", '{"chunk_size":16,"layers":[{"threshold":NaN}]}', "NaN is not a JSON number"),
    ("infinity", '{"chunk_size":16,"layers":[{"threshold":Infinity}]}', "Infinity is not a JSON number"),
    ("repeated key", '{"chunk_size":16,"chunk_size":32,"layers":[{"op":"delta"}]}', "'chunk_size' appears twice"),
    ("endless number", '{"chunk_size":' + "9" * 5000 + ',"layers":[{"op":"delta"}]}', "cannot be read"),
    ("deep", "[" * 10**5, "cannot be read"),
    ("overflow", '{"chunk_size":16,"layers":[{"budget":1e999}]}', "budget = inf"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in BAD_JSON], ids=[case[0] for case in BAD_JSON])
def test_malformed_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RoutingPolicy.from_json(text)
    assert "\n" not in str(caught.value)


def test_layers_must_be_layer_policies() -> None:
    with pytest.raises(ValueError, match=r"policy.layers\[1\] = 'delta'"):
        RoutingPolicy((LayerPolicy(Op.delta), "delta"), 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(Op), ids=lambda kind: kind.value)
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.value)
def test_a_layer_of_fixed_kind_takes_its_own_op_alone(kind: Op, op: Op) -> None:
    policy = RoutingPolicy((LayerPolicy(op, budget=0.5 if op is Op.routed else None),), 16)
    if kind is Op.routed or kind is op:
        policy.check([kind], 16)
    else:
        with pytest.raises(ValueError, match=rf"policy.layers\[0\].op = '{op.value}' .* kind {kind.value}"):
            policy.check([kind], 16)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = RoutingPolicy.uniform(KINDS, 16, 0.25)
    policy.check(KINDS, 16)
    with pytest.raises(ValueError, match=r"chunk_size = 16 .* chunk size is 64"):
        policy.check(KINDS, 64)
    with pytest.raises(ValueError, match=r"layers = 4 .* the model has 3 layers"):
        policy.check(KINDS[:3], 16)


@pytest.mark.parametrize("budget", [0, 0.25, 1], ids=["zero", "quarter", "one"])
def test_uniform_policies(budget: float) -> None:
    policy = RoutingPolicy.uniform(KINDS, 16, budget)
    policy.check(KINDS, 16)
    middle = {0: LayerPolicy(Op.delta), 0.25: LayerPolicy(budget=0.25), 1: LayerPolicy(Op.softmax)}[budget]
    assert policy.layers == (LayerPolicy(Op.softmax), middle, LayerPolicy(Op.delta), middle)


def test_extreme_policies() -> None:
    assert RoutingPolicy.all_delta(KINDS, 16) == RoutingPolicy.uniform(KINDS, 16, 0)
    assert RoutingPolicy.all_softmax(KINDS, 16) == RoutingPolicy.uniform(KINDS, 16, 1)
    with pytest.raises(ValueError, match=r"budget = 1.2 .* \[0, 1\]"):
        RoutingPolicy.uniform(KINDS, 16, 1.2)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (LayerPolicy(Op.delta), "D"),
        (LayerPolicy(Op.softmax), "S"),
        (LayerPolicy(Op.softmax, mix_temperature=2), "S/2"),
        (LayerPolicy(budget=0.25), ".25"),
        (LayerPolicy(budget=0), "0"),
        (LayerPolicy(budget=1), "1"),
        (LayerPolicy(threshold=-0.5), "θ-.5"),
        (LayerPolicy(threshold=0), "θ0"),
        (LayerPolicy(threshold=math.inf), "θinf"),
        (LayerPolicy(threshold=10.25), "θ10.25"),
        (LayerPolicy(budget=0.125, cap=0.5, burst=2, mix_temperature=0.5), ".125≤.5+2/.5"),
        (LayerPolicy(budget=0.125, cap=1), ".125≤1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_are_described_shortly(layer: LayerPolicy, text: str) -> None:
    assert layer.describe() == text


def test_policies_are_described_layer_by_layer() -> None:
    assert RoutingPolicy.uniform(KINDS, 16, 0.25).describe() == "S .25 D .25"
