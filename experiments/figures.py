"""Figures of test accuracy along training, and the way in which all figures are written."""

import pathlib
import textwrap
from typing import Any, NamedTuple

import numpy as np

from experiments import styles


class Curve(NamedTuple):
    """One line of a figure: accuracy [evaluations, seeds] against step [evaluations]."""

    label: str
    steps: np.ndarray
    accuracy: np.ndarray


def plot_curves(curves: list[Curve], path: pathlib.Path, title: str) -> None:
    """Draws test accuracy against iteration, with a band of one standard error over seeds.

    Args:
        curves: one curve per algorithm.
        path: the picture to write.
        title: the title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    looks = styles.assigned(curve.label for curve in curves)
    with matplotlib.rc_context(styles.RC):
        lines = -(-len(curves) // 2)
        figure, (whole, end) = plt.subplots(
            2, 1, figsize=(styles.WIDTH, 6.4 + 0.2 * lines), layout="constrained"
        )
        for i, curve in enumerate(curves):
            percent = 100 * curve.accuracy
            mean, error = percent.mean(1), standard_error(percent)
            look = looks[curve.label]
            for axes in (whole, end):
                options = look.options(len(curve.steps), first=i)
                axes.plot(curve.steps, mean, label=curve.label, linewidth=1.4, **options)
                axes.fill_between(
                    curve.steps, mean - error, mean + error, color=look.colour, alpha=0.15, lw=0
                )
        for axes in (whole, end):
            axes.set_ylabel("test accuracy (%)")
        end.set_xlabel("iteration")
        last = np.concatenate(
            [100 * curve.accuracy[2 * len(curve.accuracy) // 3 :] for curve in curves]
        )
        end.set_ylim(np.floor(last.min()) - 0.5, np.ceil(last.max()) + 0.5)
        end.set_title("the same, closer")
        below_axes(figure, whole)
        figure.suptitle(wrapped(title))
    save(figure, path)


def below_axes(figure: Any, axes: Any, columns: int = 2) -> None:
    """Writes the legend of some axes below all axes of the figure, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=4)


def wrapped(title: str, width: int = 76) -> str:
    """A title with its lines broken to the width of a picture, though not around "="."""
    whole = title.replace(" = ", "\u00a0=\u00a0")
    return "\n".join(textwrap.fill(line, width) for line in whole.split("\n"))


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a matplotlib figure with a transparent background, and closes it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130, facecolor="none")
    plt.close(figure)


def standard_error(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last axis (seeds); 0 for a single seed."""
    seeds = values.shape[-1]
    if seeds == 1:
        return np.zeros(values.shape[:-1])
    from scipy import stats

    return np.asarray(stats.sem(values, axis=-1))
