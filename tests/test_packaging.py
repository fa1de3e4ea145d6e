"""The wheel and the sdist hold the linked folders as natsl.*, and an installed copy runs away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from natsl.generate import Sampling, generate
from natsl.load import load_exported
from tests.run_helpers import make_run

ROOT = Path(__file__).parents[1]
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "natsl", "kernels", "space", "search", "conf")


def run(*command: str, cwd: Path, path: Path | list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder that is not the checkout, with ``path`` as the only addition to the import path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path if isinstance(path, list) else [path]))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def shipped() -> set[str]:
    """Every file that an installed natsl must have, relative to site-packages."""
    files = {
        Path("natsl", *([] if folder == "natsl" else [folder]), path.relative_to(ROOT / folder)).as_posix()
        for folder in ("natsl", "kernels", "space", "search", "conf")
        for suffix in ("*.py", "*.yaml", "tuned.json", "quickstart.json", "small.json")
        for path in (ROOT / folder).rglob(suffix)
        if "__pycache__" not in path.parts
    }
    return files | {"natsl/py.typed"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, made from a copy of the sources, and the wheel, made from the sdist; no network."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout / name)
    out = tmp_path_factory.mktemp("dist")
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("natsl-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    result = run(sys.executable, *install, cwd=target)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def test_wheel_holds_every_module_and_preset(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped()


def test_sdist_holds_every_module_and_preset(dist: Path) -> None:
    (path,) = dist.glob("natsl-*.tar.gz")
    with tarfile.open(path) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped() | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_states_licence_and_scripts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in texts["LICENSE"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for script, target in project["scripts"].items():
        assert f"{script} = {target}" in texts["entry_points.txt"]


def test_site_packages_gain_natsl_only(installed: Path) -> None:
    folders = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert folders - {"bin"} == {"natsl"}


def test_installed_copy_is_the_one_imported(installed: Path, tmp_path: Path) -> None:
    code = "import natsl, natsl.kernels.reference, natsl.space, natsl.search, natsl.conf; print(natsl.__file__)"
    result = run(sys.executable, "-c", code, cwd=tmp_path, path=installed)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == installed / "natsl" / "__init__.py"


MODULES = ("natsl", "natsl.search", "natsl.train", "natsl.export", "natsl.generate", "natsl.evaluate")


@pytest.mark.parametrize("module", MODULES)
def test_installed_command_gives_help_in_another_folder(module: str, installed: Path, tmp_path: Path) -> None:
    result = run(sys.executable, "-m", module, "--help", cwd=tmp_path, path=installed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["natsl-search", "natsl search"])
def test_installed_script_runs_in_another_folder(script: str, installed: Path, tmp_path: Path) -> None:
    name, *verb = script.split()
    result = run(sys.executable, str(installed / "bin" / name), *verb, "--help", cwd=tmp_path, path=installed)
    assert result.returncode == 0, result.stderr
    module = run(sys.executable, "-m", "natsl.search", "--help", cwd=tmp_path, path=installed).stdout
    assert result.stdout == module.replace("python -m natsl.search", script)


LOAD = """
import sys, natsl
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer(["def f", "import os"], padding=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=12)[:, -12:].tolist())
import kernels
print(kernels.owner, "natsl.kernels.pages" in sys.modules, natsl.__file__)
"""


def test_an_export_loads_beside_another_package_named_kernels(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    make_run(tmp_path)
    command = ("-m", "natsl", "export", "run=r", f"root={tmp_path}", "name=mine")
    done = run(sys.executable, *command, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "r" / "export" / "mine"
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n__version__ = '0.0.1'\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = [installed, tmp_path / "site"]
    result = run(sys.executable, "-c", LOAD, str(folder), cwd=elsewhere, path=path)
    assert result.returncode == 0, result.stderr
    model, policy = load_exported(folder)
    prompts = (b"def f", b"import os")
    expected = [list(generate(model, policy, [*prompt], 12, Sampling(0))) for prompt in prompts]
    assert result.stdout.splitlines() == [str(expected), f"somebody else True {installed / 'natsl' / '__init__.py'}"]
