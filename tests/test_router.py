"""Margins, thresholds and routes of a layer, and the gradient that routes carry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from natsl.config import CalibrationScope, RouteGradient
from natsl.kernels.routing import chunk_means
from natsl.layout import Layout
from natsl.router import Router, clamped_routes, group_threshold, kept_before, route_chunks, straight_through
from natsl.space.policy import LayerPolicy, Op
from tests.oracles import assert_near, layer_context


def test_a_router_starts_and_is_stored_as_a_linear_layer() -> None:
    """Checkpoints hold its weight under this name, and a seed must give the weights that it always gave."""
    torch.manual_seed(0)
    router, after = Router(16, 3), torch.rand(1)
    torch.manual_seed(0)
    linear, after_linear = nn.Linear(16, 6, bias=False), torch.rand(1)
    assert list(router.state_dict()) == ["weight"]
    assert torch.equal(router.weight, linear.weight)
    assert torch.equal(after, after_linear)


@pytest.mark.parametrize("lengths", [None, [21, 10]], ids=["whole", "padded"])
def test_margins_are_differences_of_scores_of_chunk_means(lengths: list[int] | None) -> None:
    router = Router(16, 3).double()
    x = torch.randn(2, 21, 16).double()
    margins = router.margins(chunk_means(x, 8, None if lengths is None else torch.tensor(lengths)))
    assert margins.shape == (2, 3, 3)
    assert margins.dtype is torch.float64
    for b, size in enumerate(lengths or [21, 21]):
        for n in range(-(-size // 8)):
            scores = (x[b, 8 * n : min(8 * n + 8, size)].mean(0) @ router.weight.T).view(3, 2)
            assert_near(margins[b, n], scores[:, 1] - scores[:, 0])


def test_margins_of_a_standardised_input() -> None:
    torch.manual_seed(0)
    router = Router(16, 3, norm=True).double()
    after = torch.rand(1)
    torch.manual_seed(0)
    Router(16, 3)
    assert torch.equal(after, torch.rand(1)), "the norm takes no random numbers"
    assert set(router.state_dict()) == {"weight", "bias", "mean", "variance", "updates"}
    means = torch.randn(2, 5, 16).double()
    plain = router.margins(means)  # no statistics yet
    assert_near(plain, (means @ router.weight.T).unflatten(-1, (3, 2)).diff(dim=-1)[..., 0], torch.float32)
    with torch.no_grad():
        router.bias.normal_()
        router.mean.normal_()
        router.variance.uniform_(0.5, 2.0)
    scores = (means - router.mean) / router.variance.sqrt() @ router.weight.T + router.bias
    assert_near(router.margins(means), scores.unflatten(-1, (3, 2)).diff(dim=-1)[..., 0], torch.float32)


def test_statistics_follow_the_chunks_of_training() -> None:
    router = Router(16, 2, norm=True)
    x = 3 * torch.randn(2, 21, 16) + 5
    policies = [LayerPolicy(budget=0.5)]
    lengths = torch.tensor([21, 7])  # three chunks, and one

    def route(router: Router, gradient: RouteGradient | None, lengths: Tensor | None = None) -> None:
        layout = Layout() if lengths is None else Layout(lengths=lengths)
        route_chunks(router, x, 2, 8, replace(layer_context(policies, 2, gradient=gradient), layout=layout))

    route(router.eval(), RouteGradient())
    assert float(router.updates) == 0
    route(router.train(), RouteGradient(), lengths)
    chunks = torch.cat((chunk_means(x[:1], 8)[0], x[1:, :7].mean(1)))
    assert_near(router.mean, chunks.mean(0))
    assert_near(router.variance, chunks.var(0, unbiased=False))
    route(router, RouteGradient(), lengths)  # the second of two equal steps changes nothing
    assert_near(router.mean, chunks.mean(0))
    assert_near(router.variance, chunks.var(0, unbiased=False))
    with torch.no_grad():
        router.updates.fill_(999.0)
        x[1, 3, 5] = math.inf  # such a step is left out
    route(router, RouteGradient())
    assert_near(router.mean, chunks.mean(0))
    assert_near(router.variance, chunks.var(0, unbiased=False))
    assert float(router.updates) == 999.0
    with torch.no_grad():
        x[1, 3, 5] = 0.0
    route(router, RouteGradient())
    whole = chunk_means(x, 8).flatten(0, 1).mean(0)
    assert_near(router.mean, chunks.mean(0) + 0.02 * (whole - chunks.mean(0)))


@pytest.mark.parametrize("routed", [True, False], ids=["router", "none"])
def test_every_group_follows_its_policy(routed: bool) -> None:
    router = Router(16, 3) if routed else None
    x = torch.randn(6, 21, 16)
    policies = [LayerPolicy(Op.softmax), LayerPolicy(Op.delta)]
    policies += [LayerPolicy(threshold=-math.inf), LayerPolicy(threshold=0.1)] if routed else [LayerPolicy(Op.softmax)]
    x = x[: 6 - 6 % len(policies)]
    routing = route_chunks(
        router, x, 3, 8, layer_context(policies, len(x), heads=3, kind=Op.routed if routed else Op.softmax)
    )
    size = len(x) // len(policies)
    groups = routing.route.split(size)
    assert groups[0].all()
    assert not groups[1].any()
    assert groups[2].all()
    assert (routing.margins is not None) == routed
    if routing.margins is not None:
        assert torch.equal(groups[3], (routing.margins[-size:] > 0.1).float())


def test_straight_through_is_binary_forward_and_a_sigmoid_backward() -> None:
    margins = torch.randn(500).requires_grad_()
    theta = torch.tensor(0.2)
    hard = (margins.detach() > theta).float()
    route = straight_through(margins, theta, hard, 0.5)
    assert torch.equal(route, hard), "exactly 0 or 1: the kernels read whether a chunk is kept from it"
    upstream = torch.randn(500)
    (grad,) = torch.autograd.grad((route * upstream).sum(), margins)
    y = torch.sigmoid((margins.detach() - theta) / 0.5)
    torch.testing.assert_close(grad, y * (1 - y) / 0.5 * upstream)


def group_route(margins: Tensor, complete: Tensor, budget: float, settings: RouteGradient) -> Tensor:
    theta = group_threshold(margins, complete, budget, settings)
    hard = (margins.detach() > theta.detach()).to(margins.dtype)
    return straight_through(margins, theta, hard, settings.route_temperature)


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
def test_projected_gradient_has_no_part_along_a_common_shift(budget: float, scope: CalibrationScope) -> None:
    margins = torch.randn(3, 8, 2).double().requires_grad_()
    complete = torch.ones(3, 8, dtype=torch.bool)
    complete[:, -1] = complete[1, 5:] = False
    upstream = torch.randn(3, 8, 2).double() * complete[..., None]
    settings = RouteGradient(calibration=scope)
    (grad,) = torch.autograd.grad((group_route(margins, complete, budget, settings) * upstream).sum(), margins)
    (free,) = torch.autograd.grad(
        (
            group_route(margins, complete, budget, RouteGradient(calibration=scope, project_budget=False)) * upstream
        ).sum(),
        margins,
    )
    over = (0, 1, 2) if scope is CalibrationScope.layer else (0, 1)
    assert grad.sum(over).abs().max() < 1e-9
    assert free.sum(over).abs().max() > 1e-3
    theta = group_threshold(margins.detach(), complete, budget, settings)
    y = torch.sigmoid((margins.detach() - theta) / 0.5)
    slope = y * (1 - y)
    assert_near(free, slope / 0.5 * upstream)
    weight = slope * complete[..., None]
    weight = weight / weight.sum(over, keepdim=True)
    torch.testing.assert_close(grad, free - weight * free.sum(over, keepdim=True), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
def test_training_threshold_keeps_the_budget_exactly(project: bool, scope: CalibrationScope) -> None:
    settings = RouteGradient(calibration=scope, project_budget=project)
    complete = torch.ones(5, 20, dtype=torch.bool)
    for case in range(50):
        margins = (torch.randn(5, 20, 2) * 10 ** (case % 5 - 2)).requires_grad_()
        budget = (case + 0.5) / 51
        route = group_route(margins, complete, budget, settings)
        pool = 200 if scope is CalibrationScope.layer else 100
        kept = route.detach().sum() if scope is CalibrationScope.layer else route.detach().sum((0, 1))
        # the quantile lies between two of M margins: M − 1 − floor((1 − budget)(M − 1)) of them are above
        assert (kept == pool - 1 - math.floor((1 - budget) * (pool - 1))).all()


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
def test_chunks_known_on_the_host_and_a_mask_give_the_same_threshold(project: bool, scope: CalibrationScope) -> None:
    settings = RouteGradient(calibration=scope, project_budget=project)
    margins = torch.randn(3, 8, 2).double().requires_grad_()
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, :6] = True
    picked = margins.detach()[mask].view(-1, 1 if scope is CalibrationScope.layer else 2)
    found = []
    for complete in (6, mask):
        theta = group_threshold(margins, complete, 0.3, settings)
        assert_near(theta[0, 0].detach(), torch.quantile(picked, 0.7, dim=0).expand(2))
        weights = torch.linspace(1, 2, 2).double().view_as(theta)
        found.append(torch.autograd.grad((theta * weights).sum(), margins)[0] if project else theta.detach())
    assert_near(found[0], found[1])
    assert not project or not found[0][:, 6:].any()


def test_budgets_of_0_and_1_and_incomplete_groups_have_infinite_thresholds() -> None:
    margins, none = torch.randn(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool)
    settings = RouteGradient()
    ends = group_threshold(margins, ~none, torch.tensor([0.0, 1.0]).double(), settings)
    assert ends.flatten().tolist() == [math.inf, -math.inf]
    assert (group_threshold(margins, none, 0.5, settings) == -math.inf).all()
    assert (group_threshold(margins, 0, 0.5, settings) == -math.inf).all()
    mixed = torch.tensor([0.0, 0.5]).double()
    for complete in (0, none):
        assert group_threshold(margins, complete, mixed, settings).flatten().tolist() == [math.inf, -math.inf]


def gradient(
    keep: Tensor, skip: Tensor, route: Tensor, decided: Tensor, groups: int, settings: RouteGradient
) -> Tensor:
    """What reaches the routes from these gradients of the two memories' routes."""
    leaf = route.clone().requires_grad_()
    pair = clamped_routes(leaf, decided, groups, settings)
    assert torch.equal(pair.keep, route)
    assert torch.equal(pair.skip, route)
    return torch.autograd.grad((pair.keep * keep + pair.skip * skip).sum(), leaf)[0]


