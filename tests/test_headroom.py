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
from natsl.search.headroom import FITS, READS, Observation, accuracy, features_of, headroom, observe
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


def planted(noise: float, chunks: int = 16) -> Observation:
    """Chunks whose gains follow one of eight features, times what is left of the sequence."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, chunks, 8, generator=generator)
    rate = torch.stack((2 * x[..., 3] + 1, torch.zeros(256, chunks)), -1)
    rate = rate + noise * torch.randn(rate.shape, generator=generator)
    left = ((chunks - 1 - torch.arange(chunks)) / chunks)[None, :, None]
    return Observation(dict.fromkeys(("hidden", "conv", "signals"), x), rate * left)


@pytest.mark.parametrize(("name", "fit"), [(name, fit) for name, fit, _ in FITS], ids=[name for name, _, _ in FITS])
def test_predictors_find_what_tells_gains(name: str, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 500)
    seen = planted(0.5)
    score = accuracy(fit(seen, READS["hidden"], CPU)(seen), seen)
    if name != "ranking":  # its scores have no unit
        assert score["r2"][0] > 0.9
    assert score["captured"][0] > 0.75
    assert abs(score["captured"][1]) < 0.25
    other = planted(0.5, chunks=32)
    assert accuracy(fit(seen, READS["hidden"], CPU)(other), other)["captured"][0] > 0.6


def test_accuracy_by_hand() -> None:
    """Ten sequences of two chunks, the second gains nothing: a tenth is two chunks, rates are twice the gain."""
    gains = torch.zeros(10, 2, 1)
    gains[:, 0, 0] = torch.tensor([4.0, 4, 3, 2, 1, 1, 1, 1, 1, 2])  # the mean over all chunks is 1
    seen = Observation({}, gains)
    rate, weight = seen.rates()
    assert rate[::2, 0].tolist() == [8.0, 8, 6, 4, 2, 2, 2, 2, 2, 4]
    assert not rate[1::2].any()
    assert weight.view(10, 2).unique(dim=0).tolist() == [[0.5, 0.0]]
    z = torch.zeros(10, 2, 1)
    z[0], z[2] = 5.0, 6.0  # in both chunks of two sequences; the highest two are those of the third
    assert accuracy(z, seen)["captured"][0] == pytest.approx((1.5 - 1) / (4 - 1))
    assert accuracy(rate.view(10, 2, 1), seen)["captured"][0] == pytest.approx(1.0)
    assert accuracy(rate.view(10, 2, 1), seen)["r2"][0] == pytest.approx(1.0)
    assert accuracy(torch.full((10, 2, 1), 4.0), seen)["r2"][0] == pytest.approx(0.0)  # the mean


def test_a_head_whose_chunks_gain_nothing_has_nothing_to_predict() -> None:
    seen = Observation({}, torch.zeros(4, 5, 2))
    assert accuracy(torch.randn(4, 5, 2), seen) == {"r2": [0.0, 0.0], "captured": [0.0, 0.0]}


def test_signals_are_those_of_the_token_form(model: RoutedLM) -> None:
    """Error of the state by the recurrence, the largest share of attention and the nearest kept key by loops."""
    mixer = model.get_submodule("blocks.0.mixer")
    assert isinstance(mixer, RoutedMixer)
    c, C = mixer.config, mixer.config.chunk_size
    torch.manual_seed(3)
    x = torch.randn(2, 4 * C, c.width)
    route = torch.tensor([1.0, 0.0, 1.0, 0.0])[None, :, None].expand(2, 4, c.heads).contiguous()
    with torch.no_grad():
        features = features_of(mixer, x, route, route)
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


def test_gains_are_those_of_the_routes_that_were_made(model: RoutedLM) -> None:
    batch = tiny_data(tasks={"bytes": 1.0}).batch("bytes", Split.test, 3, seed=0)
    own = observe(model, POLICY, batch, 2)
    assert list(own) == [0, 2]
    with torch.no_grad():
        routes = [layer.route for layer in model(batch.tokens, POLICY).layers]
    fixed: list[Tensor | None] = [routes[0], None, routes[2]]
    for i, seen in observe(model, POLICY, batch, 3, fixed).items():
        assert_near(seen.gains, own[i].gains)
        assert float(seen.gains[:, -1].abs().max()) == 0.0  # no query comes after the last chunk
    features = observe(model, POLICY, batch, 3, gains=False)
    for i, seen in features.items():
        assert seen.gains.shape == (*own[i].gains.shape[:2], 0)
        for name, value in seen.features.items():
            assert_near(value, own[i].features[name])
    fixed[0] = torch.zeros_like(routes[0])
    assert not torch.allclose(observe(model, POLICY, batch, 3, fixed)[2].gains, own[2].gains)


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
    names = {f"{kind}, {reads}" for kind, _, inputs in FITS for reads in inputs}
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
