"""The language model: policies, padding, causality, refusals, presets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from natsl.config import CalibrationScope, ModelConfig, Precision, RouteGradient
from natsl.kernels import dispatch
from natsl.layout import Layout
from natsl.model import RoutedLM, count_parameters
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import TOLERANCE, assert_near, fill_calibration, mixer_of, tiny_config, tiny_model

PRESETS = Path(__file__).parents[1] / "conf" / "model"
D, S, R = (LayerPolicy(Op.delta), LayerPolicy(Op.softmax), LayerPolicy(Op.routed, budget=0.4))
T0 = LayerPolicy(Op.routed, threshold=0.0)


def policy(*layers: LayerPolicy) -> RoutingPolicy:
    return RoutingPolicy(layers, 8)


def tokens(B: int = 2, T: int = 37) -> Tensor:
    return torch.randint(0, 384, (B, T))


def calibrated(kinds: str = "rrr", precision: Precision = Precision.float32, **options: object) -> RoutedLM:
    model = tiny_model(kinds, precision, **options)
    fill_calibration(model)
    return model


def near(a: Tensor, b: Tensor, bound: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


def run(model: RoutedLM, x: Tensor, p: RoutingPolicy | Sequence[RoutingPolicy], **options: Any) -> Any:
    with torch.no_grad():
        return model(x, p, **options)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 37])
def test_groups_of_the_batch_equal_each_run_alone(T: int) -> None:
    model, x = calibrated(), tokens(10, T)
    warm = LayerPolicy(Op.routed, budget=0.4, mix_temperature=3.0)
    capped = LayerPolicy(Op.routed, threshold=-1.0, cap=0.5, burst=1)
    policies = [policy(S, S, S), policy(D, D, D), policy(R, D, S), policy(warm, R, T0), policy(capped, warm, R)]
    whole = run(model, x, policies)
    for i, p in enumerate(policies):
        alone = run(model, x[2 * i : 2 * i + 2], p)
        near(whole.logits[2 * i : 2 * i + 2], alone.logits)
        for a, b in zip(whole.layers, alone.layers, strict=True):
            assert torch.equal(a.route[2 * i : 2 * i + 2], b.route)
    assert whole.logits.dtype is torch.float32
    different = {tuple(row.flatten().tolist()) for row in run(model, x[:1].expand(5, -1), policies).logits}
    assert len(different) == 5, "every policy does something else"


@pytest.mark.parametrize("T", [8, 20])
def test_padding_on_any_side_equals_no_padding(T: int) -> None:
    model = calibrated("rsdr", rope=True)
    p = policy(R, S, D, LayerPolicy(Op.routed, threshold=-1.0, cap=0.5))
    rows = [(0, T), (3, T - 3), (0, 5), (T - 1, T), (4, T - 1), (0, 0)]
    x = tokens(len(rows), T)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (a, b) in enumerate(rows):
        mask[i, a:b] = True
    padded = run(model, x, p, layout=Layout.padded(mask))
    assert padded.logits.isfinite().all()
    for i, (a, b) in enumerate(rows):
        if a < b:
            alone = run(model, x[i : i + 1, a:b], p)
            near(padded.logits[i : i + 1, a:b], alone.logits)
            complete = (b - a) // 8
            for one, other in zip(padded.layers, alone.layers, strict=True):
                assert torch.equal(one.route[i, :complete], other.route[0, :complete])
                if one.margins is not None and other.margins is not None:  # a partial chunk has its true mean
                    near(one.margins[i, : other.margins.shape[1]], other.margins[0])
    near(run(model, x, p, layout=Layout.padded(mask.long())).logits, padded.logits)
    near(run(model, x, p, layout=Layout.padded(torch.ones_like(mask))).logits, run(model, x, p).logits)


def test_padding_in_training_leaves_budgets_to_real_chunks() -> None:
    model, x = calibrated("r"), tokens(4, 40)
    mask = torch.zeros(4, 40, dtype=torch.bool)
    mask[:, :16] = True
    layers = run(model, x, policy(R), layout=Layout.padded(mask), route_gradient=RouteGradient()).layers
    alone = run(model, x[:, :16], policy(R), route_gradient=RouteGradient()).layers
    assert torch.equal(layers[0].route[:, :2], alone[0].route)


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]], ids=str)
def test_masks_with_holes_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="mask has holes"):
        Layout.padded(torch.tensor([[1, 1, 1, 1], row]))


@pytest.mark.parametrize("kinds", ["d", "s", "r", "dsr", "rsd", "srd", "ddr", "ssd"])
def test_layers_in_any_order(kinds: str) -> None:
    model = RoutedLM(tiny_config(kinds))
    p = RoutingPolicy.fill(model.kinds, 8, LayerPolicy(Op.routed, budget=0.5))
    output = model(tokens(4, 19), p, route_gradient=RouteGradient())
    assert [layer.margins is not None for layer in output.layers] == [kind == "r" for kind in kinds]
    output.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Causality


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize(
    ("kinds", "p"),
    [
        ("d", policy(D)),
        ("s", policy(S)),
        ("r", policy(D)),
        ("r", policy(S)),
        ("rrr", policy(R, T0, R)),
        (
            "rr",
            policy(
                LayerPolicy(Op.routed, threshold=-0.5, cap=0.4), LayerPolicy(Op.routed, budget=0.5, cap=0.3, burst=1)
            ),
        ),
    ],
    ids=["delta", "softmax", "routed-delta", "routed-softmax", "routed", "capped"],
)
def test_no_output_before_a_token_depends_on_it(kinds: str, p: RoutingPolicy, rope: bool) -> None:
    model, x = calibrated(kinds, rope=rope), tokens(2, 37)
    before = run(model, x, p)
    for t in (0, 6, 7, 8, 20, 36):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 384
        after = run(model, changed, p)
        near(after.logits[:, :t], before.logits[:, :t], 1e-6)
        assert not torch.allclose(after.logits[:, t], before.logits[:, t])
        for a, b in zip(after.layers, before.layers, strict=True):
            assert torch.equal(a.route[:, : t // 8], b.route[:, : t // 8])


def test_routes_of_a_prefix_are_those_of_the_whole() -> None:
    model, x = calibrated(), tokens(3, 64)
    p = policy(R, LayerPolicy(Op.routed, budget=0.6, cap=0.5), T0)
    whole = run(model, x, p)
    for n in (8, 9, 24, 39):
        part = run(model, x[:, :n], p)
        near(part.logits, whole.logits[:, :n])
        for a, b in zip(part.layers, whole.layers, strict=True):
            assert torch.equal(a.route[:, : n // 8], b.route[:, : n // 8])


@pytest.mark.parametrize("T", [8, 32, 37])
def test_the_route_of_the_last_chunk_changes_nothing(T: int) -> None:
    model, x = calibrated(), tokens(2, T)
    p = policy(T0, T0, T0)
    first = run(model, x, p)
    routes = [layer.route.clone() for layer in first.layers]
    for route in routes:
        route[:, -1] = 1 - route[:, -1]
    near(run(model, x, p, routes=routes).logits, first.logits, 1e-6)
    if T > 8:
        routes[1][:, 0] = 1 - routes[1][:, 0]
        assert not torch.allclose(run(model, x, p, routes=routes).logits, first.logits)


# Policies


def test_budgets_are_nested_in_a_layer() -> None:
    model, x = calibrated("r"), tokens(4, 80)
    kept = [run(model, x, policy(LayerPolicy(budget=b))).layers[0].route for b in (0, 0.1, 0.3, 0.5, 0.9, 1)]
    for fewer, more in pairwise(kept):
        assert (more >= fewer).all()
    assert not kept[0].any()
    assert kept[-1].all()
    assert 0 < kept[2].sum() < kept[3].sum() < 80


def test_budget_1_is_softmax_and_needs_no_calibration() -> None:
    model, x = tiny_model("r"), tokens()
    near(run(model, x, policy(LayerPolicy(budget=1))).logits, run(model, x, policy(S)).logits, 1e-6)


def test_budget_0_serves_the_own_chunk_with_both_branches() -> None:
    model, x = tiny_model("r"), tokens()
    none_kept = run(model, x, policy(LayerPolicy(budget=0)))
    assert not none_kept.layers[0].route.any()
    given = run(model, x, policy(S), routes=[torch.zeros(2, 5, 2)])
    near(given.logits, none_kept.logits, 1e-6)
    assert not torch.allclose(run(model, x, policy(D)).logits, none_kept.logits)


def test_given_routes_of_a_layer_of_softmax_alone() -> None:
    model, x = tiny_model("s"), tokens()
    dense = run(model, x, policy(S))
    near(run(model, x, policy(S), routes=[torch.ones(2, 5, 2)]).logits, dense.logits, 1e-6)
    own = run(model, x, policy(S), routes=[torch.zeros(2, 5, 2)])
    near(own.logits[:, :8], dense.logits[:, :8], 1e-6)
    assert not torch.allclose(own.logits[:, 8:], dense.logits[:, 8:])


def test_threshold_is_a_margin_in_logits() -> None:
    model, x = tiny_model("r"), tokens()
    output = run(model, x, policy(LayerPolicy(threshold=0.3)))
    margins = output.layers[0].margins
    assert margins is not None
    assert torch.equal(output.layers[0].route, (margins > 0.3).float())
    assert 0 < output.layers[0].route.mean() < 1


def test_calibration_is_per_head() -> None:
    model, x = calibrated("r"), tokens()
    model.calibration.set_scope(CalibrationScope.head)
    model.calibration.by_head[0, 1] += 100
    route = run(model, x, policy(R)).layers[0].route
    assert route[..., 0].any()
    assert not route[..., 1].any()


def test_mix_temperature_divides_the_mixing_logits() -> None:
    model, x = calibrated("r"), tokens()
    hot = run(model, x, policy(replace(R, mix_temperature=4.0))).logits
    assert not torch.allclose(hot, run(model, x, policy(R)).logits)
    with torch.no_grad():
        for parameter in (*mixer_of(model).mix_proj.parameters(), mixer_of(model).mix_bias):
            parameter.div_(4)
    near(run(model, x, policy(R)).logits, hot, 1e-6)


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_budgets_need_calibration(budget: float) -> None:
    with pytest.raises(ValueError, match="the model is not calibrated: budgets need a calibration table"):
        run(tiny_model("r"), tokens(), policy(LayerPolicy(budget=budget)))


def test_a_change_of_the_calibration_is_noticed() -> None:
    model, x = tiny_model("rr"), tokens()
    budget, threshold = LayerPolicy(budget=0.4), LayerPolicy(threshold=0.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="not calibrated"):
            run(model, x, policy(budget, threshold))
    fill_calibration(model)
    run(model, x, policy(budget, budget))
    with torch.no_grad():
        model.calibration.by_layer[1] = math.nan
    run(model, x, policy(budget, threshold))
    run(model, x, policy(LayerPolicy(budget=0.0), LayerPolicy(budget=1.0)))
    with pytest.raises(ValueError, match="not calibrated"):
        run(model, x, [policy(budget, threshold), policy(threshold, budget)])
    run(model, x, policy(budget, budget), routes=[None, torch.zeros(2, 5, 2)])
    run(model, x, policy(budget, budget), route_gradient=RouteGradient())
    model.calibration.by_layer = torch.zeros_like(model.calibration.by_layer)
    run(model, x, policy(budget, budget))
    with torch.inference_mode():
        model.calibration.by_layer = torch.zeros_like(model.calibration.by_layer)
        model(x, policy(budget, budget))


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (policy(S, S), "policy layers = 2 .* the model has 3 layers"),
        (policy(S, S, S), "policy.layers\\[0\\].op = 'softmax' .* kind delta"),
        (policy(D, D, D), "policy.layers\\[1\\].op = 'delta' .* kind softmax"),
        (policy(D, R, D), "policy.layers\\[1\\].op = 'routed'"),
        (RoutingPolicy((D, S, D), 16), "policy.chunk_size = 16 .* chunk size is 8"),
    ],
    ids=["depth", "delta", "softmax", "routed", "chunk"],
)
def test_policies_that_do_not_fit_are_refused(p: RoutingPolicy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_model("dsr"), tokens(), p)
    with pytest.raises(ValueError, match=message):
        run(tiny_model("dsr"), tokens(), [policy(D, S, D), p])


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, "tokens must be"),
        (torch.zeros(3, 0, dtype=torch.int64), {}, "tokens must be"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, "tokens must be"),
        (torch.zeros(2, 3), {}, "tokens must be integers .* found torch.float32"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            {"layout": Layout.padded(torch.ones(2, 4).bool())},
            "layout is of a mask \\(2, 4\\)",
        ),
        (torch.zeros(2, 3, dtype=torch.int64), {"routes": [None, None]}, "routes has 2 entries for 1 layers"),
        (torch.zeros(2, 3, dtype=torch.int64), {"routes": [torch.zeros(2, 2, 2)]}, "route has shape"),
    ],
    ids=["1-d", "no-tokens", "no-rows", "float", "mask", "routes", "route-shape"],
)
def test_mistakes_in_the_input(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_model("r"), x, policy(S), **options)


def test_batch_that_does_not_split() -> None:
    for policies in ([policy(S)] * 2, []):
        with pytest.raises(ValueError, match=f"a batch of 3 does not split into {len(policies)} equal policies"):
            run(tiny_model("r"), tokens(3), policies)


# Options and shapes


def test_order_of_the_batch_does_not_matter() -> None:
    model, x = calibrated(), tokens(4)
    order = torch.tensor([2, 0, 3, 1])
    p = policy(R, T0, R)
    near(run(model, x[order], p).logits, run(model, x, p).logits[order], 1e-5)


def test_rope_tells_positions_apart() -> None:
    """One softmax layer without convolution sees a set of earlier tokens; with rope it sees their places."""
    x = tokens(1, 8)
    swapped = x[:, [1, 0, *range(2, 8)]]
    for rope in (False, True):
        model = tiny_model("s", rope=rope, conv_width=1)
        same = torch.allclose(
            run(model, x, policy(S)).logits[:, -1], run(model, swapped, policy(S)).logits[:, -1], atol=1e-5
        )
        assert same is not rope


def test_tied_and_untied_embeddings() -> None:
    tied, untied = (tiny_model("d", tie_embeddings=tie) for tie in (True, False))
    assert tied.head is None
    assert count_parameters(untied) - count_parameters(tied) == 384 * 16
    hidden: list[Tensor] = []
    for model in (tied, untied):
        hook = model.norm.register_forward_hook(lambda _m, _i, out: hidden.append(out))
        logits = run(model, tokens(), policy(D)).logits
        hook.remove()
        weight = model.embed.weight if model.head is None else model.head.weight
        near(logits, F.linear(hidden[-1], weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_in_other_dtypes(dtype: torch.dtype) -> None:
    model, x = tiny_model("rsd"), tokens()
    p = policy(LayerPolicy(budget=0), S, D)
    expected = run(model, x, p).logits
    logits = run(model.to(dtype), x, p).logits
    assert logits.dtype is dtype
    near(logits.float(), expected, max(TOLERANCE[dtype], TOLERANCE[torch.float32]) * 8)


def half(kinds: str = "rsd") -> RoutedLM:
    return calibrated(kinds, precision=Precision.bfloat16)


def test_bfloat16_computes_in_half_and_keeps_weights_whole() -> None:
    model, x = half(), tokens()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.dtype}) if isinstance(out, Tensor) else None
        )
    p = policy(LayerPolicy(budget=0), S, D)
    output = run(model, x, p)
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert seen.pop("embed") is torch.float32
    assert seen.pop("blocks.0.mixer.router") is torch.float32, "margins must not tie"
    assert set(seen.values()) == {torch.bfloat16}
    whole = tiny_model("rsd")
    whole.load_state_dict(model.state_dict())
    exact = run(whole, x, p).logits
    assert output.logits.dtype is torch.bfloat16
    near(output.logits.float(), exact, TOLERANCE[torch.bfloat16] * 8)
    assert not torch.equal(output.logits, exact)


def test_bfloat16_gives_every_weight_a_gradient_of_its_own_dtype() -> None:
    model, x = half("rr"), tokens(4, 64)
    routed = LayerPolicy(budget=0.4)
    policies = [policy(S, S), policy(D, D), policy(routed, D), policy(routed, routed)]
    losses = model(x, policies, targets=torch.roll(x, -1, 1), route_gradient=RouteGradient())
    assert losses.loss.dtype is torch.float32
    losses.loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype is torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("precision", Precision, ids=lambda p: p.value)
def test_token_losses_are_those_of_the_logits(precision: Precision) -> None:
    model, x = calibrated("rd", precision=precision), tokens()
    targets = torch.where(torch.rand(x.shape) < 0.2, -100, torch.roll(x, -1, 1))
    p = policy(R, D)
    logits = run(model, x, p).logits.float()
    losses = run(model, x, p, targets=targets)
    near(losses.loss, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), 1e-6)
    assert torch.equal(losses.right, logits.argmax(-1) == targets)


def test_fresh_model_predicts_about_uniformly() -> None:
    model, x = RoutedLM(tiny_config()), tokens(4, 64)
    loss = F.cross_entropy(run(model, x, policy(S, D, T0)).logits.flatten(0, 1), torch.roll(x, -1, 1).flatten())
    assert math.log(384) - 0.5 < float(loss) < math.log(384) + 2.5


def preset(name: str) -> RoutedLM:
    with torch.device("meta"):
        return RoutedLM(ModelConfig(**dict(OmegaConf.load(PRESETS / f"{name}.yaml"))))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("340m", 323e6, 357e6), ("760m", 722e6, 798e6), ("small", 20e6, 60e6), ("tiny", 5e4, 2e5)],
)
def test_presets_have_the_parameters_of_their_names(name: str, low: float, high: float) -> None:
    assert low <= count_parameters(preset(name)) <= high


@pytest.mark.parametrize(
    ("name", "width", "key", "value", "softmax_heads"), [("340m", 1024, 128, 256, 12), ("760m", 1536, 192, 384, 18)]
)
def test_presets_have_the_heads_of_the_paper(name: str, width: int, key: int, value: int, softmax_heads: int) -> None:
    model = preset(name)
    c = model.config
    assert (c.width, c.heads, c.key_dim, c.value_dim, c.chunk_size) == (width, 6, key, value, 64)
    assert (c.softmax_heads, len(c.layers)) == (softmax_heads, 21)
    assert [i for i, kind in enumerate(c.layers) if kind is Op.routed] == [3, 7, 11, 15, 19, 20]
    assert set(c.layers) == {Op.delta, Op.routed}
    mixer = mixer_of(model, 3)
    assert mixer.q_norm.weight.shape == (64,)
    assert mixer.softmax_norm.shape == (128,)
    assert not c.rope


@pytest.mark.parametrize("token", [-1, 384], ids=["negative", "past the vocabulary"])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    model = RoutedLM(ModelConfig())
    tokens = torch.tensor([[5, token, 7]])
    with pytest.raises(ValueError, match=r"tokens are .*: they must lie in \[0, 384\)"):
        model(tokens, RoutingPolicy.all_delta(model.kinds, 16))


@pytest.mark.parametrize(("kinds", "compiled"), [("rds", False), ("rr", False), ("rds", True)])
def test_on_the_kernels_as_on_torch(kinds: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training pass of the whole model, on a GPU or in Triton's interpreter: the same loss and gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(kinds, chunk_size=16, key_dim=32, value_dim=32, softmax_per_head=2).to(device)
    policies = [RoutingPolicy.uniform(model.kinds, 16, budget=0.5), RoutingPolicy.all_delta(model.kinds, 16)]
    tokens = torch.randint(0, 256, (2, 37)).to(device)  # two chunks and a part of one
    targets = torch.randint(0, 256, (2, 37)).to(device)
    gradient = RouteGradient()

    def gradients(backend: str) -> tuple[Tensor, list[Tensor | None]]:
        monkeypatch.setattr(dispatch, "resolve", lambda given, op, device: backend if given == "auto" else given)
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        loss = model(tokens, policies, targets=targets, route_gradient=gradient).loss.mean()
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    expected_loss, expected = gradients("torch")
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    loss, actual = gradients("triton")
    assert_near(loss, expected_loss)
    for (name, _), x, y in zip(model.named_parameters(), actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None and y is not None:
            assert_near(x, y)


@pytest.mark.parametrize("policy", ["mine.json", {"layers": []}, [None]], ids=str)
def test_what_is_no_policy_is_named(policy: Any) -> None:
    with pytest.raises(ValueError, match="it must be a RoutingPolicy, or several"):
        tiny_model("r").compile_policy(policy, 1)
