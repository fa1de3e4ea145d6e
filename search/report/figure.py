"""A figure of matplotlib that notebooks show by itself. Loads matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure without pyplot, whose first figure is what makes notebooks show others."""

    def _repr_png_(self) -> bytes:
        """The picture, for notebooks."""
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()
