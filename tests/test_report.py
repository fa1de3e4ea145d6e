"""The report: complete for every kind of front, one file without a network, everything escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from natsl.search.config import SearchConfig
from natsl.search.controls.comparison import Share
from natsl.search.front import Baseline, Front, Kind, KneeChoice, Point
from natsl.search.report.chart import Axis, Mark, Marker, Series, chart, dumbbells
from natsl.search.report.controls import share_line
from natsl.search.report.headline import headline, scale_line
from natsl.search.report.html import render
from natsl.search.report.plane import FAMILY_STYLES, picture, planes, show
from natsl.search.report.png import COLOURS, front_png
from natsl.search.report.style import STYLE
from natsl.space.policy import Op
from tests.search_helpers import built, compared, is_png, searched, with_tasks

HOSTILE = "<script>alert('&')</script>$x_1$"


class Page(HTMLParser):
    """Collects tags, links and text, and checks that what is opened is closed."""

    VOID = ("meta", "br", "path", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID or (tag in ("circle", "path") and "<title>" in (self.get_starttag_text() or "")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """A front of two objectives."""
    return built(searched(tmp_path_factory.mktemp("front"), SearchConfig(n_trials=20)))


@pytest.fixture(scope="module")
def compared_front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """A front with controls."""
    study = searched(tmp_path_factory.mktemp("compared"), SearchConfig(n_trials=20))
    return compared(built(study), study)


def older_points(front: Front) -> tuple[Point, ...]:
    """The points as an older version has stored them, which did not know what is kept in each task."""
    return tuple(
        replace(point, measured={name: value for name, value in point.measured.items() if name != "kept_by_task"})
        for point in front.points
    )


def test_a_report_is_one_file_without_network_or_scripts(front: Front) -> None:
    page = Page(render(front))
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert all(name != "src" and not name.startswith("on") for name, _ in page.attributes)
    assert all(value is not None and value.startswith("#") for name, value in page.attributes if name == "href")
    assert "http" not in render(front)
    assert "url(" not in render(front)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in render(front)


def test_a_report_holds_every_point_with_its_export_command(front: Front) -> None:
    text = "".join(Page(render(front)).text)
    for point in front.points:
        assert f"natsl export run=first pick={point.id}" in text
        assert point.policy.digest() in text
    for item in front.baselines:
        assert item.name in text
    assert f"{front.knee} ◎ knee" in text
    assert "python -m search name=first" in text
    links = {value for name, value in Page(render(front)).attributes if name == "href"}
    assert links == {f"#{point.id}" for point in front.points}


def test_the_kept_fraction_of_each_of_several_tasks_is_in_the_rows(front: Front) -> None:
    older = render(front)
    assert "in mqar" not in older
    assert render(with_tasks(front, "mqar")) == older
    several = with_tasks(front, "bytes", "mqar", "needle")
    html = render(several)
    Page(html)
    cells = "".join(f"<td>{show('kept_fraction', kept)}</td>" for kept in (0.0, 0.5, 1.0))
    rows = [line for line in html.split("<tr") if cells in line]
    budgets = sum(item.kind is Kind.uniform for item in front.baselines)  # once more, beside what they asked for
    assert len(rows) == len(front.rows) + budgets
    assert len(front.rows) > len(front.points) + len(front.baselines), "members of families have rows too"
    assert html.count("<th>kept<small>in bytes</small></th><th>kept<small>in mqar</small></th>") == 3
    unknown = render(replace(several, points=older_points(front)))
    assert unknown.count("<td>–</td><td>–</td><td>–</td>") >= len(front.points)
    hostile = render(with_tasks(front, "bytes", HOSTILE))
    assert "<script" not in hostile


def test_points_stand_beside_their_controls_in_every_task(compared_front: Front) -> None:
    html = render(compared_front)
    Page(html)
    assert "What the router chooses" not in render(replace(compared_front, comparisons=()))
    section = unescape(html.split("What the router chooses")[1].split("</section>")[0])
    assert section.count('<div class="scroll controls"><table>') == 2, "one for each task, which scrolls in its box"
    for comparison in compared_front.comparisons:
        for item in comparison.tasks:
            for rival in (item.learned, *item.rivals):
                assert rival.label in section
                assert show(item.metric, rival.value) in section
    assert section.count("off-distribution") == 14 + 13, (
        "all but static heads without route noise; one task has an oracle"
    )
    assert section.count("<th>selection share<small>off-distribution: likely too high</small></th>") == 2
    assert "nothing to select" in section
    unknown = render(replace(compared_front, points=older_points(compared_front)))
    assert "in each task, layer and head" in section
    assert "in each task, layer and head" not in unknown
    several = render(replace(with_tasks(compared_front, "bytes", HOSTILE), comparisons=compared_front.comparisons))
    Page(several)
    assert several.count("<td>bytes</td><td>0.0, 0.0</td>") == len(compared_front.comparisons)
    assert "<script" not in several


def test_the_share_is_in_the_headline(compared_front: Front) -> None:
    text, good = headline(compared_front)[1]
    assert re.fullmatch(
        rf"At {compared_front.knee} the router chooses chunks: share 1?\.\d\d ± \.\d\d on mqar; "
        r"nothing to select on bytes\. That is likely too high: .*",
        text,
    )
    assert good is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.97, "chooses chunks: share .97 ± .01"), (0.01, "only heads: share .01 ± .01"), (-0.3, "share −.30 ± .01")],
)
def test_a_share_that_is_not_above_zero_is_no_choice_of_chunks(
    value: float, expected: str, compared_front: Front
) -> None:
    knee = compared_front.comparison(compared_front.knee)
    assert knee is not None
    share = Share(value, 0.01, 0.5, 0.01)
    line = share_line(replace(knee, tasks=(replace(knee.tasks[0], share=share),)))
    assert line is not None
    assert expected in line[0]
    assert line[1] is (None if value > 0.02 else False), "without route noise the share is too high to be good news"
    assert share_line(replace(knee, tasks=(replace(knee.tasks[0], share=None),))) is None
    assert share_line(replace(knee, tasks=knee.tasks[1:])) == (
        f"At {knee.of} there is nothing to select on bytes.",
        None,
    )


def test_the_headline_compares_with_random_routing_and_baselines(front: Front) -> None:
    lines = headline(front)
    assert "random routing at the same fractions" in lines[0][0]
    routed = [point for point in front.points if point.gain_over_random is not None]
    wins = sum(front.beats_random(point) is True for point in routed)
    assert lines[2] == (
        f"Points at which learned routing beats random routing: {wins} of the {len(routed)} compared.",
        True,
    )
    assert wins > len(routed) / 2


def test_a_router_that_does_not_beat_random_routing_is_told_so(front: Front) -> None:
    worse = tuple(
        replace(p, gain_over_random=p.gain_over_random and dict.fromkeys(p.gain_over_random, -0.1))
        for p in front.points
    )
    lines = headline(replace(front, points=worse))
    assert lines[2][0].startswith("Points at which learned routing beats random routing: 0 of the")
    assert lines[2][1] is False
    assert 'class="bad"' in render(replace(front, points=worse))
    assert 'class="gap good"' not in render(replace(front, points=worse))


@pytest.mark.parametrize(
    ("gain", "error", "expected", "good"),
    [
        (0.02, 0.004, "the front is better (+0.0200 ± 0.0040, one standard error).", True),
        (0.003, 0.004, "the front is not better by more than one standard error (+0.0030 ± 0.0040).", False),
        (-0.003, 0.004, "the front is not better by more than one standard error (−0.0030 ± 0.0040).", False),
        (-0.02, 0.004, "the front is worse (−0.0200 ± 0.0040).", False),
        (0.02, None, "the front is better (+0.0200).", None),
    ],
    ids=["better", "a little better", "a little worse", "worse", "error unknown"],
)
def test_the_headline_compares_the_front_with_the_best_family(
    gain: float, error: float | None, expected: str, good: bool | None, front: Front
) -> None:
    families = tuple(
        replace(item, hypervolume_test=volume, gain=gain, gain_error=error)
        for item, volume in zip(front.families, (0.7, 0.9, 0.8), strict=False)
    )
    found = replace(front, families=families, hypervolume_test=0.9 + gain)
    text, verdict = headline(found)[1]
    assert text.startswith(
        f"Hypervolume on the test split: front {0.9 + gain:.4f}, best sweep (one-head, one routing head"
    )
    assert text.endswith(f"0.9000: {expected}")
    assert verdict is good
    section = render(found).split("The front against sweeps")[1].split("</section>")[0]
    rows = re.findall(r"<tr><th>([\w-]+)<small>", section)
    assert rows == ["front", "one-head", "prefix", "one-layer"], "the best family first"
    assert section.count('<td class="good">') == (3 if good else 0)
    assert section.count('<td class="bad">') == (3 if good is False else 0)


def test_a_report_says_what_was_evaluated(front: Front) -> None:
    facts = front.facts | {"evaluations": {"trials": 111, "families": 82, "test split": 128, "controls": 174}}
    html = render(replace(front, facts=facts))
    assert "The families took 82 evaluations of their own on the search split." in html
    assert "<tr><th>evaluations.test split</th><td>128</td></tr>" in html


def test_a_report_without_families_says_nothing_of_them(front: Front) -> None:
    without = replace(front, families=(), hypervolume_test=None, knee_choice=None)
    Page(render(without))
    assert "The front against sweeps" not in render(without)
    assert not any("sweep" in text or "least sum" in text for text, _ in headline(without))


def test_the_headline_tells_what_choosing_the_knee_costs(front: Front) -> None:
    choice = KneeChoice("t0007", 0.31, "t0012", 0.25)
    assert headline(replace(front, knee_choice=choice))[-1] == (
        "Choosing the knee on the search split costs 0.0600: on the test split its sum of scaled objectives is "
        "0.3100, that of t0012 0.2500, the least.",
        None,
    )
    same = headline(replace(front, knee_choice=replace(choice, best="t0007", best_sum=0.31)))[-1][0]
    assert same.endswith("has the least sum of scaled objectives on the test split too.")


@pytest.mark.parametrize(
    ("kept", "value", "expected"), [(-0.01, -0.001, True), (-0.01, 0.0, False), (0.01, -0.001, False)], ids=str
)
def test_an_oracle_that_is_cheaper_and_better_is_in_the_headline(
    kept: float, value: float, expected: bool, compared_front: Front
) -> None:
    knee = compared_front.comparison(compared_front.knee)
    assert knee is not None
    recall = knee.tasks[0]
    learned = replace(recall.learned, kept=0.05, value=0.002)
    rivals = tuple(
        replace(rival, kept=0.05 + kept, value=0.002 + value) if rival.name == "oracle" else rival
        for rival in recall.rivals
    )
    comparison = replace(knee, tasks=(replace(recall, learned=learned, rivals=rivals), *knee.tasks[1:]))
    lines = [text for text, _ in headline(replace(compared_front, comparisons=(comparison,)))]
    oracle = (
        f"At {knee.of} the chunks that hold the answers would be cheaper and better: 0.1 % with 4.0 % of the chunks "
        "instead of 0.2 % with 5.0 % of the chunks on mqar."
    )
    assert (oracle in [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]) is expected


def test_the_report_says_that_static_heads_mix_requests(compared_front: Front) -> None:
    section = render(compared_front).split("What the router chooses")[1]
    assert "some requests are answered with the next cheaper choice of heads" in section


def placed(front: Front, *places: tuple[float, float]) -> tuple[Point, ...]:
    """Points a, b, … with these fractions kept and errors on the test split."""
    points = []
    for name, (kept, error) in zip("abcdefgh", places, strict=False):
        values, point = {"recall_error": error, "kept_fraction": kept}, front.points[0]
        points.append(replace(point, id=name, values=values, measured=point.measured | values))
    return tuple(points)


@pytest.mark.parametrize(
    ("places", "stairs"),
    [
        ([(0.0, 0.9), (0.1, 0.3), (0.2, 0.1)], "abc"),
        ([(0.0, 0.9), (0.1, 0.3), (0.15, 0.4), (0.2, 0.1)], "abd"),
        ([(0.0, 0.9), (0.1, 0.3), (0.1, 0.4), (0.1, 0.3), (0.2, 0.3)], "abd"),
        ([(0.0, 0.2), (0.1, 0.3)], "a"),
    ],
    ids=["falling", "rising", "equal in something", "one left"],
)
def test_the_staircase_never_rises(places: list[tuple[float, float]], stairs: str, front: Front) -> None:
    points = placed(front, *places)
    found = picture(replace(front, points=points, knee="a"), "kept_fraction", "recall_error")
    (series,) = (item for item in found.series if item.style == "front")
    marks = [mark for mark in series.marks if not mark.hidden]
    assert [mark.text[0] for mark in marks if not mark.off_line] == list(stairs)
    assert ("off the line" in series.label) is (len(stairs) < len(points))
    html = chart("the front", [series], found.x, found.y)
    assert html.count("<circle") == len(marks), "all of them are marks"
    assert html.count("V") - chart("the front", [replace(series, line=False)], found.x, found.y).count("V") == (
        len([mark for mark in series.marks if not mark.off_line]) - 1
    )


def test_the_picture_ends_where_the_front_is_as_good_as_it_gets(front: Front) -> None:
    points = placed(front, (0.0, 0.9), (0.02, 0.3), (0.05, 0.008), (0.6, 0.0))
    (family, *_), drawn = front.families, replace(front, points=points, knee="b")
    changed = [{"recall_error": 0.5, "kept_fraction": 0.01}, {"recall_error": 0.1, "kept_fraction": 0.64}]
    members = zip((family.members[0], family.members[-1]), changed, strict=True)
    ends = tuple(replace(item, values=new, measured=item.measured | new) for item, new in members)
    found = picture(
        replace(drawn, families=(replace(family, members=ends),), baselines=()), "kept_fraction", "recall_error"
    )
    assert found.x.end == pytest.approx(1.15 * 0.05)
    assert found.note == "1 baseline and 1 point of the front lie outside"
    lines = {item.style: item.marks for item in found.series if item.marks}
    inside, *between, border = lines["family0"]
    assert (inside.x, inside.hidden, border.x, border.hidden) == (0.01, False, found.x.end, True)
    assert between
    for mark in (*between, border):
        assert mark.y == pytest.approx(0.5 - 0.4 * (mark.x - 0.01) / 0.63), "mixtures of requests"
    assert [mark.x for mark in lines["front"]] == [0.0, 0.02, 0.05, found.x.end]
    assert lines["front"][-1].y == 0.008, "a staircase goes on as it is"
    html = chart("the front", found.series, found.x, found.y)
    Page(html)
    assert html.count("<circle") == 3 + 1 + 1, "points, one member, the ring of the knee"
    rising = placed(front, (0.0, 0.9), (0.02, 0.3), (0.05, 0.008), (0.055, 0.2), (0.59, 0.4), (0.6, 0.0))
    cut = picture(replace(drawn, points=rising), "kept_fraction", "recall_error").series[-2].marks
    assert (cut[-2].off_line, cut[-1].hidden, cut[-1].y) == (True, True, 0.008), "on from the last stair"
    late = picture(replace(drawn, knee="d"), "kept_fraction", "recall_error")
    assert late.x.end == pytest.approx(1.15 * 0.6), "the knee is always shown"


def test_the_note_says_where_all_softmax_is(front: Front) -> None:
    found = picture(front, "kept_fraction", "recall_error")
    assert found.x.end is not None
    assert found.x.end < 1
    assert found.note.replace("\N{NO-BREAK SPACE}", " ").endswith("lie outside, all-softmax at 100.0 %")


def test_a_scale_that_the_test_split_leaves_is_reported(front: Front) -> None:
    assert scale_line(front) is None

    def nearly_alike(item: Baseline) -> Baseline:
        """All-delta as good as all-softmax, but for a thousandth, on the search split only."""
        if item.name not in ("all-softmax", "all-delta"):
            return item
        kept = 1.0 if item.name == "all-softmax" else 0.0
        return replace(item, search_values={"recall_error": 0.5 - 0.001 * kept, "kept_fraction": kept})

    narrow = replace(front, baselines=tuple(map(nearly_alike, front.baselines)))
    line = (scale_line(narrow) or "").replace("\N{NO-BREAK SPACE}", " ")
    assert " widths in recall error, where all-softmax has 49.9 % and all-delta 50.0 %." in line
    assert "kept" not in line
    best = front.best_family
    assert best is not None
    policies: list[Point | Baseline] = [*front.points, *best.members]
    errors = [item.values["recall_error"] for item in policies]
    widths = (0.499 - min(errors)) / 0.001
    assert f"{sum(error < 0.499 - 1e-4 for error in errors)} of {len(errors)} by up to {widths:.3g} widths" in line
    assert line in [text.replace("\N{NO-BREAK SPACE}", " ") for text, _ in headline(narrow)]


@pytest.mark.parametrize("pair", [("recall_error", "val_loss"), ("kept_fraction", "decode_bytes")], ids="-".join)
def test_only_costs_under_a_quality_are_cut(pair: tuple[str, str], front: Front) -> None:
    assert picture(front, *pair).x.end is None


def test_only_baselines_of_no_family_are_marks_of_their_own(front: Front) -> None:
    styles = [item.style for item in picture(front, "kept_fraction", "recall_error").series]
    families = [f"family{i}" for i in range(len(front.families))]
    assert styles == [*families, "depth", "extreme", "random", "front", "knee"]
    assert set(styles) <= COLOURS.keys()
    assert {f"family{i}" for i in range(FAMILY_STYLES)} <= COLOURS.keys()
    assert all(f".family{i} " in STYLE for i in range(FAMILY_STYLES))


@pytest.mark.parametrize(
    ("count", "cell"),
    [
        (0, "–"),
        (2, "n0, n1"),
        (4, "<details><summary>n0, n1, +2</summary>n0, n1, n2, n3</details>"),
    ],
)
def test_what_dominates_a_point_is_folded_where_it_is_long(count: int, cell: str, front: Front) -> None:
    point = replace(front.points[0], dominated_by=tuple(f"n{i}" for i in range(count)))
    text = render(replace(front, points=(point,), knee=None))
    Page(text)
    assert f'<td class="names">{cell}</td>' in text
    assert f",{' '.join(point.dominated_by)},\n" in replace(front, points=(point,), knee=None).to_csv()


def test_what_comes_from_outside_is_escaped(front: Front) -> None:
    facts = {"counts": {HOSTILE: HOSTILE}, "problems": [HOSTILE], "commands": [HOSTILE], "setting": {HOSTILE: HOSTILE}}
    points = tuple(replace(point, dominated_by=(HOSTILE,)) for point in front.points)
    hostile = replace(front, run=HOSTILE, points=points, fingerprint={"data": HOSTILE}, facts=facts)
    html = render(hostile)
    assert "<script" not in html
    assert HOSTILE in "".join(Page(html).text)


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (["recall_error"], 1),
        (["kept_fraction"], 1),
        (["recall_error", "kept_fraction"], 1),
        (["recall_error", "val_loss", "decode_bytes"], 3),
        (["recall_error", "val_loss", "decode_bytes", "kept_fraction"], 6),
        (["bits_per_byte", "prefill_flops", "recall_error", "kv_bytes_per_token", "kept_fraction"], 10),
    ],
    ids=lambda value: f"{len(value)} objectives" if isinstance(value, list) else "",
)
def test_any_number_of_objectives_is_drawn_in_pairs(objectives: list[str], expected: int, tmp_path: Path) -> None:
    found = built(searched(tmp_path, SearchConfig(n_trials=14, objectives=objectives, uniform_budgets=[0.25])))
    pairs = planes(found)
    assert len(pairs) == expected
    assert all(across != up for across, up in pairs)
    text = render(found)
    Page(text)
    assert text.split("Learned against random")[0].count('<svg viewBox="0 0 480') == expected
    assert is_png(front_png(found))


def test_a_front_without_a_feasible_trial_is_reported(tmp_path: Path) -> None:
    found = built(searched(tmp_path, SearchConfig(n_trials=5, constraints={"recall_error": -1.0})))
    assert (found.points, found.knee, found.hypervolume) == ((), None, 0.0)
    text = render(found)
    Page(text)
    assert "there is no front and nothing to export" in text
    assert is_png(front_png(found))


def test_a_front_of_one_point_is_reported(tmp_path: Path) -> None:
    found = built(searched(tmp_path, SearchConfig(n_trials=1)))
    assert [point.id for point in found.points] == [found.knee] == ["t0000"]
    Page(render(found))
    assert is_png(front_png(found))


def test_a_front_of_equal_points_is_reported(front: Front) -> None:
    values = {"recall_error": 0.5, "kept_fraction": 0.5}
    measured = front.points[0].measured | values | {"val_loss": 2.0}
    points = tuple(replace(point, values=values, measured=measured) for point in front.points)
    others = tuple(replace(item, values=values, measured=item.measured | measured) for item in front.baselines)
    equal = replace(front, points=points, baselines=others, history=(0.0,) * 20, hypervolume=0.0)
    Page(render(equal))
    assert is_png(front_png(equal))


def test_a_front_of_nothing_at_all_is_reported(front: Front) -> None:
    empty = replace(front, points=(), baselines=(), knee=None, history=(), facts={}, fingerprint={})
    Page(render(empty))
    assert is_png(front_png(empty))


@pytest.mark.parametrize("kinds", [(Op.routed,), (Op.delta, Op.routed, Op.softmax)], ids=["one layer", "hybrid"])
def test_other_models_are_reported(kinds: tuple[Op, ...], tmp_path: Path) -> None:
    found = built(searched(tmp_path, SearchConfig(n_trials=12), kinds))
    Page(render(found))
    assert is_png(front_png(found))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("recall_error", 0.0314, "3.1 %"),
        ("kept_fraction", 1.0, "100.0 %"),
        ("val_loss", 1.93049, "1.930"),
        ("kv_bytes_per_token", 96.0, "96 B"),
        ("decode_bytes", 1234567.0, "1.23 MB"),
        ("prefill_flops", 5.5e16, "55 PFLOP"),
        ("needle_error", None, "–"),
    ],
)
def test_numbers_are_shown_with_their_units(name: str, value: float | None, expected: str) -> None:
    assert show(name, value) == expected.replace(" ", "\N{NO-BREAK SPACE}")


AXIS = Axis("value", lambda value: f"{value:.3g}")


@pytest.mark.parametrize(
    "marks",
    [(), ((1.0, 1.0),), ((0.0, 0.0), (0.0, 0.0)), ((-5.0, 1e9), (3.0, 1e-9)), ((0.0, 1e-12), (1e-12, 0.0))],
    ids=["none", "one", "equal", "far apart", "tiny"],
)
@pytest.mark.parametrize("root", [False, True], ids=["linear", "root"])
def test_charts_stay_inside_their_frame(marks: tuple[tuple[float, float], ...], root: bool) -> None:
    series = Series("s", "front", tuple(Mark(x, y, "here", 0.1) for x, y in marks), Marker.dot, line=True)
    drawn = chart("a chart", [series], replace(AXIS, root=root), AXIS)
    Page(drawn)
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= 480
        assert 0 <= float(y) <= 330
    assert drawn.count("<circle") == len(marks)


def test_dumbbells_have_a_bar_per_row() -> None:
    rows = [("a", Mark(0.1, 0), Mark(0.5, 0, "", 0.05), True), ("b", Mark(0.6, 0), Mark(0.5, 0), False)]
    drawn = dumbbells("compared", rows, AXIS)
    Page(drawn)
    assert drawn.count('class="gap good"') == 1
    assert drawn.count('class="gap bad"') == 1
    Page(dumbbells("nothing", [], AXIS))
