"""Tokens taken back: the cache is then as if only those before them had been read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.cache import Cache
from natsl.kernels.pages import KeyPages
from natsl.kernels.segment import touched_chunks
from natsl.layout import Layout
from natsl.model import RoutedLM
from natsl.router import RoutePair
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import tiny_model
from tests.test_cache import LAYERS, POLICIES, C, double, near

T = 12 * C


def text(rows: int = 6) -> Tensor:
    return torch.randint(384, (rows, T), generator=torch.Generator().manual_seed(2))


def read(model: RoutedLM, cache: Cache, x: Tensor, policy: Any, until: Sequence[int], **options: Any) -> Tensor:
    """Go on with ``x`` until row b has ``until[b]`` tokens; logits, with padding on the right."""
    before = cache.lengths.tolist()
    sizes = [last - first for first, last in zip(before, until, strict=True)]
    tokens = torch.zeros(len(x), max(sizes), dtype=torch.int64)
    for b, (first, size) in enumerate(zip(before, sizes, strict=True)):
        tokens[b, :size] = x[b, first : first + size]
    logits: Tensor = model(tokens, policy, layout=Layout(torch.tensor(sizes)), cache=cache, **options).logits
    return logits


def same_state(a: Cache, b: Cache) -> None:
    assert a.lengths.tolist() == b.lengths.tolist()
    start = a.lengths % C
    every = range(len(start))
    for one, two in zip(a.select(every).layers, b.select(every).layers, strict=True):  # pages in the same order
        tensors, others = one.tensors(), two.tensors()
        for name in ("pages.keys", "pages.values"):
            if one.pages is not None:
                open_page = one.pages.table.gather(2, one.pages.kept[..., None])[..., 0]
                for x in (tensors[name], others[name]):
                    for row, pages in enumerate(open_page):
                        x[pages, :, start[row] :] = 0.0  # nobody reads what is there
                    x[0] = 0.0
        for name, x in tensors.items():
            if name != "pages.table":  # as wide as it has become
                near(x, others[name])


def check_crop(
    model: RoutedLM,
    policies: Sequence[RoutingPolicy],
    calls: Sequence[Sequence[int]],
    wanted: Sequence[int],
    base: Sequence[int],
) -> Cache:
    """Read up to ``base``, record, read on in ``calls``, take tokens back; the state and what follows are right."""
    x = text(len(base))
    cache, fresh = model.new_cache(len(base)), model.new_cache(len(base))
    if any(base):
        read(model, cache, x, policies, base)
    cache.record()
    for until in calls:
        read(model, cache, x, policies, until)
    cache.crop(wanted, model)
    if any(wanted):
        read(model, fresh, x, policies, wanted)
    same_state(cache, fresh)
    other = torch.randint(384, (len(base), T), generator=torch.Generator().manual_seed(3))
    for more in (1, C + 3, 1):
        until = [n + more for n in cache.lengths.tolist()]
        near(read(model, cache, other, policies, until), read(model, fresh, other, policies, until))
    same_state(cache, fresh)
    return cache


@pytest.mark.parametrize("wanted", range(C + 2, 3 * C + 3))
def test_every_length_around_borders(wanted: int) -> None:
    last = 3 * C + 2
    check_crop(double(), POLICIES, [[2 * C + 1] * 6, [2 * C + 2] * 6, [last] * 6], [wanted] * 6, [C + 2] * 6)


@pytest.mark.parametrize("base", [0, 1, C - 1, C, C + 1])
def test_rows_of_different_lengths(base: int) -> None:
    rows = [base, base + 1, base + C - 1, base, base + 2 * C, base + 5]
    calls = [[n + more for n, more in zip(rows, added, strict=True)] for added in ([0, 1, 9, 2, 8, 20], [30] * 6)]
    for wanted in (rows, [n + 30 for n in rows], [n + m for n, m in zip(rows, (0, 30, 9, 11, 29, 1), strict=True)]):
        check_crop(double(), POLICIES, calls, wanted, rows)


@pytest.mark.parametrize(("kinds", "name"), [("d", "delta"), ("s", "softmax"), *(("r", name) for name in LAYERS)])
def test_every_op_in_every_kind_of_layer(kinds: str, name: str) -> None:
    model = double(kinds, conv_width=1 if kinds == "s" else 4, softmax_per_head=2)
    singles = [[n, n] for n in range(C - 3, 3 * C)]
    for wanted in ([C - 3, 2 * C], [C, 3 * C - 1], [2 * C - 1, C + 1]):
        check_crop(model, [RoutingPolicy((LAYERS[name],), C)], singles, wanted, [C - 4, C - 4])


def test_crops_one_after_another() -> None:
    """With as many drafted and taken back as in speculative decoding, and pages that grow meanwhile."""
    model, x = double(), text()
    cache, fresh = model.new_cache(6), model.new_cache(6)
    read(model, cache, x, POLICIES, [3] * 6)
    cache.record()
    noise = torch.randint(384, (6, T))
    for step in range(5):
        now = cache.lengths.tolist()
        mixed = torch.where(torch.arange(T) < torch.tensor(now)[:, None] + 4, x, noise)
        read(model, cache, mixed, POLICIES, [n + 7 for n in now])
        cache.crop([n + (row + step) % 5 for row, n in enumerate(now)], model)
    read(model, fresh, x, POLICIES, cache.lengths.tolist())
    same_state(cache, fresh)


def test_complete_chunks_keep_their_routes_under_whatever_policy_made_them() -> None:
    model, x = double(), text(2)
    layers = [LayerPolicy(budget=0.3, mix_temperature=3.0), LayerPolicy(budget=0.9), LayerPolicy(budget=0.0)]
    policies = [
        RoutingPolicy((layer, LayerPolicy(Op.softmax), LayerPolicy(Op.delta), other), C)
        for layer, other in zip(layers, layers[::-1], strict=True)
    ]
    for wanted in ([5, 41], [17, 23], [24, 25], [40, 16]):
        cache, fresh = model.new_cache(2), model.new_cache(2)
        cache.record()
        for policy, until in zip([*policies, policies[0]], (11, 22, 33, 41), strict=True):
            read(model, cache, x, policy, [until] * 2)
            if until - 11 < max(wanted):
                read(model, fresh, x, policy, [min(until, n) for n in wanted])
        cache.crop(wanted, model)
        same_state(cache, fresh)


def test_fixed_routes_are_kept() -> None:
    """For both memories apart, where no router would make the same again."""
    model, x, n = double("r"), text(2), 3 * C + 2
    keep, skip = (torch.randint(2, (2, touched_chunks(n, C), 2)).double() for _ in range(2))
    policy = RoutingPolicy((LayerPolicy(budget=0.4),), C)
    cache = model.new_cache(2)
    cache.record()
    read(model, cache, x, policy, [n, n], routes=[RoutePair(keep, skip)])
    read(model, cache, x, policy, [n + 4, n + 4])
    cache.crop([n - 1, 2 * C], model)
    fresh = model.new_cache(2)
    N = touched_chunks(n - 1, C)
    read(model, fresh, x, policy, [n - 1, 2 * C], routes=[RoutePair(keep[:, :N], skip[:, :N])])
    same_state(cache, fresh)


def test_padding_on_the_left_and_single_precision() -> None:
    model, x = tiny_model("rsdr"), text(2)
    policy = RoutingPolicy(tuple(LayerPolicy(op) for op in (Op.delta, Op.softmax, Op.delta, Op.softmax)), C)
    cache, mask = model.new_cache(2), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    cache.record()
    model(torch.where(mask, x[:, :20], 0), policy, layout=Layout.padded(mask), cache=cache)
    cache.crop([9, 11], model)
    fresh = model.new_cache(2)
    read(model, fresh, torch.stack((x[0].roll(-7), x[1])), policy, [9, 11])
    torch.testing.assert_close(
        read(model, cache, x, policy, [12, 14]), read(model, fresh, x, policy, [12, 14]), rtol=1e-5, atol=1e-5
    )


def test_what_is_recorded_survives_what_single_steps_write_in_place() -> None:
    model, x = double(), text()
    cache = model.new_cache(6)
    read(model, cache, x, POLICIES, [C + 3] * 6)
    fresh = copy.deepcopy(cache)
    cache.record()
    for layer in cache.layers:
        for name, tensor in layer.tensors().items():
            if name != "pages.table":
                tensor.zero_()
    cache.lengths += 1
    cache.crop([C + 3] * 6, model)
    for layer, other in zip(cache.layers, fresh.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert name in ("pages.keys", "pages.values") or torch.equal(tensor, other.tensors()[name]), name


def test_a_crop_in_inference_mode_goes_on_outside() -> None:
    model, x = double(), text()
    cache, fresh = model.new_cache(6), model.new_cache(6)
    with torch.inference_mode():
        cache.record()
        read(model, cache, x, POLICIES, [20] * 6)
        cache.crop([13] * 6, model)
    read(model, fresh, x, POLICIES, [13] * 6)
    near(read(model, cache, x, POLICIES, [19] * 6), read(model, fresh, x, POLICIES, [19] * 6))


def test_a_copy_goes_its_own_way() -> None:
    model, x = double(), text()
    cache = model.new_cache(6)
    cache.record()
    read(model, cache, x, POLICIES, [20] * 6)
    copied, chosen = copy.deepcopy(cache), cache.select(range(6))
    assert chosen.recording is None
    cache.crop([9] * 6, model)
    assert copied.lengths.tolist() == [20] * 6
    copied.crop([11] * 6, model)
    fresh = model.new_cache(6)
    read(model, fresh, x, POLICIES, [11] * 6)
    same_state(copied, fresh)


def test_a_cache_that_does_not_record_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = double(), double().new_cache(6)
    assert cache.recording is None
    monkeypatch.setattr("natsl.cache.Recording", None)
    read(model, cache, text(), POLICIES, [20] * 6)
    assert cache.recording is None


def test_steps_that_are_not_recorded_are_refused() -> None:
    cache = double().new_cache(6)
    cache.record()
    with pytest.raises(ValueError, match="the cache records, which single steps do not"), cache.advancing(None):
        pass
    cache.recording = None
    with cache.advancing(None):
        pass


def test_what_cannot_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = double(), text()
    cache = model.new_cache(6)
    read(model, cache, x, POLICIES, [10] * 6)
    with pytest.raises(ValueError, match=r"nothing to go back to: call record\(\) before"):
        cache.crop([9] * 6, model)
    cache.record()
    read(model, cache, x, POLICIES, [20] * 6)
    for lengths, message in (
        ([12] * 5 + [9], r"lengths\[5\] = 9 is not allowed: it must lie in 10–20, from what was read when record"),
        ([21] + [12] * 5, r"lengths\[0\] = 21 is not allowed: it must lie in 10–20"),
        ([12] * 5, r"the cache holds 6 sequences, but lengths = \[12, 12, 12, 12, 12\]"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            cache.crop(lengths, model)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="of a model of another shape"):
        cache.crop([12] * 6, double(width=24))
    cache.unread = [7] * 6
    cache.crop([12] * 6, model)  # it is still good
    assert cache.unread == [None] * 6
    with pytest.raises(ValueError, match=r"lengths\[0\] = 11 is not allowed: it must lie in 12–12"):
        cache.crop([11] * 6, model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    read(model, cache, x, POLICIES, [20] * 6)
    monkeypatch.setattr(model.blocks[2], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.crop([13] * 6, model)
    for call in (cache.record, lambda: cache.crop([13] * 6, model)):
        with pytest.raises(ValueError, match="the cache is unusable"):
            call()


def test_calls_under_one_policy_are_read_again_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = double(), text()
    cache = model.new_cache(6)
    cache.record()
    passes = []

    def counted(self: RoutedLM, tokens: Tensor, *args: Any, **options: Any) -> Any:
        passes.append(tokens.shape[1])
        return forward(self, tokens, *args, **options)

    forward = RoutedLM.forward
    for t in range(1, 2 * C):
        policy = RoutingPolicy(POLICIES[0].layers, C)  # equal, not the same
        read(model, cache, x, policy, [t] * 6)
    monkeypatch.setattr(RoutedLM, "forward", counted)
    cache.crop([2 * C - 3] * 6, model)
    assert passes == [2 * C - 3]


def test_taking_back_frees_pages() -> None:
    model, x = double("s"), text(1)
    cache, policy = model.new_cache(1), RoutingPolicy((LayerPolicy(Op.softmax),), C)
    cache.record()
    for _ in range(40):
        read(model, cache, x, policy, [3 * C])
        cache.crop([0], model)
    pages = cache.layers[0].pages
    assert isinstance(pages, KeyPages)
    assert pages.kept.tolist() == [[0, 0]]
    assert pages.keys.shape[0] <= (1 + 2 * 4 + 2) * 5 // 4
