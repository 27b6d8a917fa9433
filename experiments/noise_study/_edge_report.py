"""The table and the picture of the edge of stochastic stability, made from the records."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, records, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

FAMILY = ("cov", "bernoulli", "sparse_cov", "student_t")
"""The laws with SGD's covariance, declared in advance: each has three comparisons with SGD."""
QUANTITIES = {
    "eigenvalue": "largest eigenvalue",
    "sgd_sharpness": "batch sharpness of SGD there",
    "own_sharpness": "batch sharpness of the noise itself",
}
"""The quantities that are compared, each in units of 2 / eta."""
FIELDS = frozenset(("seeds", "steps", "loss", "sgd_mean_of_ratios", *QUANTITIES))
LABELS = {
    "gd": "GD",
    "sgd": "SGD",
    "sgd-other-key": "SGD, another key",
    "cov": "M-SGD-Cov",
    "bernoulli": "M-SGD-Bernoulli",
    "sparse_cov": "M-SGD-sparse Cov",
    "student_t": "Student t",
    "isotropic": "isotropic, same trace",
}
_STYLES = styles.assigned([*LABELS.values()])
_BANDS = ("gd", "sgd", "isotropic")


def endpoint(line: dict[str, Any], quantity: str) -> Float[np.ndarray, " seeds"]:
    """The mean over the measurements in the second half of the steps, in units of 2 / eta.

    For the loss, it is the last measurement. Not finite for a seed that diverged.
    """
    values = np.asarray(line[quantity], float)
    if quantity == "loss":
        return values[-1]
    late = np.asarray(line["steps"]) > line["step"] / 2
    return values[late].mean(0) * line["learning_rate"] / 2


