"""One layer against its definition written token by token, and the router's gradient against its formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from natsl.calibration import Calibration
from natsl.compiled import compile_policies
from natsl.config import Counterfactual, RouteGradient
from natsl.layout import Layout
from natsl.mixer import BIAS_GAIN, RoutedMixer, rotate
from natsl.router import LayerContext, RoutePair, group_threshold
from natsl.space.policy import ALLOWED_OPS, LayerPolicy, Op, RoutingPolicy
from tests.oracles import assert_near, dense_softmax, layer_context, tiny_config, token_delta

KINDS = {"delta": "d", "softmax": "s", "routed": "r"}


def make_mixer(kind: str, **options: object) -> RoutedMixer:
    """A float64 layer with every parameter random."""
    mixer = RoutedMixer(tiny_config(KINDS[kind], **options), Op(kind)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def context(
    policy: LayerPolicy, B: int, T: int, route: Tensor | RoutePair | None = None, kind: str = "routed"
) -> LayerContext:
    return layer_context([policy], B, torch.full((B,), T), route, kind=Op(kind))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_layer(
    m: RoutedMixer, x: Tensor, op: Op, route: Tensor, temperature: float = 1.0, skip: Tensor | None = None
) -> Tensor:
    """The layer as the paper defines it; x [B,T,D], route [B,N,R] of 0 and 1, and ``skip`` where the two differ."""
    skip = route if skip is None else skip
    B, T, _ = x.shape
    c = m.config
    Hs = c.softmax_heads
    y = x @ m.qkv_proj.weight.T
    conv = torch.zeros_like(y)
    for t in range(T):
        for tap in range(c.conv_width):
            if t - tap >= 0:
                conv[:, t] += m.conv[:, c.conv_width - 1 - tap] * y[:, t - tap]
    conv = conv * torch.sigmoid(conv)
    K, V = c.heads * c.key_dim, c.heads * c.value_dim
    q, k, v = conv[..., :K], conv[..., K : 2 * K], conv[..., 2 * K : 2 * K + V]
    o: dict[Op, Tensor] = {}
    if op is not Op.delta:
        qs, ks = norm(q.view(B, T, Hs, -1), m.q_norm.weight), norm(k.view(B, T, Hs, -1), m.k_norm.weight)
        if c.rope:
            qs, ks = (torch.cat([plain_rotation(z[:, t : t + 1], t) for t in range(T)], 1) for z in (qs, ks))
        scale = (c.key_dim // c.softmax_per_head) ** -0.5
        attended = dense_softmax(qs, ks, v.view(B, T, Hs, -1), route, chunk_size=c.chunk_size, scale=scale)
        o[Op.softmax] = norm(attended, m.softmax_norm)
    if m.kind is not Op.softmax:
        g = -m.A_log.exp() * torch.log1p((x @ m.a_proj.weight.T + m.dt_bias).exp())
        beta = torch.sigmoid(x @ m.b_proj.weight.T + m.b_proj.bias)
        heads = [z.view(B, T, c.heads, -1) for z in (q, k, v)]
        out, _ = token_delta(heads[0], heads[1], heads[2], g, beta, skip, chunk_size=c.chunk_size)
        o[Op.delta] = norm(out.reshape(B, T, Hs, -1), m.delta_norm)
    if len(o) == 1:
        (mixed,) = o.values()
    else:
        logits = (q @ m.mix_proj.weight.T + m.mix_proj.bias).view(B, T, Hs, 2)
        for t in range(T):
            kept = route[:, : t // c.chunk_size].sum(1).repeat_interleave(c.softmax_per_head, 1)[..., None]
            logits[:, t] += BIAS_GAIN * m.mix_bias.view(Hs, 2) / (1 + kept)
        share = (logits / temperature).softmax(-1)
        mixed = share[..., :1] * o[Op.delta] + share[..., 1:] * o[Op.softmax]
    gate = (x @ m.gate_proj.weight.T).view(B, T, Hs, -1)
    return (gate * torch.sigmoid(gate) * mixed).reshape(B, T, -1) @ m.out_proj.weight.T


def plain_rotation(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of one position; pairs are (i, i + half)."""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        out[..., i] = x[..., i] * math.cos(angle) - x[..., i + half] * math.sin(angle)
        out[..., i + half] = x[..., i + half] * math.cos(angle) + x[..., i] * math.sin(angle)
    return out


