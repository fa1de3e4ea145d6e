"""Answers of a model by the length of the sequence and by depth: how far down the text what is asked for is planted.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natsl.data import Split, TaskData
from natsl.evaluate import run_batches
from natsl.model import RoutedLM
from natsl.space.policy import RoutingPolicy
from natsl.tasks import TASKS, DataConfig
from natsl.tasks.sequences import Batch
from natsl.tasks.task import Task

FEWEST = 4  # sequences of a task at any length, unless the test split has fewer


def sequences_at(tokens: int, data: DataConfig) -> int:
    """How many test sequences of a task there are at a length: about as many tokens in all at every length."""
    return max(min(FEWEST, data.test_sequences), data.test_sequences * data.seq_len // tokens)


@dataclass(frozen=True)
class Grid:
    """What is asked at which lengths, ascending, in tokens, and at how many depths.

    ``sequences``: of each length, and of each depth of tasks that plant at one (None: ``sequences_at``).
    ``batch_size``: sequences of a pass at ``data.seq_len``; of longer ones there are fewer in a pass.
    """

    split: Split
    lengths: tuple[int, ...]
    depths: int
    sequences: int | None
    batch_size: int

    def count(self, tokens: int, data: DataConfig) -> int:
        """Sequences of a length."""
        return sequences_at(tokens, data) if self.sequences is None else self.sequences

    def spans(self, planted: bool) -> list[tuple[float, float]]:
        """From and to of every depth: places between the ends of the text that are ``planted`` at, or equal parts."""
        n = self.depths
        if planted:
            return [(0.5, 0.5)] if n == 1 else [(i / (n - 1), i / (n - 1)) for i in range(n)]
        return [(i / n, (i + 1) / n) for i in range(n)]


@dataclass(frozen=True)
class Cell:
    """Answers at one length and depth: ``right`` of those ``asked`` in so many ``sequences``.

    ``depth``: from and to, as shares of the tokens before the questions; equal where everything was planted there.
    """

    tokens: int
    depth: tuple[float, float]
    right: int
    asked: int
    sequences: int

    @property
    def accuracy(self) -> float | None:
        """Share of right answers (None: nothing was asked)."""
        return self.right / self.asked if self.asked else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**vars(self), "accuracy": self.accuracy}


@dataclass(frozen=True)
class Answers:
    """Answers to the questions of one task.

    ``trained``: whether it is a task of the run. ``planted``: pairs or needles in a sequence, at every length as many.
    ``cells``: by length, then by depth. ``left_out``: length → why nothing was asked there.
    """

    task: str
    trained: bool
    planted: int
    cells: tuple[Cell, ...]
    left_out: Mapping[int, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "trained": self.trained,
            "planted": self.planted,
            "cells": [cell.to_dict() for cell in self.cells],
            "left_out": dict(self.left_out),
        }


def answers(
    model: RoutedLM, policy: RoutingPolicy, data: TaskData, grid: Grid, on_cells: Callable[[int], object]
) -> list[Answers]:
    """The answers to every task that asks for something, whether the run has it or not.

    ``on_cells`` is called with the number of cells that were measured or left out since the last time.
    """
    return [_answers(model, policy, data, grid, task, on_cells) for task in asking()]


def asking() -> list[str]:
    """The tasks that ask for something."""
    return [name for name, kind in TASKS.items() if kind.metric is not None]


def _answers(
    model: RoutedLM,
    policy: RoutingPolicy,
    data: TaskData,
    grid: Grid,
    task: str,
    on_cells: Callable[[int], object],
) -> Answers:
    kind, cells, left_out = data.config.build(task), [], {}
    for tokens in grid.lengths:
        try:
            found = _at(model, policy, data, grid, kind, tokens)
        except (FloatingPointError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
            left_out[tokens] = str(error).partition("\n")[0]
        else:
            cells += found
        on_cells(grid.depths)
    return Answers(task, task in data.tasks, kind.planted(data.config.seq_len)[0], tuple(cells), left_out)


def _at(model: RoutedLM, policy: RoutingPolicy, data: TaskData, grid: Grid, kind: Task[Any], tokens: int) -> list[Cell]:
    """The cells of one length; ``ValueError`` if there are no sequences of it, or no depths in them."""
    spans = grid.spans(kind.has_depth)
    rows = max(1, grid.batch_size * data.config.seq_len // tokens)
    right, asked, sequences = (torch.zeros(len(spans), dtype=torch.int64) for _ in range(3))
    for row, span in enumerate(spans) if kind.has_depth else [(None, None)]:
        depth = None if span is None else span[0]
        batch = data.batch(kind.name, grid.split, grid.count(tokens, data.config), seed=0, length=tokens, depth=depth)
        for _, part, output in run_batches(model, policy, {kind.name: batch}, batch_size=rows):
            assert output.right is not None, "the model was given targets"
            part, correct = part.to("cpu"), (output.right & part.recall).cpu()
            at = _depths(kind, part, grid.depths) if row is None else torch.full_like(part.tokens, row)
            for i in range(len(spans)):
                here = part.recall & (at == i)
                right[i] += (correct & here).sum()
                asked[i] += here.sum()
                sequences[i] += here.any(1).sum()
    numbers = zip(spans, right.tolist(), asked.tolist(), sequences.tolist(), strict=True)
    return [Cell(tokens, *item) for item in numbers]


def _depths(kind: Task[Any], batch: Batch, depths: int) -> Tensor:
    """In which of equal parts of the text what each question asks for was planted, int64 [B, T]."""
    places = kind.places(batch)
    if places is None:
        raise ValueError(f"task {kind.name} does not say where what it asks for was planted")
    before = batch.recall.int().argmax(1, keepdim=True).clamp(min=1)  # tokens before the first question
    return (places * depths // before).clamp(max=depths - 1)
