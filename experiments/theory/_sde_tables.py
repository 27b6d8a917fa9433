"""The tables that the SDE experiment prints, and its records."""

import itertools
import math
from typing import Any

import jax
import numpy as np

from experiments.tables import text_table
from msgd_jax import sde


def strong_table(rows: list[dict[str, Any]]) -> str:
    """One line per case: the theoretical order, the measured one with its standard error, p and a.

    p is the probability of residuals at least as large as these if the errors are on a line.
    """
    lines = []
    for row in rows:
        a = row.get("deterministic")
        constant = str(sde.Estimate(**a)) if a else ""
        order = str(sde.Estimate(**row["order"]))
        lines.append([row["label"], f"{row['expected']:g}", order, _p_value(row), constant])
    return text_table(["path-wise (strong) order", "expected", "measured", "p", "a"], lines, gap=3)


def _p_value(row: dict[str, Any]) -> str:
    value = row.get("p_value")
    return "" if value is None else f"{value:.2g}"


def weak_table(rows: list[dict[str, Any]]) -> str:
    """One line per case, under the name of its group; exact rows have no standard error."""
    lines = []
    for group, cases in itertools.groupby(rows, key=lambda row: row["group"]):
        lines.append([f"{group}:"])
        for row in cases:
            order = row["order"]
            shown = str(sde.Estimate(**order)) if isinstance(order, dict) else f"{order:.3f}"
            lines.append([f"  {row['label']}", f"{row['expected']:g}", shown, _p_value(row)])
    return text_table(["order in expectation (weak)", "expected", "measured", "p"], lines, gap=3)


def network_table(networks: list[dict[str, Any]]) -> str:
    """One line per iteration: its distance to the SDE at the end, also relative to the path's.

    Args:
        networks: `NetworkRun`s as JSON.
    """
    lines = []
    for part in networks:
        for name, values in part["distances"].items():
            end, relative = values[-1], values[-1] / part["displacement"][-1]
            lines.append([name, f"{part['learning_rate']:g}", f"{end:.4g}", f"{relative:.2%}"])
    header = ["LeNet on FashionMNIST", "eta", "distance at the end", "relative"]
    return text_table(header, lines, gap=3)


def record(sweep: sde.ErrorSweep) -> dict[str, Any]:
    """The sweep as JSON values; if nothing is random, there is no chi-square."""
    fit = sweep.order_fit
    quality = {"chi_square": fit.chi_square, "p_value": fit.p_value}
    return {
        "learning_rates": sweep.learning_rates.tolist(),
        "errors": sweep.errors.tolist(),
        "standard_errors": sweep.standard_errors.tolist(),
        "order": fit.slope._asdict(),
        **{name: value if math.isfinite(value) else None for name, value in quality.items()},
    }


def as_json(part: Any) -> dict[str, Any]:
    """A named tuple whose arrays are lists."""
    return jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, part._asdict())
