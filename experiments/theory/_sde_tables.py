"""The tables that the SDE experiment prints, and its records."""

import itertools
import math
from typing import Any

import jax
import numpy as np

from experiments.tables import text_table
from msgd_jax import sde


def strong_table(rows: list[dict[str, Any]]) -> str:
    """One line per case: the theoretical order, the measured one with its standard error, and a.

    Chi-square measures how far the errors are from a line, and p is the probability of residuals at
    least as large if they are on one.
    """
    lines = []
    for row in rows:
        a = row.get("deterministic")
        constant = str(sde.Estimate(**a)) if a else ""
        order = str(sde.Estimate(**row["order"]))
        lines.append([row["label"], f"{row['expected']:g}", order, *_fit(row), constant])
    header = ["path-wise (strong) order", "expected", "measured", "chi-square", "p", "a"]
    return text_table(header, lines, gap=3)


def _fit(row: dict[str, Any]) -> tuple[str, str]:
    """Chi-square with its degrees of freedom, and p; empty where nothing is random."""
    chi_square, p_value = row.get("chi_square"), row.get("p_value")
    if chi_square is None or p_value is None:
        return "", ""
    return f"{chi_square:.1f} ({len(row['learning_rates']) - 2})", f"{p_value:.2g}"


def weak_table(rows: list[dict[str, Any]]) -> str:
    """One line per case, under the name of its group; exact rows have no standard error."""
    lines = []
    for group, cases in itertools.groupby(rows, key=lambda row: row["group"]):
        lines.append([f"{group}:"])
        for row in cases:
            order = row["order"]
            shown = str(sde.Estimate(**order)) if isinstance(order, dict) else f"{order:.3f}"
            lines.append([f"  {row['label']}", f"{row['expected']:g}", shown, *_fit(row)])
    header = ["order in expectation (weak)", "expected", "measured", "chi-square", "p"]
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
