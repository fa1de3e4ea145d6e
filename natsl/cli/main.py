"""What all commands share: options by Hydra, one line for a user's mistake, exit codes, the choice of the device.

Exit codes: 0 done, 2 a mistake of the user, 1 a failure, 130 Ctrl-C. Hydra makes no folder, changes no directory and
configures no logging here. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from natsl.run import UserError, redact_text

if TYPE_CHECKING:
    import argparse

    import torch
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from natsl.cli.options import Loader

C = TypeVar("C")
# Failures of the machine that one line explains better than a traceback.
_PLAIN_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)


def run_main(config_name: str, config_class: type[C], function: Callable[[C], int | None]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line, then call ``function`` with a ``config_class``.

    Returns if all went well and exits otherwise. ``-m`` runs one job after another, after all of them were checked.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    warnings.showwarning = _show_warning
    try:
        code = _main(config_name, config_class, function, sys.argv[1:])
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        line = user_line(error)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            _say(redact_text(traceback.format_exc()).rstrip())
            code = 1
        if line is not None:
            _say(f"error: {line}")
            code = 1 if isinstance(error, OSError) and error.errno else 2
    if code:
        sys.exit(code)


def user_line(error: Exception) -> str | None:
    """The one line that tells a user what to mend, or None if ``error`` is a defect whose traceback is needed."""
    text = _text(error)
    return None if text is None else redact_text(" ".join(text.split()))


def _text(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _PLAIN_ERRNO:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if isinstance(error, ValueError) and not _from_library(error):
        return str(error)
    if "omegaconf" in sys.modules and "hydra" in sys.modules:
        return _hydra_text(error)
    return None


def _from_library(error: Exception) -> bool:
    """Whether an exception was raised by an installed package: then it is our defect, not the user's mistake."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "natsl":
        return False
    return "site-packages" in Path(last.tb_frame.f_code.co_filename).parts


def _hydra_text(error: Exception) -> str | None:
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return f"{error.override} cannot be read: put a value with spaces or symbols in quotes, as in '{key}=\"a (b)\"'"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return f"unknown option {cause.full_key!r} (--help lists all)"
    if isinstance(cause, OmegaConfBaseException):
        first = str(cause.msg or cause).splitlines()[0]
        return f"{cause.full_key}: {first}" if cause.full_key else first
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:1] if "search path" in str(error).lower() else lines)
    found = re.fullmatch(r"(In '.*?': )\w+ raised while composing config: (.*?) full_key: (\S+).*", text)
    return f"{found[1]}{found[3]}: {found[2]}" if found else text


def _main(config_name: str, config_class: type[C], function: Callable[[C], int | None], argv: list[str]) -> int:
    if "--version" in argv:
        from natsl import __version__

        print(f"natsl {__version__}")
        return 0
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = command_name()
    args = parser.parse_args(argv)
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not allowed: it would execute a pickle")
    if args.config_path is not None:
        raise UserError("--config-path is not allowed: add your own folder of config files with --config-dir")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve goes with --cfg or --help")
    config_name = args.config_name or config_name
    loader = _loader(config_class, args.config_dir)
    if args.help:
        from natsl.cli.options import help_text

        print(help_text(loader, _compose(loader, config_name, args.overrides), command_name()), end="")
        return 0
    if args.hydra_help or args.cfg or args.shell_completion or args.info:
        return _show(loader, config_name, args, parser)
    _note_ignored(args.overrides)
    if not (args.multirun or "hydra.mode=MULTIRUN" in args.overrides):
        return function(_to_object(_compose(loader, config_name, args.overrides), config_class)) or 0
    lines = _jobs(loader, args.overrides)
    jobs = [_to_object(_compose(loader, config_name, line), config_class) for line in lines]
    names = [name for job in jobs if (name := getattr(job, "name", None)) is not None]
    if len(set(names)) < len(names):
        raise UserError(f"the {len(jobs)} jobs need different names, for example name=a,b or name='s${{seed}}'")
    for number, (line, job) in enumerate(zip(lines, jobs, strict=True), 1):
        _say(redact_text(f"job {number} of {len(jobs)}: {' '.join(line)}"))
        code = function(job)
        if code:
            return code
    return 0


