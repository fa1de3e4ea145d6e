"""Launches of one Triton kernel at a fraction of the host's time that Triton itself takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from natsl.kernels.launch.compilation import collecting
from natsl.kernels.launch.replay import recorder, run


class Launcher:
    """A Triton kernel that is launched as ``kernel[grid](*arguments, **constants)``: tensors first, then numbers.

    Triton works out anew at every launch which variant of the kernel the arguments need, and asks the driver about
    every pointer. Here the variant is remembered by what it depends on, and pointers are passed as numbers. What needs
    variants of its own takes Triton's way: tensors not aligned to 16 bytes, sizes of more than 31 bits. The tensors are
    on the current device, as ``register`` sees to.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # → kernel, constants it is called with

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].device
        if device.type != "cuda" or collecting():
            self.function[grid](*arguments, **constants)
            return
        tensors = [x for x in arguments if isinstance(x, Tensor)]  # the first ones
        pointers, numbers = [x.data_ptr() for x in tensors], arguments[len(tensors) :]
        kinds: list[Any] = []  # what Triton asks of a whole number: whether it is 1, divisible by 16 or long
        special = reduce(or_, pointers) & 15  # not 0: a variant of its own
        for n, parameter in zip(numbers, self.function.params[len(tensors) :], strict=False):
            if parameter.is_constexpr:
                kinds.append(n)
            elif type(n) is int:
                if parameter.do_not_specialize:
                    special |= n >> 31
                else:
                    kinds.append((n == 1, n % 16 == 0, n >> 31 > 0))
        key = (device.index, *[x.dtype for x in tensors], *constants.values(), *kinds)
        variant = None if special else self._variants.get(key)
        if variant is None:
            if any(isinstance(n, Tensor) for n in numbers):
                raise TypeError(f"{self.function}: tensors must be its first arguments")
            kernel = self.function[grid](*arguments, **constants)
            names = self.function.arg_names[len(arguments) :]
            variant = kernel, tuple(constants[name] for name in names)
            if not special:
                self._variants[key] = variant
        else:
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            run(variant[0], grid, stream, [*pointers, *numbers, *variant[1]])
        active = recorder()
        if active is not None:
            active.record(variant[0], grid, tensors, (*numbers, *variant[1]), bool(special))
