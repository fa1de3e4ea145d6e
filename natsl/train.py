"""The training loop of a supernet: AdamW, warm-up and cosine, clipping, NaN guard, exact resume, calibration.

On a GPU a step never waits for the device. Whether its loss and gradient were finite is decided there, a bad step is
left out there, and the host asks for the numbers where it logs or stores, and every ``max_bad_steps`` steps at least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from natsl import checkpoint, signals
from natsl.calibrate import calibrate, kept_by_head, mixed_sequences
from natsl.config import (
    OLDER_MODEL,
    OLDER_TRAIN,
    TRAINING_VERSION,
    ModelConfig,
    Precision,
    SupernetConfig,
    TrainConfig,
    check_batch,
    check_chunks,
)
from natsl.data import TaskData
from natsl.errors import UserError
from natsl.files import to_plain
from natsl.kernels.dispatch import kernel_limit
from natsl.kernels.shape import Shape
from natsl.kernels.warmup import warm_up
from natsl.model import RoutedLM
from natsl.progress import Progress
from natsl.resume import is_free_on_resume
from natsl.run import Run
from natsl.space.check import check
from natsl.space.policy import RoutingPolicy
from natsl.supernet import Loss, N, sandwich_backward, sandwich_policies, seed_of, smallest_is_empty
from natsl.threads import resume_threads, threads_restored
from natsl.tracking import Tracker

KEPT_BUDGET, KEPT_SEQUENCES = 0.25, 8  # of what is shown of routers at the checkpoints of a training
OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Specialisation:
    """One policy that finished weights are trained for, instead of the policies of the sandwich.

    ``supernet``: sha256 of the checkpoint that it begins with. ``steps``: how many its weights were trained for before,
    in that run and those that it began with; batches go on after them.
    """

    policy: RoutingPolicy
    supernet: str
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as checkpoints hold it."""
        return {"policy": self.policy.to_dict(), "supernet": self.supernet, "steps": self.steps}


@dataclass(frozen=True)
class TrainRecipe:
    """How a supernet is trained: schedule, sandwich and seed; ``special``: for one policy only (None: a supernet)."""

    train: TrainConfig
    supernet: SupernetConfig
    seed: int
    special: Specialisation | None = None


class TrainingDivergedError(UserError):
    """Loss or gradient was not finite for too many steps in a row; the last good checkpoint is kept."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of a step: linear warm-up, then cosine from ``lr`` to ``lr · lr_final`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_optimizer(model: RoutedLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (not on norms, biases, gates' scales, convolutions and embeddings).

    ``rate`` of a group: its learning rate in units of ``learning_rate``. A step decays routers as much as other
    matrices.
    """
    # checkpoints know parameters by this order: all that decay, all others, and routers with a rate of their own last
    rates = [1.0] if config.router_lr is None else [1.0, config.router_lr / config.lr]
    groups: list[tuple[float, bool, list[torch.nn.Parameter]]] = [
        (r, decays, []) for r in rates for decays in (True, False)
    ]
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and "embed" not in name and not name.endswith("conv")
        apart = ".router." in name and len(rates) > 1
        groups[2 * apart + (not matrix)][2].append(parameter)
    settings = [
        {"params": own, "weight_decay": config.weight_decay / rate if decays else 0.0, "rate": rate}
        for rate, decays, own in groups
        if own
    ]
    fused = True if model.embed.weight.device.type == "cuda" else None  # it can leave out a step on the device
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


