"""The figures of the SDE experiment."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")  # This backend needs no display.
import matplotlib.pyplot as plt
from matplotlib import ticker

from experiments import figures, styles
from experiments.theory.sde_problems import Problem

_STYLES = {"SDE": styles.style(0), "M-SGD-Gaussian": styles.style(3), "SGD": styles.style(1)}


def plot_strong(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws root mean square distances against eta, log-log, with the fitted lines."""
    expected = sorted({row["expected"] for row in rows})
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(
            figsize=(styles.WIDTH, 4.6 + 0.2 * len(rows)), layout="constrained"
        )
        for i, row in enumerate(rows):
            # Each expected order has a line style. Colours and markers tell the rows apart.
            look = styles.style(i)._replace(
                line=styles.LINES[expected.index(row["expected"])],
                marker=styles.MARKERS[(i + 4 * (i // 9)) % 9],  # Rows 0 and 9 share a colour.
            )
            _points_and_line(axes, row, look)
        _finish(axes, "distance to the SDE at T = 2 (root mean square)")
        title = (
            "Path by path: order 1/2 without a shared Brownian path, 1 with it, "
            "3/2 where Euler's drift error is gone"
        )
        figure.suptitle(figures.wrapped(title))
        figures.below_axes(figure, axes, columns=1)
    figures.save(figure, path)


def plot_weak(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the size of differences of expectations against eta, one panel per group of cases."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    most = max(sum(row["group"] == group for row in rows) for group in groups)
    with matplotlib.rc_context(styles.RC):
        figure, panels = plt.subplots(
            len(groups),
            1,
            figsize=(styles.WIDTH, (4.4 + 0.2 * most) * len(groups)),
            layout="constrained",
            squeeze=False,
        )
        for axes, group in zip(panels.flat, groups, strict=True):
            members = [row for row in rows if row["group"] == group]
            for i, row in enumerate(members):
                line = "-" if row["expected"] == 2 else "--"
                _points_and_line(axes, row, styles.style(i)._replace(line=line))
            _finish(axes, "difference of expectations")
            axes.set_xlabel(members[0].get("abscissa", "learning rate $\\eta$"))
            axes.set_title(group)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=4)
        title = "In expectation: order 2 needs the right noise, order 1 does not"
        figure.suptitle(title)
    figures.save(figure, path)


def plot_paths(problem: Problem, plane: Sequence[Any], path: pathlib.Path) -> None:
    """Draws the paths on the contours of the loss, and their distances to the SDE."""
    grid_x, grid_y, losses = _landscape(problem, plane)
    levels = np.unique(np.quantile(losses, np.linspace(0, 1, 20)))
    with matplotlib.rc_context(styles.RC):
        figure, panels = plt.subplots(
            2 * len(plane),
            1,
            figsize=(styles.WIDTH, 8.6 * len(plane)),
            layout="constrained",
            height_ratios=(3, 2) * len(plane),
        )
        for above, below, part in zip(panels[::2], panels[1::2], plane, strict=True):
            above.contour(
                grid_x, grid_y, losses, levels, colors=styles.NEUTRAL, alpha=0.5, linewidths=0.7
            )
            for name, points in part.points.items():
                colour, line, _ = _STYLES[name]
                width, layer = (2, 3) if name == "SDE" else (1.1, 2)
                look = {"color": colour, "linestyle": line, "linewidth": width, "zorder": layer}
                for i, path_points in enumerate(points):
                    above.plot(*path_points.T, label=None if i else name, **look)
            above.plot(*part.points["SDE"][0, 0], "o", color=styles.NEUTRAL, markersize=6)
            above.set_title(f"four paths of each, $\\eta$ = {part.learning_rate:g}")
            above.set_xlabel("$\\theta_1$")
            above.set_ylabel("$\\theta_2$")
            for name, distances in part.distances.items():
                options = _STYLES[name].options(len(distances) - 1)
                below.semilogy(part.times[1:], distances[1:], **options)
            below.set_xlabel("time $k\\eta$")
            below.set_ylabel("distance to the SDE (median)")
            below.set_ylim(5e-4, 5)
        figures.below_axes(figure, panels[0], columns=3)
        title = (
            "y = a tanh(b x), batches of 1 of N = 32: M-SGD-Gaussian follows the SDE that shares "
            "its Brownian path, until the saddle parts a few; SGD goes its own way"
        )
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _landscape(problem: Problem, plane: Sequence[Any]) -> tuple[Any, Any, Any]:
    points = np.concatenate([p.reshape(-1, 2) for part in plane for p in part.points.values()])
    high = np.abs(points).max(0) + 0.3
    low = -high
    axes = [np.linspace(a, b, 120) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes), -1)
    mean_loss = jax.vmap(lambda theta: problem.loss_vector_fn(theta, problem.data).mean())
    losses = mean_loss(jnp.asarray(grid.reshape(-1, 2), jnp.float32))
    return grid[..., 0], grid[..., 1], np.asarray(losses).reshape(grid.shape[:2])


def _points_and_line(axes: Any, row: dict[str, Any], look: styles.Style) -> None:
    """Draws measured sizes with error bars, and the least-squares line through them."""
    rates, errors = np.array(row["learning_rates"]), np.abs(row["errors"])
    bars = np.minimum(row.get("standard_errors") or np.zeros_like(errors), 0.95 * errors)
    order = row["order"]["value"] if isinstance(row["order"], dict) else row["order"]
    weights = errors**2 / np.maximum(bars, 1e-6 * errors) ** 2
    middle = np.average(np.log(errors) - order * np.log(rates), weights=weights)
    axes.errorbar(
        rates, errors, bars, fmt=look.marker, color=look.colour, markersize=6, fillstyle="none"
    )
    axes.plot(rates, np.exp(middle) * rates**order, color=look.colour, linestyle=look.line, lw=1.2)
    axes.plot(  # For the legend alone: the line with the marker, and the order with its error.
        [],
        [],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        fillstyle="none",
        label=f"{_order(row)}  {row['label']}",
    )


def _order(row: dict[str, Any]) -> str:
    order = row["order"]
    if isinstance(order, dict):
        return f"{order['value']:.3f} ± {order['standard_error']:.3f}"
    return f"{order:.3f}"


def _finish(axes: Any, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("learning rate $\\eta$")
    axes.set_ylabel(ylabel)
