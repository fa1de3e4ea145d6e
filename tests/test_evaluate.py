"""Measured quality and kept fractions against a computation by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from natsl import tasks
from natsl.checkpoint import build_model, file_sha256
from natsl.config import Precision
from natsl.counts import Counts
from natsl.data import Split
from natsl.errors import UserError
from natsl.evaluate import Evaluation, RandomRouting, count, count_each, evaluate, summary
from natsl.export import _write
from natsl.files import to_plain, write_json
from natsl.load import load_exported
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.tasks import TASKS, metrics
from natsl.tasks.needle import NeedleTask
from natsl.tasks.sequences import IGNORED, Batch
from tests.oracles import fill_calibration, tiny_data, tiny_model

ROUTED = LayerPolicy(budget=0.4)


def make_model(kinds: str = "rrr") -> RoutedLM:
    model = tiny_model(kinds)
    fill_calibration(model)
    return model


def policy(*layers: LayerPolicy) -> RoutingPolicy:
    return RoutingPolicy(layers, 8)


def make_sets() -> dict[str, Batch]:
    return tiny_data(tasks={"bytes": 1.0, "mqar": 1.0, "needle": 1.0}).eval_sets(Split.search)


def test_values_by_hand() -> None:
    model, sets = make_model("rds"), make_sets()
    p = policy(ROUTED, LayerPolicy(Op.delta), LayerPolicy(Op.softmax))
    result = evaluate(model, p, sets)
    losses, errors = [], {}
    for task, batch in sets.items():
        with torch.no_grad():
            logits = model(batch.tokens, p).logits
        text = (batch.targets != IGNORED) & ~batch.recall
        losses.append(F.cross_entropy(logits[text], batch.targets[text], reduction="none"))
        if batch.recall.any():
            errors[task] = 1 - (logits.argmax(-1) == batch.targets)[batch.recall].double().mean().item()
    loss = float(torch.cat(losses).double().mean())
    assert result.val_loss == pytest.approx(loss, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert result.errors["recall_error"] == pytest.approx(errors["mqar"])
    assert result.errors["needle_error"] == pytest.approx(errors["needle"])


def test_tasks_that_were_not_asked_for_have_no_value() -> None:
    sets = make_sets()
    result = evaluate(make_model(), policy(ROUTED, ROUTED, ROUTED), {"bytes": sets["bytes"]})
    assert result.val_loss is not None
    assert result.errors == dict.fromkeys(metrics().values())
    asked = sets["mqar"]
    targets = torch.where(asked.recall, asked.targets, IGNORED)
    only_recall = evaluate(
        make_model(), policy(ROUTED, ROUTED, ROUTED), {"mqar": Batch(asked.tokens, targets, asked.recall)}
    )
    assert only_recall.val_loss is only_recall.bits_per_byte is None
    assert only_recall.errors["recall_error"] is not None


class EchoTask(NeedleTask):
    """A task that only this test knows."""

    name = "echo"
    metric = "echo_error"


def test_the_error_of_a_new_task_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "echo", EchoTask)
    sets = make_sets()
    result = evaluate(make_model(), policy(ROUTED, ROUTED, ROUTED), {"bytes": sets["bytes"], "echo": sets["needle"]})
    error = result.to_dict()["echo_error"]
    assert error is not None
    assert 0 <= error <= 1
    assert result.errors == {**dict.fromkeys(metrics().values()), "echo_error": error}
    assert list(result.errors) == list(metrics().values())
    assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_fractions_of_each_task_are_those_of_its_sequences_by_themselves() -> None:
    model, sets = make_model("rds"), make_sets()
    sets["bytes"] = tiny_data(tasks={"bytes": 1.0}, seq_len=52).eval_sets(Split.search)["bytes"].rows(slice(0, 3))
    p = policy(LayerPolicy(threshold=0.1), LayerPolicy(Op.delta), LayerPolicy(Op.softmax))
    result = evaluate(model, p, sets, batch_size=2)
    assert list(result.kept_by_task) == list(result.kept_fraction_by_task) == list(sets)
    for task, batch in sets.items():
        alone = evaluate(model, p, {task: batch})
        assert result.kept_by_task[task] == alone.kept_by_head == alone.kept_by_task[task]
        assert result.kept_fraction_by_task[task] == alone.kept_fraction == alone.kept_fraction_by_task[task]
        with torch.no_grad():
            margins = model(batch.tokens, p).layers[0].margins
        assert margins is not None
        by_head = (margins[:, : batch.tokens.shape[1] // 8] > 0.1).double().mean((0, 1))
        assert result.kept_by_task[task][0] == pytest.approx(by_head.tolist())
        assert result.kept_by_task[task][1:] == ((0, 0), (1, 1))
    chunks = {task: len(batch) * (batch.tokens.shape[1] // 8) for task, batch in sets.items()}
    assert len(set(chunks.values())) == 2, "tasks of other sizes weigh otherwise"
    assert len(set(result.kept_fraction_by_task.values())) > 1
    pooled = sum(chunks[task] * result.kept_fraction_by_task[task] for task in sets) / sum(chunks.values())
    assert result.kept_fraction == pytest.approx(pooled)


def test_fractions_of_tasks_are_readable_and_read_back() -> None:
    result = evaluate(make_model("rd"), policy(ROUTED, LayerPolicy(Op.delta)), make_sets())
    plain = json.loads(json.dumps(result.to_dict()))
    assert list(plain)[-1] == "kept_by_task"
    assert list(plain["kept_by_task"]) == ["bytes", "mqar", "needle"]
    for task, kept in plain["kept_by_task"].items():
        assert kept["kept_fraction"] == pytest.approx(sum(kept["by_head"][0]) / 2)
        assert kept["by_head"] == [list(heads) for heads in result.kept_by_task[task]]
    assert Evaluation.from_dict(plain) == result


STORED = """{"val_loss": 2.5, "bits_per_byte": 3.6, "recall_error": 0.25, "needle_error": null, "kept_fraction": 0.5,
"kept_by_layer": [0.5, 1.0], "kept_by_head": [[0.25, 0.75], [1.0, 1.0]]}"""


def test_a_stored_evaluation_is_read_and_written_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and fronts of any age hold this flat form."""
    monkeypatch.setattr(tasks, "TASKS", {name: TASKS[name] for name in ("bytes", "mqar", "needle")})
    stored = Evaluation.from_dict(json.loads(STORED))
    assert stored == Evaluation(
        2.5, 3.6, {"recall_error": 0.25, "needle_error": None}, 0.5, (0.5, 1.0), ((0.25, 0.75), (1.0, 1.0))
    )
    assert (stored.kept_by_task, stored.kept_fraction_by_task) == ({}, {})
    assert json.dumps(stored.to_dict()) == STORED.replace("\n", " ")
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "echo": EchoTask})
    assert Evaluation.from_dict(json.loads(STORED)).errors["echo_error"] is None


