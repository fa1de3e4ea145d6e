"""The training loop: schedule, learning, steps without a finite loss, the command."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natsl import checkpoint, supernet
from natsl.calibrate import make_table
from natsl.cli.commands import TrainRunConfig, run_training
from natsl.config import Counterfactual, Precision, Sandwich, SupernetConfig, TrainConfig, check_batch
from natsl.data import TaskData
from natsl.errors import UserError
from natsl.run import Run
from natsl.space.policy import RoutingPolicy
from natsl.supernet import Loss, smallest_is_empty, task_loss
from natsl.tasks import CalibrationDataConfig, DataConfig
from natsl.tasks.sequences import Batch
from natsl.tracking import TrackingConfig, TrackingMode
from natsl.train import (
    Health,
    StepResult,
    Trainer,
    TrainingDivergedError,
    build_optimizer,
    learning_rate,
    train_supernet,
)
from tests.oracles import mixer_of, tiny_config, tiny_data
from tests.train_helpers import Killed, Record, assert_equal, kill_at, make_model, recipe

# Schedule and optimiser


def test_learning_rate() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=2.0, lr_final=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[54] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    flat = TrainConfig(steps=3, warmup_steps=0, lr=1.0, lr_final=1.0)
    assert [learning_rate(flat, step) for step in range(3)] == [1.0, 1.0, 1.0]
    assert learning_rate(TrainConfig(steps=1, warmup_steps=0, lr=1.0), 0) == 1.0


def test_matrices_alone_decay() -> None:
    model = make_model("r", tie_embeddings=False)
    groups = build_optimizer(model, TrainConfig(lr=0.002, router_lr=0.01, weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:  # a step takes as much of every matrix by decay
        assert group["rate"] * group["weight_decay"] == pytest.approx(0.1 if group["weight_decay"] else 0.0)
    decayed_names = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    plain_names = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed_names | plain_names == set(names.values())
    assert {"head.weight", "blocks.0.mixer.router.weight", "blocks.0.mlp.in_proj.weight"} <= decayed_names
    assert {"embed.weight", "blocks.0.mixer.conv", "blocks.0.mixer.A_log", "norm.weight"} <= plain_names
    assert not any(name.endswith(("bias", "norm.weight", "conv")) for name in decayed_names)


def test_the_order_of_parameters_is_that_of_older_checkpoints() -> None:
    """The optimiser's state is stored by it: first all that decay, then all others."""
    model = make_model("rd", tie_embeddings=False)
    names = {id(p): name for name, p in model.named_parameters()}

    def order(router_lr: float | None) -> list[str]:
        groups = build_optimizer(model, TrainConfig(router_lr=router_lr)).param_groups
        return [names[id(p)] for group in groups for p in group["params"]]

    matrices = [
        name for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith(("conv", "embed.weight"))
    ]
    assert order(None) == matrices + [name for name in names.values() if name not in matrices]
    own = order(0.01)
    assert [name for name in own if ".router." not in name] == [n for n in order(None) if ".router." not in n]
    assert own[-1] == "blocks.0.mixer.router.weight"


@pytest.mark.parametrize(("router_lr", "rate"), [(0.01, 5.0), (None, 1.0)], ids=["own", "as the rest"])
def test_routers_have_a_rate_of_their_own(
    tmp_path: Path, router_lr: float | None, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, float]] = []

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        taken.append({names[id(p)]: group["lr"] for group in self.param_groups for p in group["params"]})

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model = make_model()
    names = {id(p): name for name, p in model.named_parameters()}
    train_supernet(model, tiny_data(), recipe(lr=0.002, router_lr=router_lr, warmup_steps=2, steps=4), tmp_path)
    assert len(taken) == 4
    for number, rates in enumerate(taken):
        expected = learning_rate(TrainConfig(lr=0.002, warmup_steps=2, steps=4), number)
        for name, value in rates.items():
            assert value == pytest.approx(expected * (rate if ".router." in name else 1.0)), name