def _loader(config_class: type, config_dir: str | None) -> Loader:
    import hydra.version
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    from natsl.cli.options import Loader

    hydra.version.setbase("1.3")
    search_path = create_config_search_path("pkg://natsl.conf")  # Hydra imports it, which registers the classes
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return Loader(search_path, config_class)


def _compose(loader: Loader, config_name: str, overrides: list[str]) -> DictConfig:
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    try:
        return loader.load_configuration(config_name, list(overrides), RunMode.RUN)
    except ValueError as error:
        if isinstance(error, UserError | OmegaConfBaseException):
            raise
        empty = [text for text in overrides if text.lower().endswith("=null")]
        if empty and "Config group override must be" in str(error):  # Hydra tells neither option nor value
            raise UserError(f"{' '.join(empty)} is not allowed: give the name of a preset, or leave it out") from None
        raise UserError(str(error)) from None  # Hydra's complaint about what was written


def _to_object(config: DictConfig, config_class: type[C]) -> C:
    """The composed config as an object of ``config_class``, which checks itself on the way."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        del config["hydra"]
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given: {' '.join(f'{key}=...' for key in missing)}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, config_class)
    return result


def _jobs(loader: Loader, overrides: list[str]) -> list[list[str]]:
    """Command lines of the jobs of a sweep: every combination of the values."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    kept = [override for override in parsed if not override.is_hydra_override()]
    return [list(job) for job in BasicSweeper.split_arguments(kept, None)[0]]


def _show(loader: Loader, config_name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """What Hydra itself shows: ``--cfg``, ``--info``, ``--hydra-help``, shell completion."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    hydra = Hydra(task_name=config_name, config_loader=loader)
    GlobalHydra.instance().initialize(hydra)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            _show_one(hydra, config_name, args, parser)
    except UserError:
        if not args.shell_completion:  # a shell that completes a wrong line has nothing to offer, and stays silent
            raise
    finally:
        GlobalHydra.instance().clear()
    print(redact_text(shown.getvalue()), end="")
    return 0


def _show_one(hydra: Hydra, config_name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.hydra_help:
        hydra.hydra_help(config_name, parser, args)
    elif args.cfg:
        hydra.show_cfg(config_name, args.overrides, args.cfg, args.package, args.resolve)
    elif args.shell_completion:
        hydra.shell_completion(config_name, args.overrides)
    else:
        hydra.show_info(args.info, config_name, args.overrides)


def _note_ignored(overrides: list[str]) -> None:
    from natsl.cli.options import IGNORED_HYDRA

    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in IGNORED_HYDRA:
            _say(f"note: {key} has no effect: everything is written to the run's folder, root/name")


def command_name() -> str:
    """How the running command was called: ``natsl-search`` or ``python -m natsl.train``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name or "natsl"


def resolve_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``; ``auto`` without a GPU is the CPU, with a notice.

    Raises ``UserError`` for another name and for a GPU that is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"device = {name!r} is not allowed: it must be auto, cpu, cuda or cuda:<number>")
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        if count == 0:
            _say("note: no GPU found, running on the CPU (device=cpu silences this)")
        return torch.device("cuda" if count else "cpu")
    if count <= int(index or 0):
        raise UserError(f"device = {name!r} is not there: this machine has {count} usable GPUs; use device=auto or cpu")
    if index:
        torch.cuda.set_device(int(index))  # kernels are launched on the current device
    return torch.device(name)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if category is UserWarning:  # made for the user, who does not care where in the code it arose
        text = f"warning: {message}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(redact_text(text), file=file or sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
