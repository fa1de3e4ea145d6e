"""Dominance, knee and hypervolume."""

from __future__ import annotations

import itertools
import random

import pytest

from natsl.search.pareto import Scale, Volume, covers, dominates, family_dominates, mixture_dominates, non_dominated

AB = ("a", "b")


def values(*rows: tuple[float, ...]) -> list[dict[str, float]]:
    return [dict(zip("abcd", row, strict=False)) for row in rows]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0), (1, 1), (True, True)),
        ((0, 1), (0, 2), (True, True)),
        ((1, 1), (1, 1), (True, False)),
        ((0, 2), (1, 1), (False, False)),
        ((2, 2), (1, 1), (False, False)),
    ],
    ids=["better in both", "better in one", "equal", "a trade", "worse"],
)
def test_dominance(first: tuple[float, float], second: tuple[float, float], expected: tuple[bool, bool]) -> None:
    a, b = values(first, second)
    assert (covers(a, b, AB), dominates(a, b, AB)) == expected


@pytest.mark.parametrize("count", [80, 400])
@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_non_dominated_agrees_with_its_definition(objectives: int, count: int) -> None:
    rng = random.Random(objectives)
    names = "abcd"[:objectives]
    rows = values(*[tuple(rng.randrange(6) for _ in names) for _ in range(count)])
    found = non_dominated(rows, names)
    free = [i for i, row in enumerate(rows) if not any(dominates(other, row, names) for other in rows)]
    first_of_equal = [i for i in free if rows[i] not in rows[:i]]
    assert found == first_of_equal


def test_nothing_and_equal_values_have_a_front() -> None:
    assert non_dominated([], AB) == []
    assert non_dominated(values((1, 1), (1, 1), (1, 1)), AB) == [0]


@pytest.mark.parametrize(
    ("first", "second", "other", "expected"),
    [
        ((0, 1), (1, 0), (0.5, 0.6), True),
        ((0, 1), (1, 0), (0.5, 0.5), False),
        ((0, 1), (1, 0), (0.5, 0.4), False),
        ((0, 1), (1, 0), (0, 1), False),
        ((0, 1), (1, 0), (1, 0.1), True),
        ((0, 1), (0, 0), (0, 0.5), True),
        ((0.2, 1), (0.2, 0), (0.1, 0.5), False),
        ((0.5, 0.5), (0.5, 0.5), (0.5, 0.6), True),
        ((0.5, 0.5), (0.5, 0.5), (0.5, 0.5), False),
        ((0, 0, 1), (1, 1, 0), (0.5, 0.5, 0.6), True),
        ((0, 0, 1), (1, 1, 0), (0.5, 0.4, 0.5), False),
        ((0, 0, 1), (1, 1, 0), (0.5, 0.4, 0.6), True),
        ((0, 1, 0.3), (1, 0, 0.3), (0.5, 0.5, 0.4), True),
        ((0, 1, 0.3), (1, 0, 0.3), (0.6, 0.6, 0.2), False),
        ((0, 1, 1), (1, 0, 0), (1 / 3, 2 / 3, 2 / 3), False),
    ],
    ids=[
        "above the line",
        "on the line",
        "below the line",
        "the first itself",
        "above the second",
        "the second is better",
        "cheaper than both",
        "one member",
        "one member itself",
        "three objectives",
        "three objectives, no t for both",
        "three objectives, one t",
        "three objectives, the same third one",
        "three objectives, a better third one",
        "three objectives, on the line",
    ],
)
def test_a_mixture_dominates_what_it_is_at_least_as_good_as(
    first: tuple[float, ...], second: tuple[float, ...], other: tuple[float, ...], expected: bool
) -> None:
    a, b, c = values(first, second, other)
    names = "abc"[: len(first)]
    assert mixture_dominates(a, b, c, names) is expected
    assert mixture_dominates(b, a, c, names) is expected
    steps = [{n: a[n] + i / 1200 * (b[n] - a[n]) for n in names} for i in range(1201)]
    if expected:
        assert any(dominates(step, c, names) for step in steps)
    else:
        better = {n: c[n] - 1e-6 for n in names}
        assert not any(covers(step, better, names) for step in steps)