def test_clamp_at_a_multiple_of_the_mean_of_a_group() -> None:
    """Both sides together, over the heads whose threshold is finite, each group by itself."""
    total = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 33.0]).view(1, 8, 1)
    keep = torch.cat((total, 100 * total)).expand(2, 8, 2)
    decided = torch.tensor([[[True, False]], [[True, True]]])
    route = (torch.arange(16).view(2, 8, 1) % 3 > 0).float().expand(2, 8, 2)
    settings = RouteGradient(gradient_clamp=2.0)
    found = gradient(0.25 * keep, 0.75 * keep, route, decided, 2, settings)
    clamped = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 10.0])  # 2 · mean |g| = 2 · 40 / 8
    torch.testing.assert_close(found[0, :, 0], clamped)
    assert not found[0, :, 1].any()
    torch.testing.assert_close(found[1], 100 * clamped[:, None].expand(8, 2))
    free = gradient(keep, 2 * keep, route, decided, 2, replace(settings, gradient_clamp=0.0))
    torch.testing.assert_close(free, 3 * keep)


@pytest.mark.parametrize("clamp", [0.0, 10.0])
def test_what_is_not_decided_passes_no_gradient_on(clamp: float) -> None:
    """Not even one that is not finite, which would take the whole step with it."""
    router = Router(16, 2)
    policies = [LayerPolicy(Op.softmax), LayerPolicy(budget=(0.3, 0.0))]
    settings = RouteGradient(gradient_clamp=clamp)
    routing = route_chunks(router, torch.randn(4, 40, 16), 2, 8, layer_context(policies, 4, gradient=settings))
    upstream = torch.ones(4, 5, 2)
    upstream[0, 1, 0] = upstream[2, 1, 1] = math.inf
    (grad,) = torch.autograd.grad((routing.route, routing.skip), router.weight, (upstream, upstream))
    assert grad.isfinite().all()
    assert grad.any()