@pytest.mark.parametrize(("kind", "op"), [(kind.value, op.value) for kind, ops in ALLOWED_OPS.items() for op in ops])
@pytest.mark.parametrize(
    "options", [{}, {"softmax_per_head": 2}, {"rope": True}, {"associative_init": True}, {"router_norm": True}], ids=str
)
@pytest.mark.parametrize("T", [1, 7, 8, 21])
def test_layer_equals_its_definition(T: int, options: dict[str, object], kind: str, op: str) -> None:
    mixer = make_mixer(kind, **options)
    x = torch.randn(2, T, 16).double()
    N = -(-T // 8)
    policy = LayerPolicy(Op(op), threshold=0.0 if op == "routed" else None, mix_temperature=0.7)
    margins = x.new_zeros(2, N, 2)
    if kind == "routed":
        for n in range(N):
            r, means = mixer.router, x[:, 8 * n : 8 * n + 8].mean(1)
            z = (means - r.mean) / r.variance.sqrt() @ r.weight.T + r.bias if r.norm else means @ r.weight.T
            margins[:, n] = z.view(2, 2, 2)[..., 1] - z.view(2, 2, 2)[..., 0]
    fixed = {"delta": torch.zeros_like(margins), "softmax": torch.ones_like(margins)}
    route = fixed.get(op, (margins > 0).double())
    y, routing = mixer(x, context(policy, 2, T, kind=kind))
    assert torch.equal(routing.route, route.float())
    if kind == "routed":
        assert routing.margins is not None
        assert_near(routing.margins, margins, torch.float32)
    # rotation angles, gates and norms of the softmax heads are float32 on purpose
    assert_near(y, plain_layer(mixer, x, Op(op), route, 0.7), torch.float32)


def test_given_routes_take_the_place_of_the_routers() -> None:
    mixer = make_mixer("routed")
    x = torch.randn(2, 21, 16).double()
    route = (torch.rand(2, 3, 2) < 0.5).float()
    y, routing = mixer(x, context(LayerPolicy(Op.routed, threshold=-math.inf), 2, 21, route))
    assert torch.equal(routing.route, route)
    assert_near(y, plain_layer(mixer, x, Op.routed, route.double()), torch.float32)


@pytest.mark.parametrize("case", ["nowhere", "both", "mixed"])
def test_a_chunk_may_be_kept_nowhere_or_kept_and_written(case: str) -> None:
    mixer = make_mixer("routed")
    x = torch.randn(2, 21, 16).double()
    keep = {"nowhere": torch.zeros(2, 3, 2), "both": torch.ones(2, 3, 2)}.get(case, (torch.rand(2, 3, 2) < 0.5).float())
    skip = 1 - keep if case != "mixed" else (torch.rand(2, 3, 2) < 0.5).float()
    y, routing = mixer(x, context(LayerPolicy(threshold=0.0), 2, 21, RoutePair(keep, skip)))
    assert torch.equal(routing.route, keep)
    assert torch.equal(routing.skip, skip)
    assert_near(y, plain_layer(mixer, x, Op.routed, keep.double(), skip=skip.double()), torch.float32)
    together, _ = mixer(x, context(LayerPolicy(threshold=0.0), 2, 21, keep))
    assert not torch.allclose(y, together)


# The bias of the mix by the number of chunks kept


def test_the_bias_knows_only_what_was_kept_before() -> None:
    mixer = make_mixer("routed")
    x = torch.randn(2, 40, 16).double()
    route = (torch.rand(2, 5, 2) < 0.5).float()
    y, _ = mixer(x, context(LayerPolicy(threshold=0.0), 2, 40, route))
    for n in range(5):
        other = route.clone()
        other[:, n:] = 1 - other[:, n:]
        z, _ = mixer(x, context(LayerPolicy(threshold=0.0), 2, 40, other))
        end = 8 * (n + 1)  # softmax serves the own chunk whatever its route
        assert torch.equal(z[:, :end], y[:, :end])
        assert n == 4 or not torch.allclose(z[:, end:], y[:, end:])


def test_the_bias_counts_the_chunks_that_are_seen() -> None:
    mixer = make_mixer("routed")
    x, nothing = torch.randn(2, 40, 16).double(), torch.zeros(2, 5, 2)
    keep, other = ((torch.rand(2, 5, 2) < 0.5).float() for _ in range(2))
    seen = (keep[:, None] > 0) & torch.ones(5, 5, dtype=torch.bool).tril(-1)[..., None]
    y, of_other, of_nobody = (
        mixer(x, context(LayerPolicy(threshold=0.0), 2, 40, pair))[0]
        for pair in (RoutePair(keep, nothing), RoutePair(other, nothing, seen), RoutePair(keep, nothing, seen & False))
    )
    torch.testing.assert_close(of_other, y)
    assert not torch.allclose(of_nobody, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_of_zero_changes_no_logit(dtype: torch.dtype) -> None:
    mixer = make_mixer("routed").to(dtype)
    nn.init.zeros_(mixer.mix_bias)
    q, rows = torch.randn(2, 21, 16, dtype=dtype), context(LayerPolicy(threshold=0.0), 2, 21)
    (span,) = rows.spans()
    logits = mixer._mix_logits(q, torch.randint(3, (2, 3, 2)), rows, span)
    assert torch.equal(logits, mixer.mix_proj(q).view(2, 21, 2, 2))
    assert logits.dtype == dtype


def test_the_bias_gets_its_gradient() -> None:
    mixer = make_mixer("routed", softmax_per_head=2)
    x, route = torch.randn(2, 40, 16).double(), (torch.rand(2, 5, 2) < 0.5).float()
    rows = context(LayerPolicy(threshold=0.0), 2, 40, route)
    weights = torch.randn(2, 40, 16).double()

    def loss() -> Tensor:
        y: Tensor = mixer(x, rows)[0]
        return (y * weights).sum()

    (gradient,) = torch.autograd.grad(loss(), mixer.mix_bias)
    assert_near(gradient[::2], -gradient[1::2])  # only the difference of two logits counts
    for i in range(8):
        with torch.no_grad():
            values = []
            for step in (1e-4, -2e-4):
                mixer.mix_bias[i] += step
                values.append(loss())
            mixer.mix_bias[i] += 1e-4
        assert_near((values[0] - values[1]) / 2e-4, gradient[i], torch.float32)


def test_rows_of_op_delta_have_no_bias() -> None:
    """Neither where they are computed by themselves nor where both memories run for all rows."""
    mixer = make_mixer("routed")
    x, policies = torch.randn(4, 21, 16).double(), [LayerPolicy(Op.delta), LayerPolicy(budget=0.0)]
    for per_kind in (True, False):
        groups = [RoutingPolicy((policy,), 8) for policy in policies]
        compiled = compile_policies(groups, [Op.routed], 2, Calibration(1, 2, 17), 4, per_kind)
        rows = LayerContext(compiled.layer(0), Layout())
        before, _ = mixer(x, rows)
        with torch.no_grad():
            mixer.mix_bias[1::2] += 1.0
        after, _ = mixer(x, rows)
        assert torch.equal(after[:2], before[:2])
        assert not torch.allclose(after[2:], before[2:])
        (gradient,) = torch.autograd.grad(after[:2].sum(), mixer.mix_bias)
        assert not gradient.any()


def test_rotation_is_relative() -> None:
    x, y, place = torch.randn(1, 12, 2, 8), torch.randn(1, 12, 2, 8), torch.arange(12)[None]
    here = torch.einsum("bthk,bshk->bhts", rotate(x, 100.0, place), rotate(y, 100.0, place))
    for shift in (1, 5, 300):
        far = [rotate(z, 100.0, place + shift) for z in (x, y)]
        torch.testing.assert_close(torch.einsum("bthk,bshk->bhts", *far), here, rtol=0, atol=1e-4)
    unrotated = torch.einsum("bthk,bshk->bhts", x, y)
    torch.testing.assert_close(here.diagonal(dim1=2, dim2=3), unrotated.diagonal(dim1=2, dim2=3))
    assert not torch.allclose(here, unrotated)


def test_associative_start_is_identity_and_shift() -> None:
    config = tiny_config("r", associative_init=True)
    convs = torch.stack([RoutedMixer(config, Op.routed).conv.detach() for _ in range(40)]).mean(0)
    mixer = RoutedMixer(config, Op.routed)
    expected = torch.zeros(48, 4)
    expected[:16, 3] = expected[16:32, 2] = expected[32:, 3] = 1
    assert (convs - expected).abs().max() < 0.09
    assert torch.equal(mixer.qkv_proj.weight[:16], mixer.qkv_proj.weight[16:32])


# The router's gradient


def test_sequences_without_a_complete_chunk_have_no_router_gradient() -> None:
    mixer = make_mixer("routed")
    x = torch.randn(4, 7, 16).double()
    for lengths in (None, torch.full((4,), 7)):
        rows = layer_context([LayerPolicy(budget=0.4)], 4, lengths, gradient=RouteGradient())
        y, routing = mixer(x, rows)
        assert routing.route.all()
        grads = torch.autograd.grad(y.sum(), mixer.router.weight, allow_unused=True)
        assert grads[0] is None or not grads[0].any()


@pytest.mark.parametrize("T", [24, 29])
def test_no_lengths_stand_for_whole_sequences(T: int) -> None:
    mixer = make_mixer("routed")
    x = torch.randn(4, T, 16).double()
    results = []
    for lengths in (None, torch.full((4,), T)):
        policies = [LayerPolicy(budget=0.4), LayerPolicy(budget=0.7)]
        rows = layer_context(policies, 4, lengths, gradient=RouteGradient())
        y, routing = mixer(x, rows)
        weights = torch.linspace(-1, 1, y.numel()).double().view_as(y)
        results.append((y, routing.route, torch.autograd.grad((y * weights).sum(), mixer.router.weight)[0]))
    assert torch.equal(results[0][1], results[1][1])
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][2], results[1][2], torch.float32)


