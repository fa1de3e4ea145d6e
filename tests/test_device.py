"""The device that a command runs on."""

from __future__ import annotations

import logging

import pytest
import torch

from natsl.device import resolve_device
from natsl.errors import UserError


def test_device_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "natsl")
    assert resolve_device("cpu") == torch.device("cpu")
    assert caplog.records == []


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cpu:0", "cuda:-1", "CUDA", "cuda:0:0"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match="it must be auto, cpu, cuda or cuda:<number>"):
        resolve_device(name)


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO, "natsl")
    assert resolve_device("auto") == torch.device("cpu")
    notice = "no GPU found, running on the CPU (device=cpu silences this)"
    assert caplog.record_tuples == [("natsl.device", logging.INFO, notice)]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="this machine has 0 usable GPUs"):
            resolve_device(name)


def test_devices_with_gpus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    caplog.set_level(logging.INFO, "natsl")
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda") == torch.device("cuda")
    assert not current
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert current == [1]
    with pytest.raises(UserError, match="cuda:2"):
        resolve_device("cuda:2")
    assert caplog.records == []
