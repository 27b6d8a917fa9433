"""The tables and the picture of the study of the noise scale, made from the records."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, records, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

PREDICTORS = {
    "simple": "mean of tr S / |g|²",
    "pooled": "mean tr S / mean |g|²",
    "curvature": "mean tr(HS) / mean g·Hg",
}
"""The predictors of the critical batch size, declared in advance; each has one comparison per
target. Means are over the steps of the reference run until it reaches the target."""
FACTOR = 2.0
"""The factor within which a prediction counts as right, declared in advance."""
EXACT, SIMPLE, LOW, HIGH = "exact", 0, 3, 4
SERIES = ("trace_hs", "along", "loss")
# The position of each quantity in the list of five that an estimator gives.
_QUANTITIES = {"noise scale": 0, "tr S": 1, "|g|²": 2}


def _reference(found: list[dict[str, Any]]) -> dict[str, Any]:
    for line in found:
        if line["kind"] == "reference":
            return line
    raise records.DamagedRecordError("the records of scale have no reference run")


def _batches(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = [line for line in found if line["kind"] == "batch"]
    if len(lines) < 3:
        raise records.DamagedRecordError(
            f"the records of scale must have at least 3 batch sizes, got {len(lines)}"
        )
    return sorted(lines, key=lambda line: line["batch_size"])


def rows(found: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per estimator, and one per target loss.

    Args:
        found: the records.
        settings: those of the study, with the `targets`.

    Raises:
        records.DamagedRecordError: if the reference run is missing, or there are fewer than 3 batch
            sizes.
    """
    line, batches = _reference(found), _batches(found)
    names = [name for name in line["measured"] if name not in SERIES]
    result = [_estimator(name, line) for name in names]
    targets = [_target(i, target, line, batches) for i, target in enumerate(settings["targets"])]
    compared = [row[name] for row in targets for name in PREDICTORS if row[name]]
    intervals.adjust(compared, ("p_equivalent",), len(targets) * len(PREDICTORS))
    return result + targets