@pytest.mark.parametrize(
    ("kinds", "batch", "net", "message"),
    [
        ("r", 12, SupernetConfig(), "train.batch_size = 12 .* multiple of the 8 policies"),
        ("r", 4, SupernetConfig(random_policies=1), "multiple of the 3 policies"),
    ],
    ids=["groups", "one-random"],
)
def test_batches_must_fit_the_sandwich(
    tmp_path: Path, kinds: str, batch: int, net: SupernetConfig, message: str
) -> None:
    model = make_model(kinds)
    with pytest.raises(ValueError, match=message):
        train_supernet(model, tiny_data(), recipe(net=net, batch_size=batch), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_routed_layers_is_trained_as_it_is(tmp_path: Path) -> None:
    """A static hybrid to compare with: one policy, the whole batch, of any size."""
    model = make_model("ds")
    records: list[dict[str, float]] = []
    train_supernet(model, tiny_data(), recipe(batch_size=5, steps=2, log_every=1), tmp_path, records.append)
    assert all(record["loss"] == record["loss_softmax"] for record in records)
    assert not {"loss_delta", "loss_empty", "loss_random"} & set(records[0])


def test_accumulate_takes_any_batch() -> None:
    check_batch(make_model("r").kinds, TrainConfig(batch_size=5), SupernetConfig(sandwich=Sandwich.accumulate))


# What the host reads


def test_numbers_keep_their_names_on_the_way_to_the_host() -> None:
    number = iter(range(100))
    losses = [Loss(*(torch.tensor(float(next(number))) for _ in range(4))) for _ in range(3)]
    packed = StepResult(losses, torch.tensor(50.0), torch.tensor(51.0)).pack()
    assert (packed.shape, packed.dtype) == ((14,), torch.float32)
    expected = [Loss(total=4.0 * i, text=4.0 * i + 1, recall=4.0 * i + 2, accuracy=4.0 * i + 3) for i in range(3)]
    assert StepResult.unpack(packed.tolist()) == StepResult(expected, grad_norm=50.0, router_grad_norm=51.0)
    health = Health(*(torch.tensor(float(i)) for i in range(4))).pack()
    assert Health.unpack(health.tolist()) == Health(in_a_row=0, longest=1, skipped=2, last=3)


# Training


def test_training_learns_and_reports(tmp_path: Path) -> None:
    model = make_model()
    records: list[Record] = []
    train_supernet(model, tiny_data(), recipe(steps=25, batch_size=8, log_every=5), tmp_path, records.append)
    assert [r["step"] for r in records] == [1, 5, 10, 15, 20, 25]
    assert not model.training
    assert model.calibration.by_head.isfinite().all()
    for record in records:
        assert all(math.isfinite(v) for v in record.values())
        assert record["tokens_per_second"] > 0
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert records[-1]["eta_seconds"] == 0
    names = {"loss_softmax", "loss_random", "recall_softmax", "text_random", "lr", "grad_norm"}
    assert all(names <= record.keys() for record in records)
    smallest = [{"loss_delta", "loss_empty"} & record.keys() for record in records]
    assert smallest == [{"loss_empty" if smallest_is_empty(0, int(r["step"]) - 1) else "loss_delta"} for r in records]
    loaded, record = checkpoint.load_model(tmp_path)
    assert record["finished"] is True
    assert_equal(loaded, model)


@pytest.mark.parametrize("kind", ["dense", "accumulate", "none", "sampled", "no noise"])
def test_options_train(tmp_path: Path, kind: str) -> None:
    base = SupernetConfig(calibration_points=17, calibration_sequences=8, random_policies=2)
    nets = {
        "dense": replace(base, dense_steps=3, anneal_steps=2),
        "accumulate": replace(base, sandwich=Sandwich.accumulate, distill=0.5, random_policies=1),
        "none": replace(base, counterfactual=Counterfactual.none, project_budget=False, gradient_clamp=0.0),
        "sampled": replace(base, counterfactual=Counterfactual.derivative, counterfactual_rate=0.5),
        "no noise": replace(base, route_noise=0.0, detach_router=False),
    }
    model = make_model("rd")
    records: list[Record] = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_supernet(model, tiny_data(), recipe(net=nets[kind], steps=5), tmp_path, records.append)
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind == "dense":
        assert [("loss_random" in r, r["router_grad_norm"] > 0) for r in records] == [(False, False)] * 3 + [
            (True, True)
        ] * 2


# Losses that are not finite


def broken_loss(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], value: float) -> None:
    """Make the loss of the steps for which ``bad`` holds (counted from 1 in this process) ``value``."""
    calls = 0

    def broken(loss: Tensor, right: Tensor, batch: Batch) -> Loss[Tensor]:
        nonlocal calls
        calls += 1
        result = task_loss(loss, right, batch)
        step = (calls + 3) // 4  # four policies a step
        return replace(result, total=result.total * value) if bad(step) else result

    monkeypatch.setattr(supernet, "task_loss", broken)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser of a GPU, which leaves out bad steps by itself; torch has it on the CPU too."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: adamw(groups, **{**options, "fused": True}))


