"""Small trainings, and what stops them, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from natsl.config import Precision, SupernetConfig, TrainConfig
from natsl.model import RoutedLM
from natsl.train import TrainRecipe
from tests.oracles import tiny_config

Record = dict[str, float]


class Killed(BaseException):
    """Stands for a signal."""


def recipe(seed: int = 0, net: SupernetConfig | None = None, **options: Any) -> TrainRecipe:
    train = TrainConfig(
        **{"steps": 7, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1, **options}
    )
    return TrainRecipe(train, net or SupernetConfig(calibration_points=17, random_policies=2), seed)


def make_model(
    kinds: str = "rr", init: int = 0, precision: Precision = Precision.float32, **options: object
) -> RoutedLM:
    torch.manual_seed(init)
    return RoutedLM(tiny_config(kinds, **options), 17, precision)


def kill_at(step: int) -> Callable[[Record], None]:
    def on_step(record: Record) -> None:
        if record["step"] == step:
            raise Killed

    return on_step


def assert_equal(a: RoutedLM, b: RoutedLM) -> None:
    one, other = a.state_dict(), b.state_dict()
    for name in one:
        assert torch.equal(one[name], other[name]), name
