"""A whole search that something cut off: the same command goes on, and the result is that of a straight run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.counts import Counts
from natsl.errors import UserError
from natsl.evaluate import Evaluation, count, evaluate
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.search import judge, pipeline, rungs
from natsl.search.controls.registry import ControlRunner
from natsl.search.front import Front
from natsl.search.pipeline import run_search
from natsl.space.policy import RoutingPolicy
from natsl.tasks.sequences import Batch
from tests.test_pipeline import interrupt, results, tiny

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.mark.parametrize("at", [5, 14], ids=["in a trial", "while testing"])
def test_the_same_command_goes_on_after_the_memory_was_full(
    at: int, straight: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, at, torch.OutOfMemoryError("CUDA out of memory"))
    run = Run.open("first", tmp_path)
    if at == 5:  # the next trials are made, and the report tells of this one
        front = run_search(tiny(tmp_path, text))
        assert front is not None
        assert "1 of them by a fault of the machine: the same command tries them again" in front.facts["problems"]
        assert len(front.history) == 6
    else:
        with pytest.raises(UserError, match=r"cut off by a fault of the machine \(OutOfMemoryError: CUDA"):
            run_search(tiny(tmp_path, text))
    monkeypatch.undo()
    assert run_search(tiny(tmp_path, text)) is not None
    assert results(run) == straight
    assert run_search(tiny(tmp_path, text)) is None


@pytest.mark.parametrize("at", [3, 8, 9, 14, 20], ids=lambda at: f"interrupted at {at}")
def test_nothing_is_evaluated_twice(
    at: int, straight: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trials, test scores, baselines and controls only the evaluation that was cut off is made again."""
    calls: list[tuple[object, ...]] = []
    cut_off: list[tuple[object, ...]] = []

    def note(policy: RoutingPolicy, sets: dict[str, Batch], routing: object) -> None:
        (sequences, *_) = [batch.tokens.sum().item() for batch in sets.values()]
        calls.append((policy.digest(), sequences, routing))
        if len(calls) == at and not cut_off:
            cut_off.append(calls.pop())
            raise KeyboardInterrupt

    def evaluated(model: RoutedLM, policy: RoutingPolicy, sets: dict[str, Batch], **named: Any) -> Evaluation:
        note(policy, sets, named.get("random_routing"))
        return evaluate(model, policy, sets, **named)

    def counted(model: RoutedLM, policy: RoutingPolicy, sets: dict[str, Batch], **named: Any) -> dict[str, Counts]:
        note(policy, sets, None)
        return count(model, policy, sets, **named)

    monkeypatch.setattr(judge, "evaluate", evaluated)
    monkeypatch.setattr(rungs, "count", counted)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text))
    assert run_search(tiny(tmp_path, text)) is not None
    assert calls.count(cut_off[0]) == 1
    again = {call for call in calls if calls.count(call) > 1}  # the first part of what was cut off in a later one
    assert len(again) <= 1
    assert {call[0] for call in again} <= {cut_off[0][0]}
    assert len(set(calls)) > 20
    assert results(Run.open("first", tmp_path, create=False)) == straight


def test_a_search_cut_off_while_its_report_is_written_scores_nothing_again(
    straight: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "front_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text))
    monkeypatch.undo()
    for function in ("evaluate", "count"):
        monkeypatch.setattr(judge, function, interrupted)
    assert run_search(tiny(tmp_path, text)) is not None
    assert results(Run.open("first", tmp_path, create=False)) == straight


OF_TEXT: dict[str, Any] = {"objectives": ["val_loss", "kept_fraction"], "n_trials": 9}


@pytest.fixture(scope="module")
def straight_of_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> Front:
    """The front of a search with controls that nothing cut off."""
    front = run_search(tiny(tmp_path_factory.mktemp("straight"), text, **OF_TEXT))
    assert front is not None
    return front


@pytest.mark.parametrize("at", [1, 4, 9, 11], ids=lambda at: f"interrupted at {at}")
def test_no_control_is_evaluated_twice(
    at: int, straight_of_text: Front, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, int]] = []
    cut_off: list[tuple[str, str, int]] = []
    plain = ControlRunner.__call__

    def counted(self: ControlRunner, policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
        calls.append((policy.digest(), name, draw))
        if len(calls) == at and not cut_off:
            cut_off.append(calls.pop())
            raise KeyboardInterrupt
        return plain(self, policy, name, draw)

    monkeypatch.setattr(ControlRunner, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text, **OF_TEXT))
    front = run_search(tiny(tmp_path, text, **OF_TEXT))
    assert front is not None
    assert calls.count(cut_off[0]) == 1
    assert len(calls) == len(set(calls)) >= 11
    assert len(front.comparisons) > 0
    assert straight_of_text.comparisons == front.comparisons
    assert straight_of_text.facts["evaluations"] == front.facts["evaluations"]
