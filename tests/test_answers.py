"""Answers by length and depth: every question is counted once, in the cell of the place that its key was planted at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from natsl.answers import Answers, Cell, Grid, answers, asking, sequences_at
from natsl.data import Split, TaskData
from natsl.evaluate import count, run_batches
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, RoutingPolicy
from natsl.tasks import TASKS
from natsl.tasks.needle import Alphabet, NeedleConfig
from natsl.tasks.sequences import Batch
from tests.oracles import fill_calibration, tiny_data, tiny_model
from tests.task_helpers import make_data

GRID = Grid(Split.test, (64, 128), 4, None, 3)
POLICY = RoutingPolicy((LayerPolicy(budget=0.4),) * 2, 8)


def model() -> RoutedLM:
    made = tiny_model("rr")
    fill_calibration(made)
    return made


def measured(data: TaskData, grid: Grid = GRID) -> dict[str, Answers]:
    return {item.task: item for item in answers(model(), POLICY, data, grid, lambda cells: None)}


def known(batch: Batch, row: int) -> Iterator[tuple[int, float]]:
    """Position of each question of a sequence, and the depth of its key, found token by token."""
    tokens, asked = batch.tokens[row].tolist(), batch.recall[row].tolist()
    first = asked.index(True)
    for at, is_asked in enumerate(asked):
        if is_asked:
            yield at, tokens[:first].index(tokens[at]) / first


def right_where_shallow(monkeypatch: pytest.MonkeyPatch, below: float) -> None:
    """Answers of a model that recalls exactly what lies above a depth."""

    def changed(*arguments: Any, **options: Any) -> Iterator[Any]:
        for task, part, output in run_batches(*arguments, **options):
            right = torch.zeros_like(part.recall)
            for row in range(len(part)):
                for at, depth in known(part, row):
                    right[row, at] = depth < below
            yield task, part, replace(output, right=right)

    monkeypatch.setattr("natsl.answers.run_batches", changed)


def test_recall_is_counted_by_the_depth_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    right_where_shallow(monkeypatch, 0.5)
    found = measured(tiny_data(), replace(GRID, sequences=40))["mqar"]
    assert [cell.tokens for cell in found.cells] == [64] * 4 + [128] * 4
    assert [cell.depth for cell in found.cells[:4]] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert {cell.accuracy for cell in found.cells if cell.depth[1] <= 0.5} == {1.0}
    assert {cell.accuracy for cell in found.cells if cell.depth[0] >= 0.5} == {0.0}
    for tokens in GRID.lengths:
        batch = tiny_data().batch("mqar", Split.test, 40, 0, length=tokens)
        cells = [cell for cell in found.cells if cell.tokens == tokens]
        depths = [[depth for _, depth in known(batch, row)] for row in range(40)]
        for cell in cells:
            inside = [[depth for depth in row if cell.depth[0] <= depth < cell.depth[1]] for row in depths]
            assert cell.asked == sum(map(len, inside))
            assert cell.sequences == sum(map(bool, inside))
        assert sum(cell.asked for cell in cells) == int(batch.recall.sum())


def test_needles_are_planted_where_the_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    right_where_shallow(monkeypatch, 0.6)
    found = measured(tiny_data(tasks={"needle": 1.0}), replace(GRID, depths=5, sequences=6))["needle"]
    assert [cell.depth[0] for cell in found.cells] == [0, 0.25, 0.5, 0.75, 1] * 2
    assert all(cell.depth[0] == cell.depth[1] for cell in found.cells)
    assert {(cell.asked, cell.sequences) for cell in found.cells} == {(6, 6)}
    assert [cell.accuracy for cell in found.cells] == [1, 1, 1, 0, 0] * 2


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_all_depths_together_are_the_error_of_the_task(task: str) -> None:
    data = tiny_data(tasks={task: 1.0}, needle=NeedleConfig(needles=2))
    cells = [cell for cell in measured(data)[task].cells if cell.tokens == 128]
    depths = [cell.depth[0] for cell in cells] if TASKS[task].has_depth else [None]
    number = sequences_at(128, data.config)
    counts = [
        count(model(), POLICY, {task: data.batch(task, Split.test, number, 0, length=128, depth=depth)})[task]
        for depth in depths
    ]
    assert sum(cell.right for cell in cells) == sum(int(own.right.sum()) for own in counts)
    assert sum(cell.asked for cell in cells) == sum(int(own.asked.sum()) for own in counts)


def test_tasks_that_the_run_does_not_have_are_asked_and_marked() -> None:
    found = measured(tiny_data(tasks={"needle": 1.0}))
    assert (found["mqar"].trained, found["needle"].trained) == (False, True)
    assert (found["mqar"].planted, found["needle"].planted) == (8, 1)
    assert all(found[task].cells and not found[task].left_out for task in ("mqar", "needle"))


def test_what_cannot_be_asked_is_left_out_and_not_wrong() -> None:
    calls: list[int] = []
    data = tiny_data(tasks={"bytes": 1.0}, seq_len=44)
    grid = replace(GRID, lengths=(44, 176, 4400))
    found = {item.task: item for item in answers(model(), POLICY, data, grid, calls.append)}
    assert found["mqar"].cells == ()
    assert "multiple of data.mqar.segment = 16" in found["mqar"].left_out[44]
    assert {cell.tokens for cell in found["needle"].cells} == {44, 176}
    assert "is too short" in found["needle"].left_out[4400]
    assert sum(calls) == len(asking()) * 3 * grid.depths
    plain = json.loads(json.dumps(found["needle"].to_dict()))
    assert plain["cells"][0]["accuracy"] == plain["cells"][0]["right"] / plain["cells"][0]["asked"]
    assert Cell(44, (0.0, 0.5), 0, 0, 0).to_dict()["accuracy"] is None


def test_needles_in_bytes_have_depths() -> None:
    data = tiny_data(tasks={"needle": 1.0}, needle=NeedleConfig(needles=3, alphabet=Alphabet.bytes))
    cells = measured(data, replace(GRID, sequences=2, depths=1))["needle"].cells
    assert [(cell.depth, cell.asked) for cell in cells] == [((0.5, 0.5), 6)] * 2


@pytest.mark.parametrize("task", asking())
def test_places_are_those_of_the_key_and_its_value(task: str) -> None:
    data = make_data()
    batch = data.batch(task, Split.test, 5, 0)
    places = data.config.build(task).places(batch)
    if places is None:  # it has a depth, or says nothing
        return
    assert places.shape == batch.tokens.shape
    assert (places >= 0).equal(batch.recall)
    first = batch.recall.int().argmax(1, keepdim=True)
    assert (places < first).all()
    planted = batch.tokens.gather(1, places.clamp(min=0))
    assert planted[batch.recall].equal(batch.tokens[batch.recall])
    values = batch.tokens.gather(1, (places + 1).clamp(min=0))
    assert values[batch.recall].equal(batch.targets[batch.recall])
