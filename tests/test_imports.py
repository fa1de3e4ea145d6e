"""The direction of imports, the names under which the folders are imported, and what entry points load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from natsl.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
API = (ROOT / "natsl" / "api.py",)  # the commands as functions
LINKED = ("kernels", "space", "search", "conf")

# Which parts of natsl each folder may import; of natsl, only command lines read search (a test of its own).
MAY_IMPORT = {
    "kernels": {"kernels"},
    "space": {"space"},
    "natsl": {"natsl", "kernels", "space", "search"},
    "search": {"natsl", "kernels", "space", "search"},
    "conf": {"natsl", "kernels", "space", "search", "conf"},
}
MAY_USE = {"kernels": {"torch", "triton", "matplotlib"}, "space": set()}


def sources(folder: str) -> list[Path]:
    """The Python files of a top-level folder; links are not followed, so each file is seen once."""
    files = [
        Path(parent, name)
        for parent, _, names in os.walk(ROOT / folder, followlinks=False)
        for name in names
        if name.endswith(".py")
    ]
    return sorted(files)


def module_name(path: Path) -> str:
    """The name a file is imported under, for example ``natsl.search.study``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] in ("natsl", "tests") else ("natsl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything a file imports, at the top or inside of functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return found


def part_of(name: str) -> str | None:
    """The folder that an imported name lies in (``natsl.space.policy`` → ``space``), None if it is not ours."""
    head, *rest = name.split(".")
    if head != "natsl":
        return None
    return rest[0] if rest and rest[0] in LINKED else "natsl"


def is_entry(path: Path) -> bool:
    """Whether a file is part of a command line, ``natsl/cli/`` and what ``python -m`` runs of a package, or the API."""
    return path.is_relative_to(ROOT / "natsl" / "cli") or path.name == "__main__.py" or path in API


def describe(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_direction(folder: str) -> None:
    files = sources(folder)
    assert files
    wrong = [
        describe(path, line, name)
        for path in files
        for line, name in imported(path)
        if part_of(name) is not None and part_of(name) not in MAY_IMPORT[folder]
    ]
    assert wrong == []


def test_only_command_lines_and_the_api_of_natsl_read_search() -> None:
    wrong = [
        describe(path, line, name)
        for path in sources("natsl")
        for line, name in imported(path)
        if part_of(name) == "search" and not is_entry(path)
    ]
    assert wrong == []


def test_libraries_import_no_command_line() -> None:
    wrong = [
        describe(path, line, name)
        for folder in ("kernels", "space", "natsl", "search")
        for path in sources(folder)
        if not is_entry(path)
        for line, name in import_names(import_nodes(path, functions=True))
        if f"{name}.".startswith(("natsl.cli.", "natsl.conf.", "natsl.api."))
    ]
    assert wrong == []


def test_libraries_that_are_commands_only_call_their_verb() -> None:
    seen = set()
    for folder in ("natsl", "search"):
        for path in sources(folder):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) and not is_entry(path):
                    source, call = (ast.unparse(line) for line in node.body)
                    assert source == "from natsl.cli.main import run_verb"
                    assert call in {f"run_verb({verb!r})" for verb in VERBS}
                    seen.add(module_name(path))
    commands = ("train", "evaluate", "export", "generate", "throughput", "latency")
    assert seen == {f"natsl.{name}" for name in commands}


@pytest.mark.parametrize("folder", MAY_USE)
def test_third_party_packages(folder: str) -> None:
    allowed = MAY_USE[folder] | sys.stdlib_module_names | {"natsl"}
    wrong = [
        describe(path, line, name)
        for path in sources(folder)
        for line, name in imported(path)
        if name.partition(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tests"])
def test_imports_are_absolute_and_never_bare(folder: str) -> None:
    wrong = [
        describe(path, line, name)
        for path in sources(folder)
        for line, name in imported(path)
        if name.startswith(".") or name.partition(".")[0] in LINKED
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", LINKED)
def test_link_is_relative(folder: str) -> None:
    link = ROOT / "natsl" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_which_folders_are_regular_packages() -> None:
    # With an __init__.py, kernels/ would hide another package of that name from transformers when run from the root;
    # without one, Hydra does not find conf.
    regular = {folder for folder in LINKED if (ROOT / folder / "__init__.py").exists()}
    assert regular == {"space", "search", "conf"}


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter from the root."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


LIGHT = [
    ("natsl", ["torch", "optuna", "hydra", "wandb", "transformers"]),
    ("natsl.api", ["torch", "numpy", "optuna", "hydra", "wandb", "matplotlib", "rich", "transformers"]),
    ("natsl.hf", ["torch", "optuna", "hydra", "wandb", "transformers"]),
    ("natsl.config", ["torch", "optuna", "wandb"]),
    ("natsl.space", ["torch", "numpy", "optuna", "hydra", "wandb"]),
    ("natsl.search.config", ["torch", "optuna", "wandb"]),
    ("natsl.search.families", ["torch", "optuna", "wandb"]),
    ("natsl.search.ablation.command", ["torch", "optuna", "wandb", "matplotlib"]),
    ("natsl.search.outer.command", ["torch", "optuna", "wandb", "matplotlib"]),
    ("natsl.cli.main", ["torch", "optuna", "hydra", "wandb"]),
    ("natsl.cli.commands", ["torch", "optuna", "wandb"]),
    ("natsl.cli.generation", ["torch", "optuna", "wandb"]),
    ("natsl.cli.evaluation", ["torch", "optuna", "wandb", "matplotlib"]),
    ("natsl.load", ["torch", "optuna", "wandb"]),
    ("natsl.tracking", ["torch", "optuna", "wandb"]),
    ("natsl.throughput", ["torch", "optuna", "wandb"]),
    ("natsl.cli.latency", ["torch", "optuna", "wandb"]),
    ("natsl.cli.plan", ["torch", "optuna", "wandb"]),
    ("natsl.conf", ["torch", "optuna", "wandb"]),
    ("natsl.search.worker.process", ["torch", "optuna"]),
    ("natsl.search.worker.answers", ["torch._dynamo", "optuna", "wandb", "matplotlib", "transformers"]),
]


@pytest.mark.parametrize(("module", "heavy"), LIGHT, ids=[module for module, _ in LIGHT])
def test_light_modules_load_nothing_heavy(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = fresh("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_thresholds_load_no_sympy() -> None:
    code = (
        "import sys, torch; from natsl.kernels.routing import budget_threshold\n"
        "x = torch.ones(3, dtype=torch.float64); budget_threshold(x.cumsum(0), x.cumsum(0) / 3, x)\n"
        "print('sympy' in sys.modules)"
    )
    result = fresh("-c", code)
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr


def test_space_loads_no_third_party_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import natsl.space\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names - {'natsl'}))"
    )
    result = fresh("-c", code)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == []


# Each takes from 0.1 to several seconds to import.
HEAVY = {"torch", "triton", "optuna", "wandb", "matplotlib", "transformers", "numpy", "pandas", "safetensors", "scipy"}
HELP = [["natsl"], ["natsl.search"], ["natsl.kernels.bench"], *(["natsl", verb] for verb in VERBS)]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    """Every import is listed, those of an import that fails included."""
    result = fresh("-X", "importtime", "-m", *command, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout.lower()
    names = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "natsl" in names
    assert {name.partition(".")[0] for name in names} & HEAVY == set()


# Inside kernels/, each part may import those of its line: launch ← _triton ← ops ← registry ← bench, warmup.
_BASE = {"shape", "segment", "dispatch", "reference"}
_OPS = {path.stem for path in (ROOT / "kernels").glob("*.py")} - _BASE - {"registry", "warmup"}
KERNEL_PARTS = {
    **{name: {*_BASE} for name in _BASE},
    "launch": {"launch"},
    "_triton": {"_triton", "launch", *_BASE},
    **{name: {"_triton", *_OPS, *_BASE} for name in _OPS},
    "registry": {*_OPS, *_BASE},
    "warmup": {"registry", "launch", *_BASE},
    # a step of decoding is not in the registry: it has a state and no gradient
    "bench": {"bench", "warmup", "registry", "launch", "decode", "delta", "pages", *_BASE},
}


def kernel_part(name: str) -> str | None:
    """The part of kernels/ that an imported name is in (``natsl.kernels.launch.replay`` → ``launch``)."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["natsl", "kernels"] and len(parts) > 2 else None


def import_nodes(path: Path, *, functions: bool) -> list[ast.Import | ast.ImportFrom]:
    """Import statements of a file; ``functions``: those inside of functions as well.

    Left out: what stands under ``if TYPE_CHECKING``, which never runs, and under a ``__main__`` guard, which runs in a
    module of another name.
    """
    nodes: list[ast.Import | ast.ImportFrom] = []
    text = path.read_text(encoding="utf-8")
    blocks: list[ast.AST] = [ast.parse(text)]
    for block in blocks:
        for node in ast.iter_child_nodes(block):
            if isinstance(node, ast.Import | ast.ImportFrom):
                nodes.append(node)
            elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                blocks += node.orelse
            elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                blocks.append(node)
    return nodes


def import_names(nodes: list[ast.Import | ast.ImportFrom]) -> list[tuple[int, str]]:
    """Line and full name of everything that the statements import."""
    names = []
    for node in nodes:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        names += [(node.lineno, f"{prefix}{alias.name}") for alias in node.names]
    return names


def test_direction_inside_kernels() -> None:
    wrong = []
    for path in sources("kernels"):
        part = kernel_part(module_name(path))
        assert part in KERNEL_PARTS, path
        wrong += [
            describe(path, line, name)
            for line, name in import_names(import_nodes(path, functions=True))
            if part_of(name) == "kernels" and kernel_part(name) not in KERNEL_PARTS[part]
        ]
    assert wrong == []


def test_registry_is_read_by_bench_and_warmup() -> None:
    wrong = [
        describe(path, line, name)
        for folder in MAY_IMPORT
        for path in sources(folder)
        for line, name in import_names(import_nodes(path, functions=True))
        if kernel_part(name) == "registry" and kernel_part(module_name(path)) not in ("bench", "warmup")
    ]
    assert wrong == []


def test_ops_load_without_triton() -> None:
    wrong = [
        describe(path, line, name)
        for path in sources("kernels")
        if kernel_part(module_name(path)) in _OPS | _BASE
        for line, name in import_names(import_nodes(path, functions=False))
        if kernel_part(name) == "_triton" or name.partition(".")[0] == "triton"
    ]
    assert wrong == []


def import_circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or are between two circles; empty if there is none."""
    names = set(edges)
    while True:
        targets = {target for name in names for target in edges[name]}
        rest = {name for name in names if name in targets and edges[name] & names}
        if rest == names:
            return sorted(names)
        names = rest


def test_no_module_imports_itself_in_a_circle() -> None:
    """Over all files, imports inside of functions included."""
    files = {module_name(path): path for folder in MAY_IMPORT for path in sources(folder)}

    def module_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = {module_of(name) for _, name in import_names(import_nodes(path, functions=True))}
        edges[module] = {target for target in targets if target is not None}
    circle = import_circle(edges)
    assert {name: sorted(edges[name] & set(circle)) for name in circle} == {}


@pytest.mark.parametrize(
    ("edges", "circle"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}, ["b", "c"]),
        ({"a": {"a"}}, ["a"]),
    ],
    ids=["none", "of two", "of one"],
)
def test_circles_are_seen(edges: dict[str, set[str]], circle: list[str]) -> None:
    assert import_circle(edges) == circle
