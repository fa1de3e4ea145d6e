"""Headroom: what is seen of chunks, predictors that find what was planted, and losses under what they choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from natsl import evaluate as evaluation
from natsl.counts import Counts
from natsl.data import Split
from natsl.evaluate import Routing, evaluate
from natsl.mixer import RoutedMixer
from natsl.model import RoutedLM
from natsl.modules import short_convolution
from natsl.search import headroom as module
from natsl.search.controls.learned import Subject, follow
from natsl.search.headroom import KINDS, Kind, Scale, accuracy, features_of, headroom, measure_gains, observe, rates_of
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import assert_near, fill_calibration, tiny_data, tiny_model

POLICY = RoutingPolicy((LayerPolicy(budget=0.4), LayerPolicy(Op.delta), LayerPolicy(budget=0.3)), 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> RoutedLM:
    torch.manual_seed(0)
    made = tiny_model("rrr").eval()
    fill_calibration(made)
    return made


def planted(noise: float, chunks: int = 16) -> tuple[Tensor, Tensor]:
    """Features of chunks, and gains that follow one of the eight, times what is left of the sequence."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, chunks, 8, generator=generator)
    rate = torch.stack((2 * x[..., 3] + 1, torch.zeros(256, chunks)), -1)
    rate = rate + noise * torch.randn(rate.shape, generator=generator)
    left = ((chunks - 1 - torch.arange(chunks)) / chunks)[None, :, None]
    return x, rate * left


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_predictors_find_what_tells_gains(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 500)
    x, gains = planted(0.5)
    predict = kind.fit(x, gains, CPU)
    score = accuracy(predict(x), gains, kind.has_unit)
    assert set(score) == ({"r2", "captured"} if kind.has_unit else {"captured"})
    assert not kind.has_unit or score["r2"][0] > 0.9
    assert score["captured"][0] > 0.75
    assert abs(score["captured"][1]) < 0.25
    x, gains = planted(0.5, chunks=32)
    assert accuracy(predict(x), gains, kind.has_unit)["captured"][0] > 0.6


def test_a_scale_is_that_of_the_features_it_was_made_of() -> None:
    torch.manual_seed(5)
    x = 3 * torch.randn(5, 7, 2) + torch.tensor([1.0, -40.0])
    scale = Scale.of({"a": x, "b": x[..., :1]})
    for rows in (own.flatten(0, 1) for own in scale({"a": x, "b": x[..., :1]}).values()):
        assert_near(rows.mean(0), torch.zeros(rows.shape[1]))
        assert_near(rows.std(0), torch.ones(rows.shape[1]))
    other = scale({"a": x + 1})["a"]
    assert_near(other, scale({"a": x})["a"] + 1 / x.flatten(0, 1).std(0))


def test_accuracy_by_hand() -> None:
    """Ten sequences of two chunks, the second gains nothing: a tenth is two chunks, rates are twice the gain."""
    gains = torch.zeros(10, 2, 1)
    gains[:, 0, 0] = torch.tensor([4.0, 4, 3, 2, 1, 1, 1, 1, 1, 2])  # the mean over all chunks is 1
    rate, weight = rates_of(gains)
    assert rate[::2, 0].tolist() == [8.0, 8, 6, 4, 2, 2, 2, 2, 2, 4]
    assert not rate[1::2].any()
    assert weight.view(10, 2).unique(dim=0).tolist() == [[0.5, 0.0]]
    z = torch.zeros(10, 2, 1)
    z[0], z[2] = 5.0, 6.0  # in both chunks of two sequences; the highest two are those of the third
    assert accuracy(z, gains, True)["captured"][0] == pytest.approx((1.5 - 1) / (4 - 1))
    assert accuracy(rate.view(10, 2, 1), gains, True)["captured"][0] == pytest.approx(1.0)
    assert accuracy(rate.view(10, 2, 1), gains, True)["r2"][0] == pytest.approx(1.0)
    assert accuracy(torch.full((10, 2, 1), 4.0), gains, True)["r2"][0] == pytest.approx(0.0)  # the mean


def test_a_head_whose_chunks_gain_nothing_has_nothing_to_predict() -> None:
    score = accuracy(torch.randn(4, 5, 2), torch.zeros(4, 5, 2), True)
    assert score == {"r2": [0.0, 0.0], "captured": [0.0, 0.0]}