def rows(found: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per run: means with intervals, and paired differences to SGD.

    Args:
        found: the records.
        settings: those of the study, with the `learning_rate` at which laws are compared, and the
            `margin` of equivalence in units of 2 / eta.

    Raises:
        records.DamagedRecordError: if there is no run of SGD.
    """
    rate, margin = settings["learning_rate"], settings["margin"]
    if not any(line["noise"] == "sgd" for line in found):
        raise records.DamagedRecordError("the records of edge have no run of sgd")
    result = []
    for line in found:
        at_same = {
            other["noise"]: other
            for other in found
            if other["learning_rate"] == line["learning_rate"]
        }
        row: dict[str, Any] = {
            "noise": line["noise"],
            "learning_rate": line["learning_rate"],
            "diverged": int((~np.isfinite(endpoint(line, "loss"))).sum()),
            "seeds": len(line["seeds"]),
            "loss": intervals.mean(endpoint(line, "loss")),
        }
        for quantity in (*QUANTITIES, "sgd_mean_of_ratios"):
            row[quantity] = intervals.mean(endpoint(line, quantity))
            if line["noise"] != "sgd" and quantity in QUANTITIES and "sgd" in at_same:
                row[f"{quantity}_to_sgd"] = _compared(line, at_same["sgd"], quantity, margin)
        result.append(row)
    inside = [row for row in result if row["noise"] in FAMILY and row["learning_rate"] == rate]
    compared = [row[f"{q}_to_sgd"] for row in inside for q in QUANTITIES if row[f"{q}_to_sgd"]]
    intervals.adjust(compared, ("p_value", "p_equivalent"), len(FAMILY) * len(QUANTITIES))
    return result


def _compared(
    line: dict[str, Any], sgd: dict[str, Any], quantity: str, margin: float
) -> dict[str, float] | None:
    values, reference = endpoint(line, quantity), endpoint(sgd, quantity)
    both = np.isfinite(values) & np.isfinite(reference)
    if both.sum() < 2:
        return None
    difference = statistics.difference(values[both], reference[both])
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
        "p_equivalent": statistics.equivalence(values[both], reference[both], margin),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: where each run stabilised, and its differences from SGD with p-values."""
    means = [
        [
            LABELS[row["noise"]],
            f"{row['learning_rate']:g}",
            f"{row['seeds'] - row['diverged']} of {row['seeds']}",
            *(intervals.shown(row[name]) for name in (*QUANTITIES, "sgd_mean_of_ratios")),
            "-" if row["loss"] is None else f"{row['loss'][0]:.4f}",
        ]
        for row in rows
    ]
    header = [
        "noise",
        "eta",
        "seeds",
        "eigenvalue",
        "SGD's BS there",
        "own BS",
        "SGD's, mean of ratios",
        "loss",
    ]
    differences = [
        [LABELS[row["noise"]], QUANTITIES[name], *_difference(row[f"{name}_to_sgd"])]
        for row in rows
        if row["learning_rate"] == rows[0]["learning_rate"]
        for name in QUANTITIES
        if row.get(f"{name}_to_sgd")
    ]
    texts = [
        "Mean over the second half of the steps in units of 2 / eta, with 95 % intervals over seeds"
        " (BS: batch sharpness, ratio of expectations):",
        tables.text_table(header, means),
    ]
    if differences:
        texts += [
            "\nMinus SGD, seed by seed, in units of 2 / eta, each interval by itself. p by Holm's "
            "method over the declared family of covariance laws, not adjusted for the others:",
            tables.text_table(
                ["noise", "quantity", "difference", "p", "p of equivalence"], differences, left=2
            ),
        ]
    return "\n".join(texts)


def _difference(one: dict[str, float]) -> list[str]:
    interval = f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
    return [interval, *(intervals.p_value(one[name]) for name in ("p_value", "p_equivalent"))]


def draw(found: list[dict[str, Any]], settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """Both quantities along training, and the endpoint against the learning rate."""
    rate = settings["learning_rate"]
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(3, 1, figsize=(styles.WIDTH, 10.5), layout="constrained")
        for axis, quantity in zip(axes, ("eigenvalue", "own_sharpness"), strict=False):
            for line in found:
                if line["learning_rate"] == rate:
                    _along(axis, line, quantity)
            axis.set_xlabel("iteration")
            axis.set_title(f"{QUANTITIES[quantity]}, $\\eta$ = {rate:g}")
        _against_rate(axes[2], found)
        for axis in axes:
            axis.axhline(1, color=styles.NEUTRAL, lw=1, ls=":")
            axis.set_ylim(bottom=0)
            axis.set_ylabel("in units of $2 / \\eta$")
        figures.below_axes(figure, axes[0])
        seeds = len(found[0]["seeds"])
        title = f"Digits, squared loss: where training stabilises ({seeds} seeds, 95 % intervals)"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _along(axis: Any, line: dict[str, Any], quantity: str) -> None:
    values = np.asarray(line[quantity], float) * line["learning_rate"] / 2
    summaries = [intervals.mean(one) for one in values]
    kept = [i for i, one in enumerate(summaries) if one is not None]
    mean, half = np.array([summaries[i] for i in kept]).reshape(-1, 2).T
    steps, name = np.asarray(line["steps"])[kept], line["noise"]
    look, first = _STYLES[LABELS[name]], list(LABELS).index(name)
    axis.plot(steps, mean, lw=1.4, label=LABELS[name], **look.options(len(steps), first))
    if name in _BANDS:
        axis.fill_between(steps, mean - half, mean + half, color=look.colour, alpha=0.2, lw=0)


def _against_rate(axis: Any, found: list[dict[str, Any]]) -> None:
    """Draws the endpoints of the laws that ran at several learning rates."""
    for place, name in enumerate(("gd", "sgd", "cov")):
        lines = sorted(
            (one for one in found if one["noise"] == name), key=lambda one: one["learning_rate"]
        )
        look = _STYLES[LABELS[name]]
        for quantity, line, face in (("eigenvalue", ":", "none"), ("own_sharpness", "-", None)):
            points = [
                (one["learning_rate"], intervals.mean(endpoint(one, quantity))) for one in lines
            ]
            shown = [(x * 1.02 ** (place - 1), *y) for x, y in points if y is not None]
            if not shown:
                continue
            x, mean, half = np.array(shown).T
            axis.errorbar(
                x,
                mean,
                half,
                color=look.colour,
                marker=look.marker,
                markerfacecolor=face,
                linestyle=line,
                markersize=6,
                capsize=2,
                lw=1,
            )
    grey = {"color": styles.NEUTRAL, "marker": "o"}
    axis.plot([], [], ls=":", markerfacecolor="none", label="largest eigenvalue", **grey)
    axis.plot([], [], ls="-", label="own batch sharpness", **grey)
    axis.legend(loc="lower right")
    axis.set_xscale("log")
    rates = sorted({one["learning_rate"] for one in found})
    axis.set_xticks(rates, [f"{x:g}" for x in rates])
    axis.minorticks_off()
    axis.set_xlabel("learning rate $\\eta$")
    axis.set_title("second half of training: GD, SGD, M-SGD-Cov")
