"""The device that a command runs on. Loads torch only once a name has been checked."""

from __future__ import annotations

import contextlib
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.errors import UserError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


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
            _log.info("no GPU found, running on the CPU (device=cpu silences this)")
        return torch.device("cuda" if count else "cpu")
    if count <= int(index or 0):
        raise UserError(f"device = {name!r} is not there: this machine has {count} usable GPUs; use device=auto or cpu")
    if index:
        torch.cuda.set_device(int(index))  # what names no device, such as an event, is on it
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a device is called: the name of a GPU, or of the processor as far as the system tells."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine() or "CPU"


def probe_device(device: torch.device) -> None:
    """Free cached memory and raise ``RuntimeError`` if the device does not compute any more."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.ones(1, device=device).add_(1).item()
