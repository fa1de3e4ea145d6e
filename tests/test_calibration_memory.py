"""Calibration after the last checkpoint and evaluation in batches: what runs out of memory loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from natsl import checkpoint, modules
from natsl.calibrate import calibrate
from natsl.config import SupernetConfig
from natsl.data import Split
from natsl.evaluate import evaluate
from natsl.files import write_text
from natsl.space.policy import RoutingPolicy
from natsl.train import train_supernet
from tests.oracles import tiny_data
from tests.train_helpers import Record, assert_equal, make_model, recipe


def test_an_evaluation_holds_the_logits_of_a_part_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make_model(), tiny_data(tasks={"mqar": 1.0, "bytes": 1.0})
    calibrate(model, data, SupernetConfig(calibration_points=17), seed=0)
    sets = data.eval_sets(Split.search)
    policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, 0.3)
    whole = evaluate(model, policy, sets)
    sizes = []
    linear = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        if weight is model.embed.weight:
            sizes.append(y.numel())
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setattr(modules, "LOGITS_AT_ONCE", 50 * 384)
    parts = evaluate(model, policy, sets)
    assert max(sizes) <= 50 * 384
    assert sum(sizes) == 16 * 64 * 384
    assert (parts.errors["recall_error"], parts.kept_by_head) == (whole.errors["recall_error"], whole.kept_by_head)
    assert parts.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["plain", "noise"])
def test_a_training_that_ends_in_its_calibration_is_not_made_again(
    noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = SupernetConfig(calibration_points=17, calibration_sequences=8, random_policies=2, route_noise=noise)
    unbroken = make_model()
    train_supernet(unbroken, tiny_data(), recipe(net=net), tmp_path / "unbroken")

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr("natsl.train.calibrate", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            train_supernet(make_model(), tiny_data(), recipe(net=net), folder)
    _, record = checkpoint.load_model(folder)
    assert (record["step"], record["finished"]) == (7, False)
    resumed, steps = make_model(init=1), list[Record]()
    train_supernet(resumed, tiny_data(), recipe(net=net), folder, steps.append)
    assert not steps, "no step is taken again"
    assert_equal(unbroken, resumed)
    assert checkpoint.load_model(folder)[1]["finished"] is True


@pytest.mark.parametrize("cut", ["before the tensors", "between tensors and record"])
def test_a_checkpoint_that_replaces_one_of_its_step_is_never_missing(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoint of a run, cut off anywhere while the calibrated one takes its place."""
    folder = tmp_path / "r"
    write, calls = write_text, list[Path]()

    def interrupted(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == (2 if cut == "before the tensors" else 3):
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_supernet(make_model(), tiny_data(), recipe(checkpoint_every=50, keep_checkpoints=1), folder)
    monkeypatch.undo()
    _, record = checkpoint.load_model(folder)
    assert record["step"] == 7
    assert record["finished"] is (cut != "before the tensors")