@pytest.mark.parametrize("optimizer", ["plain", "fused"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_step_without_a_finite_loss_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, value: float, optimizer: str
) -> None:
    if optimizer == "fused":
        request.getfixturevalue("fused")
    model = make_model()
    snapshots: list[dict[str, Tensor]] = []
    records: list[Record] = []

    def on_step(record: Record) -> None:
        records.append(record)
        snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})

    broken_loss(monkeypatch, lambda step: step in (3, 4), value)
    train_supernet(model, tiny_data(), recipe(), tmp_path, on_step)
    assert [r["skipped"] for r in records] == [0, 0, 1, 2, 2, 2, 2]
    for i in range(1, 7):
        same = [torch.equal(snapshots[i][name], snapshots[i - 1][name]) for name in snapshots[i]]
        assert all(same) if i in (2, 3) else not any(same)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.calibration.by_head.isfinite().all()


def test_no_checkpoint_is_written_in_the_middle_of_bad_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_loss(monkeypatch, lambda step: step in (3, 4), math.nan)
    with pytest.raises(Killed):
        train_supernet(make_model(), tiny_data(), recipe(), tmp_path, kill_at(5))
    assert checkpoint.steps(tmp_path) == [2]


def test_training_stops_after_bad_steps_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_loss(monkeypatch, lambda step: step in (2, 3) or step >= 5, math.nan)
    with pytest.raises(
        TrainingDivergedError,
        match=r"not finite for 3 steps in a row, the last one 7: train again under another name with a lower train\.lr",
    ) as error:
        train_supernet(make_model(), tiny_data(), recipe(steps=20, max_bad_steps=3), tmp_path)
    assert "\n" not in str(error.value)
    assert checkpoint.steps(tmp_path) == [4]
    loaded, record = checkpoint.load_model(tmp_path)
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert record["finished"] is False


def test_bad_steps_that_are_read_late_stop_the_training_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: None
) -> None:
    """As on a GPU: nothing is read but at logs, checkpoints and every max_bad_steps steps."""
    monkeypatch.setattr(Trainer, "reads_free", False)
    broken_loss(monkeypatch, lambda step: 2 <= step <= 4, math.nan)
    late = recipe(steps=20, max_bad_steps=3, log_every=100, checkpoint_every=5)
    with pytest.raises(TrainingDivergedError, match="not finite for 3 steps in a row, the last one 4:"):
        train_supernet(make_model(), tiny_data(), late, tmp_path, lambda record: None)
    assert checkpoint.steps(tmp_path) == [], "the checkpoint of step 5 would have come after the bad steps"


