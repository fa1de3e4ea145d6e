"""The files that hold a front."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

from natsl.search.front import Baseline, FamilyFront, Front, Kind, KneeChoice, Point
from natsl.search.lengths import AtLength, Lengths, Planted
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.search_helpers import CHUNK, with_tasks


def small_front() -> Front:
    measured: dict[str, Any] = {
        "val_loss": 2.0,
        "bits_per_byte": 2.9,
        "recall_error": 0.1,
        "needle_error": None,
        "kept_fraction": 0.25,
        "kept_by_layer": (0.0, 0.5),
        "kept_by_head": ((0.0, 0.0), (0.4, 0.6)),
    }
    policy = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.5)), CHUNK)
    ours = {"recall_error": 0.1, "kept_fraction": 0.25}
    theirs = {"recall_error": 0.4, "kept_fraction": 0.26}
    control = Baseline(
        "random@t0003", Kind.random, policy, theirs, measured | theirs, None, {"recall_error": 0.02}, 5, "t0003"
    )
    return Front(
        run="first",
        objectives=("recall_error", "kept_fraction"),
        points=(Point("t0003", policy, ours, ours, measured, ("only-layer-1",), {"recall_error": 0.3}),),
        baselines=(
            Baseline("only-layer-1", Kind.single, policy, ours, measured, ours),
            control,
        ),
        knee="t0003",
        hypervolume=0.75,
        history=(0.5, 0.75),
        fingerprint={"model": "m"},
        families=(small_family(policy, measured),),
        hypervolume_test=0.7,
        knee_choice=KneeChoice("t0003", 0.35, "t0003", 0.35),
    )


def small_family(policy: RoutingPolicy, measured: dict[str, Any]) -> FamilyFront:
    """Two members, of which one is a baseline of the front."""
    values = {"recall_error": 0.2, "kept_fraction": 0.2}
    swept = RoutingPolicy((LayerPolicy(Op.delta), LayerPolicy(budget=0.4)), CHUNK)
    members = (
        Baseline("layer-1-0.4", Kind.family, swept, values, measured | values, values),
        Baseline("only-layer-1", Kind.single, policy, values, measured, values),
    )
    return FamilyFront("one-layer", "one layer", members, 0.6, 0.65, 0.05, 0.01)


def test_front_json_is_what_the_specification_says() -> None:
    plain = json.loads(json.dumps(small_front().to_dict(), allow_nan=False))
    assert plain["run"] == "first"
    assert plain["objectives"] == [
        {"name": "recall_error", "direction": "minimize"},
        {"name": "kept_fraction", "direction": "minimize"},
    ]
    point = plain["points"][0]
    assert point["id"] == plain["knee"] == "t0003"
    assert RoutingPolicy.from_dict(point["policy"]).digest() == point["digest"]
    assert point["values"] == {"recall_error": 0.1, "kept_fraction": 0.25}
    assert point["measured"]["kept_by_head"] == [[0.0, 0.0], [0.4, 0.6]]
    assert point["dominated_by"] == ["only-layer-1"]
    single, control = plain["baselines"]
    assert (single["name"], single["kind"], single["search_values"]) == ("only-layer-1", "single", point["values"])
    assert (control["of"], control["draws"], control["std"]) == ("t0003", 5, {"recall_error": 0.02})
    assert (plain["hypervolume"], plain["hypervolume_history"]) == (0.75, [0.5, 0.75])
    assert plain["fingerprint"] == {"model": "m"}
    (family,) = plain["families"]
    points = family.pop("points")
    assert [RoutingPolicy.from_dict(item["policy"]).describe() for item in points] == ["D .4", "D .5"]
    assert [(item["name"], item["kind"]) for item in points] == [("layer-1-0.4", "family"), ("only-layer-1", "single")]
    values = {"recall_error": 0.2, "kept_fraction": 0.2}
    assert [(item["values"], item["search_values"]) for item in points] == [(values, values)] * 2
    assert family == {
        "name": "one-layer",
        "label": "one layer",
        "hypervolume_search": 0.6,
        "hypervolume_test": 0.65,
        "gain": 0.05,
        "gain_error": 0.01,
    }
    assert plain["hypervolume_test"] == 0.7
    assert plain["knee_choice"] == {"point": "t0003", "sum": 0.35, "best": "t0003", "best_sum": 0.35, "cost": 0.0}


def test_a_front_is_read_back_from_its_json() -> None:
    at = AtLength(
        128, 2, {"mqar": Planted(4, 5)}, {"t0003": {"val_loss": 2.0}}, {"t0003": {"kv_bytes": 3.0}}, {"a": "b"}
    )
    for front in (small_front(), replace(small_front(), lengths=Lengths(64, 64, (at,)), facts={"select": "run=first"})):
        plain = json.loads(json.dumps(front.to_dict(), allow_nan=False))
        again = Front.from_dict(plain)
        assert json.loads(json.dumps(again.to_dict())) == plain
        assert (again.run, again.knee, again.lengths, again.facts) == (
            front.run,
            front.knee,
            front.lengths,
            front.facts,
        )
        assert [item.name for item in again.rows] == [item.name for item in front.rows]
        assert again.to_csv() == front.to_csv()


def test_front_csv_has_a_row_per_point_and_baseline() -> None:
    rows = list(csv.DictReader(io.StringIO(small_front().to_csv())))
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("t0003", "front"),
        ("only-layer-1", "single"),
        ("random@t0003", "random"),
        ("layer-1-0.4", "family"),
    ]
    assert (rows[0]["recall_error"], rows[0]["search_recall_error"], rows[0]["val_loss"]) == ("0.1", "0.1", "2.0")
    assert (rows[0]["knee"], rows[0]["dominated_by"], rows[0]["policy"]) == ("knee", "only-layer-1", "D .5")
    assert (rows[2]["std_recall_error"], rows[2]["search_recall_error"], rows[1]["knee"]) == ("0.02", "", "")


def test_front_csv_has_the_kept_fraction_of_each_of_several_tasks() -> None:
    front = small_front()
    older, single = front.to_csv(), with_tasks(front, "mqar").to_csv()
    assert older == single
    several = with_tasks(front, "bytes", "mqar", "needle")
    rows = list(csv.DictReader(io.StringIO(several.to_csv())))
    for row in rows:
        assert [row.pop(f"kept_{task}") for task in ("bytes", "mqar", "needle")] == ["0.0", "0.5", "1.0"]
    assert rows == list(csv.DictReader(io.StringIO(older)))
    mixed = replace(
        several, baselines=front.baselines, families=front.families
    )  # these were stored by an older version
    last = list(csv.DictReader(io.StringIO(mixed.to_csv())))[-1]
    assert (last["kept_bytes"], last["kept_mqar"]) == ("", "")


def test_front_json_has_the_kept_fraction_of_each_task() -> None:
    plain = json.loads(json.dumps(with_tasks(small_front(), "bytes", "mqar").to_dict(), allow_nan=False))
    for item in (*plain["points"], *plain["baselines"]):
        assert item["measured"]["kept_by_task"]["mqar"] == {"kept_fraction": 1.0, "by_head": [[1.0, 1.0], [1.0, 1.0]]}


def test_quality_and_cost_are_chosen_from_the_objectives() -> None:
    front = small_front()
    assert (front.quality, front.cost) == ("recall_error", "kept_fraction")
    assert front.random_of("t0003") is front.baselines[1]
    assert front.random_of("only-layer-1") is None