def test_perfect_answers_have_no_error() -> None:
    model, batch = make_model("r"), make_sets()["mqar"]
    p = policy(ROUTED)
    with torch.no_grad():
        answers = model(batch.tokens, p).logits.argmax(-1)
    right = Batch(batch.tokens, torch.where(batch.recall, answers, batch.targets), batch.recall)
    assert evaluate(model, p, {"mqar": right}).errors["recall_error"] == 0
    wrong = Batch(batch.tokens, torch.where(batch.recall, (answers + 1) % 384, batch.targets), batch.recall)
    assert evaluate(model, p, {"mqar": wrong}).errors["recall_error"] == 1


@pytest.mark.parametrize("length", [16, 20, 23])
def test_kept_fraction_counts_complete_chunks_alone(length: int) -> None:
    model = make_model("rrrrs")
    x = torch.randint(0, 256, (6, length))
    batch = Batch(x, torch.roll(x, -1, 1), torch.zeros_like(x, dtype=torch.bool))
    capped = LayerPolicy(threshold=-math.inf, cap=0.5)
    p = policy(
        LayerPolicy(Op.softmax), LayerPolicy(Op.delta), LayerPolicy(threshold=0.1), capped, LayerPolicy(Op.softmax)
    )
    result = evaluate(model, p, {"bytes": batch}, batch_size=4)
    with torch.no_grad():
        margins = model(x, p).layers[2].margins
    assert margins is not None
    by_head = (margins[:, :2] > 0.1).double().mean((0, 1))
    assert result.kept_by_head[2] == pytest.approx(by_head.tolist())
    assert result.kept_by_layer == pytest.approx([1, 0, by_head.mean().item(), 0.5, 1])
    assert result.kept_fraction == pytest.approx((1 + 0 + by_head.mean().item() + 0.5) / 4), "layers with a router"


