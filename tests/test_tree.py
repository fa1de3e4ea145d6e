"""Many policies for the same sequences: each gets what it gets by itself, and common first layers are computed once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from natsl.config import RouteGradient
from natsl.data import Split
from natsl.evaluate import count, count_each
from natsl.layout import Layout
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import fill_calibration, tiny_model
from tests.task_helpers import make_data

D, S = LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
A, B = LayerPolicy(budget=0.3), LayerPolicy(budget=(0.6, 0.0), mix_temperature=2.0)
CAPPED = LayerPolicy(budget=0.6, cap=0.2, burst=1)


def policies(chunk_size: int = 8) -> list[RoutingPolicy]:
    layers = [(D, D, A), (A, D, S), (A, D, A), (D, D, D), (A, D, CAPPED), (S, D, B), (D, D, B)]
    return [RoutingPolicy(item, chunk_size) for item in layers]


def calibrated(**options: Any) -> RoutedLM:
    model = tiny_model("rdr", **options)
    fill_calibration(model)
    return model.eval()


def test_each_policy_gets_what_it_gets_by_itself() -> None:
    model, chosen = calibrated(), policies()
    tokens = torch.randint(0, model.config.vocab_size, (3, 29), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    with torch.no_grad():
        output = model(tokens, model.compile_tree(chosen, 3), targets=targets, logits_to_keep=29)
        assert output.logits.shape == (21, 29, model.config.vocab_size)
        for i, policy in enumerate(chosen):
            rows = slice(3 * i, 3 * i + 3)
            alone = model(tokens, policy, targets=targets, logits_to_keep=29)
            torch.testing.assert_close(output.logits[rows], alone.logits)
            torch.testing.assert_close(output.loss[rows], alone.loss)
            for ours, theirs in zip(output.layers, alone.layers, strict=True):
                assert torch.equal(ours.route[rows], theirs.route)
                assert torch.equal(ours.skip[rows], theirs.skip)
                if theirs.margins is not None:
                    torch.testing.assert_close(ours.margins[rows], theirs.margins)


def test_common_first_layers_are_computed_once() -> None:
    model = calibrated()
    rows: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with torch.no_grad():
        model(tokens, model.compile_tree(policies(), 2))
        model(tokens, model.compile_tree(policies()[3:4], 2))
    assert rows == [2 * 3, 2 * 3, 2 * 7, 2, 2, 2]  # three first layers, then three pairs, then seven policies


def test_what_a_tree_does_not_go_with() -> None:
    model, tokens = calibrated(), torch.zeros(2, 16, dtype=torch.long)
    tree = model.compile_tree(policies(), 2)
    with pytest.raises(ValueError, match="for 2 sequences, not 3"):
        model(tokens[:1].expand(3, -1), tree)
    with pytest.raises(ValueError, match="another model"):
        calibrated(heads=4)(tokens, tree)
    for options in (
        {"cache": model.new_cache(2)},
        {"layout": Layout.padded(torch.ones(2, 16, dtype=torch.bool))},
        {"routes": [None, None, torch.ones(2, 2, 2)]},
        {"route_gradient": RouteGradient()},
    ):
        with pytest.raises(ValueError, match="a tree of policies goes with neither"):
            model(tokens, tree, **options)
    with pytest.raises(ValueError, match="of which only 7 differ"):
        model.compile_tree([*policies(), policies()[0]], 2)
    with pytest.raises(ValueError, match="not calibrated"):
        tiny_model("rdr").compile_tree(policies(), 2)


@pytest.mark.parametrize("batch_size", [4, 16, 64], ids="{} rows".format)
def test_counts_of_many_policies_are_those_of_each(batch_size: int) -> None:
    data = make_data(tasks={"mqar": 1.0, "bytes": 1.0}, seq_len=96, search_sequences=5)
    model = calibrated(vocab_size=384)
    sets, chosen = data.eval_sets(Split.search), policies()
    for policy, several in zip(chosen, count_each(model, chosen, sets, batch_size=batch_size), strict=True):
        assert several is not None
        for task, alone in count(model, policy, sets).items():
            for name in ("tokens", "right", "asked", "kept"):
                assert torch.equal(getattr(several[task], name), getattr(alone, name)), name
            torch.testing.assert_close(several[task].nats, alone.nats)
            assert several[task].chunks == alone.chunks


def test_a_policy_that_is_not_finite_spoils_no_other() -> None:
    model, chosen = calibrated(vocab_size=384), policies()
    with torch.no_grad():  # only softmax reads it
        dict(model.named_parameters())["blocks.0.mixer.softmax_norm"].fill_(math.nan)
    sets = make_data(seq_len=96, search_sequences=2).eval_sets(Split.search)
    results = count_each(model, chosen, sets)
    assert [item is None for item in results] == [policy.layers[0].op is not Op.delta for policy in chosen]
