"""The tables that the SDE experiment prints, and what it records."""

import math
from typing import Any

import jax
import numpy as np

from msgd_jax import sde


def strong_table(rows: list[dict[str, Any]]) -> str:
    """One line a case: order with its standard error, how well a line fits, theory's, and a.

    p is the probability of residuals as large as these if the errors are on a line.
    """
    lines = [f"{'path-wise (strong) order':<38}{'expected':>9}{'measured':>18}{'p':>8}{'a':>20}"]
    lines.append("-" * len(lines[0]))
    for row in rows:
        a = row.get("deterministic")
        constant = sde.Estimate(**a) if a else ""
        order = sde.Estimate(**row["order"])
        lines.append(
            f"{row['label']:<38}{row['expected']:>9g}{order!s:>18}{_p_value(row):>8}{constant!s:>20}"
        )
    return "\n".join(lines)


def _p_value(row: dict[str, Any]) -> str:
    value = row.get("p_value")
    return "" if value is None else f"{value:.2g}"


def weak_table(rows: list[dict[str, Any]]) -> str:
    """One line a case, under the name of its group; exact rows have no standard error."""
    lines = [f"{'order in expectation (weak)':<62}{'expected':>9}{'measured':>18}{'p':>8}"]
    lines.append("-" * len(lines[0]))
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"{group}:")
        order = row["order"]
        shown = str(sde.Estimate(**order)) if isinstance(order, dict) else f"{order:.3f}"
        line = f"  {row['label']:<60}{row['expected']:>9g}{shown:>18}{_p_value(row):>8}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def network_table(networks: list[dict[str, Any]]) -> str:
    """One line for each iteration: its distance to the SDE at the end, relative to the way gone.

    Args:
        networks: `NetworkRun`s as JSON.
    """
    lines = [f"{'LeNet on FashionMNIST':<28}{'eta':>9}{'distance at the end':>21}{'relative':>10}"]
    lines.append("-" * len(lines[0]))
    for part in networks:
        for name, values in part["distances"].items():
            end, relative = values[-1], values[-1] / part["displacement"][-1]
            lines.append(f"{name:<28}{part['learning_rate']:>9g}{end:>21.4g}{relative:>10.2%}")
    return "\n".join(lines)


def record(sweep: sde.ErrorSweep) -> dict[str, Any]:
    """Numbers that JSON has: where nothing is random there is no chi-square."""
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