@dataclass(frozen=True)
class StepResult(Generic[N]):
    """The loss of each policy of a step, and the norms of the gradients before clipping.

    0-dim tensors on the device, floats once they are on the host.
    """

    losses: list[Loss[N]]
    grad_norm: N
    router_grad_norm: N

    def pack(self: StepResult[Tensor]) -> Tensor:
        """All numbers as one float32 tensor [2 + 4 · policies]."""
        numbers = [self.grad_norm, self.router_grad_norm]
        for loss in self.losses:
            numbers += [loss.total.detach(), loss.text, loss.recall, loss.accuracy]
        return torch.stack(numbers).float()

    @staticmethod
    def unpack(values: Sequence[float]) -> StepResult[float]:
        """The inverse of ``pack``, from the values of its tensor."""
        grad_norm, router_grad_norm, *rest = values
        losses = [
            Loss(total=total, text=text, recall=recall, accuracy=accuracy)
            for total, text, recall, accuracy in zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
        ]
        return StepResult(losses, grad_norm, router_grad_norm)


@dataclass(frozen=True)
class Health(Generic[N]):
    """Steps that were left out since the process began: now in a row, most in a row, in all; the last one (from 1).

    0-dim tensors on the device, ints once they are on the host.
    """

    in_a_row: N
    longest: N
    skipped: N
    last: N

    def pack(self: Health[Tensor]) -> Tensor:
        """All numbers as one float32 tensor [4]."""
        return torch.stack((self.in_a_row, self.longest, self.skipped, self.last))

    @staticmethod
    def unpack(values: Sequence[float]) -> Health[int]:
        """The inverse of ``pack``, from the values of its tensor."""
        in_a_row, longest, skipped, last = (int(value) for value in values)
        return Health(in_a_row=in_a_row, longest=longest, skipped=skipped, last=last)


class Trainer:
    """Takes single steps of a training and counts those that were left out because something was not finite."""

    def __init__(self, model: RoutedLM, data: TaskData, recipe: TrainRecipe) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.device = model.embed.weight.device
        if recipe.special is not None:
            model.freeze_unused(recipe.special.policy)
        self.optimizer = build_optimizer(model, recipe.train)
        self.router = [p for n, p in model.named_parameters() if ".router." in n]
        self.rest = [p for n, p in model.named_parameters() if ".router." not in n]
        none = torch.zeros((), device=self.device)
        self._health = Health(in_a_row=none, longest=none, skipped=none, last=none)

    def step(self, step: int) -> StepResult[Tensor]:
        """Take the step of this number (from 0), determined by it and the seed; no wait for the device on a GPU."""
        train, seed = self.recipe.train, self.recipe.seed
        torch.manual_seed(seed_of("step", seed, step))  # counterfactual sampling and route noise
        special = self.recipe.special
        seen = 0 if special is None else special.steps
        batch = self.data.train_batch(train.batch_size, seed, seen + step).to(self.device)
        if special is None:
            policies = sandwich_policies(self.model, self.recipe.supernet, seed, step)
        else:
            policies = [special.policy]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autograd.set_multithreading_enabled(False):  # a hop to another thread costs more than it gives
            losses = sandwich_backward(self.model, batch, policies, self.recipe.supernet)
        norm, router_norm = self._clip(self.rest, train.clip), self._clip(self.router, train.router_clip)
        totals = torch.stack([loss.total.detach() for loss in losses])
        bad = 1.0 - (norm.isfinite() & router_norm.isfinite() & totals.isfinite().all()).float()
        before = self._health
        in_a_row = (before.in_a_row + 1) * bad
        self._health = Health(
            in_a_row=in_a_row,
            longest=torch.maximum(before.longest, in_a_row),
            skipped=before.skipped + bad,
            last=before.last * (1 - bad) + (step + 1) * bad,
        )
        rate = learning_rate(train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined] # the way GradScaler skips a step
            self.optimizer.step()
        elif not bool(bad):
            self.optimizer.step()
        return StepResult(losses, norm, router_norm)

    @property
    def reads_free(self) -> bool:
        """Whether ``read`` waits for nothing."""
        return self.device.type == "cpu"

    def read(self, result: StepResult[Tensor] | None = None) -> tuple[Health[int], StepResult[float] | None]:
        """What has happened up to now, and the numbers of a step, on the host: one transfer."""
        health = self._health.pack()
        if result is None:
            return Health.unpack(to_host(health)), None
        values = to_host(torch.cat((health, result.pack())))
        return Health.unpack(values[: len(health)]), StepResult.unpack(values[len(health) :])

    def _clip(self, parameters: list[torch.nn.Parameter], bound: float) -> Tensor:
        if all(p.grad is None for p in parameters):  # torch would put its 0 on the CPU
            return torch.zeros((), device=self.device)
        return torch.nn.utils.clip_grad_norm_(parameters, bound)


