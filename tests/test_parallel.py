"""Data parallelism: plain DDP around the model computes the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from natsl.config import RouteGradient
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import tiny_model

KINDS = "rsdr"
GRADIENT = RouteGradient(gradient_clamp=0.0)  # the clamp's bound is a mean over the batch, and each rank has its own


def make_policy(model: RoutedLM, name: str) -> RoutingPolicy:
    if name == "softmax":
        return RoutingPolicy.all_softmax(model.kinds, 8)
    if name == "delta":
        return RoutingPolicy.all_delta(model.kinds, 8)
    return RoutingPolicy.fill(model.kinds, 8, LayerPolicy(threshold=0.05))


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(384, (4, 45), generator=generator)
    targets = torch.roll(tokens, -1, 1)
    targets[:, ::5] = -100  # as many on every rank
    return tokens, targets


def make_model() -> RoutedLM:
    torch.manual_seed(3)
    return tiny_model(KINDS).double().train()


def backward(model: torch.nn.Module, policy: RoutingPolicy, tokens: Tensor, targets: Tensor) -> None:
    loss = model(tokens, policy, targets=targets, route_gradient=GRADIENT).loss
    (loss.sum() / (targets >= 0).sum()).backward()


def worker(rank: int, folder: str, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model()
    parallel = DistributedDataParallel(model)
    tokens, targets = (x[2 * rank : 2 * rank + 2] for x in make_batch())
    for name in names:  # a second step fails if a parameter of the first had no gradient
        model.zero_grad()
        backward(parallel, make_policy(model, name), tokens, targets)
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save(gradients, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    names = ["delta", "softmax", "threshold"]
    spawn(worker, (str(tmp_path), names), nprocs=2)
    model, (tokens, targets) = make_model(), make_batch()
    unused = {}
    for name in names:
        model.zero_grad()
        backward(model, make_policy(model, name), tokens, targets)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            for gradients in ranks:
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=0, atol=1e-12)
        unused[name] = {key for key, gradient in ranks[0].items() if not gradient.any()}
    assert {"blocks.0.mixer.router.weight", "blocks.3.mixer.softmax_norm"} <= unused["delta"]
    assert unused["softmax"] == {"blocks.0.mixer.router.weight", "blocks.3.mixer.router.weight"}
    assert unused["threshold"] == set()


ROUTER, MIX = "router.weight", {"mix_proj.weight", "mix_proj.bias", "mix_bias"}
UNUSED = {  # by the layer's policy: what has no influence on the loss
    "delta": (LayerPolicy(Op.delta), {"q_norm.weight", "k_norm.weight", "softmax_norm", ROUTER, *MIX}),
    "softmax": (LayerPolicy(Op.softmax), {ROUTER}),
    "threshold": (LayerPolicy(threshold=0.0), set()),
}


@pytest.mark.parametrize(("layer", "unused"), UNUSED.values(), ids=UNUSED)
def test_unused_parameters_get_zeros_as_gradients(layer: LayerPolicy, unused: set[str]) -> None:
    model = tiny_model("r")
    model(make_batch()[0], RoutingPolicy((layer,), 8), route_gradient=GRADIENT).logits.square().sum().backward()
    gradients = {name.removeprefix("blocks.0.mixer."): p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.any()) == (name not in unused), name