def test_only_neighbours_of_a_family_are_mixed() -> None:
    bent = values((0, 1), (0.9, 0.9), (1, 0))
    target = values((0.5, 0.6))[0]
    assert not family_dominates(bent, target, AB)
    assert family_dominates([bent[0], bent[2]], target, AB)
    assert family_dominates(values((0.4, 0.5)), target, AB), "a family of one"
    assert not family_dominates([], target, AB)


UNIT = Scale(AB, (0.0, 0.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], 0.0),
        ([(0, 0)], 1.0),
        ([(0.5, 0.5)], 0.25),
        ([(0.5, 0.5), (0.5, 0.5)], 0.25),
        ([(0.25, 0.5), (0.5, 0.25)], 0.5),
        ([(0.5, 0.5), (0.75, 0.75)], 0.25),
        ([(1.0, 0.0)], 0.0),
        ([(2.0, -1.0)], 0.0),
        ([(-1.0, 0.0)], 2.0),
        ([(-1.0, 0.25)], 1.5),
    ],
    ids=[
        "empty",
        "ideal",
        "one",
        "twice",
        "two",
        "dominated",
        "at the border",
        "outside",
        "better than the reference",
        "better than the reference in one",
    ],
)
def test_hypervolume_of_two_objectives(rows: list[tuple[float, float]], expected: float) -> None:
    assert UNIT.hypervolume(values(*rows)) == pytest.approx(expected)


@pytest.mark.parametrize("objectives", [1, 3, 4])
def test_hypervolume_agrees_with_counting_cells(objectives: int) -> None:
    rng = random.Random(objectives)
    names = tuple("abcd"[:objectives])
    rows = values(*[tuple(rng.randrange(5) / 5 for _ in names) for _ in range(6)])
    cells = list(itertools.product([(i + 0.5) / 5 for i in range(5)], repeat=objectives))
    inside = sum(any(all(row[n] <= x for n, x in zip(names, cell, strict=True)) for row in rows) for cell in cells)
    scale = Scale(names, (0.0,) * objectives, (1.0,) * objectives)
    assert scale.hypervolume(rows) == pytest.approx(inside / len(cells))


def test_hypervolume_grows_trial_by_trial() -> None:
    volume = Volume(UNIT)
    found = [volume.add(row) for row in (None, *values((0.5, 0.5), (0.9, 0.9), (0.25, 0.75), (0.2, 0.2)), None)]
    assert found == pytest.approx([0, 0.25, 0.25, 0.3125, 0.64, 0.64])


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_hypervolume_is_that_of_all_trials_after_each_of_them(objectives: int) -> None:
    """Also where they are equal, dominated, better than the better reference or worse than the worse one."""
    rng = random.Random(objectives)
    names = tuple("abcde"[:objectives])
    scale = Scale(names, (0.0,) * objectives, (1.0,) * objectives)
    rows = [{name: rng.choice([rng.uniform(-0.1, 1.1), 0.5]) for name in names} for _ in range(60)]
    volume = Volume(scale)
    found = [volume.add(row) for row in rows]
    assert found == pytest.approx([scale.hypervolume(rows[: i + 1]) for i in range(len(rows))])
    assert found == sorted(found)


def test_scale_is_anchored_at_its_references() -> None:
    softmax, delta = {"a": 0.1, "b": 200.0}, {"a": 0.9, "b": 100.0}
    scale = Scale.between(AB, softmax, delta)
    scaled = scale.apply([softmax, delta, {"a": 0.5, "b": 125.0}])
    assert scaled.ravel().tolist() == pytest.approx([0, 1, 1, 0, 0.5, 0.25])
    flat = Scale.between(AB, softmax, {"a": 0.9, "b": 200.0})
    assert flat.apply([{"a": 0.5, "b": 201.0}]).tolist() == [[0.5, 2.0]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([(0.3, 0.3)], 0),
        ([(0.0, 1.0), (0.1, 0.15), (0.5, 0.1), (1.0, 0.0)], 1),
        ([(0.5, 0.5), (0.5, 0.5)], 0),
    ],
    ids=["empty", "one point", "a bend", "all equal"],
)
def test_knee(rows: list[tuple[float, float]], expected: int | None) -> None:
    assert UNIT.knee(values(*rows)) == expected