def test_model_without_a_router_keeps_nothing() -> None:
    result = evaluate(make_model("ds"), policy(LayerPolicy(Op.delta), LayerPolicy(Op.softmax)), make_sets())
    assert result.kept_fraction == 0
    assert result.kept_by_layer == (0, 1)
    assert result.kept_fraction_by_task == dict.fromkeys(("bytes", "mqar", "needle"), 0.0)


def test_batch_size_does_not_matter() -> None:
    model, sets, p = make_model(), make_sets(), policy(ROUTED, ROUTED, LayerPolicy(Op.delta))
    one, other = (evaluate(model, p, sets, batch_size=n) for n in (3, 32))
    assert one.val_loss == pytest.approx(other.val_loss, rel=1e-5)
    for a, b in zip(one.kept_by_head, other.kept_by_head, strict=True):
        assert a == pytest.approx(b)
    assert one.errors["recall_error"] == other.errors["recall_error"]


def test_random_routing_keeps_its_fractions_where_the_policy_routes() -> None:
    model = make_model()
    batch = tiny_data(tasks={"bytes": 1.0}, test_sequences=200).eval_sets(Split.test)
    p = policy(ROUTED, LayerPolicy(Op.softmax), ROUTED)
    results = [evaluate(model, p, batch, random_routing=RandomRouting(s, (0.2, 0.5, 0.7))) for s in (0, 0, 1)]
    for result in results:
        heads_and_chunks = 2 * sum(len(item) * (item.tokens.shape[1] // 8) for item in batch.values())
        expected = [round(fraction * heads_and_chunks) / heads_and_chunks for fraction in (0.2, 1.0, 0.7)]
        assert result.kept_by_layer == pytest.approx(expected, abs=1e-12)
        assert result.kept_fraction == pytest.approx(sum(result.kept_by_layer) / 3)
    assert results[0] == results[1]
    assert results[0].val_loss != results[2].val_loss
    all_kept, none_kept = (
        evaluate(model, p, batch, random_routing=RandomRouting(0, (f, 0.5, f))).kept_by_layer for f in (1.0, 0.0)
    )
    assert all_kept == (1, 1, 1)
    assert none_kept == (0, 1, 0)


@pytest.mark.parametrize("length", [16, 21], ids=["whole chunks", "partial chunk"])
def test_random_routing_keeps_exactly_what_a_policy_kept_at_any_batch_size(length: int) -> None:
    model, x = make_model(), torch.randint(0, 256, (7, length))
    batch = Batch(x, torch.roll(x, -1, 1), torch.zeros_like(x, dtype=torch.bool))
    sets = {"bytes": batch, "more": batch.rows(slice(0, 3))}
    p = policy(ROUTED, LayerPolicy(threshold=0.1), LayerPolicy(Op.delta))
    kept = evaluate(model, p, sets).kept_by_layer
    for seed in range(5):
        one, other = (evaluate(model, p, sets, random_routing=RandomRouting(seed, kept), batch_size=n) for n in (2, 32))
        assert one.kept_by_layer == pytest.approx(kept, abs=1e-12)
        assert one.kept_by_head == other.kept_by_head
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-5)


def test_random_routing_needs_a_fraction_per_layer() -> None:
    with pytest.raises(ValueError, match=r"RandomRouting.fractions = \(0.5,\)"):
        evaluate(make_model(), policy(ROUTED, ROUTED, ROUTED), make_sets(), random_routing=RandomRouting(0, (0.5,)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_results_that_are_not_finite_are_refused(value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed.weight[100] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate(model, policy(ROUTED, ROUTED, ROUTED), make_sets())


def test_answers_that_are_not_finite_are_refused_though_the_text_is() -> None:
    model, batch = make_model("r"), make_sets()["mqar"]

    def break_end(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(out.shape[1])[None, :, None] < out.shape[1] - 2, out, math.nan)

    model.norm.register_forward_hook(break_end)
    with pytest.raises(FloatingPointError, match="logits of task mqar are not finite"):
        evaluate(model, policy(ROUTED), {"mqar": batch})


def test_an_exported_model_computes_in_the_precision_that_it_was_trained_in(tmp_path: Path) -> None:
    model, sets, p = make_model(), make_sets(), policy(ROUTED, ROUTED, ROUTED)
    state, exact = model.state_dict(), evaluate(model, p, sets)
    model = build_model(to_plain(model.config), state, Precision.bfloat16)
    half = evaluate(model, p, sets)
    assert half.val_loss == pytest.approx(exact.val_loss, rel=1e-2)
    assert half.val_loss != exact.val_loss
    for value in ("bfloat16", None, "int8"):
        _write(tmp_path, model, p, {})
        if value != "bfloat16":  # None: by an older natsl
            config = json.loads((tmp_path / "config.json").read_text())
            own = {k: v for k, v in config["natsl"].items() if k != "precision"}
            config["natsl"] = own if value is None else {**own, "precision": value}
            write_json(tmp_path / "config.json", config)
            manifest = json.loads((tmp_path / "manifest.json").read_text())
            manifest["files"]["config.json"] = file_sha256(tmp_path / "config.json")
            write_json(tmp_path / "manifest.json", manifest)
        if value == "int8":
            with pytest.raises(
                UserError, match="precision = 'int8' is not allowed: it must be one of float32, bfloat16"
            ):
                load_exported(tmp_path)
            continue
        loaded, _ = load_exported(tmp_path)
        assert {t.dtype for t in loaded.parameters()} == {torch.float32}
        assert evaluate(loaded, p, sets) == (half if value == "bfloat16" else exact)


def test_results_are_the_sums_of_what_is_counted_in_every_sequence() -> None:
    model, sets, p = make_model("rds"), make_sets(), policy(ROUTED, LayerPolicy(Op.delta), LayerPolicy(Op.softmax))
    counts, result = count(model, p, sets, batch_size=3), evaluate(model, p, sets, batch_size=3)
    assert summary(counts, model.kinds) == result
    for task, batch in sets.items():
        own = counts[task]
        assert own.kept[:, 2].eq(own.chunks).all()
        for i in range(len(batch)):
            alone = evaluate(model, p, {task: batch.rows(slice(i, i + 1))})
            if own.tokens[i]:
                assert float(own.nats[i] / own.tokens[i]) == pytest.approx(alone.val_loss, rel=1e-5)
            if own.asked[i]:
                assert 1 - float(own.right[i] / own.asked[i]) == pytest.approx(alone.errors[metrics()[task]])
            assert torch.allclose(own.kept[i] / own.chunks, torch.tensor(alone.kept_by_head))


def test_counts_are_read_back_as_they_were() -> None:
    model, p = make_model("rd"), policy(ROUTED, LayerPolicy(Op.delta))
    for counts in count(model, p, make_sets(), batch_size=3).values():
        again = Counts.from_dict(json.loads(json.dumps(counts.to_dict())))
        for name in ("nats", "tokens", "right", "asked", "kept"):
            assert torch.equal(getattr(again, name), getattr(counts, name))
        assert again.chunks == counts.chunks
        older = {key: value for key, value in counts.to_dict().items() if key != "in_bytes"}
        assert Counts.from_dict(older).in_bytes


def test_token_ids_have_a_loss_and_no_bits_per_byte() -> None:
    model, p = make_model("rd"), policy(ROUTED, LayerPolicy(Op.delta))
    sets = make_sets()
    of_ids = {task: replace(batch, in_bytes=False) for task, batch in sets.items()}
    in_bytes, result = evaluate(model, p, sets), evaluate(model, p, of_ids)
    assert in_bytes.bits_per_byte is not None
    assert result == replace(in_bytes, bits_per_byte=None)
    assert result.to_dict()["bits_per_byte"] is None
    (each,) = count_each(model, [p], of_ids)
    assert each is not None
    plain = {task: json.loads(json.dumps(counts.to_dict())) for task, counts in each.items()}
    again = {task: Counts.from_dict(counts).rows(slice(0, 2)) for task, counts in plain.items()}
    assert summary(again, model.kinds).bits_per_byte is None, "it is stored with the counts"
