"""Points of a front measured again on longer sequences, and the length that costs are billed at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl.checkpoint import load_model
from natsl.config import SupernetConfig
from natsl.data import Split, TaskData, load_text
from natsl.errors import UserError
from natsl.evaluate import Evaluation, evaluate
from natsl.files import read_config
from natsl.run import Run
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.front import Front
from natsl.search.lengths import AtLength, LengthRunner, Lengths, Planted
from natsl.search.objective import CostContext
from natsl.search.pipeline import run_search
from natsl.search.prepare import make_problem
from natsl.search.report.headline import headline
from natsl.search.report.html import render
from natsl.space import cost
from natsl.space.policy import RoutingPolicy
from natsl.space.space import Control, SearchSpace
from tests.search_helpers import synthetic_judge
from tests.test_pipeline import interrupted, tiny

pytestmark = pytest.mark.usefixtures("no_picture")

LONGER: dict[str, Any] = {"lengths": [2, 1], "objectives": ["val_loss", "kept_fraction"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Run, Front]:
    """A finished search that went to twice its length."""
    root = tmp_path_factory.mktemp("runs")
    front = run_search(tiny(root, text, **LONGER))
    assert front is not None
    return Run.open("first", root, create=False), front


def test_points_are_measured_at_every_length(done: tuple[Run, Front]) -> None:
    front = done[1]
    assert front.lengths is not None
    assert (front.lengths.searched_at, front.lengths.billed_at) == (64, 64)
    own, double = front.lengths.measured
    assert (own.tokens, own.sequences, double.tokens, double.sequences) == (64, 3, 128, 3)
    names = {item.of for item in front.comparisons} | {"all-softmax", "all-delta"}
    assert set(own.measured) == set(double.measured) == set(own.costs) == names
    assert len(names) > 2, "the search has points that route"
    for name, measured in own.measured.items():
        known = next(item for item in front.rows if item.name == name)
        assert measured == known.measured, "the sequences of the test split"
    assert (own.planted, double.planted) == ({"mqar": Planted(8, 8)}, {"mqar": Planted(16, 16)})


def test_what_is_measured_is_the_policy_on_those_sequences(done: tuple[Run, Front], text: str) -> None:
    run, front = done
    assert front.lengths is not None
    model, config = load_model(run.supernet)[0], tiny(run.path.parent, text)
    data = TaskData(config.data, load_text(text), config.model.vocab_size)
    sets = {"mqar": data.batch("mqar", Split.test, 3, 0, length=128, grow=True)}
    policy = RoutingPolicy.all_softmax(model.kinds, 8)
    found = front.lengths.measured[1]
    expected = evaluate(model, policy, sets, batch_size=4)
    assert found.measured["all-softmax"]["recall_error"] == expected.errors["recall_error"]
    bill = found.costs["all-softmax"]["decode_bytes"]
    assert bill == cost.decode_bytes(config.model.layer_shapes(), policy, expected.kept_by_layer, 128)
    assert bill > found.costs["all-delta"]["decode_bytes"]
    assert bill > front.lengths.measured[0].costs["all-softmax"]["decode_bytes"]


def test_files_and_report_show_them(done: tuple[Run, Front]) -> None:
    run, front = done
    plain = json.loads(run.front_json.read_text())["lengths"]
    assert front.lengths is not None
    assert plain == json.loads(json.dumps(front.lengths.to_dict()))
    assert [item["tokens"] for item in plain["measured"]] == [64, 128]
    page = run.report.read_text()
    assert "<h2>Longer sequences</h2>" in page
    assert "128 tokens" in page
    assert "16 to recall in mqar" in page
    assert "were measured at" not in page, "costs are billed where fractions were measured"


def test_the_headline_has_the_knee_at_the_greatest_length(done: tuple[Run, Front]) -> None:
    front = done[1]
    name = front.comparisons[0].of
    last = headline(replace(front, knee=name))[-1][0]
    assert last.startswith(f"At 128 tokens {name} keeps ")
    assert ", all-softmax " in last
    assert not any(text.startswith("At 64") for text, _ in headline(replace(front, lengths=Lengths(64, 64))))


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_stage_goes_on_where_it_stopped(
    at: int, done: tuple[Run, Front], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(inner: Callable[..., Evaluation]) -> Callable[..., Evaluation]:
        def evaluated(model: Any, policy: RoutingPolicy, *args: Any, **named: Any) -> Evaluation:
            result = inner(model, policy, *args, **named)
            calls.append(policy.digest())
            return result

        return evaluated

    monkeypatch.setattr("natsl.evaluate.evaluate", counted(interrupted(evaluate, at)))
    with pytest.raises(KeyboardInterrupt):
        run_search(tiny(tmp_path, text, **LONGER))
    monkeypatch.setattr("natsl.evaluate.evaluate", counted(evaluate))
    front = run_search(tiny(tmp_path, text, **LONGER))
    assert front is not None
    assert front.lengths == done[1].lengths
    assert len(calls) == len(set(calls)) == len(done[1].lengths.measured[1].measured)  # type: ignore[union-attr]


def test_a_fault_at_a_length_is_told_in_the_report(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Evaluation:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("natsl.evaluate.evaluate", fails)
    front = run_search(tiny(tmp_path, text, **LONGER))
    assert front is not None
    assert front.lengths is not None
    (longer,) = (item for item in front.lengths.measured if item.tokens == 128)
    assert longer.measured == {}
    assert set(longer.left_out.values()) == {"OutOfMemoryError: CUDA out of memory"}
    assert "CUDA out of memory" in render(front)


def test_a_search_that_was_taken_away_reports_no_lengths(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: Any, **__: Any) -> Evaluation:
        raise UserError("the study 'first' is process 7's")

    monkeypatch.setattr("natsl.evaluate.evaluate", taken)
    with pytest.raises(UserError, match="process 7"):
        run_search(tiny(tmp_path, text, **LONGER))
    assert not Run.open("first", tmp_path, create=False).report.exists()


def test_lengths_can_be_asked_for_later(text: str, tmp_path: Path) -> None:
    first = run_search(tiny(tmp_path, text, n_trials=2))
    assert first is not None
    assert first.lengths == Lengths(64, 64)
    assert "Longer sequences" not in render(first)
    again = run_search(tiny(tmp_path, text, n_trials=2, lengths=[2]))
    assert again is not None
    assert again.lengths is not None
    assert [item.tokens for item in again.lengths.measured] == [128]
    assert run_search(tiny(tmp_path, text, n_trials=2, lengths=[2])) is None


def test_a_length_that_cannot_be_made_is_left_out_and_reported(text: str, tmp_path: Path) -> None:
    """The text has too few bytes; the rest of the report is made."""
    front = run_search(tiny(tmp_path, text, n_trials=1, lengths=[100_000]))
    assert front is not None
    assert front.lengths is not None
    (found,) = front.lengths.measured
    assert not found.measured
    assert "too short" in found.left_out["mqar"]
    assert "mqar left out" in render(front)


def test_costs_are_billed_at_the_length_that_is_searched(text: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, text)
    assert config.search.context is None
    assert make_problem(config).costs.context == 64
    assert make_problem(replace(config, search=SearchConfig(context=5000))).costs.context == 5000


def test_a_context_of_its_own_is_billed_and_told(text: str, tmp_path: Path) -> None:
    objectives = ["recall_error", "decode_bytes"]
    own, far = (
        run_search(replace(tiny(tmp_path, text, objectives=objectives, n_trials=2, context=context), name=name))
        for name, context in (("own", None), ("far", 4096))
    )
    assert own is not None
    assert far is not None
    assert own.fingerprint["context"] == 64
    assert far.fingerprint["context"] == 4096
    softmax = [next(item for item in front.baselines if item.name == "all-softmax") for front in (own, far)]
    assert softmax[1].values["decode_bytes"] > 10 * softmax[0].values["decode_bytes"]
    assert far.lengths == Lengths(64, 4096), "on a CPU nothing is measured at the context"
    line = "Kept fractions were measured at 64 tokens and costs are billed at 4,096: nothing was measured there."
    assert line in render(far)
    again = replace(far, lengths=Lengths(64, 4096, (AtLength(4096, 1, {}, {"all-delta": {}}, {"all-delta": {}}, {}),)))
    assert "where some policies were measured again" in render(again)
    assert "were measured at" not in render(own)


@pytest.mark.parametrize(
    ("device", "context", "lengths"),
    [("cpu", 4096, (64, 192)), ("cuda", 4096, (64, 192, 4096)), ("cuda", 64, (64, 192)), ("cuda", 192, (64, 192))],
)
def test_on_a_gpu_points_are_measured_at_the_context_too(
    device: str, context: int, lengths: tuple[int, ...], text: str, tmp_path: Path
) -> None:
    config = tiny(tmp_path, text, lengths=[3, 1])
    data = TaskData(config.data, load_text(text), config.model.vocab_size)
    at = CostContext(config.model.layer_shapes(), context)
    assert LengthRunner(synthetic_judge(), data, config.search, at, device == "cuda").lengths == lengths


def test_an_older_search_keeps_the_length_that_it_was_billed_at(text: str, tmp_path: Path) -> None:
    old = tiny(tmp_path, text, n_trials=1, context=32768)
    run_search(old)
    assert read_config(Run.open("first", tmp_path, create=False).config)["search"]["context"] == 32768
    with pytest.raises(ValueError, match=r"search\.context: 32768 then, None now"):
        run_search(tiny(tmp_path, text, n_trials=1))
    assert run_search(old) is None


@pytest.mark.parametrize("value", [0, -1, 1.5, True], ids=repr)
def test_lengths_are_multiples(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"search.lengths\[1\] = {value!r}"):
        SearchConfig(lengths=[2, value])


def test_capped_growth_is_said(done: tuple[Run, Front]) -> None:
    front = done[1]
    assert front.lengths is not None
    few = replace(front.lengths.measured[1], planted={"mqar": Planted(12, 16)})
    page = render(replace(front, lengths=replace(front.lengths, measured=(few,))))
    assert "12 to recall in mqar, not 16: there are no more keys" in page


def test_a_search_beyond_the_budgets_of_training_says_so() -> None:
    """Of three layers with a mean of .6 one may have 1; with a mean of .2 none had more than .6."""
    assert SearchRunConfig(supernet=SupernetConfig(budget_max=0.6)).untrained_budgets() is None
    seen = SearchRunConfig(supernet=SupernetConfig(budget_min=0.0, budget_max=0.2))
    line = seen.untrained_budgets()
    assert line is not None
    assert "search.space.budget_max = 1 asks for more than training saw: a layer had 0.6 at most" in line
    narrow = replace(seen, search=SearchConfig(space=SearchSpace(budget_max=0.6)))
    assert narrow.untrained_budgets() is None
    thresholds = SearchSpace(control=Control.threshold)
    assert replace(seen, search=SearchConfig(space=thresholds)).untrained_budgets() is None