def to_host(values: Tensor) -> list[float]:
    """The numbers of a 1-D tensor. On a GPU it waits for them and for nothing that was launched later."""
    if values.device.type == "cuda":
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(values.device))
        done.synchronize()
        values = pinned
    return values.tolist()


@signals.held()
@threads_restored()
def train_supernet(
    model: RoutedLM,
    data: TaskData,
    recipe: TrainRecipe,
    folder: Path,
    on_step: OnStep | None = None,
    until: int | None = None,
) -> None:
    """Train ``model`` in place, calibrate it and leave its checkpoints in ``folder``.

    A folder with checkpoints of the same configuration is resumed: the result equals that of an unbroken run (on a GPU
    up to rounding: kernels of other libraries may add in another order every time); one of another configuration is
    refused with the difference (``ValueError``). With ``recipe.special``, ``model`` has the weights of its checkpoint,
    and what its policy does not use is frozen and stays so. ``on_step`` receives a record of numbers every
    ``log_every`` steps. SIGTERM ends it after a step, whose checkpoint is stored. ``until``: a step at which the
    training pauses, its checkpoint stored and the model not calibrated; the schedule is that of all steps (None: to the
    end).
    Raises ``TrainingDivergedError`` after ``max_bad_steps`` steps in a row without finite loss and gradient.
    """
    train, supernet, seed = recipe.train, recipe.supernet, recipe.seed
    if recipe.special is None:
        check_batch(model.kinds, train, supernet)
    check_chunks(model.config.chunk_size, data.config.seq_len)
    check(
        model.precision is train.precision,
        "train.precision",
        train.precision,
        f"the model computes in {model.precision.value}",
    )
    trainer = Trainer(model, data, recipe)
    meta = {
        "seed": seed,
        "data": data.fingerprint,
        "train": {k: v for k, v in to_plain(train).items() if not is_free_on_resume(f"train.{k}")},
        "supernet": to_plain(supernet),
        "specialised": None if recipe.special is None else recipe.special.to_dict(),
    }
    start, finished = _resume(folder, model, trainer.optimizer, meta)
    if finished:
        model.eval()
        return

    def store(step: int, finished: bool = False) -> None:
        record = {"version": TRAINING_VERSION, **meta, "finished": finished}
        if trainer.device.type == "cpu":
            record["threads"] = torch.get_num_threads()
        checkpoint.save(folder, step, model, trainer.optimizer, record, train.keep_checkpoints)

    model.train()
    end = train.steps if until is None else min(until, train.steps)
    began = time.monotonic()
    for step in range(start, end):
        result = trainer.step(step)
        done = step + 1
        logs = on_step is not None and (done % train.log_every == 0 or done in (1, end))
        stores = (done % train.checkpoint_every == 0 or done == end) and done < train.steps
        due = done % train.max_bad_steps == 0 or done == end or trainer.reads_free
        if not (logs or stores or due or signals.pending()):
            continue
        health, numbers = trainer.read(result if logs else None)
        if health.longest >= train.max_bad_steps:
            kept = checkpoint.steps(folder)
            where = f"; the checkpoint of step {kept[-1]} in {folder} is from before" if kept else ""
            raise TrainingDivergedError(
                f"loss or gradient was not finite for {health.longest} steps in a row, the last one {health.last}: "
                f"train again under another name with a lower train.lr{where}"
            )
        if on_step is not None and numbers is not None:
            record = _record(numbers, step, recipe)
            speed = (done - start) / (time.monotonic() - began)
            record["skipped"] = float(health.skipped)
            record["tokens_per_second"] = speed * train.batch_size * data.config.seq_len
            record["eta_seconds"] = (end - done) / speed
            on_step(record)
        stopping = signals.pending()
        if (stores or stopping) and health.in_a_row == 0:
            store(done)
        if stopping:
            return  # and ``held`` raises
    trainer.optimizer.zero_grad(set_to_none=True)
    if end < train.steps:
        model.eval()
        return
    if start < train.steps:
        store(train.steps)  # whatever happens in calibration, the training is not lost
    model.eval()
    calibrate(model, data, supernet, seed)
    store(train.steps, finished=True)


