"""The training loop of a supernet: AdamW, warm-up and cosine, clipping, NaN guard, exact resume, calibration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from natsl import checkpoint
from natsl.cli import resolve_device, run_main
from natsl.config import ModelConfig, SupernetConfig, TrainConfig, TrainRunConfig, check_batch, to_plain
from natsl.data import load_text
from natsl.model import RoutedLM, count_parameters
from natsl.progress import Progress
from natsl.run import Run, UserError
from natsl.supernet import Loss, calibrate, sandwich_backward, sandwich_policies, seed_of
from natsl.tasks import TaskData
from natsl.tracking import Tracker, start_tracker

# How often things are written and how long bad steps are borne: a resumed run may change these.
_FREE_ON_RESUME = ("keep_checkpoints", "log_every", "checkpoint_every", "max_bad_steps")

OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class TrainRecipe:
    """How a supernet is trained: schedule, sandwich and seed."""

    train: TrainConfig
    supernet: SupernetConfig
    seed: int


class TrainingDivergedError(UserError):
    """Loss or gradient was not finite for too many steps in a row; the last good checkpoint is kept."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of a step: linear warm-up, then cosine from ``lr`` to ``lr · lr_final`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_optimizer(model: RoutedLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (not on norms, biases, gates' scales, convolutions and embeddings)."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and "embed" not in name and not name.endswith("conv")
        (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def train_supernet(
    model: RoutedLM,
    data: TaskData,
    recipe: TrainRecipe,
    folder: Path,
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` in place, calibrate it and leave its checkpoints in ``folder``.

    A folder with checkpoints of the same configuration is resumed: the result equals that of an unbroken run; one of
    another configuration is refused with the difference (``ValueError``). ``on_step`` receives a record of numbers
    every ``log_every`` steps. Raises ``TrainingDivergedError`` after ``max_bad_steps`` steps in a row without finite
    loss and gradient.
    """
    train, supernet, seed = recipe.train, recipe.supernet, recipe.seed
    check_batch(model.kinds, train, supernet)
    device = model.embed.weight.device
    optimizer = build_optimizer(model, train)
    router = [p for n, p in model.named_parameters() if ".router." in n]
    rest = [p for n, p in model.named_parameters() if ".router." not in n]
    meta = {
        "seed": seed,
        "data": data.fingerprint,
        "train": {k: v for k, v in to_plain(train).items() if k not in _FREE_ON_RESUME},
        "supernet": to_plain(supernet),
    }
    start, finished = _resume(folder, model, optimizer, meta)
    if finished:
        model.eval()
        return

    def store(step: int, finished: bool = False) -> None:
        record = {**meta, "finished": finished}
        checkpoint.save(folder, step, model, optimizer, record, train.keep_checkpoints)

    model.train()
    bad_in_a_row, skipped, began = 0, 0, time.monotonic()
    for step in range(start, train.steps):
        torch.manual_seed(seed_of("step", seed, step))  # counterfactual sampling and route noise
        batch = data.train_batch(train.batch_size, seed, step).to(device)
        policies = sandwich_policies(model, supernet, seed, step)
        optimizer.zero_grad(set_to_none=True)
        losses = sandwich_backward(model, batch, policies, supernet)
        norm = float(torch.nn.utils.clip_grad_norm_(rest, train.clip))
        router_norm = float(torch.nn.utils.clip_grad_norm_(router, train.router_clip))
        finite = math.isfinite(norm) and math.isfinite(router_norm)
        if finite and all(math.isfinite(float(loss.total.detach())) for loss in losses):
            bad_in_a_row = 0
            rate = learning_rate(train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        else:
            bad_in_a_row, skipped = bad_in_a_row + 1, skipped + 1
            if bad_in_a_row >= train.max_bad_steps:
                kept = checkpoint.steps(folder)
                where = f"; the checkpoint of step {kept[-1]} in {folder} is from before" if kept else ""
                raise TrainingDivergedError(
                    f"loss or gradient was not finite for {bad_in_a_row} steps in a row, the last one {step + 1}: "
                    f"train again under another name with a lower train.lr{where}"
                )
        done = step + 1
        if on_step is not None and (done % train.log_every == 0 or done in (1, train.steps)):
            record = _record(losses, step, train)
            speed = (done - start) / (time.monotonic() - began)
            record |= {"grad_norm": norm, "router_grad_norm": router_norm, "skipped": float(skipped)}
            record["tokens_per_second"] = speed * batch.tokens.numel()
            record["eta_seconds"] = (train.steps - done) / speed
            on_step(record)
        if done % train.checkpoint_every == 0 and done < train.steps and bad_in_a_row == 0:
            store(done)
    model.eval()
    calibrate(model, data, supernet, seed)
    store(train.steps, finished=True)


def _record(losses: list[Loss], step: int, train: TrainConfig) -> dict[str, float]:
    """One line of the log: losses and recall per sandwich policy (the random ones averaged)."""
    record = {"step": step + 1.0, "steps": float(train.steps), "lr": learning_rate(train, step)}
    totals = [float(loss.total.detach()) for loss in losses]
    record["loss"] = sum(totals) / len(totals)
    groups = {"softmax": losses[:1], "delta": losses[1:2], "random": losses[2:]}
    for name, group in groups.items():
        for key, values in (
            ("loss", [float(loss.total.detach()) for loss in group]),
            ("text", [loss.text for loss in group]),
            ("recall", [loss.accuracy for loss in group]),
        ):
            known = [v for v in values if v is not None]
            if known:
                record[f"{key}_{name}"] = sum(known) / len(known)
    return record


def _resume(folder: Path, model: RoutedLM, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> tuple[int, bool]:
    """Load the newest checkpoint if there is one: (steps done, finished)."""
    found = checkpoint.read_newest(folder)
    if found is None:
        return 0, False
    tensors, record = found
    for key, value in {**meta, "model": to_plain(model.config)}.items():
        old = record.get(key)
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            names = sorted(k for k in old.keys() | value.keys() if old.get(k) != value.get(k))
            difference = ", ".join(f"{key}.{n}: {old.get(n)!r} then, {value.get(n)!r} now" for n in names)
        else:
            difference = f"{key}: {old!r} then, {value!r} now"
        raise ValueError(f"the checkpoints in {folder} belong to another run ({difference}): choose another name")
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    model.load_state_dict(state)
    checkpoint.load_optimizer(optimizer, tensors)
    return int(record["step"]), bool(record["finished"])


def fit(
    run: Run, model: ModelConfig, data: TaskData, recipe: TrainRecipe, device: torch.device, tracker: Tracker
) -> RoutedLM:
    """Train the supernet of a run (or resume it, or take it if it is finished), shown live, logged and tracked."""
    torch.manual_seed(recipe.seed)
    net = RoutedLM(model, recipe.supernet.calibration_points).to(device)
    steps = recipe.train.steps
    with Progress("train", steps) as progress:

        def on_step(record: dict[str, float]) -> None:
            run.log({"event": "step", **record})
            tracker.log({f"train/{key}": value for key, value in record.items()}, step=int(record["step"]))
            parts = [f"loss {record['loss']:.3f}"]
            if "recall_random" in record:
                names = ("softmax", "random", "delta")
                values = "/".join(f"{record[f'recall_{name}']:.2f}" for name in names)
                parts.append(f"recall {'/'.join(names)} {values}")
            parts.append(f"{record['tokens_per_second'] / 1e3:.1f}k tokens/s")
            progress.update(int(record["step"]), " · ".join(parts))

        train_supernet(net, data, recipe, run.supernet, on_step)
    points = net.calibration.shape[-1]
    levels = [i / (points - 1) for i in range(points)]
    run.write_json(run.calibration, {"quantiles": levels, "margins": net.calibration.tolist()})
    return net


def run_training(config: TrainRunConfig) -> None:
    """The command ``natsl.train``: a supernet in ``runs/<name>/supernet``."""
    device = resolve_device(config.device)
    check_batch(config.model.layers, config.train, config.supernet)
    data = TaskData(config.data, load_text(config.data.path), config.model.vocab_size)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.study_db.exists():
            raise UserError(f"name = {config.name!r} is a search, which trains its own supernet: choose another name")
        if not run.config.exists():
            run.write_config(config)
        recipe = TrainRecipe(config.train, config.supernet, config.seed)
        with start_tracker(config.tracking, run, to_plain(config)) as tracker:
            net = fit(run, config.model, data, recipe, device, tracker)
        run.write_config(config)  # only now is it known that the checkpoints belong to this configuration
    print(f"supernet of {count_parameters(net):,} parameters in {run.supernet}")
    print(f"search its policies: natsl-search name={config.name}-search supernet_from={config.name}")


def main() -> None:
    """Entry point of ``natsl-train`` and ``python -m natsl.train``."""
    run_main("train", TrainRunConfig, run_training)


if __name__ == "__main__":
    main()
