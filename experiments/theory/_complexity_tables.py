"""The tables that the complexity experiment prints."""

from typing import Any

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