def _record(result: StepResult[float], step: int, recipe: TrainRecipe) -> dict[str, float]:
    """One line of the log: losses and recall per sandwich policy (the random ones averaged).

    The smallest policy is ``delta``, or ``empty`` where both memories ran and nothing was kept; ``policy`` is the only
    one of a specialisation.
    """
    train = recipe.train
    record = {"step": step + 1.0, "steps": float(train.steps), "lr": learning_rate(train, step)}
    record |= {"grad_norm": result.grad_norm, "router_grad_norm": result.router_grad_norm}
    losses = result.losses
    record["loss"] = sum(loss.total for loss in losses) / len(losses)
    smallest = "empty" if smallest_is_empty(recipe.seed, step) else "delta"
    groups = [("softmax", losses[:1]), (smallest, losses[1:2]), ("random", losses[2:])]
    for name, group in groups if recipe.special is None else [("policy", losses)]:
        columns = {
            "loss": [loss.total for loss in group],  # shown also where it is not finite
            "text": [loss.text for loss in group if not math.isnan(loss.text)],  # NaN: the batch has no such task
            "recall": [loss.accuracy for loss in group if not math.isnan(loss.accuracy)],
        }
        record |= {f"{key}_{name}": sum(values) / len(values) for key, values in columns.items() if values}
    return record


