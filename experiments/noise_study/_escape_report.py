"""The tables and the picture of the study of anisotropic noise, made from the records."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, records, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

FAMILY = ("cov", "diagonal", "isotropic", "top_eigenvector")
"""The noises of SGD's trace, declared in advance: each has three comparisons with SGD."""
QUANTITIES = {
    "rise": "rise of the loss",
    "eigenvalue": "largest eigenvalue",
    "trace_h": "trace of the Hessian",
}
"""The quantities that are compared, as ratios."""
LABELS = {
    "gd": "GD",
    "sgd": "SGD",
    "sgd-other-key": "SGD, another key",
    "cov": "M-SGD-Cov",
    "diagonal": "diagonal",
    "isotropic": "isotropic",
    "top_eigenvector": "top eigenvector",
}
_STYLES = styles.assigned([*LABELS.values()])
# The shape of the covariance of each noise.
_SHAPES = {"sgd": "cov", "sgd-other-key": "cov"}


def _lines(found: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    lines = {line["noise"]: line for line in found if line["kind"] == kind}
    needed = {"path": {"gd", "sgd"}, "escape": {"gd", "sgd"}}[kind]
    if needed - lines.keys():
        missing = min(needed - lines.keys())
        raise records.DamagedRecordError(f"the records of escape have no {kind} of {missing}")
    return lines


def endpoint(
    line: dict[str, Any], quantity: str, gd: dict[str, Any]
) -> Float[np.ndarray, " seeds"]:
    """One number per seed, for one noise.

    The rise is that of the mean loss over GD's, averaged over the second half of the short steps;
    all else is the mean over the measurements in the second half of the long run.
    """
    if quantity == "rise":
        rise = np.asarray(line["short_loss"], float) - np.asarray(gd["short_loss"], float)
        return rise[:, rise.shape[1] // 2 :].mean(1)
    late = np.asarray(line["steps"]) > line["step"] / 2
    return np.asarray(line[quantity], float)[late].mean(0)


def rows(found: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per path and shape of the noise, and one per noise from the minimum.

    Raises:
        records.DamagedRecordError: if a run of GD or SGD is missing.
    """
    del settings  # All that is needed is in the records.
    paths, escapes = _lines(found, "path"), _lines(found, "escape")
    result: list[dict[str, Any]] = []
    for name, line in paths.items():
        late = np.asarray(line["steps"]) > line["step"] / 2
        for shape, values in line["shapes"].items():
            row: dict[str, Any] = {"path": name, "shape": shape}
            for quantity in ("alignment", "cosine"):
                row[quantity] = intervals.mean(np.asarray(values[quantity], float)[late].mean(0))
            result.append(row)
    minimum = paths["gd"]["shapes"]
    runs = [_escape(name, line, escapes, minimum) for name, line in escapes.items()]
    compared = [
        row[f"{quantity}_to_sgd"]
        for row in runs
        for quantity in QUANTITIES
        if row["noise"] in FAMILY and row[f"{quantity}_to_sgd"]
    ]
    intervals.adjust(compared, ("p_value",), len(FAMILY) * len(QUANTITIES))
    return result + runs


def _escape(
    name: str,
    line: dict[str, Any],
    escapes: dict[str, dict[str, Any]],
    minimum: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The endpoints of one noise, and their ratios to SGD's and to the prediction."""
    gd, sgd = escapes["gd"], escapes["sgd"]
    row: dict[str, Any] = {"noise": name}
    for quantity in (*QUANTITIES, "loss", "test_accuracy", "distance"):
        row[quantity] = intervals.mean(endpoint(line, quantity, gd))
    for quantity in QUANTITIES:
        row[f"{quantity}_to_sgd"] = (
            None
            if name == "sgd"
            else _ratio(endpoint(line, quantity, gd), endpoint(sgd, quantity, gd))
        )
    row["rise_to_predicted"] = None
    if name != "gd":
        predicted = np.asarray(minimum[_SHAPES.get(name, name)]["rise"], float)
        predicted = predicted[:, predicted.shape[1] // 2 :].mean(1)
        row["rise_to_predicted"] = _ratio(endpoint(line, "rise", gd), predicted)
    return row


def _ratio(
    values: Float[np.ndarray, " seeds"], reference: Float[np.ndarray, " seeds"]
) -> dict[str, float] | None:
    """The geometric mean of the ratios, seed by seed, with its interval, over positive values."""
    both = (values > 0) & (reference > 0) & np.isfinite(values) & np.isfinite(reference)
    if both.sum() < 2:
        return None
    logs = statistics.difference(np.log(values[both]), np.log(reference[both]))
    mean, low, high = (float(np.exp(x)) for x in logs[:3])
    return {"mean": mean, "low": low, "high": high, "p_value": logs.p_value}


def table(rows: list[dict[str, Any]]) -> str:
    """Three tables: alignment along training, the runs from the minimum, and ratios to SGD."""
    alignment = [
        [
            LABELS[row["path"]],
            LABELS[row["shape"]],
            intervals.shown(row["alignment"], 2),
            intervals.shown(row["cosine"]),
        ]
        for row in rows
        if "path" in row
    ]
    runs = [row for row in rows if "noise" in row]
    means = [
        [
            LABELS[row["noise"]],
            "-" if row["noise"] == "gd" else intervals.shown(row["rise"], 6),
            _shown(row["rise_to_predicted"]),
            intervals.shown(row["eigenvalue"], 2),
            intervals.shown(row["trace_h"], 1),
            intervals.shown(row["loss"], 5),
            "-" if row["test_accuracy"] is None else f"{100 * row['test_accuracy'][0]:.2f}",
        ]
        for row in runs
    ]
    header = [
        "noise",
        "rise of the loss",
        "rise / predicted",
        "largest eigenvalue",
        "tr H",
        "loss",
        "test %",
    ]
    ratios = [
        [
            LABELS[row["noise"]],
            text,
            _shown(row[f"{name}_to_sgd"]),
            intervals.p_value(row[f"{name}_to_sgd"]["p_value"]),
        ]
        for row in runs
        for name, text in QUANTITIES.items()
        if row[f"{name}_to_sgd"]
    ]
    return "\n".join(
        [
            "Alignment with the Hessian of noise of each shape, in the second half of the path "
            "(1 for isotropic noise), with 95 % intervals over seeds:",
            tables.text_table(["path of", "shape", "alignment", "cosine"], alignment, left=2),
            "\nFrom GD's minimum on, with 95 % intervals over seeds:",
            tables.text_table(header, means),
            "\nRatios to SGD, seed by seed, each interval by itself. p by Holm's method over the "
            "declared family, not adjusted for GD and SGD with another key:",
            tables.text_table(["noise", "quantity", "ratio to SGD", "p"], ratios, left=2),
        ]
    )


def _shown(one: dict[str, float] | None) -> str:
    return "-" if one is None else f"{one['mean']:.3g} [{one['low']:.3g}, {one['high']:.3g}]"


def draw(found: list[dict[str, Any]], settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """Alignment along training, the rise of the loss at the minimum, and sharpness after it."""
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    del settings
    paths, escapes = _lines(found, "path"), _lines(found, "escape")
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(3, 1, figsize=(styles.WIDTH, 10.5), layout="constrained")
        _alignments(axes[0], paths)
        _rises(axes[1], escapes, paths["gd"]["shapes"])
        for name, line in escapes.items():
            _along(axes[2], name, line)
        axes[2].set_xlabel("iteration from the minimum on")
        axes[2].set_ylabel("largest eigenvalue")
        axes[2].set_title("sharpness, means over seeds")
        figures.below_axes(figure, axes[2])
        seeds = len(paths["gd"]["seeds"])
        title = f"Digits, squared loss: noises of equal trace at GD's minimum ({seeds} seeds)"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _alignments(axis: Any, paths: dict[str, dict[str, Any]]) -> None:
    """Alignment along both paths; those of SGD have open markers."""
    for name, line in paths.items():
        for shape, values in line["shapes"].items():
            if shape == "isotropic" and name == "sgd":
                continue  # It is 1 by definition.
            look = _STYLES[LABELS[shape]]
            axis.plot(
                line["steps"],
                np.asarray(values["alignment"], float).mean(1),
                color=look.colour,
                marker=look.marker,
                ls="-" if name == "gd" else ":",
                markerfacecolor=look.colour if name == "gd" else "none",
                lw=1.2,
            )
    axis.set_yscale("log")
    axis.set_xlabel("iteration of GD (full markers), of SGD (open)")
    axis.set_ylabel("alignment")
    axis.set_title("alignment with the Hessian along training, means over seeds")


def _rises(
    axis: Any, escapes: dict[str, dict[str, Any]], minimum: dict[str, dict[str, Any]]
) -> None:
    """The rise of the mean loss over GD's, with the prediction as a thin dashed line."""
    gd = np.asarray(escapes["gd"]["short_loss"], float)
    for i, (name, line) in enumerate(escapes.items()):
        if name == "gd":
            continue
        look = _STYLES[LABELS[name]]
        rise = (np.asarray(line["short_loss"], float) - gd).mean(0)
        steps = 1 + np.arange(len(rise))
        axis.plot(steps, rise, lw=1.4, **look.options(len(steps), first=i))
        if name not in _SHAPES or name == "sgd":
            predicted = np.asarray(minimum[_SHAPES.get(name, name)]["rise"], float).mean(0)
            axis.plot(steps, predicted, color=look.colour, lw=0.8, ls="--")
    axis.set_yscale("log")
    axis.set_xlabel("iteration from the minimum on")
    axis.set_ylabel("loss minus that of GD")
    axis.set_title("rise of the loss, means over seeds; dashed: predicted")


def _along(axis: Any, name: str, line: dict[str, Any]) -> None:
    look, first = _STYLES[LABELS[name]], list(LABELS).index(name)
    values = np.asarray(line["eigenvalue"], float).mean(1)
    options = look.options(len(line["steps"]), first)
    axis.plot(line["steps"], values, lw=1.4, label=LABELS[name], **options)