def run_training(gradient: RouteGradient, x: Tensor, mixer: RoutedMixer) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a linear loss: margins, router weights, input."""
    x = x.clone().requires_grad_()
    rows = layer_context([LayerPolicy(budget=0.4)], 4, torch.full((4,), x.shape[1]), gradient=gradient)
    y, routing = mixer(x, rows)
    assert routing.margins is not None
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    margins, weights, inputs = torch.autograd.grad(loss, [routing.margins, mixer.router.weight, x])
    return margins, weights, inputs


@pytest.mark.parametrize("mode", Counterfactual, ids=lambda m: m.value)
def test_router_gradient_of_a_layer(mode: Counterfactual) -> None:
    mixer = make_mixer("routed")
    x = torch.randn(4, 35, 16).double()
    config = RouteGradient(counterfactual=mode, gradient_clamp=0.0)
    free, _, _ = run_training(replace(config, project_budget=False), x, mixer)
    projected, weight, into = run_training(config, x, mixer)
    assert free[:, :4].abs().max() > 1e-3
    assert not free[:, 4].any(), "an incomplete last chunk has no route to learn"
    assert abs(float(projected.sum())) < 1e-5 * float(projected.abs().sum())
    same, same_weight, through = run_training(replace(config, detach_router=False), x, mixer)
    torch.testing.assert_close(same, projected)
    torch.testing.assert_close(same_weight, weight)
    assert not torch.allclose(through, into), "not detached, the router's gradient reaches the trunk"


def test_chosen_sides_have_the_same_gradient_in_every_mode() -> None:
    mixer = make_mixer("routed")
    x = torch.randn(4, 32, 16).double()
    config = RouteGradient(project_budget=False, gradient_clamp=0.0)
    chosen, derivative, insertion = (
        run_training(replace(config, counterfactual=mode), x, mixer)[0] for mode in Counterfactual
    )
    _, routing = mixer(x, context(LayerPolicy(threshold=0.0), 4, 32))
    assert routing.margins is not None
    theta = group_threshold(routing.margins.detach(), torch.ones(4, 4, dtype=torch.bool), 0.4, config)
    kept = routing.margins > theta
    torch.testing.assert_close(derivative[kept], insertion[kept])
    assert not torch.allclose(derivative[:, :-1], insertion[:, :-1])
    assert not torch.allclose(chosen[:, :-1], derivative[:, :-1])


def test_route_noise_is_drawn_anew() -> None:
    mixer = make_mixer("routed")
    x = torch.randn(4, 64, 16).double()
    policies = [LayerPolicy(Op.routed, budget=0.5)]
    noisy = layer_context(policies, 4, torch.full((4,), 64), gradient=RouteGradient(route_noise=3.0))
    routes = [mixer(x, noisy)[1].route for _ in range(2)]
    assert not torch.equal(*routes)
    assert all(r.sum() == 32 for r in routes), "noise reorders the chunks, the budget holds"


def test_explicit_visibility_of_what_is_kept_changes_nothing() -> None:
    mixer, x = make_mixer("routed"), torch.randn(2, 35, 16).double()
    keep = (torch.rand(2, 5, 2) < 0.5).double()
    skip = (torch.rand(2, 5, 2) < 0.5).double()
    policy = LayerPolicy(budget=0.5)
    expected, _ = mixer(x, context(policy, 2, 35, RoutePair(keep, skip)))
    visible = keep.bool()[:, None].expand(2, 5, 5, 2)
    y, routing = mixer(x, context(policy, 2, 35, RoutePair(keep, skip, visible)))
    assert_near(y, expected)
    assert torch.equal(routing.route, keep.float())
    nothing, _ = mixer(x, context(policy, 2, 35, RoutePair(keep, skip, torch.zeros_like(visible))))
    assert not torch.allclose(nothing, expected)


def test_visibility_of_a_softmax_layer() -> None:
    mixer, x = make_mixer("softmax"), torch.randn(2, 35, 16).double()
    keep = (torch.rand(2, 5, 2) < 0.5).double()
    policy = LayerPolicy(Op.softmax)
    expected, _ = mixer(x, context(policy, 2, 35, keep, "softmax"))
    visible = keep.bool()[:, None].expand(2, 5, 5, 2)
    y, _ = mixer(x, context(policy, 2, 35, RoutePair(keep, keep, visible), "softmax"))
    assert_near(y, expected)


def test_visibility_that_does_not_fit_is_refused() -> None:
    mixer, x = make_mixer("routed"), torch.randn(2, 35, 16).double()
    keep = torch.ones(2, 5, 2)
    for visible in (torch.ones(2, 5, 5, 2), torch.ones(2, 4, 4, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"RoutePair.visible is torch.* it must be bool \(2, 5, 5, 2\)"):
            mixer(x, context(LayerPolicy(budget=0.5), 2, 35, RoutePair(keep, keep, visible)))
