"""Figures as PNG files. Names that come from data are text in them, with all their dollars, never formulas."""

import io

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False


def to_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
