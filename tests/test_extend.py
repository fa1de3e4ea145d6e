"""The recipes of docs/extend.md: each applies to a copy of the tree, is covered by its suite, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("natsl", "kernels", "space", "search", "conf", "tests", "pyproject.toml")
# A fenced block at the start of a line and, if there is one, the path on a line of its own before it.
BLOCK = re.compile(r"^(?:`([\w./]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Without what a search does beside searching, and small: three trials on few and short sequences.
QUICK = (
    "export=false tracking.mode=disabled device=cpu model.width=16 data.seq_len=96 data.search_sequences=2 "
    "data.test_sequences=2 search.n_trials=3"
)


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


def apply(title: str, folder: Path) -> tuple[Path, list[str]]:
    """A copy of the tree with the recipe applied, and the recipe's commands, which were not run."""
    tree = folder / "tree"
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copy2(ROOT / name, tree / name)
    commands: list[str] = []
    for block in recipe(title):
        if block.language == "python":
            assert block.path is not None, block.text
            path = tree / block.path
            assert not path.exists(), f"{block.path} exists: a recipe changes it by a diff"
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "diff":
            run(["git", "apply", "-"], tree, block.text)
        else:
            commands += block.text.splitlines()
    return tree, commands


def passed(output: str) -> int:
    """How many tests pytest says have passed."""
    counts = re.search(r"(\d+) passed", output)
    assert counts is not None, output
    return int(counts[1])


def test_an_objective_is_an_entry(tmp_path: Path) -> None:
    tree, (suite, search) = apply("An objective", tmp_path)
    assert "-k cached_layers" in suite
    assert passed(run(["bash", "-c", suite], tree)) >= 5
    run(["bash", "-c", f"{search} {QUICK}"], tree)
    front = json.loads((tree / "runs" / "layers" / "front.json").read_text())
    assert [item["name"] for item in front["objectives"]] == ["val_loss", "cached_layers"]
    values = {item["name"]: item["values"]["cached_layers"] for item in front["baselines"]}
    assert (values["all-delta"], values["all-softmax"]) == (0, 3)
    assert "layers that keep anything" in (tree / "runs" / "layers" / "report.html").read_text()


def test_a_task_is_a_file_and_its_error_an_objective(tmp_path: Path) -> None:
    tree, (suite, search) = apply("A task", tmp_path)
    output = run(["bash", "-c", f"{suite} -v"], tree)
    assert passed(output) >= 15
    assert re.search(r"test_tasks.py::test_every_target_is_right\[copying-test\] PASSED", output)
    assert re.search(r"test_tasks.py::test_integer_options_are_integers\[copying-span\] PASSED", output)
    assert re.search(
        r"test_objective.py::test_every_objective_is_in_the_files_and_the_report\[copy_error\] PASSED", output
    )
    run(["bash", "-c", f"{search} {QUICK}"], tree)
    front = json.loads((tree / "runs" / "copies" / "front.json").read_text())
    for item in (*front["points"], *front["baselines"]):
        assert item["values"]["copy_error"] == item["measured"]["copy_error"]
        assert item["measured"]["recall_error"] is not None
        assert item["measured"]["needle_error"] is None
        assert list(item["measured"]["kept_by_task"]) == ["mqar", "copying"]
    report = (tree / "runs" / "copies" / "report.html").read_text()
    assert "copy error" in report
    assert "in copying" in report


def test_a_sampler_is_a_file_and_its_name(tmp_path: Path) -> None:
    tree, (suite, search) = apply("A sampler", tmp_path)
    assert suite.endswith("-k nsga2_sbx")
    shorter = suite.replace("nsga2_sbx", "'nsga2_sbx and not enqueued and not three'")  # what takes longest
    assert passed(run(["bash", "-c", shorter], tree)) >= 7
    config = run(["bash", "-c", f"{search} --cfg job"], tree)  # the suite has made searches already
    assert "\n  sampler: nsga2_sbx\n" in config


def test_a_family_is_a_function_and_an_entry(tmp_path: Path) -> None:
    tree, (suite, search) = apply("A family or a control", tmp_path)
    assert passed(run(["bash", "-c", suite], tree)) >= 7
    run(["bash", "-c", f"{search} {QUICK}"], tree)
    front = json.loads((tree / "runs" / "families" / "front.json").read_text())
    assert "alternating" in [item["name"] for item in front["families"]]
    assert "one budget in every second layer" in (tree / "runs" / "families" / "report.html").read_text()


def test_an_op_is_checked_against_its_reference(tmp_path: Path) -> None:
    tree, (bench, suite) = apply("An op", tmp_path)
    output = run(["bash", "-c", bench], tree)
    assert re.search(r"^\d+ checks good;", output)
    assert re.search(r"^Checked: .*\bsoft_cap\b", output, re.MULTILINE)
    assert passed(run(["bash", "-c", suite], tree)) >= 3
