"""Configs made in Python: what Hydra would have refused is refused here as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from natsl import config
from natsl.cli.commands import TrainRunConfig
from natsl.cli.evaluation import EvaluateRunConfig
from natsl.cli.generation import GenerateConfig

CLASSES: list[Any] = [
    config.ModelConfig,
    config.SupernetConfig,
    config.TrainConfig,
    TrainRunConfig,
    lambda **options: EvaluateRunConfig(run="x", **options),
    lambda **options: GenerateConfig(run="x", **options),
]
COUNTS = [(make, name) for make in CLASSES for name, kind in get_type_hints(type(make())).items() if kind is int]


@pytest.mark.parametrize(("make", "name"), COUNTS, ids=[name for _, name in COUNTS])
def test_integers_are_integers(make: Callable[..., object], name: str) -> None:
    for value in (2.5, 16.0, True, "3", None, -1):
        with pytest.raises(ValueError, match=rf"{name} = {value!r} is not allowed: it must be"):
            make(**{name: value})


@pytest.mark.parametrize("kind", ["foo", 1, None])
def test_kinds_of_layers(kind: Any) -> None:
    allowed = "it must be one of delta, softmax, routed"
    with pytest.raises(ValueError, match=rf"model.layers\[1\] = {kind!r} is not allowed: {allowed}"):
        config.ModelConfig(layers=["delta", kind])  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["float16", 32, None])
def test_precisions(value: Any) -> None:
    assert config.TrainConfig(precision="bfloat16").precision is config.Precision.bfloat16  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"train.precision = {value!r} is not allowed: it must be one of float32, b"):
        config.TrainConfig(precision=value)


def test_evaluation_has_no_seed() -> None:
    assert "seed" not in {item.name for item in dataclasses.fields(EvaluateRunConfig)}
