"""The sandwich: how policies are drawn, what they are scored by, and where gradients flow."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from natsl import supernet
from natsl.config import RouteGradient, Sandwich, SupernetConfig
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.supernet import (
    losses_of,
    random_head_policy,
    random_policy,
    sandwich_backward,
    sandwich_policies,
    seed_of,
    split_budget,
    task_loss,
)
from natsl.tasks.sequences import IGNORED, Batch
from tests.oracles import assert_near, tiny_config, tiny_data, tiny_model

KINDS = [Op.routed, Op.delta, Op.routed, Op.softmax, Op.routed]


def budgets_of(policy: RoutingPolicy, kinds: list[Op]) -> list[float]:
    """Budgets of the layers that have a router; one made delta-only keeps nothing."""
    return [p.mean_budget() or 0.0 for p, kind in zip(policy.layers, kinds, strict=True) if kind is Op.routed]


# Drawing policies


def test_split_budget_keeps_the_mean_and_the_bound() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        n = rng.choice([1, 2, 3, 7])
        shares = [rng.choice([rng.expovariate(1), 0.0, 10 ** rng.uniform(-30, 3)]) for _ in range(n)]
        total = rng.choice([0.0, 1.0, rng.random(), rng.random()])
        budgets = split_budget(total, shares)
        assert all(0 <= b <= 1 for b in budgets)
        assert abs(sum(budgets) / n - total) < 1e-12
        order = sorted(range(n), key=lambda i: shares[i])
        assert all(budgets[a] <= budgets[b] + 1e-12 for a, b in pairwise(order))


def test_split_budget_is_proportional_below_the_bound() -> None:
    assert split_budget(0.25, [1, 3]) == pytest.approx([0.125, 0.375])
    assert split_budget(0.75, [1, 9, 0]) == pytest.approx([1.0, 1.0, 0.25])


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.6), (0.0, 1.0), (0.3, 0.3)])
def test_total_budget_of_random_policies_is_uniform(low: float, high: float) -> None:
    rng = random.Random(0)
    totals, firsts, ops = [], [], []
    for _ in range(3000):
        policy = random_policy(KINDS, 8, low, high, rng)
        policy.check(KINDS, 8)
        budgets = budgets_of(policy, KINDS)
        totals.append(sum(budgets) / 3)
        firsts.append(budgets[0])
        ops += [p.op for p, kind in zip(policy.layers, KINDS, strict=True) if kind is Op.routed]
    assert all(low - 1e-12 <= total <= high + 1e-12 for total in totals)
    if high > low:
        totals.sort()
        # Kolmogorov–Smirnov: 1.63 / √n is passed by chance once in a hundred; 2 / √n hardly ever
        distance = max(abs((i + 0.5) / 3000 - (t - low) / (high - low)) for i, t in enumerate(totals))
        assert distance < 2 / math.sqrt(3000)
    assert torch.tensor(firsts).std() > 0.2, "the split over layers is random too"
    assert 0.05 < sum(op is Op.delta for op in ops) / len(ops) < 0.26, "some layers are delta-only"
    assert Op.softmax not in ops


def test_a_single_routed_layer_carries_the_whole_budget() -> None:
    rng = random.Random(0)
    totals = [budgets_of(random_policy([Op.routed], 8, 0.2, 0.4, rng), [Op.routed])[0] for _ in range(200)]
    assert min(totals) >= 0.2
    assert max(totals) <= 0.4
    assert random_policy([Op.delta, Op.softmax], 8, 0.2, 0.4, rng).describe() == "D S"


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.6), (0.0, 1.0), (0.3, 0.3)])
def test_random_budgets_of_heads(low: float, high: float) -> None:
    """Their total is uniform; heads that keep nothing, also all of a layer, heads that keep all, and tiny budgets."""
    rng, heads = random.Random(0), 4
    totals, layers = [], list[tuple[float, ...]]()
    for _ in range(2000):
        policy = random_head_policy(KINDS, heads, 8, low, high, rng)
        policy.check(KINDS, 8, heads)
        drawn = [p.budget for p, kind in zip(policy.layers, KINDS, strict=True) if kind is Op.routed]
        layers += [b for b in drawn if isinstance(b, tuple)]
        totals.append(sum(map(sum, layers[-3:])) / (3 * heads))
    assert len(layers) == 6000
    budgets = [b for layer in layers for b in layer]
    assert all(low - 1e-12 <= total <= high + 1e-12 for total in totals)
    if high > low:
        totals.sort()
        assert abs(totals[500] - (low + (high - low) / 4)) < 0.05
        assert abs(totals[1500] - (low + 3 * (high - low) / 4)) < 0.05
        assert sum(0 < b < 0.01 for b in budgets) / len(budgets) > 0.01
    assert 0.1 < sum(b == 0 for b in budgets) / len(budgets) < 0.5
    assert 0.002 < sum(not any(layer) for layer in layers) / len(layers) < 0.2
    assert sum(b > 1 - 1e-9 for b in budgets) / len(budgets) > 0.01


def test_some_policies_of_a_step_have_budgets_of_heads() -> None:
    model, config = RoutedLM(tiny_config()), SupernetConfig()
    drawn = [p for step in range(300) for p in sandwich_policies(model, config, 0, step)[2:]]
    share = sum(any(layer.heads() for layer in p.layers) for p in drawn) / len(drawn)
    assert abs(share - supernet.HEAD_SHARE) < 0.06
    annealed = replace(config, anneal_steps=1000)
    early = [p for step in range(50) for p in sandwich_policies(model, annealed, 0, step)[2:]]
    totals = [sum(layer.mean_budget() or 0.0 for layer in p.layers) / 3 for p in early]
    assert min(totals) > 0.5, "small budgets come later, of layers and of heads"


def test_the_smallest_policy_is_delta_or_routed_with_nothing_kept() -> None:
    model = RoutedLM(tiny_config("rdr"))
    smallest = [sandwich_policies(model, SupernetConfig(), 0, step)[1].describe() for step in range(200)]
    assert set(smallest) == {"D D D", "0 D 0"}
    assert abs(smallest.count("0 D 0") / 200 - supernet.EMPTY_STEPS) < 0.1
    assert [supernet.smallest_is_empty(0, step) for step in range(200)] == [text == "0 D 0" for text in smallest]


def test_policies_of_a_step_follow_from_seed_and_step() -> None:
    model, config = RoutedLM(tiny_config()), SupernetConfig()
    torch.manual_seed(1)
    random.seed(1)
    first = sandwich_policies(model, config, 3, 5)
    random.seed(2)
    assert sandwich_policies(model, config, 3, 5) == first
    assert first[0].describe() == "S S S"
    assert first[1].describe() == ("0 0 0" if supernet.smallest_is_empty(3, 5) else "D D D")
    assert len(first) == 8
    seen = {sandwich_policies(model, config, seed, step)[2].digest() for seed in range(3) for step in range(20)}
    assert len(seen) == 60
    assert first[2] != first[3]


def test_seed_of_is_the_same_everywhere() -> None:
    assert seed_of("sandwich", 0, 1) == seed_of("sandwich", 0, 1) != seed_of("sandwich", 1, 0)
    assert seed_of("a", 1) == 4294491576641134471
    assert 0 <= seed_of("x") < 2**63


def test_dense_steps_train_the_largest_policy_alone() -> None:
    model, config = RoutedLM(tiny_config("rdr")), SupernetConfig(dense_steps=3)
    for step in range(3):
        assert [p.describe() for p in sandwich_policies(model, config, 0, step)] == ["S D S"]
    assert len(sandwich_policies(model, config, 0, 3)) == 8


def test_a_model_without_routed_layers_has_one_policy() -> None:
    model = RoutedLM(tiny_config("ds"))
    assert [p.describe() for p in sandwich_policies(model, SupernetConfig(), 0, 0)] == ["D S"]


def test_annealing_widens_the_range_downwards() -> None:
    model = RoutedLM(tiny_config())
    config = SupernetConfig(budget_min=0.1, budget_max=0.9, anneal_steps=10, dense_steps=2, random_policies=200)
    for step, low in [(2, 0.9), (7, 0.5), (12, 0.1), (50, 0.1)]:
        drawn = sandwich_policies(model, config, 0, step)[2:]
        for by_head in (False, True):
            chosen = [p for p in drawn if any(layer.heads() for layer in p.layers) is by_head]
            totals = [sum(budgets_of(p, model.kinds)) / 3 for p in chosen]
            least = 0.0 if by_head and step >= 12 else low
            assert all(least - 1e-9 <= total <= 0.9 + 1e-9 for total in totals)
            assert min(totals) < least + 0.1


# Loss


def test_loss_is_text_plus_recall() -> None:
    logits = torch.randn(2, 4, 5)
    targets = torch.tensor([[1, IGNORED, 2, 3], [IGNORED, 0, 4, 1]])
    recall = torch.tensor([[False, False, True, True], [False, False, False, True]])
    logits[0, 2, 2] = logits[1, 3, 1] = 9.0
    logits[0, 3, 3] = -9.0
    loss = task_loss(*losses_of(logits, targets), Batch(torch.zeros_like(targets), targets, recall))
    ce = -logits.log_softmax(-1)
    text = (ce[0, 0, 1] + ce[1, 1, 0] + ce[1, 2, 4]) / 3
    asked = (ce[0, 2, 2] + ce[0, 3, 3] + ce[1, 3, 1]) / 3
    torch.testing.assert_close(loss.total, text + asked)
    assert float(loss.text) == pytest.approx(float(text))
    assert float(loss.recall) == pytest.approx(float(asked))
    assert float(loss.accuracy) == pytest.approx(2 / 3)
    plain = task_loss(*losses_of(logits, targets), Batch(torch.zeros_like(targets), targets, torch.zeros_like(recall)))
    assert math.isnan(plain.recall)
    assert math.isnan(plain.accuracy)
    assert float(plain.total) == float(plain.text)
    nothing = torch.full_like(targets, IGNORED)
    empty = task_loss(*losses_of(logits, nothing), Batch(nothing, nothing, torch.zeros_like(recall)))
    assert float(empty.total) == 0
    assert math.isnan(empty.text)


# Gradients of a step


def gradients(model: RoutedLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_near(a[name], b[name], torch.float32)


def sandwich() -> list[RoutingPolicy]:
    one, two = LayerPolicy(budget=0.3), LayerPolicy(budget=0.6)
    layers = [[LayerPolicy(Op.softmax)] * 2, [LayerPolicy(Op.delta)] * 2, [one, two], [two, LayerPolicy(Op.delta)]]
    return [RoutingPolicy(tuple(pair), 8) for pair in layers]


def test_groups_give_every_policy_its_own_slice() -> None:
    model, batch = tiny_model("rr"), tiny_data().train_batch(8, 0, 0)
    config, policies = SupernetConfig(route_noise=0.0), sandwich()
    losses = sandwich_backward(model, batch, policies, config)
    whole = gradients(model)
    for i, policy in enumerate(policies):
        rows = batch.rows(slice(2 * i, 2 * i + 2))
        loss = task_loss(
            *losses_of(model(rows.tokens, policy, route_gradient=config.route_gradient()).logits, rows.targets), rows
        )
        assert float(loss.total.detach()) == pytest.approx(float(losses[i].total.detach()), abs=1e-5)
        (loss.total / 4).backward()
    assert_same(whole, gradients(model))


@pytest.mark.parametrize("distill", [0.0, 0.7])
def test_accumulate_gives_every_policy_the_whole_batch(distill: float) -> None:
    model, batch = tiny_model("rr"), tiny_data().train_batch(4, 0, 0)
    config = SupernetConfig(sandwich=Sandwich.accumulate, distill=distill, route_noise=0.0)
    policies = sandwich()
    losses = sandwich_backward(model, batch, policies, config)
    whole = gradients(model)
    scored = batch.targets != IGNORED
    with torch.no_grad():
        teacher = model(batch.tokens, policies[0], route_gradient=config.route_gradient()).logits[scored].softmax(-1)
    for i, policy in enumerate(policies):
        logits = model(batch.tokens, policy, route_gradient=config.route_gradient()).logits
        loss = task_loss(*losses_of(logits, batch.targets), batch)
        assert float(losses[i].text) == pytest.approx(float(loss.text))
        assert float(losses[i].accuracy) == float(loss.accuracy)
        divergence = (teacher * (teacher.log() - logits[scored].log_softmax(-1))).sum(-1).mean()
        ((loss.total + (distill * divergence if i > 0 else 0)) / 4).backward()
    assert_same(whole, gradients(model))


def test_distillation_teaches_the_students_alone() -> None:
    """With the largest policy alone there is nobody to teach: distillation changes nothing."""
    model, batch = tiny_model("rr"), tiny_data().train_batch(4, 0, 0)
    found = []
    for distill in (0.0, 5.0):
        config = SupernetConfig(sandwich=Sandwich.accumulate, distill=distill, route_noise=0.0)
        sandwich_backward(model, batch, sandwich()[:1], config)
        found.append(gradients(model))
    assert_same(*found)


def test_router_gradient_of_a_step_is_orthogonal_to_shifting_a_groups_margins() -> None:
    model, batch = tiny_model("rr"), tiny_data().train_batch(8, 0, 0)
    x = batch.tokens[:, :61]  # an incomplete chunk at the end
    output = model(x, sandwich(), route_gradient=RouteGradient(gradient_clamp=0.0))
    margins = [layer.margins for layer in output.layers]
    grads = torch.autograd.grad(F.cross_entropy(output.logits.flatten(0, 1), x.flatten()), margins)
    for layer, grad in enumerate(grads):
        by_group = grad.view(4, 2, 8, 2)
        for group, policy in enumerate(sandwich()):
            if policy.layers[layer].op is Op.routed:
                size = by_group[group].abs().sum()
                assert size > 0
                assert by_group[group].sum().abs() < 1e-5 * size
            else:
                assert not by_group[group].any()
        assert not grad[:, -1].any()
