"""The script and the notebook of ``examples/`` run as they are, each in a fresh process and an empty folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Cells of code one after another, as a kernel would run them. A kernel itself is used where nbclient is installed.
RUN_CELLS = """
import json, sys
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
print("knee:", space["knee"].id, "of", len(space["front"]))
"""
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, kernel_name="python3", timeout=300).execute()
cells = {cell["id"]: cell for cell in book["cells"]}
assert "text/html" in cells["search"]["outputs"][-1]["data"], cells["search"]["outputs"]
assert cells["search"]["outputs"][-1]["data"]["text/plain"].startswith("front of"), "not shown apart"
assert "image/png" in cells["plot"]["outputs"][-1]["data"], cells["plot"]["outputs"]
print("knee:", cells["points"]["outputs"][-1]["data"]["text/plain"])
"""


def python(folder: Path, *arguments: str) -> str:
    """Standard output of a fresh interpreter in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def notebook() -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((EXAMPLES / "search.ipynb").read_text(encoding="utf-8"))
    return plain


def test_the_script(tmp_path: Path) -> None:
    out = python(tmp_path, str(EXAMPLES / "search.py"), "here")
    assert "front of example, test split" in out
    assert "knee: " in out
    assert "text: " in out
    assert (tmp_path / "here" / "example" / "example.png").read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in tmp_path.iterdir()] == ["here"]


def test_the_notebook(tmp_path: Path) -> None:
    kernel = all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel"))
    out = python(tmp_path, "-c", RUN_NOTEBOOK if kernel else RUN_CELLS, str(EXAMPLES / "search.ipynb"))
    assert "knee: " in out
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_the_notebook_is_stored_without_outputs() -> None:
    book = notebook()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_every_example_is_run_by_a_test() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert names == {"search.py", "search.ipynb"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("search.*")), ids=lambda path: path.name)
def test_an_example_is_in_the_readme(path: Path) -> None:
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