@pytest.mark.parametrize("distill", [None, 0.0, 0.5], ids=["groups", "accumulate", "distilled"])
def test_a_step_asks_the_device_for_nothing(
    monkeypatch: pytest.MonkeyPatch, fused: None, distill: float | None
) -> None:
    """No tensor becomes a number, a size or a branch of the program: on a GPU each would wait for the device."""
    data = tiny_data(tasks={"mqar": 1.0, "bytes": 1.0})
    net = SupernetConfig(random_policies=2, route_noise=0.5)
    if distill is not None:
        net = replace(net, sandwich=Sandwich.accumulate, distill=distill)
    trainer = Trainer(make_model("rds"), data, recipe(net=net, batch_size=8))
    batch = data.train_batch(8, 0, 0)
    monkeypatch.setattr(data, "train_batch", lambda *_: batch)  # made on the host, whatever the device
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: 0)  # the look at the tokens, which is for the CPU alone
    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            picks = func.name() == "aten::index.Tensor" and any(
                i is not None and not i.dtype.is_floating_point and i.dtype is torch.bool for i in args[1]
            )
            names = (
                "aten::_local_scalar_dense",
                "aten::nonzero",
                "aten::masked_select",
                "aten::equal",
                "aten::is_nonzero",
            )
            if picks or func.name() in names:
                # torch.quantile looks at the level that it is given, on a CPU alone
                stack = [frame.name for frame in traceback.extract_stack()]
                if "group_threshold" not in stack:
                    asked.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        for step in range(2):
            trainer.step(step)
    assert asked == []
    monkeypatch.undo()
    assert trainer.read()[0] == Health(0, 0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", Precision, ids=lambda p: p.value)
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path: Path, precision: Precision) -> None:
    data = tiny_data(tasks={"mqar": 1.0, "bytes": 1.0})
    options = recipe(batch_size=8, precision=precision)
    model = make_model("rds", 0, precision, heads=1, key_dim=16, value_dim=16, chunk_size=16).to("cuda")
    trainer = Trainer(model, data, options)
    trainer.step(0)  # kernels are compiled and memory is found
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = trainer.step(1)
        health, numbers = trainer.read(result)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert health.skipped == 0
    assert numbers is not None
    assert math.isfinite(numbers.grad_norm)


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path: Path) -> None:
    """A finite loss whose gradient overflows must not reach the weights."""
    model = make_model()
    records: list[Record] = []
    hook = mixer_of(model, 1).out_proj.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingDivergedError):
        train_supernet(model, tiny_data(), recipe(max_bad_steps=2), tmp_path, records.append)
    hook.remove()
    assert math.isfinite(records[0]["loss"])
    assert not math.isfinite(records[0]["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True))


def test_clipping_bounds_trunk_and_router_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, closure: None = None) -> None:
        groups = {True: 0.0, False: 0.0}
        for name, p in model.named_parameters():
            if p.grad is not None:
                groups[".router." in name] += float(p.grad.square().sum())
        norms.append((math.sqrt(groups[False]), math.sqrt(groups[True])))
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = make_model()
    records: list[Record] = []
    train_supernet(model, tiny_data(), recipe(clip=0.01, router_clip=1e-4), tmp_path, records.append)
    assert all(r["grad_norm"] > 0.01 for r in records)
    for trunk, router in norms:
        assert trunk == pytest.approx(0.01, rel=1e-3)
        assert router == pytest.approx(1e-4, rel=2e-2)


def test_a_trained_budget_is_usable(tmp_path: Path) -> None:
    model, data = make_model(), tiny_data()
    train_supernet(model, data, recipe(steps=3), tmp_path)
    loaded, _ = checkpoint.load_model(tmp_path)
    policy = RoutingPolicy.uniform(loaded.kinds, 8, 0.3)
    x = data.train_batch(2, 0, 0).tokens
    with torch.no_grad():
        assert torch.equal(loaded(x, policy).logits, model(x, policy).logits)


def test_data_is_read_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = tiny_data(), []
    original = data.train_batch

    def spy(count: int, seed: int, step: int) -> Batch:
        asked.append((count, seed, step))
        return original(count, seed, step)

    monkeypatch.setattr(data, "train_batch", spy)
    with pytest.raises(Killed):
        train_supernet(make_model(), data, recipe(seed=4), tmp_path, kill_at(3))
    train_supernet(make_model(), data, recipe(seed=4), tmp_path)
    assert asked == [(4, 4, s) for s in (0, 1, 2, 2, 3, 4, 5, 6)]
    assert isinstance(data, TaskData)


# The command


def command(root: Path, **options: object) -> TrainRunConfig:
    changed: dict[str, Any] = {"name": "t", "root": str(root), "device": "cpu", **options}
    return TrainRunConfig(
        model=tiny_config("r"),
        data=DataConfig(seq_len=64),
        supernet=SupernetConfig(calibration_sequences=8, random_policies=2),
        train=TrainConfig(steps=2, batch_size=4, warmup_steps=0),
        tracking=TrackingConfig(mode=TrackingMode.disabled),
        **changed,
    )


def test_the_command_trains_once_and_a_refused_one_changes_nothing(tmp_path: Path) -> None:
    run_training(command(tmp_path))
    before = {p.name: p.read_bytes() for p in (tmp_path / "t").rglob("*") if p.is_file()}
    assert {"config.yaml", "calibration.json", "step-000002.safetensors"} <= before.keys()
    with pytest.raises(ValueError, match="seed: 0 then, 5 now"):
        run_training(command(tmp_path, seed=5))
    assert (tmp_path / "t" / "config.yaml").read_bytes() == before["config.yaml"]
    run_training(command(tmp_path))
    assert (tmp_path / "t" / "supernet" / "step-000002.safetensors").read_bytes() == before["step-000002.safetensors"]


def test_what_can_be_done_with_a_static_hybrid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = command(tmp_path)
    config.model = tiny_config("ds")
    run_training(config)
    assert "score it: natsl evaluate run=t budget=1 root=" in capsys.readouterr().out.replace(
        "python -m natsl", "natsl"
    )
    run = Run.open("t", tmp_path, create=False)
    with pytest.raises(UserError, match="the model of run 't' has no routed layer: there is nothing to calibrate"):
        make_table(run, "mine", CalibrationDataConfig(), torch.device("cpu"))


def test_the_command_leaves_a_search_alone(tmp_path: Path) -> None:
    run = Run.open("t", tmp_path)
    run.study_db.write_bytes(b"x")
    with pytest.raises(UserError, match="name = 't' is a search"):
        run_training(command(tmp_path))
    assert not run.config.exists()


def test_the_progress_line_can_do_without_a_tasks_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With few sequences a group may have drawn none that asks for anything."""
    config = command(tmp_path)
    config.data.tasks = {"bytes": 1.0, "mqar": 1.0}
    config.train = TrainConfig(steps=12, batch_size=4, warmup_steps=0, log_every=1)
    run_training(config)
    assert "recall softmax/random/delta" in capsys.readouterr().err
