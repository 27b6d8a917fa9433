"""The tables that the complexity experiment prints."""

from typing import Any

import numpy as np

from experiments import figures
from msgd_jax import complexity

# How Theorem 1's columns are called; the ratios of `theorem1_rows` in their order.
COLUMNS = {
    "gaussian_lower": "cR(A)/R(G)",
    "gaussian_upper": "R(G)/CR(A)",
    "without": "(11) without",
    "with": "(11) with",
    "with, corrected": "with, right",
}


def theorem1_table(rows: list[dict[str, Any]]) -> str:
    """One line a class: the ratios of both sides, 1 or less where the inequality holds."""
    header = f"{'left side / right side':<22}{'N':>4}{'b':>4}" + "".join(
        f"{name:>18}" for name in COLUMNS.values()
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = []
        for name in COLUMNS:
            found = row["inequalities"].get(name)
            ratio = complexity.Estimate(**found["ratio"]) if found else None
            shown = "-" if ratio is None else f"{ratio.value:.4f} ± {ratio.standard_error:.4f}"
            cells.append(f"{shown + ('!' if found and found['violated'] else ''):>18}")
        lines.append(
            f"{row['label']:<22}{row['num_examples']:>4}{row['batch_size']:>4}" + "".join(cells)
        )
    lines.append("!: above 1 by more than its 95 % confidence interval: the inequality is false.")
    return "\n".join(lines)


def regularizer_table(rows: list[dict[str, Any]]) -> str:
    """One line a way to train: accuracies in percent, and time relative to the first."""
    header = f"{'digits':<36}{'train loss':>18}{'test loss':>18}{'test accuracy %':>18}{'time':>8}"
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = [
            f"{row[name]['value']:.3g} ± {row[name]['standard_error']:.1g}".rjust(18)
            for name in ("train_loss", "test_loss")
        ]
        accuracy = {k: 100 * v for k, v in row["test_accuracy"].items()}
        cells.append(f"{accuracy['value']:.2f} ± {accuracy['standard_error']:.2f}".rjust(18))
        cells.append(f"{row['seconds'] / rows[0]['seconds']:.2f}".rjust(8))
        lines.append(f"{row['label']:<36}" + "".join(cells))
    return "\n".join(lines)


def trace_table(records: list[dict[str, Any]]) -> str:
    """One line a measurement: means over seeds with their standard errors."""
    names = list(records[0]["complexities"])
    header = f"{'algorithm':<12}{'step':>6}{'train loss':>17}{'loss gap':>17}" + "".join(
        f"{'R ' + name:>19}" for name in names
    )
    lines = [header, "-" * len(header)]
    for record in records:
        gap = np.array(record["test_loss"]) - np.array(record["train_loss"])
        cells = [_cell(record["train_loss"], 17), _cell(gap, 17)]
        cells += [_cell(record["complexities"][name]["mean"], 19) for name in names]
        lines.append(f"{record['algorithm']:<12}{record['step']:>6}" + "".join(cells))
    return "\n".join(lines)


def _cell(values: Any, width: int) -> str:
    values = np.asarray(values)
    return f"{values.mean():.4g} ± {figures.standard_error(values):.1g}".rjust(width)