def test_signals_are_those_of_the_token_form(model: RoutedLM) -> None:
    """Error of the state by the recurrence, the largest share of attention and the nearest kept key by loops."""
    mixer = model.get_submodule("blocks.0.mixer")
    assert isinstance(mixer, RoutedMixer)
    c, C = mixer.config, mixer.config.chunk_size
    torch.manual_seed(3)
    x = torch.randn(2, 4 * C, c.width)
    route = torch.tensor([1.0, 0.0, 1.0, 0.0])[None, :, None].expand(2, 4, c.heads).contiguous()
    with torch.no_grad():
        features = features_of(mixer, x, route)
        qkv = short_convolution(mixer.qkv_proj(x), mixer.conv)
        g, beta = mixer.gates(x)
    _, k, v = mixer.delta_heads(*mixer.split(qkv))
    signals = features["signals"].unflatten(2, (7, c.heads))  # [B,N,7,R]
    assert_near(features["hidden"], x.unflatten(1, (-1, C)).mean(2))
    assert_near(signals[:, :, 1], beta.unflatten(1, (-1, C)).mean(2))
    for b in range(2):
        for r in range(c.heads):
            border = torch.zeros(c.key_dim, c.value_dim)
            keys: list[Tensor] = []
            for n in range(4):
                working, errors = border.clone(), []
                for t in range(n * C, (n + 1) * C):
                    key = k[b, t, r] * (k[b, t, r].square().sum() + 1e-6).rsqrt()
                    working = working * g[b, t, r].exp()
                    wrong = v[b, t, r] - working.T @ key
                    errors.append(float(wrong.square().sum() / (v[b, t, r].square().sum() + 1e-6)))
                    working = working + key[:, None] * (beta[b, t, r] * wrong)
                decay = g[b, n * C : (n + 1) * C, r].sum().exp()
                border = decay * border if route[b, n, r] else working
                assert float(signals[b, n, 2, r]) == pytest.approx(sum(errors[1:]) / (C - 1), rel=1e-3)
                assert float(signals[b, n, 3, r]) == pytest.approx(max(errors[1:]), rel=1e-3)
                mean = k[b, n * C : (n + 1) * C, r].mean(0)
                mean = mean / mean.norm()
                near = max((float(mean @ other) for other in keys), default=-1.0)
                assert float(signals[b, n, 6, r]) == pytest.approx(near, abs=1e-4)
                if route[b, n, r]:
                    keys.append(mean)


def test_what_is_seen_does_not_depend_on_the_size_of_batches(model: RoutedLM) -> None:
    batch = tiny_data(tasks={"bytes": 1.0}).batch("bytes", Split.test, 3, seed=0)
    routes = follow(Subject(model, {"text": batch}, 3), POLICY).routes["text"]
    features = observe(model, POLICY, batch, 2, routes)
    gains = measure_gains(model, POLICY, batch, 2, routes)
    assert list(features) == list(gains) == [0, 2]
    for i, gain in measure_gains(model, POLICY, batch, 3, routes).items():
        assert_near(gain, gains[i])
        assert float(gain[:, -1].abs().max()) == 0.0  # no query comes after the last chunk
    for i, own in observe(model, POLICY, batch, 3, routes).items():
        assert_near(own["all"], torch.cat([own[name] for name in ("hidden", "conv", "signals")], -1))
        for name, value in own.items():
            assert_near(value, features[i][name])


def test_what_is_seen_is_that_of_the_routes(model: RoutedLM) -> None:
    """Those of the policy's own router are what it makes; others in the first layer change what the last one sees."""
    batch = tiny_data(tasks={"bytes": 1.0}).batch("bytes", Split.test, 3, seed=0)
    routes = follow(Subject(model, {"text": batch}, 3), POLICY).routes["text"]
    inputs: list[Tensor] = []
    hook = model.get_submodule("blocks.2.mixer").register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(batch.tokens, POLICY)
    hook.remove()
    hidden = inputs[0].unflatten(1, (-1, POLICY.chunk_size)).mean(2)
    features = observe(model, POLICY, batch, 3, routes)[2]
    gains = measure_gains(model, POLICY, batch, 3, routes)[2]
    assert_near(features["hidden"], hidden)
    assert routes[0] is not None
    other: list[Tensor | None] = [torch.zeros_like(routes[0]), *routes[1:]]
    assert not torch.allclose(observe(model, POLICY, batch, 3, other)[2]["hidden"], hidden)
    assert not torch.allclose(measure_gains(model, POLICY, batch, 3, other)[2], gains)


def test_headroom_of_a_model(model: RoutedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 3)
    data = tiny_data(tasks={"bytes": 1.0})
    train, test = (data.batch("bytes", split, 6, seed=0) for split in (Split.train, Split.test))
    kept: list[list[Any]] = []
    original = evaluation.count

    def count(*given: Any, routing: Routing, **options: Any) -> dict[str, Counts]:
        routes = [route for route in routing("text", slice(None)) or [] if isinstance(route, Tensor)]
        kept.append([route.sum(1).long().tolist() for route in routes])
        return original(*given, routing=routing, **options)

    monkeypatch.setattr(module, "count", count)
    result = headroom(model, POLICY, train, test, 3)
    assert set(result["layers"]) == {"0", "2"}
    names = {f"{kind.name}, {reads}" for kind in KINDS for reads in kind.reads}
    for layer in result["layers"].values():
        assert names < set(layer)
        assert all(best >= mean for best, mean in zip(layer["best_tenth"], layer["gain"], strict=True))
    loss = result["loss"]
    assert {name.removeprefix("predicted: ") for name in loss if name.startswith("predicted")} == names
    learned = evaluate(model, POLICY, {"bytes": test}).val_loss
    assert loss["learned"]["loss"] == pytest.approx(learned)
    assert loss["hindsight"]["loss"] < loss["learned"]["loss"]
    routes = follow(Subject(model, {"text": test}, 3), POLICY).routes["text"]
    assert len(kept) > 3 + 1 + len(names)  # after three of other sequences each keeps as many as learned
    assert all(own == [route.sum(1).tolist() for route in routes if route is not None] for own in kept[3:])
    heads = {
        f"layer {i}, head {r}"
        for i in (0, 2)
        for r in range(model.config.heads)
        if bool(routes[i][..., r].any())  # type: ignore[index]
    }
    assert set(loss["hindsight_in"]) == heads | {"layer 0", "layer 2"}
    partial = [row["loss"] for name, row in loss["hindsight_in"].items() if "head" not in name]
    assert all(value < loss["learned"]["loss"] for value in partial)
