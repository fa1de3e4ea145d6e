"""Where the sequences of a call are: padding, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.config import Precision, RouteGradient
from natsl.kernels import dispatch
from natsl.layout import Layout
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import TOLERANCE, fill_calibration, tiny_model

LENGTHS = (13, 1, 8, 40, 7, 17, 16, 9)  # in chunks of 8
BUDGET, CAPPED = LayerPolicy(budget=0.4), LayerPolicy(threshold=-0.5, cap=0.5, mix_temperature=2.0)
D, S = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
POLICIES = [
    RoutingPolicy(layers, 8)
    for layers in (
        (BUDGET, S, D, BUDGET),
        (D, S, D, CAPPED),
        (S, S, D, LayerPolicy(threshold=(0.1, -0.1))),
        (LayerPolicy(budget=(0.0, 0.5)), S, D, D),
    )
]


def double(kinds: str = "rsdr", **options: Any) -> RoutedLM:
    model = tiny_model(kinds, **options)
    fill_calibration(model)
    return model.double()


def documents(model: RoutedLM) -> list[Tensor]:
    return [torch.randint(model.config.vocab_size, (1, length)) for length in LENGTHS]


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("count", [1, 4], ids=["one-policy", "policies"])
def test_packed_documents_equal_each_alone(count: int, rope: bool) -> None:
    model = double(rope=rope, conv_width=4)
    texts, policies = documents(model), POLICIES[:count]
    with torch.no_grad():
        packed = model(torch.cat(texts, 1), policies, layout=Layout.packed(LENGTHS, 8))
        logits = packed.logits.split(LENGTHS, 1)
        chunks = [-(-length // 8) for length in LENGTHS]
        for i, text in enumerate(texts):
            alone = model(text, policies[i * count // len(texts)])
            torch.testing.assert_close(logits[i], alone.logits, rtol=0, atol=1e-10)
            for one, other in zip(packed.layers, alone.layers, strict=True):
                assert torch.equal(one.route.split(chunks, 1)[i], other.route)
                if one.margins is not None:
                    torch.testing.assert_close(one.margins.split(chunks, 1)[i], other.margins, rtol=0, atol=1e-10)


def test_nothing_leaks_between_packed_documents() -> None:
    model = double()
    texts = documents(model)
    layout = Layout.packed(LENGTHS, 8)
    before = model(torch.cat(texts, 1), POLICIES[0], layout=layout).logits.split(LENGTHS, 1)
    texts[3] = (texts[3] + 1) % model.config.vocab_size
    after = model(torch.cat(texts, 1), POLICIES[0], layout=layout).logits.split(LENGTHS, 1)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != 3 for i in range(len(LENGTHS))]


@pytest.mark.parametrize("clamp", [0.0, 3.0], ids=["free", "clamped"])
def test_packed_documents_train_as_rows_do(clamp: float) -> None:
    """Gradients of packed documents of one length are those of the same documents as rows, budgets and all."""
    model = double()
    gradient = RouteGradient(gradient_clamp=clamp)
    x = torch.randint(model.config.vocab_size, (4, 45))
    targets = torch.randint(model.config.vocab_size, (4, 45))
    found = []
    for packed in (False, True):
        model.zero_grad()
        shape, layout = ((1, -1), Layout.packed([45] * 4, 8)) if packed else ((4, 45), None)
        output = model(x.view(shape), POLICIES, targets=targets.view(shape), layout=layout, route_gradient=gradient)
        output.loss.mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clamp", [0.0, 1.0], ids=["free", "clamped"])
def test_padded_and_packed_sequences_train_as_each_alone(clamp: float) -> None:
    """Losses and all gradients, where each has a policy of its own, whose budget is a quantile of it."""
    model, lengths = double(), (33, 7, 16, 20)
    gradient = RouteGradient(gradient_clamp=clamp)
    x, targets = (torch.randint(model.config.vocab_size, (4, 40)) for _ in range(2))
    mask = torch.zeros(4, 40, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 3 * row : 3 * row + length] = True
    weight = torch.rand(4, 40).double()
    found: list[tuple[Tensor, list[Tensor]]] = []

    def collect(losses: list[Tensor]) -> None:
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((torch.cat(losses).detach(), gradients))
        model.zero_grad()

    alone = []
    for row, policy in enumerate(POLICIES):
        own = mask[row]
        loss = model(x[row : row + 1, own], policy, targets=targets[row : row + 1, own], route_gradient=gradient).loss
        (loss[0] * weight[row, own]).sum().backward()
        alone.append(loss[0])
    collect(alone)
    output = model(x, POLICIES, targets=targets, layout=Layout.padded(mask), route_gradient=gradient)
    (output.loss * weight)[mask].sum().backward()
    collect([output.loss[mask]])
    layout = Layout.packed(lengths, 8)
    output = model(x[mask][None], POLICIES, targets=targets[mask][None], layout=layout, route_gradient=gradient)
    (output.loss[0] * weight[mask]).sum().backward()
    collect([output.loss[0]])
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=0, atol=1e-10)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_logits_of_the_last_tokens(kind: str) -> None:
    model = double()
    x = torch.randint(model.config.vocab_size, (2, 30) if kind != "packed" else (1, 47))
    layouts = {
        "whole": None,
        "padded": Layout.padded(torch.arange(30) >= torch.tensor([[0], [13]])),
        "packed": Layout.packed([30, 17], 8),
    }
    logits = model(x, POLICIES[0], layout=layouts[kind]).logits
    rows = logits[0].split((30, 17)) if kind == "packed" else logits
    last = model(x, POLICIES[0], layout=layouts[kind], logits_to_keep=3)
    torch.testing.assert_close(last.logits, torch.stack([row[-3:] for row in rows]), rtol=0, atol=1e-12)
    scored = model(x, POLICIES[0], layout=layouts[kind], targets=x, logits_to_keep=1)
    assert scored.loss.shape == x.shape
    torch.testing.assert_close(scored.logits, last.logits[:, -1:], rtol=0, atol=1e-12)
    nothing = model(x, POLICIES[0], layout=layouts[kind], logits_to_keep=0)
    assert nothing.logits is nothing.loss is None
    assert len(nothing.layers) == 4


def run(layout: Layout | None, **options: Any) -> Any:
    return double()(torch.zeros(1, 9).long(), POLICIES[0], layout=layout, **options)


REFUSED = {
    "none": (lambda: Layout.packed([], 8), "at least one entry"),
    "empty": (lambda: Layout.packed([3, 0], 8), "each an integer ≥ 1"),
    "fraction": (lambda: Layout.packed([3.0], 8), "each an integer ≥ 1"),  # type: ignore[list-item]
    "chunk": (lambda: Layout.packed([3], 0), "chunk_size = 0 must be ≥ 1"),
    "lengths": (lambda: run(Layout(torch.tensor([3, 4]))), "layout has lengths \\(2,\\), but tokens are \\(1, 9\\)"),
    "read": (lambda: run(Layout(read=torch.tensor([3]))), "layout.read is set from a cache"),
    "targets": (lambda: run(None, targets=torch.zeros(1, 8).long()), "targets must be int64 \\(1, 9\\)"),
    "kind": (lambda: run(None, targets=torch.zeros(1, 9).int()), "targets must be int64 \\(1, 9\\)"),
    "too many": (lambda: run(None, logits_to_keep=10), "logits_to_keep = 10 must lie in \\[0, 9\\]"),
    "negative": (lambda: run(None, logits_to_keep=-1), "logits_to_keep = -1 must lie in"),
    "mask": (lambda: Layout.padded(torch.ones(4, dtype=torch.bool)), "mask must be"),
    "additive mask": (lambda: Layout.padded(torch.zeros(2, 4)), "mask must be boolean or integer"),
    "chunks": (
        lambda: double()(torch.zeros(1, 9).long(), POLICIES[0], layout=Layout.packed([9], 4)),
        "chunks of 4 tok",
    ),
    "tokens": (lambda: run(Layout.packed([8], 8)), "packs 8 tokens"),
    "split": (lambda: double()(torch.zeros(1, 9).long(), POLICIES[:2], layout=Layout.packed([9], 8)), "batch of 1"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_layouts_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("precision", Precision, ids=lambda p: p.value)
def test_packed_documents_on_the_kernels(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU or in Triton's interpreter, with the same routes: each document's logits, and the gradients of all."""
    on_gpu = torch.cuda.is_available()
    if precision is Precision.bfloat16 and not on_gpu:
        pytest.skip("needs a GPU: the interpreter has no products in bfloat16")
    device = "cuda" if on_gpu else "cpu"
    monkeypatch.setattr(dispatch, "resolve", lambda given, op, device: "triton" if given == "auto" else given)
    shape = {"chunk_size": 16, "key_dim": 32, "value_dim": 32, "softmax_per_head": 2, "rope": True}
    model = tiny_model("rs", precision, **shape).to(device)
    policy = RoutingPolicy((LayerPolicy(threshold=0.0), S), 16)
    lengths = [17, 1, 32]
    chunks = [-(-length // 16) for length in lengths]
    texts = [torch.randint(384, (1, length), device=device) for length in lengths]
    route = (torch.rand(1, sum(chunks), 2, device=device) < 0.5).float()

    def scored(text: Tensor, route: Tensor, layout: Layout | None) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        output = model(text, policy, targets=text, layout=layout, routes=[route, None], logits_to_keep=1)
        output.loss.sum().backward()
        return output.logits, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    layout = Layout.packed(lengths, 16, device)
    packed, gradients = scored(torch.cat(texts, 1), route, layout)
    bound = TOLERANCE[torch.bfloat16 if precision is Precision.bfloat16 else torch.float32] * 8
    parts = [scored(text, part, None) for text, part in zip(texts, route.split(chunks, 1), strict=True)]
    for i, (alone, _) in enumerate(parts):
        torch.testing.assert_close(packed[i], alone[0], rtol=0, atol=bound)
    for i, gradient in enumerate(gradients):
        expected = torch.stack([single[i] for _, single in parts]).sum(0)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=bound * max(1.0, float(expected.abs().max())))


def test_padding_is_not_scored() -> None:
    model, x = double(), torch.randint(384, (2, 20))
    mask = torch.arange(20) >= torch.tensor([[0], [7]])
    loss = model(x, POLICIES[0], targets=x, layout=Layout.padded(mask)).loss
    assert torch.equal(loss != 0, mask)
