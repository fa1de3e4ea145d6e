"""Which files below a path are text: links, binaries, JSON lines, patterns, and the folders of runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from natsl.data import TaskData, load_text
from natsl.run import Run
from natsl.tasks import DataConfig
from natsl.text import TextFiles, TextRules, read_text, shown_size
from tests.task_helpers import make_corpus

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def read(root: Path, **rules: object) -> TextFiles:
    return read_text(str(root), TextRules(**rules))  # type: ignore[arg-type]


def names(root: Path, **rules: object) -> list[str]:
    return list(read(root, **rules).files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three texts."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.md", "sub/c.txt"):
        (root / name).write_text(f"text of {name}")
    return root


def test_linked_folders_are_read_and_circles_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "d.txt").write_text("text behind a link")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "again").symlink_to(tmp_path / "outside" / "deep")  # the first name counts, whatever the listing's order
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "a_sub").symlink_to(folder / "sub")  # a folder's own name counts more than a link to it
    (tmp_path / "outside" / "back").symlink_to(folder / "sub")
    assert names(folder) == ["a.txt", "again/d.txt", "b.md", "sub/c.txt"]


def test_links_that_lead_nowhere_are_counted(folder: Path) -> None:
    (folder / "gone").symlink_to(folder / "nothing")
    (folder / "self").symlink_to(folder / "self")
    assert "2 links that lead nowhere (" in read(folder).left_out_line


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (PNG, "1 binary (x.txt)"),
        (b"caf\xe9", "1 not UTF-8 (x.txt)"),
        (b"a" * 100_000 + b"\0", "1 binary (x.txt)"),
        ("text".encode("utf-16-le"), "1 binary (x.txt)"),
        ("text".encode("utf-16"), "1 binary (x.txt)"),
    ],
    ids=["png", "latin-1", "late NUL", "utf-16 without BOM", "utf-16"],
)
def test_what_is_no_text_is_left_out_of_a_folder_and_refused_as_a_file(
    folder: Path, contents: bytes, reason: str
) -> None:
    before = load_text(str(folder))
    (folder / "x.txt").write_bytes(contents)
    after = load_text(str(folder))
    assert after.fingerprint == before.fingerprint
    assert f"left out 1 file, {shown_size(len(contents))}: {reason}" in after.description
    with pytest.raises(ValueError, match=r"x.txt is not (UTF-8 )?text") as error:
        load_text(str(folder / "x.txt"))
    assert "\n" not in str(error.value)


def test_the_summary_counts_and_shows_the_first_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(5):
        (folder / f"{i}.png").write_bytes(PNG + bytes([i]))
    with caplog.at_level(logging.INFO, "natsl.data"):
        load_text(str(folder))
    assert len(caplog.messages) == 1
    assert "3 files, 42 bytes" in caplog.messages[0]
    assert "left out 5 files, 85 bytes: 5 binary (0.png, 1.png, 2.png, …)" in caplog.messages[0]


def test_a_name_that_is_no_utf_8_can_be_shown(folder: Path) -> None:
    (folder / "caf\udce9.txt").write_text("text")
    corpus = load_text(str(folder))
    assert "caf\\xe9.txt" in [file.name for file in corpus.contents]
    (folder / "caf\udce9.txt").write_bytes(PNG)
    load_text(str(folder)).description.encode()


@pytest.mark.parametrize(
    ("include", "exclude", "read"),
    [
        (["*.txt"], [], ["a.txt", "sub/c.txt"]),
        (["*.md", "sub/*"], [], ["b.md", "sub/c.txt"]),
        ([], ["sub/*"], ["a.txt", "b.md"]),
        (["*.txt"], ["a*"], ["sub/c.txt"]),
    ],
)
def test_patterns_choose_files(folder: Path, include: list[str], exclude: list[str], read: list[str]) -> None:
    rules = DataConfig(include=include, exclude=exclude).text_rules()
    text = read_text(str(folder), rules)
    assert list(text.files) == read
    assert f"{3 - len(read)} by data.include and data.exclude" in text.left_out_line


def test_patterns_that_leave_nothing_are_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no text; left out 3 files, .*3 by data.include and data.exclude"):
        read(folder, include=("*.rst",))
    with pytest.raises(ValueError, match=r"data.exclude = \[''\] is not allowed"):
        DataConfig(exclude=[""])


def test_json_lines_need_the_name_of_a_field(folder: Path) -> None:
    path = folder / "records.jsonl"
    path.write_text('{"id": 1, "body": "first"}\n\n{"id": 2, "body": "naïve\\n"}\n')
    assert "1 of JSON lines without data.field (records.jsonl)" in read(folder).left_out_line
    with pytest.raises(ValueError, match=r"records\.jsonl holds JSON lines: data.field=<name>"):
        read(path)
    assert read(path, field="body").files == {"records.jsonl": "first\nnaïve\n".encode()}
    assert names(folder, field="body") == ["a.txt", "b.md", "records.jsonl", "sub/c.txt"]
    assert read(path, field="").files == {"records.jsonl": path.read_bytes()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', r"has no text in data.field = 'body' in line 2; fields there: 'text'"),
        ('{"body": 3}', "has no text in data.field = 'body' in line 2"),
        ("[1]", "fields there: none"),
        ("body", "line 2 is not JSON"),
        ('{"body": "\\ud800"}', "lone surrogates"),
        ('{"body": "\\u0000"}', "a NUL byte"),
    ],
)
def test_json_lines_that_cannot_be_used(folder: Path, line: str, message: str) -> None:
    path = folder / "records.jsonl"
    path.write_text('{"body": "first"}\n' + line)
    with pytest.raises(ValueError, match=message) as error:
        read(path, field="body")
    assert "\n" not in str(error.value)
    assert "records.jsonl" not in names(folder, field="body")


def test_the_run_folder_inside_the_data_folder_is_never_data(folder: Path) -> None:
    plain = load_text(str(folder)).fingerprint
    run = Run.open("first", folder / "runs")
    run.front_csv.write_text("a file of the run")
    (folder / "runs" / "throughput.json").write_text("another file below root")
    (folder / "link").symlink_to(folder / "runs")
    rules = DataConfig().text_rules(str(folder / "runs"))
    assert load_text(str(folder), rules).fingerprint == plain
    (folder / "runs" / "throughput.json").unlink()
    assert load_text(str(folder)).fingerprint == plain, "folders of runs are known wherever they are"


def test_runs_beside_the_data_in_one_folder(folder: Path) -> None:
    run = Run.open("first", folder)
    run.front_csv.write_text("a file of the run")
    rules = DataConfig().text_rules(str(folder))
    assert list(read_text(str(folder), rules).files) == ["a.txt", "b.md", "sub/c.txt"]
    for path in (run.path, run.front_csv):
        with pytest.raises(ValueError, match="the folder of a run, whose files are never data"):
            read_text(str(path), rules)


def test_options_that_choose_text_change_no_fingerprint_by_themselves(folder: Path) -> None:
    plain, chosen = DataConfig(), DataConfig(path=str(folder), include=["*"], exclude=["x"], field="text")
    assert TaskData(plain, make_corpus(), 384).fingerprint == TaskData(chosen, make_corpus(), 384).fingerprint
