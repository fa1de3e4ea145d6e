"""Margins, thresholds and routes of a layer, and the gradient that routes carry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from natsl.config import CalibrationScope, SupernetConfig
from natsl.router import LayerContext, Router, clamp_gradient, quantile_threshold, route_chunks, straight_through
from natsl.space.policy import LayerPolicy, Op
from tests.oracles import assert_near


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
    margins = router.margins(x, 8, None if lengths is None else torch.tensor(lengths))
    assert margins.shape == (2, 3, 3)
    assert margins.dtype is torch.float32
    for b, size in enumerate(lengths or [21, 21]):
        for n in range(-(-size // 8)):
            scores = (x[b, 8 * n : min(8 * n + 8, size)].mean(0) @ router.weight.T).view(3, 2)
            assert_near(margins[b, n], (scores[:, 1] - scores[:, 0]).float())


@pytest.mark.parametrize("routed", [True, False], ids=["router", "none"])
def test_every_group_follows_its_policy(routed: bool) -> None:
    router = Router(16, 3) if routed else None
    x = torch.randn(6, 21, 16)
    policies = [LayerPolicy(Op.softmax), LayerPolicy(Op.delta)]
    policies += [LayerPolicy(threshold=-math.inf), LayerPolicy(threshold=0.1)] if routed else [LayerPolicy(Op.softmax)]
    x = x[: 6 - 6 % len(policies)]
    routing = route_chunks(router, x, 3, 8, LayerContext(policies, None, torch.zeros(3, 17)))
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


def group_route(margins: Tensor, complete: Tensor, budget: float, training: SupernetConfig) -> Tensor:
    theta = quantile_threshold(margins, complete, budget, training)
    hard = (margins.detach() > theta.detach()).to(margins.dtype)
    return straight_through(margins, theta, hard, training.route_temperature)


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
def test_projected_gradient_has_no_part_along_a_common_shift(budget: float, scope: CalibrationScope) -> None:
    margins = torch.randn(3, 8, 2).double().requires_grad_()
    complete = torch.ones(3, 8, dtype=torch.bool)
    complete[:, -1] = complete[1, 5:] = False
    upstream = torch.randn(3, 8, 2).double() * complete[..., None]
    training = SupernetConfig(calibration=scope)
    (grad,) = torch.autograd.grad((group_route(margins, complete, budget, training) * upstream).sum(), margins)
    (free,) = torch.autograd.grad(
        (
            group_route(margins, complete, budget, SupernetConfig(calibration=scope, project_budget=False)) * upstream
        ).sum(),
        margins,
    )
    over = (0, 1, 2) if scope is CalibrationScope.layer else (0, 1)
    assert grad.sum(over).abs().max() < 1e-9
    assert free.sum(over).abs().max() > 1e-3
    theta = quantile_threshold(margins.detach(), complete, budget, training)
    y = torch.sigmoid((margins.detach() - theta) / 0.5)
    slope = y * (1 - y)
    assert_near(free, slope / 0.5 * upstream)
    weight = slope * complete[..., None]
    weight = weight / weight.sum(over, keepdim=True)
    torch.testing.assert_close(grad, free - weight * free.sum(over, keepdim=True), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
def test_training_threshold_keeps_the_budget_exactly(project: bool, scope: CalibrationScope) -> None:
    training = SupernetConfig(calibration=scope, project_budget=project)
    complete = torch.ones(5, 20, dtype=torch.bool)
    for case in range(50):
        margins = (torch.randn(5, 20, 2) * 10 ** (case % 5 - 2)).requires_grad_()
        budget = (case + 0.5) / 51
        route = group_route(margins, complete, budget, training)
        pool = 200 if scope is CalibrationScope.layer else 100
        kept = route.detach().sum() if scope is CalibrationScope.layer else route.detach().sum((0, 1))
        # the quantile lies between two of M margins: M − 1 − floor((1 − budget)(M − 1)) of them are above
        assert (kept == pool - 1 - math.floor((1 - budget) * (pool - 1))).all()


@pytest.mark.parametrize("scope", CalibrationScope, ids=lambda s: s.value)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
def test_chunks_known_on_the_host_and_a_mask_give_the_same_threshold(project: bool, scope: CalibrationScope) -> None:
    training = SupernetConfig(calibration=scope, project_budget=project)
    margins = torch.randn(3, 8, 2).double().requires_grad_()
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, :6] = True
    picked = margins.detach()[mask].view(-1, 1 if scope is CalibrationScope.layer else 2)
    found = []
    for complete in (6, mask):
        theta = quantile_threshold(margins, complete, 0.3, training)
        assert_near(theta[0, 0].detach(), torch.quantile(picked, 0.7, dim=0))
        weights = torch.linspace(1, 2, theta.numel()).double().view_as(theta)
        found.append(torch.autograd.grad((theta * weights).sum(), margins)[0] if project else theta.detach())
    assert_near(found[0], found[1])
    assert not project or not found[0][:, 6:].any()


def test_extreme_budgets_and_incomplete_groups_have_infinite_thresholds() -> None:
    margins, none = torch.randn(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool)
    training = SupernetConfig()
    assert (quantile_threshold(margins, ~none, 0.0, training) == math.inf).all()
    assert (quantile_threshold(margins, ~none, 1.0, training) == -math.inf).all()
    assert (quantile_threshold(margins, none, 0.5, training) == -math.inf).all()
    assert (quantile_threshold(margins, 0, 0.5, training) == -math.inf).all()


def test_clamp() -> None:
    x = torch.zeros(8, requires_grad=True)
    route = x * 1
    clamp_gradient(route, 2.0)
    upstream = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 33.0])
    (grad,) = torch.autograd.grad((route * upstream).sum(), x)
    assert grad.tolist() == [1, -1, 1, -1, 1, -1, 1, 10.0]  # 2 · mean |g| = 2 · 40 / 8
