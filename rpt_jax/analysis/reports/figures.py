"""Matplotlib figures without pyplot, so that no backend is selected and no figure stays open."""

from pathlib import Path

from matplotlib.figure import Figure


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], layout: str | None = None, **options):
    """Make a figure of rows x columns axes.

    Args:
        rows: of axes.
        columns: of axes.
        figsize: width and height, inches.
        layout: of the figure, as matplotlib's.
        options: of `Figure.subplots`.
    Returns:
        (figure, its axes as `Figure.subplots` returns them).
    """
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def save_figures(directory: Path, figures: dict[str, Figure]) -> dict[str, Path]:
    """Save figures as plots/<name>.png; return their paths."""
    paths = {name: directory / "plots" / f"{name}.png" for name in figures}
    (directory / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=110, bbox_inches="tight")
    return paths
