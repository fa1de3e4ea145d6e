"""Controls on a tiny model: what each keeps, what it shows, and that hindsight finds the chunk that matters."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from natsl.data import Split
from natsl.evaluate import Routing, count, evaluate
from natsl.model import RoutedLM
from natsl.router import RoutePair
from natsl.search.controls import registry
from natsl.search.controls.hindsight import choose, take
from natsl.search.controls.learned import Learned, Subject, follow
from natsl.search.controls.registry import CONTROLS, ControlRunner
from natsl.search.controls.routes import half_seen, held, seen
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED, Batch
from tests.oracles import fill_calibration, tiny_data, tiny_model

POLICY = RoutingPolicy((LayerPolicy(budget=0.4), LayerPolicy(Op.softmax), LayerPolicy(threshold=0.1)), 8)


@pytest.fixture(scope="module")
def model() -> RoutedLM:
    torch.manual_seed(0)
    made = tiny_model("rrr")
    fill_calibration(made)
    return made


@pytest.fixture(scope="module")
def subject(model: RoutedLM) -> Subject:
    """Three tasks of other sizes; texts end inside a chunk."""
    sets = tiny_data(tasks={"bytes": 1.0, "mqar": 1.0, "needle": 1.0}).eval_sets(Split.test)
    sets["bytes"] = tiny_data(tasks={"bytes": 1.0}, seq_len=52).eval_sets(Split.test)["bytes"].rows(slice(0, 5))
    return Subject(model, sets, 3)


@pytest.fixture(scope="module")
def learned(subject: Subject) -> Learned:
    return follow(subject, POLICY)


def routes_of(routing: Routing, learned: Learned, task: str) -> list[Tensor]:
    """The routes of the layers that route, for all sequences of a task."""
    routes = routing(task, slice(0, len(learned.counts[task])))
    found = [route.keep if isinstance(route, RoutePair) else route for route in routes if route is not None]
    assert [route is None for route in routes] == [False, True, False]
    return found


def test_the_learned_pass_is_the_policy_itself(subject: Subject, learned: Learned) -> None:
    counts = count(subject.model, POLICY, subject.sets, batch_size=3)
    for task, own in counts.items():
        assert learned.counts[task].to_dict() == own.to_dict()
        for i, route in enumerate(learned.routes[task]):
            assert (route is None) == (i == 1)
            if route is not None:
                assert torch.equal(route.sum(1), own.kept[:, i])
    assert sum(int(own.kept[:, 0].sum()) for own in counts.values()) > 0


def test_controls_of_a_few_policies_in_any_order_follow_each_router_once(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[RoutingPolicy] = []

    def counted(subject: Subject, policy: RoutingPolicy) -> Learned:
        followed.append(policy)
        return follow(subject, policy)

    monkeypatch.setattr(registry, "follow", counted)
    runner, other = ControlRunner(subject), replace(POLICY, layers=POLICY.layers[::-1])
    for name in ("drop", "window"):
        for policy in (POLICY, other):
            runner(policy, name, 0)
    assert followed == [POLICY, other]


SAME = [name for name in CONTROLS if name != "oracle"]


@pytest.mark.parametrize("name", SAME)
def test_a_control_keeps_as_many_chunks_as_the_router(name: str, subject: Subject, learned: Learned) -> None:
    counts = ControlRunner(subject)(POLICY, name, 1)
    for task, own in learned.counts.items():
        kept, expected = counts[task].kept, own.kept
        if name != "hindsight_layer":
            assert torch.equal(kept.sum(0), expected.sum(0)), "of each layer and head"
        assert torch.equal(kept.sum((0, 2)), expected.sum((0, 2))), "of each layer"
        if name == "hindsight":
            assert torch.equal(kept, expected), "of each sequence"
        if name == "hindsight_layer":
            assert torch.equal(kept.sum(2), expected.sum(2)), "of each sequence"


@pytest.mark.parametrize("name", SAME)
def test_the_batch_size_does_not_matter(name: str, subject: Subject) -> None:
    one, other = (ControlRunner(replace(subject, batch_size=n))(POLICY, name, 1) for n in (2, 32))
    for task, counts in one.items():
        assert torch.equal(counts.kept.sum(0), other[task].kept.sum(0))
        torch.testing.assert_close(counts.nats, other[task].nats, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1, 4])
def test_shuffled_routes_are_those_of_another_sequence_of_the_task(
    shift: int, subject: Subject, learned: Learned
) -> None:
    routing = CONTROLS["shuffled"].routing(subject, learned, shift)
    for task, batch in subject.sets.items():
        original = [route for route in learned.routes[task] if route is not None]
        for moved, own in zip(routes_of(routing, learned, task), original, strict=True):
            for i in range(len(batch)):
                assert torch.equal(moved[i].bool(), own[(i + shift) % len(batch)])


def test_random_routes_differ_with_the_seed_alone(subject: Subject, learned: Learned) -> None:
    one, again, other = (CONTROLS["random_heads"].routing(subject, learned, seed) for seed in (1, 1, 2))
    for task in subject.sets:
        assert all(map(torch.equal, routes_of(one, learned, task), routes_of(again, learned, task)))
    assert any(
        not torch.equal(*pair)
        for task in subject.sets
        for pair in zip(routes_of(one, learned, task), routes_of(other, learned, task), strict=True)
    )


@pytest.mark.parametrize("sink", [False, True], ids=["window", "sink + window"])
def test_a_window_shows_as_many_chunks_as_were_kept_before(sink: bool) -> None:
    route = (torch.rand(3, 6, 2) < 0.6).float()
    mask = seen(route, sink)
    for b, c, r in itertools.product(range(3), range(6), range(2)):
        size = int(route[b, :c, r].sum())
        latest = list(range(c - size, c))
        expected = [0, *latest[1:]] if sink and size else latest
        assert mask[b, c, :, r].nonzero().flatten().tolist() == expected


def test_half_a_window_shows_the_latest_and_the_highest_margins_of_the_others() -> None:
    route, margins = (torch.rand(3, 9, 2) < 0.6).float(), torch.randn(3, 9, 2)
    mask = half_seen(route, margins)
    for b, c, r in itertools.product(range(3), range(9), range(2)):
        size = int(route[b, :c, r].sum())
        latest = list(range(c - math.ceil(size / 2), c))
        older = sorted(range(c - len(latest)), key=lambda n: -float(margins[b, n, r]))
        assert mask[b, c, :, r].nonzero().flatten().tolist() == sorted(latest + older[: size - len(latest)])


def test_half_a_window_by_margins_that_rise_is_a_window() -> None:
    route = (torch.rand(3, 9, 2) < 0.6).float()
    margins = torch.arange(9.0)[None, :, None].expand(3, 9, 2)
    assert torch.equal(half_seen(route, margins), seen(route, sink=False))


def test_half_a_window_takes_the_margins_of_the_router(subject: Subject, learned: Learned) -> None:
    routing = CONTROLS["half_window"].routing(subject, learned, 0)
    for task, batch in subject.sets.items():
        found = routing(task, slice(1, 3))
        assert [isinstance(pair, RoutePair) for pair in found] == [True, False, True]
        for pair, route, margins in zip(found, learned.routes[task], learned.margins[task], strict=True):
            assert (pair is None) == (route is None) == (margins is None)
            if isinstance(pair, RoutePair) and route is not None and margins is not None:
                assert pair.visible is not None
                assert torch.equal(pair.visible, half_seen(route[1:3].float(), margins[1:3]))
                assert torch.equal(pair.keep.bool(), route[1:3])
                assert not pair.skip.any()
                complete = batch.tokens.shape[1] // 8
                kept, left = margins[:, :complete], margins[:, :complete]
                kept = kept.masked_fill(~route[:, :complete], math.inf)
                left = left.masked_fill(route[:, :complete], -math.inf)
                assert (kept.amin((0, 1)) >= left.amax((0, 1))).all()


def test_a_memory_of_fixed_size_lets_the_lowest_score_go_for_good() -> None:
    size, score = torch.tensor([[0, 1], [2, 3], [4, 9]]), torch.randn(3, 9, 2)
    latest = (size + 1) // 2
    mask = held(size, latest, score)
    for b, r in itertools.product(range(3), range(2)):
        now: list[int] = []
        for c in range(9):
            assert mask[b, c, :, r].nonzero().flatten().tolist() == now
            now.append(c)
            if len(now) > size[b, r]:
                older = now[: len(now) - int(latest[b, r])]
                now.remove(min(older, key=lambda n: float(score[b, n, r])))


def test_a_memory_of_the_latest_alone_is_a_window() -> None:
    size = torch.tensor([[0, 1], [2, 3], [4, 9]])
    age = torch.arange(9)[:, None] - torch.arange(9)
    expected = (age[None, :, :, None] >= 1) & (age[None, :, :, None] <= size[:, None, None])
    assert torch.equal(held(size, size, torch.randn(3, 9, 2)), expected)


@pytest.mark.parametrize("name", ["fixed_window", "fixed_half", "fixed_half_random"])
def test_a_memory_of_fixed_size_holds_what_the_router_keeps_in_the_end(
    name: str, subject: Subject, learned: Learned
) -> None:
    routing = CONTROLS[name].routing(subject, learned, 0)
    for task, batch in subject.sets.items():
        rows, complete = slice(0, len(batch)), batch.tokens.shape[1] // 8
        for pair, route in zip(routing(task, rows), learned.routes[task], strict=True):
            assert (pair is None) == (route is None)
            if isinstance(pair, RoutePair) and route is not None:
                assert pair.visible is not None
                assert torch.equal(pair.keep.bool(), route)
                assert not pair.skip.any()
                most = pair.visible.sum(2).amax(1)  # [B,R]
                assert (most.amax(0) - most.amin(0) <= 1).all(), "shared evenly"
                if complete < route.shape[1]:  # else no query comes after the last chunk
                    assert torch.equal(most.sum(0), route.sum((0, 1)))


@pytest.mark.parametrize("name", ["fixed_window", "fixed_half", "fixed_half_random"])
def test_which_chunks_a_memory_of_fixed_size_holds(name: str, subject: Subject, learned: Learned) -> None:
    controls = [CONTROLS[name].routing(subject, learned, draw) for draw in (0, 1)]
    drawn_again = False
    for task, batch in subject.sets.items():
        n = len(batch)
        pairs = (control(task, slice(0, n)) for control in controls)
        for route, margins, pair, other in zip(learned.routes[task], learned.margins[task], *pairs, strict=True):
            if route is None or margins is None:
                continue
            assert isinstance(pair, RoutePair)
            assert isinstance(other, RoutePair)
            assert pair.visible is not None
            assert other.visible is not None
            total = route.sum((0, 1))
            size = torch.stack([total // n + (i < total % n) for i in range(n)])
            latest = size if name == "fixed_window" else (size + 1) // 2
            if name == "fixed_half_random":
                drawn_again = drawn_again or not torch.equal(pair.visible, other.visible)
                age = torch.arange(route.shape[1])[:, None] - torch.arange(route.shape[1])
                near = (age[None, :, :, None] >= 1) & (age[None, :, :, None] <= latest[:, None, None])
                assert pair.visible[near].all()
            else:
                assert torch.equal(pair.visible, held(size, latest, margins))
    assert drawn_again == (name == "fixed_half_random")


def test_random_older_chunks_are_as_many(subject: Subject, learned: Learned) -> None:
    names = "fixed_half_random", "fixed_half_random", "fixed_half"
    routings = [CONTROLS[name].routing(subject, learned, 0) for name in names]
    differ = False
    for task in subject.sets:
        for own, again, other in zip(*(routing(task, slice(0, 3)) for routing in routings), strict=True):
            if isinstance(own, RoutePair) and isinstance(again, RoutePair) and isinstance(other, RoutePair):
                assert own.visible is not None
                assert again.visible is not None
                assert other.visible is not None
                assert torch.equal(own.visible, again.visible)
                assert torch.equal(own.visible.sum(2), other.visible.sum(2))
                differ = differ or not torch.equal(own.visible, other.visible)
    assert differ


def test_a_window_of_everything_is_softmax_with_a_full_state(subject: Subject) -> None:
    batch = subject.sets["mqar"]
    keep = torch.ones(len(batch), 8, 2)
    everything = RoutePair(keep, torch.zeros_like(keep))
    policy = RoutingPolicy((LayerPolicy(budget=0.5),) * 3, 8)
    for sink in (False, True):
        visible = everything._replace(visible=seen(keep, sink))
        logits = [subject.model(batch.tokens, policy, routes=[pair] * 3).logits for pair in (everything, visible)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "skip"), [("drop", 1.0), ("keep_and_write", 0.0)])
def test_what_the_state_gets(name: str, skip: float, subject: Subject, learned: Learned) -> None:
    routing = CONTROLS[name].routing(subject, learned, 0)
    for pair, route in zip(routing("mqar", slice(0, 8)), learned.routes["mqar"], strict=True):
        assert (pair is None) == (route is None)
        if route is not None:
            assert isinstance(pair, RoutePair)
            assert torch.equal(pair.keep, route.float())
            assert (pair.skip == skip).all()


def test_the_oracle_keeps_the_chunks_with_answers_where_the_router_keeps_any(
    subject: Subject, learned: Learned
) -> None:
    counts = ControlRunner(subject)(POLICY, "oracle", 0)
    assert list(counts) == ["mqar", "needle"], "plain text has no answers"
    for task, own in counts.items():
        relevant = subject.sets[task].relevant_chunks(8)[:, :8].sum(1)
        for i in (0, 2):
            used = learned.counts[task].kept[:, i].sum(0) > 0
            assert torch.equal(own.kept[:, i], relevant[:, None] * used.long())


def test_hindsight_takes_the_largest_gains() -> None:
    gain = torch.tensor([[[3.0, -1.0, 5.0, 4.0], [1.0, -math.inf, 0.0, -2.0]]])
    assert take(gain, torch.tensor([[2, 3]])).tolist() == [[[0, 0, 1, 1], [1, 0, 1, 1]]]
    assert take(gain, torch.tensor([[0, 1]])).tolist() == [[[0, 0, 0, 0], [1, 0, 0, 0]]]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)], ids=["three layers", "one layer"])
@pytest.mark.parametrize("by_head", [True, False], ids=["by head", "by layer"])
def test_hindsight_gains_more_than_any_fixed_chunk(layers: tuple[int, ...], by_head: bool, model: RoutedLM) -> None:
    """On random text, with one chunk of each head to choose."""
    batch = tiny_data(tasks={"bytes": 1.0}, test_sequences=24).eval_sets(Split.test)["bytes"]
    policy = RoutingPolicy(
        tuple(LayerPolicy(budget=0.5) if i in layers else LayerPolicy(Op.delta) for i in range(3)), 8
    )

    def kept(chunk: int) -> list[Tensor | None]:
        one = torch.zeros(24, 8, 2)
        one[:, chunk] = 1
        return [one if i in layers else None for i in range(3)]

    def nats(routes: list[Tensor | None]) -> float:
        with torch.no_grad():
            return float(model(batch.tokens, policy, targets=batch.targets, routes=routes).loss.sum())

    counts = [None if route is None else route.bool() for route in kept(0)]
    assert nats(choose(model, policy, batch, counts, by_head)) < min(nats(kept(chunk)) for chunk in range(7))


def test_hindsight_answers_by_the_one_chunk_that_matters(model: RoutedLM) -> None:
    """Only the last token is scored, as an answer, and its target is what the model says with chunk 2 kept."""
    policy = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(Op.delta), LayerPolicy(budget=0.5)), 8)
    tokens = torch.randint(97, 123, (16, 64), generator=torch.Generator().manual_seed(1))
    best = torch.zeros(16, 8, 2)
    best[:, 2] = 1
    with torch.no_grad():
        logits = model(tokens, policy, routes=[None, None, best]).logits
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1] = logits[:, -1].argmax(-1)
    recall = targets != IGNORED
    batch = Batch(tokens, targets, recall)
    chosen = choose(model, policy, batch, [None, None, best.bool()], by_head=True)
    losses = []
    for routes in (chosen, *([None, None, best.roll(n, 1)] for n in range(1, 5))):
        with torch.no_grad():
            output = model(tokens, policy, targets=targets, routes=routes)
        losses.append(float(output.loss.sum()))
    assert losses[0] < min(losses[1:])


def test_a_policy_that_routes_nothing_has_controls_too(subject: Subject) -> None:
    policy = RoutingPolicy((LayerPolicy(Op.softmax), LayerPolicy(Op.delta), LayerPolicy(Op.softmax)), 8)
    runner, expected = ControlRunner(subject), evaluate(subject.model, policy, subject.sets, batch_size=3)
    for name in ("shuffled", "random_heads", "hindsight"):
        counts = runner(policy, name, 1)
        errors = {task: 1 - float(own.right.sum() / own.asked.sum()) for task, own in counts.items() if own.asked.any()}
        assert errors["mqar"] == pytest.approx(expected.errors["recall_error"])
