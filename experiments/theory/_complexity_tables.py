"""The tables that the complexity experiment prints."""

from typing import Any

import numpy as np

from experiments import figures
from experiments.tables import text_table
from msgd_jax import complexity

# The titles of Theorem 1's columns, for the ratios of `theorem1_rows` in their order.
COLUMNS = {
    "gaussian_lower": "cR(A)/R(G)",
    "gaussian_upper": "R(G)/CR(A)",
    "without": "(11) without",
    "with": "(11) with",
    "with, corrected": "with, right",
}


def theorem1_table(rows: list[dict[str, Any]]) -> str:
    """One line per class: the ratios of both sides, 1 or less where the inequality holds."""
    lines = []
    for row in rows:
        line = [row["label"], f"{row['num_examples']}", f"{row['batch_size']}"]
        for name in COLUMNS:
            found = row["inequalities"].get(name)
            ratio = complexity.Estimate(**found["ratio"]) if found else None
            shown = "-" if ratio is None else f"{ratio.value:.4f} ± {ratio.standard_error:.4f}"
            line.append(shown + ("!" if found and found["violated"] else ""))
        lines.append(line)
    table = text_table(["left side / right side", "N", "b", *COLUMNS.values()], lines)
    return (
        f"{table}\n!: above 1 by more than its 95 % confidence interval: the inequality is false."
    )


def regularizer_table(rows: list[dict[str, Any]]) -> str:
    """One line per way to train: accuracies in percent, and time relative to the first."""
    lines = []
    for row in rows:
        losses = [
            f"{row[name]['value']:.3g} ± {row[name]['standard_error']:.1g}"
            for name in ("train_loss", "test_loss")
        ]
        accuracy = {k: 100 * v for k, v in row["test_accuracy"].items()}
        shown = f"{accuracy['value']:.2f} ± {accuracy['standard_error']:.2f}"
        lines.append([row["label"], *losses, shown, f"{row['seconds'] / rows[0]['seconds']:.2f}"])
    header = ["digits", "train loss", "test loss", "test accuracy %", "time"]
    return text_table(header, lines, gap=3)


def trace_table(records: list[dict[str, Any]]) -> str:
    """One line per measurement: means over seeds with their standard errors."""
    names = list(records[0]["complexities"])
    lines = []
    for record in records:
        gap = np.array(record["test_loss"]) - np.array(record["train_loss"])
        means = [record["complexities"][name]["mean"] for name in names]
        cells = map(_cell, [record["train_loss"], gap, *means])
        lines.append([record["algorithm"], f"{record['step']}", *cells])
    header = ["algorithm", "step", "train loss", "loss gap", *(f"R {name}" for name in names)]
    return text_table(header, lines, gap=3)


def _cell(values: Any) -> str:
    values = np.asarray(values)
    return f"{values.mean():.4g} ± {figures.standard_error(values):.1g}"
