"""The recipes of docs/extend.md: they apply to a copy of the tree, are covered by their suites, and their commands run.

They share one copy and one run of pytest; none edits what another has made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("natsl", "kernels", "space", "search", "conf", "tests", "pyproject.toml")
# A fenced block at the start of a line and, if there is one, the path on a line of its own before it.
BLOCK = re.compile(r"^(?:`([\w./]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Without what a search does beside searching, and small: three trials on few and short sequences.
QUICK = (
    "export=false tracking.mode=disabled device=cpu model.width=16 data.seq_len=96 data.search_sequences=2 "
    "data.test_sequences=2 search.n_trials=3 search.launcher=inline"
)

# For the benchmark under Triton's interpreter, as in this process.
QUICK_INTERPRETER = """
import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import speed_up

    speed_up()
"""


@dataclass(frozen=True)
class Block:
    """One fenced block: a new file (``python``, with its path), an edit (``diff``) or commands (``bash``)."""

    path: str | None
    language: str
    text: str


def recipe(title: str) -> list[Block]:
    """The blocks below one heading of docs/extend.md."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in page.split("\n## ")[1:])
    return [Block(path or None, language, text) for path, language, text in BLOCK.findall(sections[title])]


def run(command: list[str], tree: Path, text: str | None = None) -> str:
    """Output of a command in a tree whose natsl it imports; no GPU, no network, none of this process' test settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "TRITON"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "PYTHONPATH": str(tree),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, cwd=tree, env=environment, input=text, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{text or command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@dataclass(frozen=True)
class Extended:
    """A tree with all recipes applied, the commands of each, and what pytest wrote about all of their suites."""

    tree: Path
    commands: dict[str, list[str]]
    output: str

    def passed(self, names: str) -> int:
        """How many tests have passed whose id matches."""
        return len(re.findall(rf"^tests/.*(?:{names}).* PASSED", self.output, re.MULTILINE))

    def run(self, command: str) -> str:
        """Output of a command line in the tree."""
        return run(["bash", "-c", command], self.tree)


# Recipes, and the tests of a suite that take longest and are left out.
RECIPES = {"An objective": "", "A task": "", "A sampler": "enqueued or three", "An op": "", "A family or a control": ""}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extended:
    """Apply every recipe; a diff must also fit the tree as it is."""
    tree = tmp_path_factory.mktemp("extended") / "tree"
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copy2(ROOT / name, tree / name)
    blocks = {title: recipe(title) for title in RECIPES}
    for block in (block for found in blocks.values() for block in found):
        if block.language == "diff":
            run(["git", "apply", "--check", "-"], tree, block.text)
    for block in (block for found in blocks.values() for block in found):
        if block.language == "python":
            assert block.path is not None, block.text
            path = tree / block.path
            assert not path.exists(), f"{block.path} exists: a recipe changes it by a diff"
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "diff":
            run(["git", "apply", "-"], tree, block.text)
    commands = {
        title: [line for block in found if block.language == "bash" for line in block.text.splitlines()]
        for title, found in blocks.items()
    }
    files, names = dict[str, None](), list[str]()
    for title, without in RECIPES.items():
        (suite,) = (line for line in commands[title] if line.startswith("python -m pytest "))
        *paths, flag, selected = shlex.split(suite)[3:]
        assert flag == "-k"
        files |= dict.fromkeys(paths)
        names.append(f"(({selected}) and not ({without}))" if without else f"({selected})")
    output = run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", " or ".join(names)], tree
    )
    return Extended(tree, commands, output)


def test_an_objective_is_an_entry(extended: Extended) -> None:
    _, search = extended.commands["An objective"]
    assert extended.passed("cached_layers") >= 5
    extended.run(f"{search} {QUICK}")
    folder = extended.tree / "runs" / "layers"
    front = json.loads((folder / "front.json").read_text())
    assert [item["name"] for item in front["objectives"]] == ["val_loss", "cached_layers"]
    values = {item["name"]: item["values"]["cached_layers"] for item in front["baselines"]}
    assert (values["all-delta"], values["all-softmax"]) == (0, 3)
    report = (folder / "report.html").read_text()
    assert "layers that keep anything" in report
    # the family of another recipe, which every search has
    assert "alternating" in [item["name"] for item in front["families"]]
    assert "one budget in every second layer" in report


def test_a_task_is_a_file_and_its_error_an_objective(extended: Extended) -> None:
    _, search = extended.commands["A task"]
    assert extended.passed("copying|copy_error") >= 15
    for test in (
        "test_tasks.py::test_every_target_is_right[copying-test]",
        "test_tasks.py::test_integer_options_are_integers[copying-span]",
        "test_objective.py::test_every_objective_is_in_the_files_and_the_report[copy_error]",
    ):
        assert extended.passed(re.escape(test)) == 1
    extended.run(f"{search} {QUICK}")
    front = json.loads((extended.tree / "runs" / "copies" / "front.json").read_text())
    for item in (*front["points"], *front["baselines"]):
        assert item["values"]["copy_error"] == item["measured"]["copy_error"]
        assert item["measured"]["recall_error"] is not None
        assert item["measured"]["needle_error"] is None
        assert list(item["measured"]["kept_by_task"]) == ["mqar", "copying"]
    report = (extended.tree / "runs" / "copies" / "report.html").read_text()
    assert "copy error" in report
    assert "in copying" in report


def test_a_sampler_is_a_file_and_its_name(extended: Extended) -> None:
    _, search = extended.commands["A sampler"]
    assert extended.passed("nsga2_sbx") >= 7
    config = extended.run(f"{search} --cfg job")  # the suite has made searches already
    assert "\n  sampler: nsga2_sbx\n" in config


def test_a_family_is_a_function_and_an_entry(extended: Extended) -> None:
    _, search = extended.commands["A family or a control"]
    assert extended.passed("alternating") >= 7
    # another recipe's search has the family too
    assert extended.run(f"{search} --cfg job").startswith("name: families\n")


def test_an_op_is_checked_against_its_reference(extended: Extended) -> None:
    bench, _ = extended.commands["An op"]
    (extended.tree / "sitecustomize.py").write_text(QUICK_INTERPRETER)
    output = extended.run(bench)
    assert re.search(r"^\d+ checks good;", output)
    assert re.search(r"^Checked: .*\bsoft_cap\b", output, re.MULTILINE)
    assert extended.passed("warm_up_runs|named_as_in_profiles|every_op") >= 3
