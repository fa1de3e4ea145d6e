"""A Gaussian process that costs milliseconds: what positions that were not tried will give, and how sure that is.

Half of its kernel is a sum over single numbers, as layers have effects of their own, and half looks at all numbers
together. Smoothness and width are chosen from a short list, for each target by the likelihood of leaving one point out.
Shapes: n points, k positions, d numbers, t targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Distance = npt.NDArray[np.float32]  # of every number [d, k, n]: exponentials of float32 are what costs least

_WIDTHS = (0.2, 0.6, 2.0)  # shares of the range
_NOISE = 1e-4  # variance, of the targets' own


def _distance(one: Array, other: Array) -> Distance:
    return np.abs(one.T[:, :, None].astype(np.float32) - other.T[:, None].astype(np.float32))


def _smooth(distance: Distance, width: float) -> Distance:
    """Matérn 3/2 of distances [d, k, n]."""
    each = math.sqrt(3.0) / width * distance
    joint = np.sqrt(3.0 * np.square(distance).mean(axis=0)) / width
    smooth: Distance = 0.5 * ((1 + each) * np.exp(-each)).mean(axis=0) + 0.5 * (1 + joint) * np.exp(-joint)
    return smooth


def _rough(distance: Distance, width: float) -> Distance:
    """Exponential of distances [d, k, n]: also for choices, whose neighbours have nothing in common."""
    joint = distance.sum(axis=0) / (width * math.sqrt(len(distance)))
    rough: Distance = 0.5 * np.exp(distance / -width).mean(axis=0) + 0.5 * np.exp(-joint)
    return rough


_KERNELS = (_smooth, _rough)


class Model:
    """Of targets [n, t] at points [n, d]; n ≥ 2."""

    def __init__(self, points: Array, targets: Array) -> None:
        self._points = points
        self._mean, spread = targets.mean(axis=0), targets.std(axis=0)
        self._spread = np.where(spread > 0, spread, 1.0)
        scaled = (targets - self._mean) / self._spread
        distance = _distance(points, points)
        fits = [_Fit(kernel, width, distance, scaled) for kernel in _KERNELS for width in _WIDTHS]
        losses = np.array([fit.loss for fit in fits])
        self._fits = [fits[i] for i in losses.argmin(axis=0)]  # one for each target

    def predict(self, positions: Array) -> tuple[Array, Array]:
        """Means and standard deviations [k, t] at positions [k, d]."""
        distance = _distance(positions, self._points)
        known = {id(fit): fit.predict(distance) for fit in self._fits}
        columns = [[part[:, t] for part in known[id(fit)]] for t, fit in enumerate(self._fits)]
        mean, deviation = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
        return self._mean + self._spread * mean, self._spread * deviation


class _Fit:
    """One kernel: ``loss`` [t] is minus twice the log likelihood of points that were left out, but for a constant."""

    def __init__(
        self, kernel: Callable[[Distance, float], Distance], width: float, distance: Distance, targets: Array
    ) -> None:
        self._kernel, self._width = kernel, width
        covariance = kernel(distance, width).astype(np.float64)
        covariance[np.diag_indices(len(covariance))] += _NOISE
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ targets
        diagonal = np.diag(self._inverse)
        self._variance = np.maximum((self._weights**2 / diagonal[:, None]).mean(axis=0), 1e-9)
        self.loss = np.log(self._variance) - np.log(diagonal).mean()

    def predict(self, distance: Distance) -> tuple[Array, Array]:
        near = self._kernel(distance, self._width).astype(np.float64)
        left = np.maximum(1 - ((near @ self._inverse) * near).sum(axis=1), 1e-9)
        return near @ self._weights, np.sqrt(left[:, None] * self._variance)
