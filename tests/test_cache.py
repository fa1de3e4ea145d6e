"""The cache: a sequence read in pieces is the sequence read at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.cache import Cache
from natsl.config import Precision, RouteGradient
from natsl.kernels.pages import NULL, KeyPages
from natsl.kernels.segment import touched_chunks
from natsl.layout import Layout
from natsl.model import RoutedLM
from natsl.router import Router
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import TOLERANCE, assert_near, fill_calibration, tiny_model

C = 8
D, S = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
CAPPED = LayerPolicy(threshold=-0.5, cap=0.4, burst=1, mix_temperature=2.0)
POLICIES = [  # for layers of kinds r, s, d, r
    RoutingPolicy((first, S, D, last), C)
    for first, last in (
        (LayerPolicy(budget=0.4), LayerPolicy(budget=0.4)),
        (D, CAPPED),
        (S, LayerPolicy(threshold=(0.1, -0.1))),
        (LayerPolicy(budget=(0.0, 0.5)), D),
        (CAPPED, LayerPolicy(budget=0.0)),
        (LayerPolicy(budget=(0.5, 1.0), cap=0.3), S),
    )
]


def double(kinds: str = "rsdr", **options: Any) -> RoutedLM:
    torch.manual_seed(0)
    model = tiny_model(kinds, **{"rope": True, "router_norm": True, **options})
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.mean.normal_()
        router.variance.uniform_(0.5, 2.0)
    fill_calibration(model)
    return model.double()


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def complete(layers: Sequence[Any], read: Tensor, lengths: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(layer, row, chunk, route [R]) of every chunk that a call completed."""
    for i, layer in enumerate(layers):
        for b, (before, new) in enumerate(zip(read.tolist(), lengths.tolist(), strict=True)):
            for n in range(before // C, (before + new) // C):
                yield i, b, n, layer.route[b, n - before // C]


def read_pieces(
    model: RoutedLM, x: Tensor, policy: Any, pieces: Sequence[Sequence[int]], cache: Cache
) -> tuple[list[Tensor], dict[tuple[int, int, int], Tensor]]:
    """Logits of each row and the routes of all complete chunks; ``pieces``: how many tokens of each row a call has."""
    logits: list[list[Tensor]] = [[] for _ in x]
    routes = {}
    for sizes in pieces:
        read, lengths = cache.lengths, torch.tensor(sizes)
        T = max(sizes)
        tokens = torch.zeros(len(x), T, dtype=torch.int64)
        mask = torch.zeros(len(x), T, dtype=torch.bool)
        for b, size in enumerate(sizes):
            start = int(read[b])
            tokens[b, T - size :] = x[b, start : start + size]  # padding on the left
            mask[b, T - size :] = True
        layout = None if min(sizes) == T else Layout.padded(mask)
        output = model(tokens, policy, layout=layout, cache=cache)
        for b, size in enumerate(sizes):
            logits[b].append(output.logits[b, T - size :])
        routes.update({(i, b, n): route for i, b, n, route in complete(output.layers, read, lengths)})
    return [torch.cat(row) for row in logits], routes


def check_one_shot(
    model: RoutedLM, x: Tensor, policies: Sequence[RoutingPolicy], pieces: Sequence[Sequence[int]]
) -> Cache:
    """Read ``x`` in pieces and compare logits and routes with those of each row alone, read at once."""
    cache = model.new_cache(len(x))
    logits, routes = read_pieces(model, x, policies, pieces, cache)
    for b, row in enumerate(logits):
        alone = model(x[b : b + 1, : len(row)], policies[b * len(policies) // len(x)])
        near(row, alone.logits[0])
        for (i, row_index, n), route in routes.items():
            if row_index == b:
                assert torch.equal(route, alone.layers[i].route[0, n]), (i, b, n)
    assert cache.lengths.tolist() == [len(row) for row in logits]
    assert {n for _, _, n in routes} == set(range(int(cache.lengths.max()) // C))
    return cache


@pytest.mark.parametrize("n", [1, 2, C - 1, C, C + 1, 2 * C - 1, 2 * C, 2 * C + 1, 3 * C])
def test_prefill_and_single_tokens_equal_one_shot(n: int) -> None:
    model, T = double(), 4 * C + 3
    x = torch.randint(384, (6, T))
    check_one_shot(model, x, POLICIES, [[n] * 6] + [[1] * 6] * (T - n))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_sizes_and_rows_of_any_lengths_equal_one_shot(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, x = double(), torch.randint(384, (6, 100))
    pieces = []
    for most in (3 * C, C, 2, 1, 2 * C + 3, 1, 1, C + 1):
        sizes = torch.randint(most + 1, (6,), generator=generator)
        sizes[int(torch.randint(6, (1,), generator=generator))] = most  # others may have none
        pieces.append(sizes.tolist())
    check_one_shot(model, x, POLICIES, pieces)


LAYERS = {"delta": D, "softmax": S, "budget": LayerPolicy(budget=0.4), "cap": CAPPED}


@pytest.mark.parametrize(("kinds", "name"), [("d", "delta"), ("s", "softmax"), *(("r", name) for name in LAYERS)])
def test_every_op_in_every_kind_of_layer(kinds: str, name: str) -> None:
    model = double(kinds, conv_width=1 if kinds == "s" else 4, softmax_per_head=2, key_dim=8, value_dim=12)
    x = torch.randint(384, (2, 45))
    check_one_shot(model, x, [RoutingPolicy((LAYERS[name],), C)], [[11, 11], [1, 1], [20, 3], [1, 1], [12, 5]])


def test_the_state_does_not_depend_on_the_pieces() -> None:
    model, x = double(), torch.randint(384, (6, 37))
    caches = [
        check_one_shot(model, x, POLICIES, pieces)
        for pieces in ([[37] * 6], [[19] * 6, [18] * 6], [[8] * 6] * 4 + [[1] * 6] * 5)
    ]
    first = caches[0]
    for other in caches[1:]:
        for a, b in zip(first.layers, other.layers, strict=True):
            near(a.tail, b.tail)
            if a.total is not None and b.total is not None:
                near(a.total, b.total)
            if a.delta is not None and b.delta is not None:
                for one, two in zip(a.delta, b.delta, strict=True):
                    near(one, two)
            if a.pages is not None and b.pages is not None:
                assert torch.equal(a.pages.kept, b.pages.kept)
                for row in range(6):
                    for head, kept in enumerate(a.pages.kept[row].tolist()):
                        places = [pages.table[row, head, : kept + 1] for pages in (a.pages, b.pages)]
                        for one, two in zip(a.pages[:2], b.pages[:2], strict=True):
                            one, two = one[places[0]].flatten(0, 1), two[places[1]].flatten(0, 1)
                            near(one[: kept * C + 37 % C], two[: kept * C + 37 % C])


def test_a_new_policy_decides_the_chunks_that_are_completed_later() -> None:
    model, x = double(), torch.randint(384, (2, 70))
    layers = [LayerPolicy(budget=0.3), LayerPolicy(budget=0.7), LayerPolicy(budget=0.0), LayerPolicy(budget=1.0)]
    cache, logits = model.new_cache(2), []
    routes: dict[tuple[int, int, int], Tensor] = {}
    for first, size in ((0, 21), (1, 1), (2, 20), (3, 20), (0, 8)):
        policy = RoutingPolicy((layers[first], S, D, layers[first - 1]), C)
        row, new = read_pieces(model, x, policy, [[size, size]], cache)
        logits.append(torch.stack(row))
        routes |= new
    fixed: list[Tensor | None] = [None] * 4
    for i in (0, 3):
        fixed[i] = torch.zeros(2, 9, 2)
        for (layer, b, n), route in routes.items():
            if layer == i:
                fixed[i][b, n] = route  # type: ignore[index]
    near(torch.cat(logits, 1), model(x, POLICIES[0], routes=fixed).logits)


def test_pages_are_what_the_policy_keeps() -> None:
    """Of each head by itself, however long the text; a page for every head and a fourth more are in stock at most."""
    model, x = double("r"), torch.randint(384, (1, 400))
    for layer, kept in (
        (LayerPolicy(threshold=-9.0, cap=0.1, burst=1), [6, 6]),
        (LayerPolicy(budget=0.0), [0, 0]),
        (LayerPolicy(budget=(0.0, 1.0)), [0, 50]),
    ):
        cache = model.new_cache(1)
        for first, last in [(0, 150), *[(t, t + 1) for t in range(150, 400)]]:
            model(x[:, first:last], RoutingPolicy((layer,), C), cache=cache, logits_to_keep=0)
        pages = cache.layers[0].pages
        assert pages is not None
        assert pages.kept.tolist() == [kept]
        used = 1 + 2 + sum(kept)
        assert used <= pages.keys.shape[0] <= (used + 2) * 5 // 4
        assert (pages.table != NULL).sum() == used - 1


def test_single_tokens_wait_for_the_device_once_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = double("r"), torch.randint(384, (1, 200))
    asked, copied = 0, 0
    grow = KeyPages.grow

    def counted(self: KeyPages, pages: int, places: int) -> KeyPages:
        nonlocal asked, copied
        grown = grow(self, pages, places)
        asked, copied = asked + 1, copied + (grown.keys is not self.keys) + (grown.table is not self.table)
        return grown

    monkeypatch.setattr(KeyPages, "grow", counted)
    cache = model.new_cache(1)
    for t in range(200):
        model(x[:, t : t + 1], RoutingPolicy((LayerPolicy(budget=1.0),), C), cache=cache, logits_to_keep=0)
    assert asked <= 200 // C + 1
    assert copied <= 20, "what grows does so by a share of itself, not for every of the 50 chunks"


@pytest.mark.parametrize("precision", Precision, ids=lambda p: p.value)
def test_pieces_in_the_precision_of_the_model(precision: Precision) -> None:
    """With the same routes, on a GPU against its kernels; keys are stored in that precision, the state in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("rsdr", precision, chunk_size=16, key_dim=32, value_dim=32, rope=True).to(device)
    policy = RoutingPolicy((LayerPolicy(threshold=0.0), S, D, LayerPolicy(threshold=0.0)), 16)
    x = torch.randint(384, (2, 90), device=device)
    routes = [(torch.rand(2, 6, 2, device=device) < 0.5).float() for _ in range(4)]
    routes[1], routes[2] = torch.ones_like(routes[1]), torch.zeros_like(routes[2])
    with torch.no_grad():
        whole = model(x, policy, routes=routes).logits
    cache, found, read = model.new_cache(2), [], 0
    for size in (21, 10, 1, 1, 33, 23, 1):
        n, N = read // 16, touched_chunks(size, 16)
        touched = [F.pad(route, (0, 0, 0, N))[:, n : n + N] for route in routes]
        found.append(model(x[:, read : read + size], policy, routes=touched, cache=cache).logits)
        read += size
    bound = 8 * TOLERANCE[whole.dtype]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=bound)
    layer = cache.layers[0]
    assert layer.pages is not None
    assert layer.delta is not None
    assert layer.pages.keys.dtype is layer.tail.dtype is whole.dtype
    assert layer.delta.border.dtype is torch.float32


def test_routes_differ_only_where_a_margin_is_near_its_threshold() -> None:
    """In half precision, in pieces and at once: within the tolerance of the dtype, of the largest margin."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("dr", Precision.bfloat16, chunk_size=16, key_dim=32, value_dim=32).to(device)
    x = torch.randint(384, (4, 1600), device=device)
    with torch.no_grad():
        margins = model(x, RoutingPolicy((D, LayerPolicy(threshold=0.0)), 16)).layers[1].margins
    assert margins is not None
    theta = float(margins.median())  # as many on either side
    policy = RoutingPolicy((D, LayerPolicy(threshold=theta)), 16)
    cache, read, parts = model.new_cache(4), 0, []
    for size in (21, 10, 1, 1, 447, 120, 1000):
        routing = model(x[:, read : read + size], policy, cache=cache).layers[1]
        closed = (read + size) // 16 - read // 16
        assert routing.margins is not None
        parts.append(torch.stack((routing.margins[:, :closed], routing.route[:, :closed])))
        read += size
    found, route = torch.cat(parts, 2)
    bound = TOLERANCE[torch.bfloat16] * float(margins.abs().max())
    assert not torch.equal(found, margins), "both ways round alike: nothing is tested"
    torch.testing.assert_close(found, margins, rtol=0, atol=bound)
    differ = route != (margins > theta).float()
    assert ((margins - theta).abs()[differ] <= bound).all()
    assert differ.float().mean() < 0.05


def test_losses_and_last_logits_from_a_cache() -> None:
    model, x = double(), torch.randint(384, (2, 30))
    targets = torch.roll(x, -1, 1)
    whole = model(x, POLICIES[0], targets=targets, logits_to_keep=2)
    cache = model.new_cache(2)
    first = model(x[:, :13], POLICIES[0], targets=targets[:, :13], cache=cache)
    second = model(x[:, 13:], POLICIES[0], targets=targets[:, 13:], logits_to_keep=2, cache=cache)
    near(torch.cat((first.loss, second.loss), 1), whole.loss)
    near(second.logits, whole.logits)
    assert not second.loss.requires_grad


def test_a_failed_call_leaves_a_cache_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = double(), torch.randint(384, (1, 9))
    cache = model.new_cache(1)
    model(x, POLICIES[0], cache=cache)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.blocks[2], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x, POLICIES[0], cache=cache)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the cache is unusable: the last call with it failed"):
        model(x, POLICIES[0], cache=cache)


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    model, x = double(), torch.randint(384, (1, 9))
    with torch.inference_mode():
        cache = model.new_cache(1)
        model(x, POLICIES[0], cache=cache)
    with torch.no_grad():
        near(
            model(x[:, :1], POLICIES[0], cache=cache).logits,
            model(torch.cat((x, x[:, :1]), 1), POLICIES[0]).logits[:, -1:],
        )


def test_caches_that_do_not_fit_are_refused() -> None:
    model, x, p = double(), torch.zeros(2, 9, dtype=torch.int64), POLICIES[0]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"cache": model.new_cache(3)}, "the cache holds 3 sequences, not 2"),
        ({"cache": double(width=24).new_cache(2)}, "the cache is of a model of another shape"),
        (
            {"cache": tiny_model("rsdr", rope=True, router_norm=True).new_cache(2)},
            "in torch.float32, but the model computes in torch.float",
        ),
        ({"cache": model.new_cache(2), "routes": [torch.zeros(2, 3, 2), *[None] * 3]}, "expected \\(2, 2, 2\\)"),
        (
            {"cache": model.new_cache(2), "route_gradient": RouteGradient()},
            "a cache is for inference: route_gradient",
        ),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            model(x, p, **options)
        if len(options) > 1:
            model(x, p, cache=options["cache"])  # it is still good
    with pytest.raises(ValueError, match="not with packed sequences"):
        model(x[:1], p, cache=model.new_cache(1), layout=Layout.packed([4, 5], C))
    with pytest.raises(ValueError, match="batch = 0 is not allowed"):
        model.new_cache(0)


WORST = LayerPolicy(threshold=-9e9, cap=0.2, burst=1)  # wants every chunk


@pytest.mark.parametrize("layer", [WORST, LayerPolicy(threshold=(math.inf, -9e9)), LayerPolicy(Op.delta)], ids=str)
def test_reserved_tensors_keep_their_shapes(layer: LayerPolicy) -> None:
    """Whatever the input keeps: as many pages as the policy allows, and no more."""
    model, tokens = tiny_model("rs"), 150
    policy = RoutingPolicy((layer, LayerPolicy(Op.softmax)), 8)
    cache, other = model.new_cache(3, policy, tokens), model.new_cache(3)
    shapes, size = [{k: x.shape for k, x in part.tensors().items()} for part in cache.layers], cache.nbytes
    x = torch.randint(384, (3, tokens))
    for a, b in ((0, 1), (1, 70), (70, 71), *((t, t + 1) for t in range(71, tokens))):
        for one in (cache, other):
            logits = model(x[:, a:b], policy, cache=one).logits
        assert [{k: x.shape for k, x in part.tensors().items()} for part in cache.layers] == shapes
    assert cache.nbytes == size
    assert_near(logits, model(x, policy).logits[:, -1:])
    pages = cache.layers[0].pages
    assert pages is not None
    kept = {WORST: [5, 5], LayerPolicy(threshold=(math.inf, -9e9)): [0, 18], LayerPolicy(Op.delta): [0, 0]}[layer]
    assert pages.kept.tolist() == [kept] * 3
    assert len(pages.keys) == 1 + 3 * (2 + sum(kept))  # the null page, the open ones and all that were kept


def test_what_ends_a_reservation() -> None:
    """More tokens than were reserved, another policy, fixed routes: pages are then taken as they are needed."""
    model, x = tiny_model("r"), torch.randint(384, (2, 60))
    capped, everything = (RoutingPolicy((layer,), 8) for layer in (WORST, LayerPolicy(threshold=-9e9)))
    routes = [torch.ones(2, 8, 2)]
    for policy, tokens, options in ((capped, 24, {}), (everything, 60, {}), (capped, 60, {"routes": routes})):
        cache, other = model.new_cache(2, capped, tokens), model.new_cache(2)
        for one in (cache, other):
            for a, b in ((0, 8), (8, 59), (59, 60)):
                given = {"routes": [routes[0][:, : (b - a + 6) // 8 + 1]]} if options else {}
                out = model(x[:, a:b], policy, cache=one, **given).logits
        pages, wanted = cache.layers[0].pages, other.layers[0].pages
        assert pages is not None
        assert wanted is not None
        assert pages.kept.tolist() == wanted.kept.tolist()
        assert len(pages.keys) >= 1 + 4 + int(pages.kept.sum())
        assert out.isfinite().all()
    with pytest.raises(ValueError, match="give both or none"):
        model.new_cache(2, max_tokens=8)
    with pytest.raises(ValueError, match="has not read anything"):
        cache.reserve(model.compile_policy(capped, 2), 60)


def test_pages_of_a_long_text_stay_below_the_bound_and_are_used_again() -> None:
    """100,000 tokens, each head wanting every chunk: never more than ceil(cap · N) + burst + 1 pages."""
    model = tiny_model("r", width=8, mlp_width=8)
    policy = RoutingPolicy((LayerPolicy(threshold=-9e9, cap=0.01, burst=2),), 8)
    cache, read, total = model.new_cache(1, policy, 100_000), 0, 100_000
    pages = cache.layers[0].pages
    assert pages is not None
    storage = pages.keys.data_ptr()
    x = torch.randint(384, (1, total))
    while read < total:
        piece = min(total - read, 4093 if read % 3 else 1)
        model(x[:, read : read + piece], policy, cache=cache, logits_to_keep=1)
        read += piece
        pages = cache.layers[0].pages
        assert pages is not None
        assert int(pages.kept.max()) <= math.ceil(0.01 * (read // 8)) + 2
        used = pages.table[0, :, : int(pages.kept.max()) + 1]
        assert len(used.unique()) == used.numel()
    assert pages.kept.tolist() == [[127, 127]]
    assert pages.keys.data_ptr() == storage
    assert len(pages.keys) == 1 + 2 * (127 + 1)