def _estimator(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """The errors of one estimator, relative to the exact values, after the first step."""
    exact = np.asarray(line["measured"][EXACT], float)[1:]
    values = np.asarray(line["measured"][name], float)[1:]
    gradients, seconds = line["cost"][name]
    row: dict[str, Any] = {"estimator": name, "gradients": gradients, "seconds": seconds}
    for quantity, place in _QUANTITIES.items():
        error = np.abs(values[..., place] / exact[..., place] - 1)
        # The median over measurements is finite, although an estimate of the scale need not be.
        row[quantity] = intervals.mean(np.median(error, 0))
    inside = (values[..., LOW] <= exact[..., SIMPLE]) & (exact[..., SIMPLE] <= values[..., HIGH])
    row["coverage"] = intervals.mean(inside.mean(0))
    return row


def _target(
    place: int, target: float, line: dict[str, Any], batches: list[dict[str, Any]]
) -> dict[str, Any]:
    """The critical batch size of one target, and the predictions of it."""
    sizes, steps, rates = _best(place, batches)
    critical, fewest, misfit = np.array([fit(sizes, one) for one in steps.T]).T
    row: dict[str, Any] = {
        "target": target,
        "critical": _geometric(critical),
        "fewest_steps": _geometric(fewest),
        "misfit": float(misfit.mean()),
        "rates": dict(zip(map(str, sizes.tolist()), rates, strict=True)),
    }
    for name, values in predictions(line, target).items():
        both = np.isfinite(values) & (values > 0) & np.isfinite(critical)
        row[name] = None
        if both.sum() >= 2:
            logs = np.log(critical[both]), np.log(values[both])
            difference = statistics.difference(*logs)
            row[name] = {
                "value": _geometric(values[both]),
                "ratio": [float(np.exp(x)) for x in difference[:3]],
                "p_equivalent": statistics.equivalence(*logs, float(np.log(FACTOR))),
            }
    return row


def _best(
    place: int, batches: list[dict[str, Any]]
) -> tuple[np.ndarray, Float[np.ndarray, "sizes seeds"], list[float]]:
    """Per batch size, the steps of all seeds at the learning rate with the fewest on average."""
    sizes, steps, rates = [], [], []
    for line in batches:
        reached = np.asarray(line["reached"], float)[:, :, place]
        logs = np.log(np.maximum(reached, 1e-9)).mean(1)
        best = int(np.argmin(logs))
        if np.isfinite(logs[best]):
            sizes.append(line["batch_size"])
            steps.append(reached[best])
            rates.append(line["rates"][best])
    return np.asarray(sizes), np.asarray(steps), rates


def fit(sizes: np.ndarray, steps: Float[np.ndarray, " sizes"]) -> tuple[float, float, float]:
    """Fits ``steps = fewest (1 + critical / size)`` to the logarithms, by least squares.

    Returns:
        The critical batch size, the fewest steps, and the root mean square of the residuals, as a
        share of the steps.
    """
    from scipy import optimize

    def residuals(logs: np.ndarray) -> np.ndarray:
        return logs[1] + np.log1p(np.exp(logs[0]) / sizes) - np.log(steps)

    found = optimize.least_squares(residuals, np.log([np.median(sizes), steps.min()]))
    critical, fewest = np.exp(found.x)
    return float(critical), float(fewest), float(np.sqrt(np.mean(found.fun**2)))


def predictions(line: dict[str, Any], target: float) -> dict[str, Float[np.ndarray, " seeds"]]:
    """The `PREDICTORS`; not finite for a seed whose reference run does not reach the target."""
    measured, steps = line["measured"], np.asarray(line["steps"], float)
    loss, exact = (np.asarray(measured[name], float) for name in ("loss", EXACT))

    def mean(values: Any) -> Float[np.ndarray, " seeds"]:
        pairs = zip(loss.T, np.asarray(values, float).T, strict=True)
        return np.array([_mean_until(steps, own, one, target) for own, one in pairs])

    return {
        "simple": mean(exact[..., SIMPLE]),
        "pooled": mean(exact[..., _QUANTITIES["tr S"]]) / mean(exact[..., _QUANTITIES["|g|²"]]),
        "curvature": mean(measured["trace_hs"]) / mean(measured["along"]),
    }


def _mean_until(steps: np.ndarray, loss: np.ndarray, values: np.ndarray, target: float) -> float:
    """The mean over steps of a broken line, up to the step at which the loss passes the target."""
    passed = np.flatnonzero(loss <= target)
    if not passed.size or passed[0] == 0:
        return float("nan")
    last = passed[0]
    share = (loss[last - 1] - target) / (loss[last - 1] - loss[last])
    end = steps[last - 1] + share * (steps[last] - steps[last - 1])
    at = np.append(steps[:last], end)
    line = np.append(values[:last], np.interp(end, steps, values))
    return float(np.trapezoid(line, at) / (end - steps[0]))


def _geometric(values: Float[np.ndarray, " seeds"]) -> list[float] | None:
    """The geometric mean, and the ends of its 95 % interval."""
    found = intervals.mean(np.log(values))
    if found is None:
        return None
    mean, half = found
    return [float(np.exp(x)) for x in (mean, mean - half, mean + half)]


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: the errors and costs of the estimators, and the predictions."""
    estimators = [
        [
            row["estimator"],
            f"{row['gradients']:,.0f}",
            f"{row['seconds']:.3f}",
            *(_percent(row[name]) for name in _QUANTITIES),
            _percent(row["coverage"]),
        ]
        for row in rows
        if "estimator" in row
    ]
    header = [
        "estimator",
        "gradients",
        "s",
        *(f"error of {q}, %" for q in _QUANTITIES),
        "inside, %",
    ]
    predicted = [
        [
            f"{row['target']:g}",
            _range(row["critical"]),
            PREDICTORS[name],
            "-" if row[name] is None else _range(row[name]["value"]),
            "-" if row[name] is None else _range(row[name]["ratio"], 2),
            "-" if row[name] is None else intervals.p_value(row[name]["p_equivalent"]),
        ]
        for row in rows
        if "target" in row
        for name in PREDICTORS
    ]
    return "\n".join(
        [
            "Median relative errors over the measurements, gradients of one example per "
            "measurement, and how many 95 % intervals contain the exact noise scale:",
            tables.text_table(header, estimators),
            "\nThe critical batch size of each loss, and its prediction (geometric means over "
            "seeds, each interval by itself; p of equality within a factor of 2 by Holm's method):",
            tables.text_table(
                ["loss", "critical", "predictor", "predicted", "critical / predicted", "p"],
                predicted,
            ),
        ]
    )


def _percent(mean: list[float] | None) -> str:
    return "-" if mean is None else f"{100 * mean[0]:.1f} ± {100 * mean[1]:.1f}"


def _range(values: list[float] | None, digits: int = 0) -> str:
    if values is None:
        return "-"
    mean, low, high = (f"{x:.{digits}f}" for x in values)
    return f"{mean} [{low}, {high}]"


def draw(found: list[dict[str, Any]], settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """The noise scale along training, errors of the estimators, and steps against batch size."""
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    line, result = _reference(found), rows(found, settings)
    estimators = [row for row in result if "estimator" in row and row["estimator"] != EXACT]
    looks = styles.assigned([EXACT, *(row["estimator"] for row in estimators)])
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(3, 1, figsize=(styles.WIDTH, 11), layout="constrained")
        _along(axes[0], line, looks)
        _errors(axes[1], estimators, looks)
        _against_size(axes[2], found, result)
        figures.below_axes(figure, axes[0])
        seeds = len(line["seeds"])
        title = f"FashionMNIST: the noise scale, and what it predicts ({seeds} seeds)"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _along(axis: Any, line: dict[str, Any], looks: dict[str, styles.Style]) -> None:
    """The noise scale by every estimator against the step: geometric means over seeds."""
    steps, measured = np.asarray(line["steps"])[1:], line["measured"]
    series = {
        name: np.asarray(values, float)[1:, :, SIMPLE]
        for name, values in measured.items()
        if name not in SERIES
    }
    for i, (name, values) in enumerate(series.items()):
        # An estimate may be infinite, which leaves a gap in a mean.
        mean = np.median(values, 1)
        options = looks[name].options(len(steps), first=i)
        axis.plot(steps, mean, lw=2 if name == EXACT else 1.2, label=name, **options)
    axis.set_yscale("log")
    axis.set_xlabel("step of the reference run")
    axis.set_ylabel("examples")
    axis.set_title("noise scale along training, medians over seeds")


def _errors(axis: Any, estimators: list[dict[str, Any]], looks: dict[str, styles.Style]) -> None:
    names = [row["estimator"] for row in estimators]
    for place, row in enumerate(estimators):
        if row["noise scale"] is None:
            continue
        mean, half = (100 * x for x in row["noise scale"])
        look = looks[row["estimator"]]
        axis.errorbar(mean, place, xerr=half, color=look.colour, marker=look.marker, capsize=2)
    # The costs are in the labels, since those of the free estimators are 0.
    labels = [
        f"{name}\n{row['gradients']:,.0f} gradients"
        for name, row in zip(names, estimators, strict=True)
    ]
    axis.set_yticks(range(len(names)), labels, fontsize=styles.FONT - 2)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("median error of the noise scale, % (95 % interval)")


def _against_size(axis: Any, found: list[dict[str, Any]], result: list[dict[str, Any]]) -> None:
    """Steps to each target against the batch size, the fit, and the predictions."""
    batches = _batches(found)
    for place, row in enumerate(row for row in result if "target" in row):
        sizes, steps, _ = _best(place, batches)
        look = styles.style(place + 1)
        mean = np.exp(np.log(steps).mean(1))
        label = f"loss {row['target']:g}"
        axis.plot(sizes, mean, ls="", marker=look.marker, color=look.colour, label=label)
        if row["critical"] is None:
            continue
        critical, fewest = row["critical"][0], row["fewest_steps"][0]
        fine = np.geomspace(sizes.min(), sizes.max(), 100)
        axis.plot(fine, fewest * (1 + critical / fine), color=look.colour, lw=1)
        for name, style in (("simple", "--"), ("pooled", ":"), ("curvature", "-.")):
            if row[name]:
                axis.axvline(row[name]["value"][0], color=look.colour, ls=style, lw=1)
        axis.axvline(critical, color=look.colour, lw=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(
        "batch size; upright: critical (solid), mean of tr S / |g|² (dashed),\n"
        "mean tr S / mean |g|² (dotted),\nmean tr(HS) / mean g·Hg (dash-dotted)"
    )
    axis.set_ylabel("steps to the loss")
    axis.legend(loc="upper right")
