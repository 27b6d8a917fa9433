"""The figures."""

import pathlib
from typing import Any, NamedTuple

import numpy as np


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

    matplotlib.use("Agg")  # also where there is no display
    import matplotlib.pyplot as plt

    figure, (whole, end) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, curve in enumerate(curves):
        percent = 100 * curve.accuracy
        mean, error = percent.mean(1), standard_error(percent)
        for axes in (whole, end):
            axes.plot(curve.steps, mean, color=f"C{i}", label=curve.label, linewidth=1.5)
            axes.fill_between(
                curve.steps, mean - error, mean + error, color=f"C{i}", alpha=0.2, linewidth=0
            )
    for axes in (whole, end):
        axes.set_xlabel("iteration")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
    last = np.concatenate([100 * curve.accuracy[len(curve.accuracy) // 4 :] for curve in curves])
    end.set_ylim(np.floor(last.min()) - 0.5, np.ceil(last.max()) + 0.5)
    end.set_title("the same, closer", fontsize=10)
    whole.legend(fontsize=9, loc="lower right")
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a matplotlib figure and closes it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def standard_error(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last axis (seeds); 0 for a single seed."""
    seeds = values.shape[-1]
    if seeds == 1:
        return np.zeros(values.shape[:-1])
    from scipy import stats

    return np.asarray(stats.sem(values, axis=-1))
