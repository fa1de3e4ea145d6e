"""What a study shows to people who open it with Optuna's own tools; that nothing of it matters to a resume."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import optuna
import pytest

from natsl.search import dashboard
from natsl.search.config import SearchConfig
from natsl.search.dashboard import note
from natsl.search.study import open_policy_study
from natsl.space.policy import RoutingPolicy
from tests.search_helpers import problem, searched, synthetic

NOTE = "dashboard:note_str:"


def read_note(study: optuna.Study) -> str:
    """The note of a study, as optuna-dashboard puts it together from the version and pieces that it stores."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    pieces = [key for key in attributes if key.startswith(NOTE)]
    assert attributes["dashboard:note_ver"] == 1
    assert all(len(attributes[key]) <= 2045 for key in pieces)
    return "".join(attributes[f"{NOTE}{i}"] for i in range(len(pieces)))


def load(folder: Path) -> optuna.Study:
    return optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name="first")


def test_a_study_can_be_read_by_people(tmp_path: Path) -> None:
    config = SearchConfig(n_trials=14, anchors=10, constraints={"kept_fraction": 0.6})
    searched(tmp_path, config).close()
    study = load(tmp_path)
    assert study.metric_names == ["recall_error", "kept_fraction"]
    text = read_note(study)
    assert text == note("first", config.objectives, config.constraints)
    for part in (
        "natsl search first",
        "`recall_error`: recall error, minimize",
        "`kept_fraction` ≤ 0.6",
        "`u.<layer>`",
    ):
        assert part in text
    assert len(study.trials) == 14
    seen = set()
    for trial in study.trials:
        policy = RoutingPolicy.from_dict(trial.user_attrs["policy"])
        assert trial.user_attrs["policy_text"] == policy.describe()
        assert trial.user_attrs["kept_fraction"] == trial.user_attrs["evaluation"]["kept_fraction"]
        counts = [part.split() for part in trial.user_attrs["ops"].split(", ")]
        assert {op: int(count) for count, op in counts} == {
            op: sum(layer.op.value == op for layer in policy.layers) for _, op in counts
        }
        assert sum(int(count) for count, _ in counts) == len(policy.layers)
        seen |= {op for _, op in counts}
        assert {key.partition(".")[0] for key in trial.params} == {"u"}
    assert seen == {"delta", "softmax", "routed"}


def test_a_study_from_before_is_introduced_and_an_edited_note_stays(tmp_path: Path) -> None:
    config = SearchConfig(n_trials=4, anchors=2)
    first = searched(tmp_path, config)
    fingerprint, digests = first.fingerprint, [record.policy.digest() for record in first.records]
    first.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("DELETE FROM study_system_attributes")
        connection.execute("DELETE FROM trial_user_attributes WHERE key IN ('policy_text', 'ops', 'kept_fraction')")
    again = open_policy_study(
        tmp_path / "study.db", "first", SearchConfig(n_trials=6), problem(config), 0, {"model": "m"}
    )
    assert (again.fingerprint, [record.policy.digest() for record in again.records]) == (fingerprint, digests)
    again.run(synthetic)
    assert len(again.records) == 6
    again.close()
    study = load(tmp_path)
    assert study.metric_names == config.objectives
    assert read_note(study).startswith("# natsl search first")
    study._storage.set_study_system_attr(study._study_id, f"{NOTE}0", "mine")
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_ver", 2)
    searched(tmp_path, SearchConfig(n_trials=6)).close()
    attributes = study._storage.get_study_system_attrs(study._study_id)
    assert (attributes[f"{NOTE}0"], attributes["dashboard:note_ver"]) == ("mine", 2)


def test_a_long_note_is_stored_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "_PIECE_LENGTH", 500)
    searched(tmp_path, SearchConfig(n_trials=2)).close()
    study = load(tmp_path)
    assert f"{NOTE}2" in study._storage.get_study_system_attrs(study._study_id)
    assert read_note(study) == note("first", SearchConfig().objectives, {})
