"""The figures of the SDE experiment."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")  # also where there is no display
import matplotlib.pyplot as plt
from matplotlib import ticker

from experiments import figures
from experiments.theory.sde_problems import Problem

COLOURS = {"SDE": "black", "M-SGD-Gaussian": "C0", "SGD": "C3"}


def plot_strong(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws root mean square distances against eta, log-log, with the fitted lines."""
    figure, axes = plt.subplots(figsize=(10.5, 5.6), layout="constrained")
    maps = {0.5: "autumn", 1: "winter", 1.5: "summer"}
    for expected, name in maps.items():
        group = [row for row in rows if row["expected"] == expected]
        colours = matplotlib.colormaps[name](np.linspace(0.0, 0.75, len(group)))
        for row, colour, marker in zip(group, colours, itertools.cycle("osD^v"), strict=False):
            _points_and_line(axes, row, f"{_order(row)}  {row['label']}", colour, marker)
    _finish(axes, "distance to the SDE at T = 2 (root mean square)")
    figure.suptitle(
        "Path by path: order 1/2 without a shared Brownian path, 1 with it, "
        "3/2 where Euler's drift error is gone",
        fontsize=11,
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="order ± s.e.")
    figures.save(figure, path)


def plot_weak(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws the size of differences of expectations against eta, one panel per group of cases."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 5.4 * lines), layout="constrained", squeeze=False
    )
    for axes, group in itertools.zip_longest(panels.flat, groups):
        if group is None:
            axes.remove()
            continue
        members = [row for row in rows if row["group"] == group]
        for i, row in enumerate(members):
            marker = "o" if row["expected"] == 2 else "s"
            _points_and_line(axes, row, f"{_order(row)}  {row['label']}", f"C{i}", marker)
        _finish(axes, "difference of expectations")
        axes.set_xlabel(members[0].get("abscissa", "learning rate $\\eta$"))
        axes.set_title(group, fontsize=10)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle("In expectation: order 2 needs the right noise, order 1 does not", fontsize=11)
    figures.save(figure, path)


def plot_paths(problem: Problem, plane: Sequence[Any], path: pathlib.Path) -> None:
    """Draws the paths on the contours of the loss, and their distances to the SDE."""
    figure, panels = plt.subplots(
        2, len(plane), figsize=(5.6 * len(plane), 8), layout="constrained", height_ratios=(3, 2)
    )
    grid_x, grid_y, losses = _landscape(problem, plane)
    for (above, below), part in zip(panels.T, plane, strict=True):
        levels = np.quantile(losses, np.linspace(0, 1, 20))
        above.contour(grid_x, grid_y, losses, np.unique(levels), colors="0.75", linewidths=0.7)
        for name, points in part.points.items():
            width, layer = (1.3, 3) if name == "SDE" else (0.9, 2)
            style = {"color": COLOURS[name], "linewidth": width, "zorder": layer}
            for i, path_points in enumerate(points):
                above.plot(*path_points.T, label=None if i else name, **style)
        above.plot(*part.points["SDE"][0, 0], "o", color="black", markersize=5)
        above.set_title(f"four paths of each, $\\eta$ = {part.learning_rate:g}", fontsize=10)
        above.set_xlabel("$\\theta_1$")
        above.set_ylabel("$\\theta_2$")
        for name, distances in part.distances.items():
            below.semilogy(part.times[1:], distances[1:], color=COLOURS[name], label=name)
        below.set_xlabel("time $k\\eta$")
        below.set_ylabel("distance to the SDE (median)")
        below.set_ylim(5e-4, 5)
        below.grid(alpha=0.3)
        below.legend(fontsize=9)
    panels[0, 0].legend(fontsize=9, loc="upper left")
    figure.suptitle(
        "y = a tanh(b x), batches of 1 of N = 32: M-SGD-Gaussian follows the SDE that shares its "
        "Brownian path,\nuntil the saddle parts a few; SGD goes its own way",
        fontsize=11,
    )
    figures.save(figure, path)


def plot_network(networks: Sequence[Any], config: Any, path: pathlib.Path) -> None:
    """Draws distances to the SDE against time, on the network."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    first = networks[0]
    axes.plot(
        first.times[1:],
        first.displacement[1:],
        color="grey",
        linestyle=":",
        label="way of the SDE from its start",
    )
    others = (name for name in first.distances if name != "M-SGD-Fisher")
    for colour, name in zip(("C3", "C1"), others, strict=False):
        label = f"{name}, $\\eta$ = {first.learning_rate:g}"
        axes.plot(first.times[1:], first.distances[name][1:], color=colour, label=label)
    for i, part in enumerate(networks):
        label = f"M-SGD-Fisher, $\\eta$ = {part.learning_rate:g}"
        shared = part.distances["M-SGD-Fisher"][1:]
        axes.plot(part.times[1:], shared, color="C0", alpha=1 - 0.25 * i, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("time $k\\eta$")
    axes.set_ylabel("distance to the SDE (root mean square)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"LeNet on FashionMNIST, b = {config.batch_size}: M-SGD-Fisher and the SDE of the same "
        f"Brownian path, {config.network_paths} of them",
        fontsize=11,
    )
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


def _points_and_line(axes: Any, row: dict[str, Any], label: str, colour: Any, marker: str) -> None:
    """Draws measured sizes with error bars, and the least-squares line through them."""
    rates, errors = np.array(row["learning_rates"]), np.abs(row["errors"])
    bars = np.minimum(row.get("standard_errors") or np.zeros_like(errors), 0.95 * errors)
    axes.errorbar(rates, errors, bars, fmt=marker, color=colour, markersize=5, fillstyle="none")
    order = row["order"]["value"] if isinstance(row["order"], dict) else row["order"]
    weights = errors**2 / np.maximum(bars, 1e-6 * errors) ** 2
    middle = np.average(np.log(errors) - order * np.log(rates), weights=weights)
    axes.plot(rates, np.exp(middle) * rates**order, color=colour, label=label, lw=1.2)


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
    axes.grid(alpha=0.3, which="both")
