"""What a specialisation gained: paired differences, policies that keep as much, and words for each outcome."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from natsl.counts import Counts
from natsl.data import Split
from natsl.evaluate import evaluate
from natsl.search.gain import equal_policy, gains, lines, quality, scaled
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, mixer_of, tiny_data, tiny_model


def counts(wrong: list[int], nats: list[float], asked: int = 10, tokens: int = 4) -> Counts:
    """Sequences with so many wrong answers and so much loss of text."""
    n = len(wrong)
    right = torch.tensor([asked - value for value in wrong])
    kept = torch.zeros(n, 1, 1, dtype=torch.int64)
    return Counts(torch.tensor(nats).double(), torch.full((n,), tokens), right, torch.full((n,), asked), kept, 8)


def test_gains_are_paired() -> None:
    before = {"mqar": counts([4, 6, 8], [8.0, 8.0, 9.0])}
    after = {"mqar": counts([3, 4, 8], [9.0, 9.0, 10.0])}
    found = gains(before, after)
    assert found["mqar"]["gain"] == pytest.approx(3 / 30)
    # the differences of the sequences are .1, .2 and 0
    assert found["mqar"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["mqar"]["verdict"] == "same", "less than two standard errors"
    assert found["text"] == {
        "metric": "val_loss",
        "gain": pytest.approx(-0.25),
        "standard_error": pytest.approx(0, abs=1e-12),
        "verdict": "worse",
    }
    assert quality(after) == {"mqar": pytest.approx(0.5), "text": pytest.approx(28 / 12)}


def test_what_is_not_clear_or_not_scored() -> None:
    before, after = {"mqar": counts([4, 6], [1.0, 1.0], tokens=0)}, {"mqar": counts([6, 3], [1.0, 1.0], tokens=0)}
    assert gains(before, after).keys() == {"mqar"}
    assert gains(before, after)["mqar"]["verdict"] == "same"
    one = {"bytes": counts([0], [4.0], asked=0)}
    assert gains(one, {"bytes": counts([0], [2.0], asked=0)}) == {
        "bytes": {"metric": "val_loss", "gain": 0.5, "standard_error": None, "verdict": "better"}
    }


def test_scaled_policies() -> None:
    layers = (
        LayerPolicy(Op.delta),
        LayerPolicy(budget=0.4, cap=0.5),
        LayerPolicy(budget=(0, 0.2, 0.9, 1)),
        LayerPolicy(threshold=(1.0, math.inf)),
    )
    more = scaled(RoutingPolicy(layers, 8), 2).layers
    assert more[0] == layers[0]
    assert more[1] == LayerPolicy(budget=0.8, cap=0.5)
    assert more[2] == LayerPolicy(budget=(0, 0.4, 1, 1))
    assert more[3] == LayerPolicy(threshold=(1 - math.log(2), math.inf))


@pytest.mark.parametrize("layer", [LayerPolicy(budget=0.3), LayerPolicy(threshold=0.2)], ids=["budget", "threshold"])
def test_a_policy_that_keeps_as_much_as_before(layer: LayerPolicy) -> None:
    before, after = tiny_model("rd"), tiny_model("rd")
    for model in (before, after):
        fill_calibration(model)
    with torch.no_grad():
        mixer_of(after).router.weight.copy_(1.7 * mixer_of(before).router.weight)
    sets = tiny_data().eval_sets(Split.search)
    policy = RoutingPolicy((layer, LayerPolicy(Op.delta)), 8)
    wanted = evaluate(before, policy, sets).kept_fraction
    assert abs(evaluate(after, policy, sets).kept_fraction - wanted) > 0.02 * wanted
    equal = equal_policy(before, after, policy, sets)
    assert equal is not None
    assert evaluate(after, equal, sets).kept_fraction == pytest.approx(wanted, rel=0.02)
    assert equal_policy(before, before, policy, sets) is None
    fixed = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.delta)), 8)
    assert equal_policy(before, after, fixed, sets) is None


def report(gain: float, error: float, verdict: str, kept: float = 0.1, equal: bool = False) -> dict[str, Any]:
    def row(kept: float, wrong: float) -> dict[str, Any]:
        return {"kept_fraction": kept, "quality": {"mqar": wrong}}

    part: dict[str, Any] = {"sequences": {"mqar": 8}, "before": row(0.1, 0.5), "after": row(kept, 0.5 - gain)}
    part |= {"equal": row(0.1, 0.5 - gain)} if equal else {}
    part["gain"] = {"mqar": {"metric": "recall_error", "gain": gain, "standard_error": error, "verdict": verdict}}
    return {"search": part, "test": part}


def test_the_words() -> None:
    shown = lines(report(0.1, 0.02, "better"))
    assert shown[-1] == "On the test split recall_error (mqar) is better."
    assert len(shown) == 9
    assert [line.split() for line in shown[1:4]] == [
        ["supernet", "10.00", "%", "0.5000"],
        ["specialised", "10.00", "%", "0.4000"],
        ["gain", "+0.1000", "±", "0.0200"],
    ]
    worse = lines(report(-0.1, 0.02, "worse"))
    assert worse[-2] == "On the test split recall_error (mqar) is worse than before."
    assert worse[-1].startswith("The specialised weights are worse there than those of the supernet: ")
    assert "no different beyond two standard errors" in lines(report(0.01, 0.02, "same"))[-1]
    assert lines(report(0.1, 0.02, "better", 0.2))[-1] == (
        "20.00 instead of 10.00 % of the chunks are kept: that is not at equal cost."
    )
    assert "the gain is under equal_policy" in lines(report(0.1, 0.02, "better", 0.2, equal=True))[-1]