def test_a_group_that_decides_nothing_gets_a_finite_gradient() -> None:
    decided = torch.zeros(2, 1, 2, dtype=torch.bool)
    found = gradient(torch.randn(2, 4, 2), torch.randn(2, 4, 2), torch.ones(2, 4, 2), decided, 1, RouteGradient())
    assert not found.any()


@pytest.mark.parametrize("against", [0.0, 0.7], ids=["unrelated", "opposed"])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
def test_sampled_sides_are_clamped_before_they_are_scaled(rate: float, against: float) -> None:
    """In expectation over the sample the gradient is the clamped one of all sides, whose tails are heavy.

    ``against``: how far the two sides of a chunk cancel.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (8, 32, 4)
    sides = torch.randn(2, *shape, generator=generator) * torch.randn(2, *shape, generator=generator).exp()
    sides[1] = (1 - against) * sides[1] - against * sides[0]
    route = (torch.rand(shape, generator=generator) < 0.3).float()
    decided = torch.ones(8, 1, 4, dtype=torch.bool)
    settings = RouteGradient(gradient_clamp=3.0)
    exact = gradient(sides[0], sides[1], route, decided, 1, settings)
    assert (exact.abs() < sides.sum(0).abs() - 1e-4).any(), "the clamp has to do something"
    mean, draws = torch.zeros(shape), 400 if rate < 1 else 1
    for _ in range(draws):
        weight = (torch.rand(shape, generator=generator) < rate).float() / rate
        keep, skip = (
            torch.where(route > 0, sides[0], weight * sides[0]),
            torch.where(route > 0, weight * sides[1], sides[1]),
        )
        mean += gradient(keep, skip, route, decided, 1, replace(settings, counterfactual_rate=rate)) / draws
    similarity = float((mean * exact).sum() / (mean.norm() * exact.norm()))
    projection = float((mean * exact).sum() / exact.square().sum())
    assert similarity > (0.99 if against == 0 else 0.95)
    assert projection == pytest.approx(1.0, abs=0.03 if against == 0 else 0.1)


@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
def test_budgets_of_heads_are_quantiles_of_each_head(project: bool) -> None:
    margins = (torch.randn(5, 20, 4) * torch.tensor([1.0, 10, 0.1, 1])).requires_grad_()
    budgets = (0.1, 0.45, 0.0, 1.0)
    settings = RouteGradient(project_budget=project)
    rows = layer_context([LayerPolicy(budget=budgets)], 5, heads=4).policy
    theta = group_threshold(margins, 20, rows.budget[0], settings)
    assert theta.shape == (1, 1, 4)
    kept = (margins > theta).sum((0, 1)).tolist()
    assert kept == [10, 45, 0, 100]
    masked = group_threshold(margins, torch.ones(5, 20, dtype=torch.bool), rows.budget[0], settings)
    torch.testing.assert_close(masked, theta)
    one = group_threshold(margins, 20, 0.1, replace(settings, calibration=CalibrationScope.head))
    torch.testing.assert_close(theta[..., 0], one[..., 0])


@pytest.mark.parametrize("lengths", [None, (13, 1, 40, 16)], ids=["rows", "packed"])
def test_chunks_kept_before_are_counted(lengths: tuple[int, ...] | None) -> None:
    layout = Layout() if lengths is None else Layout.packed(lengths, 8)
    context = replace(layer_context([LayerPolicy(threshold=0.0)], 1), layout=layout)
    route = (torch.rand(3 if lengths is None else 1, 10, 2) < 0.5).float().requires_grad_()
    count = kept_before(route, context)
    first = 0
    for size in [10] if lengths is None else [2, 1, 5, 2]:
        for n in range(first, first + size):
            assert torch.equal(count[:, n], route[:, first:n].sum(1).long())
        first += size
    assert not count.requires_grad


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_values_of_chunks_are_spread_over_their_tokens(packed: bool) -> None:
    layout = Layout.packed((13, 1, 7), 8) if packed else Layout()
    x = torch.randn(1, 4, 2) if packed else torch.randn(2, 3, 2)
    chunks = [0] * 8 + [1] * 5 + [2] + [3] * 7 if packed else [0] * 8 + [1] * 8 + [2] * 5
    assert torch.equal(layout.spread(x, 21, 8), x[:, chunks])
