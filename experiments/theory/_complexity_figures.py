"""The figures of the complexity experiment."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # This backend needs no display.
import matplotlib.pyplot as plt

from experiments import figures, styles
from msgd_jax.complexity import Estimate


def plot_theorem1(
    rows: Sequence[dict[str, Any]], columns: dict[str, str], path: pathlib.Path
) -> None:
    """Draws the ratio of both sides of each inequality, with 95 % intervals; above 1: violated."""
    titles = {
        "gaussian_lower": "(10) $\\sqrt{2/\\pi}\\,R(A) \\leq R(G)$",
        "gaussian_upper": "(10) $R(G) \\leq E\\max|g_i|\\,R(A)$",
        "without": "(11) without replacement",
        "with": "(11) with replacement: false",
        "with, corrected": "(11) with replacement, corrected",
    }
    heights = np.arange(len(rows))[::-1]
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(
            figsize=(styles.WIDTH, 2.4 + 0.6 * len(rows)), layout="constrained"
        )
        axes.axvspan(1, 1.3, color=styles.COLOURS[5], alpha=0.15, label="violated")
        for i, name in enumerate(columns):
            found = [
                (height, row["inequalities"][name]["ratio"])
                for height, row in zip(heights, rows, strict=True)
                if name in row["inequalities"]
            ]
            colour, _, marker = styles.style(i + 1)
            axes.errorbar(
                [ratio["value"] for _, ratio in found],
                [height + 0.12 * (2 - i) for height, _ in found],
                xerr=_margins([ratio for _, ratio in found]),
                fmt=marker,
                color=colour,
                markersize=6,
                label=titles[name],
            )
        labels = [
            f"{row['label']}\nN = {row['num_examples']}, b = {row['batch_size']}" for row in rows
        ]
        axes.set_yticks(heights, labels)
        axes.set_xlim(0, 1.3)
        axes.set_xlabel("left side over right side")
        figures.below_axes(figure, axes)
        figure.suptitle("Theorem 1: how tight is each inequality")
    figures.save(figure, path)


def _margins(ratios: Sequence[dict[str, Any]]) -> np.ndarray:
    """How far the 95 % intervals reach below and above their values, [2, ratios]."""
    estimates = [Estimate(**ratio) for ratio in ratios]
    ends = np.array([estimate.interval for estimate in estimates]).reshape(-1, 2)
    values = np.array([[estimate.value] for estimate in estimates]).reshape(-1, 1)
    return np.abs(ends - values).T