def _resume(folder: Path, model: RoutedLM, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> tuple[int, bool]:
    """Load the newest checkpoint if there is one: (steps done, finished)."""
    newest = checkpoint.read_newest(folder)
    if newest is None:
        return 0, False
    tensors, record = newest
    version = record.get("version", 1)  # older checkpoints do not have it
    if version != TRAINING_VERSION and not record["finished"]:
        raise UserError(
            f"the checkpoints in {folder} were begun by a natsl that draws policies, clamps the router's gradient, "
            f"calibrates or mixes the memories in another way (training version {version}, now {TRAINING_VERSION}): "
            "finish the run with it or choose another name"
        )
    for key, value in {**meta, "model": to_plain(model.config)}.items():
        old = record.get(key)
        if isinstance(old, dict):  # older checkpoints do not have all
            older = {"train": OLDER_TRAIN, "model": OLDER_MODEL}.get(key, {})
            old = {**older, **old}
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            names = sorted(k for k in old.keys() | value.keys() if old.get(k) != value.get(k))
            difference = ", ".join(f"{key}.{n}: {old.get(n)!r} then, {value.get(n)!r} now" for n in names)
        else:
            difference = f"{key}: {old!r} then, {value!r} now"
        raise UserError(f"the checkpoints in {folder} belong to another run ({difference}): choose another name")
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    model.load_state_dict(state)
    if record["finished"]:  # an older one may lack the optimiser's state of parameters that are new
        return int(record["step"]), True
    checkpoint.load_optimizer(optimizer, tensors)
    if model.embed.weight.device.type == "cpu":
        resume_threads(record)
    return int(record["step"]), False


def compile_kernels(model: ModelConfig, tokens: int, recipe: TrainRecipe, device: torch.device) -> None:
    """Compile what a step needs before it, all kernels at the same time (nothing if they do not take the shape)."""
    precision = recipe.train.precision
    dtype = torch.bfloat16 if precision is Precision.bfloat16 else torch.float32
    widths = {"V": (model.value_dim, 512)}
    if kernel_limit(dtype, model.chunk_size, {"K": (model.key_dim, 256), **widths}, delta_keys=model.key_dim) is None:
        shape = Shape(
            model.heads, model.key_dim, model.value_dim, model.softmax_per_head, model.chunk_size, precision.value
        )
        mode = recipe.supernet.counterfactual.value
        warm_up(shape, device, batch=recipe.train.batch_size, tokens=tokens, counterfactual=mode)


def fit(
    run: Run,
    model: ModelConfig,
    data: TaskData,
    recipe: TrainRecipe,
    device: torch.device,
    tracker: Tracker,
    weights: RoutedLM | None = None,
    until: int | None = None,
) -> RoutedLM:
    """Train the supernet of a run (or resume it, or take it if it is finished), shown live, logged and tracked.

    ``weights``: a model that the first step begins with, except for its calibration (None: new weights). ``until``: as
    in ``train_supernet``.
    """
    torch.manual_seed(recipe.seed)
    net = RoutedLM(model, recipe.supernet.calibration_points, recipe.train.precision)
    if weights is not None:  # until it is measured anew, a budget must not pass for calibrated
        state = {name: t for name, t in weights.state_dict().items() if not name.startswith("calibration.")}
        net.load_state_dict({**net.state_dict(), **state})
    net = net.to(device)
    if device.type == "cuda":
        compile_kernels(model, data.config.seq_len, recipe, device)
    steps = recipe.train.steps if until is None else min(until, recipe.train.steps)
    names = ("softmax", "random", "delta") if recipe.special is None else ("policy",)
    recall: dict[str, float] = {}  # the last of each: a group may have drawn no such sequence, or be another policy
    every, measured = recipe.train.checkpoint_every, 0
    shown = RoutingPolicy.uniform(net.kinds, model.chunk_size, KEPT_BUDGET)
    if recipe.special is not None:
        shown = recipe.special.policy

    def kept(step: int) -> list[list[float]]:
        tokens = mixed_sequences(data, KEPT_SEQUENCES, seed_of("kept", recipe.seed)).to(device)
        by_layer = kept_by_head(net, tokens, shown)
        return [[step, i, head, share] for i, heads in enumerate(by_layer) for head, share in enumerate(heads)]

    done = min(steps, max(checkpoint.steps(run.supernet), default=0))  # a resumed training begins there
    with Progress("train", steps, done) as progress:

        def on_step(record: dict[str, float]) -> None:
            nonlocal measured
            run.log({"event": "step", **record})
            step = int(record["step"])
            if step // every > measured or step == steps:
                measured = step // every
                tracker.rows("train/kept", ["step", "layer", "head", "kept"], partial(kept, step))
            tracker.log({f"train/{key}": value for key, value in record.items()}, step=int(record["step"]))
            parts = [f"loss {record['loss']:.3f}"]
            recall.update({name: record[f"recall_{name}"] for name in names if f"recall_{name}" in record})
            if recall:
                values = "/".join(f"{recall[name]:.2f}" if name in recall else "–" for name in names)
                parts.append(f"recall {'/'.join(names)} {values}")
            parts.append(f"{record['tokens_per_second'] / 1e3:.1f}k tokens/s")
            progress.update(int(record["step"]), " · ".join(parts))

        train_supernet(net, data, recipe, run.supernet, on_step, until)
    if steps == recipe.train.steps:
        write_calibration(run, net)
    return net


def write_calibration(run: Run, net: RoutedLM) -> None:
    """Write the calibration table of a run's supernet to ``calibration.json``."""
    run.write_json(run.calibration, net.calibration.to_plain())


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("train")
