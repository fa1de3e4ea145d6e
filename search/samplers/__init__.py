"""Samplers by name: how the next policy is proposed. Imports no optuna; a sampler's module is loaded when it is used.

A sampler is a member of ``Sampler`` and a module of that name here, with ``make(seed) -> BaseSampler``.
``near_knee`` is not one of them: it wraps any of them. ``history`` is what all may know of a study, ``moves`` and
``model`` what is proposed from it.
"""

from __future__ import annotations

import hashlib
import warnings
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Sampler(Enum):
    """How the next policy is proposed."""

    gp = "gp"  # Optuna's Gaussian process: the dearest proposals
    tpe = "tpe"  # multivariate tree-structured Parzen estimator
    nsga3 = "nsga3"
    random = "random"
    sweep = "sweep"  # one number at a time, then moves along the front that a small model expects most of


# Samplers whose proposals take longer than an evaluation of a small model.
DEAR = frozenset({Sampler.gp})


def make_sampler(sampler: Sampler, local_share: float, seed: int, index: int) -> BaseSampler:
    """The sampler of trial ``index``.

    Its draws depend on (seed, index) and the results so far, never on how often the search was resumed. ``local_share``
    of the trials, spread evenly, are moves near the knee.
    """
    from optuna.exceptions import ExperimentalWarning

    number = int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        base: BaseSampler = import_module(f"{__name__}.{sampler.value}").make(number)
    if int((index + 1) * local_share) == int(index * local_share):
        return base
    from natsl.search.samplers.near_knee import NearKneeSampler

    return NearKneeSampler(base, number)
