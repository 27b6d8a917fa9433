"""The tables and the picture of correlated noise around a minimum, made from the records."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, records, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

EDGES = 10.0 ** np.arange(-4, 1.5, 0.5)
"""The edges of the groups of eigenvalues in a record; the first and the last group are open."""
DECADES = (1e-3, 1e-2, 1e-1, 1.0)
"""The edges of the groups of eigenvalues in the tables; the first and the last group are open."""
ON_NET = ("independent", "reshuffled", "anti")
"""The noises that the net is run with as well."""
LABELS = {
    "independent": "independent batches",
    "reshuffled": "reshuffled epochs",
    "anti": "Anti-PGD, (1, -1)",
    "persistent": "persistent, (1, 1)/√2",
}
FIELDS = frozenset(
    (
        "loss_at_minimum",
        "slope_at_minimum",
        "smallest_curvature",
        "trace_at_minimum",
        "trace_at_mean",
        "eigenvalues",
        "predicted",
        "measured",
        "about_minimum",
    )
)
_STYLES = styles.assigned([*LABELS.values()])
Record = dict[str, Any]


def binned(
    curvatures: Float[np.ndarray, " D"], values: Mapping[str, Float[np.ndarray, " D"]]
) -> Record:
    """The sums of values per direction over the directions of each group of eigenvalues."""
    group = np.digitize(curvatures, EDGES)
    named = {"eigenvalues": np.ones(len(curvatures)), **values}
    sums = {name: np.bincount(group, value, len(EDGES) + 1) for name, value in named.items()}
    return {name: [float(f"{x:.6g}") for x in found] for name, found in sums.items()}


def decades(line: Record, name: str) -> Float[np.ndarray, " groups"]:
    """The sums over the groups of the tables, from those of a record."""
    lower = np.array([0, *EDGES])
    group = np.digitize(lower * (1 + 1e-9), DECADES)
    return np.bincount(group, line[name], len(DECADES) + 1)


def rows(found: list[Record], settings: Mapping[str, Any]) -> list[Record]:
    """One row per model, noise, learning rate and group of eigenvalues.

    Args:
        found: the records.
        settings: those of the study, with the `learning_rate` and the `margin`.

    Raises:
        records.DamagedRecordError: if a seed has no run with independent batches.
    """
    rate, margin = settings["learning_rate"], settings["margin"]
    result: list[Record] = []
    for model, name, own_rate in dict.fromkeys(
        (line["model"], line["noise"], line["learning_rate"]) for line in found
    ):
        lines = _of(found, model, name, own_rate)
        base = _of(found, model, "independent", own_rate)
        if [line["seed"] for line in base] != [line["seed"] for line in lines]:
            raise records.DamagedRecordError(
                f"records of {name} on the {model} at {own_rate:g} have no run with independent "
                "batches for each seed"
            )
        here = [
            _row(lines, base, group, margin)
            | {"model": model, "noise": name, "learning_rate": own_rate}
            for group in range(len(DECADES) + 1)
        ]
        result += here
    # The declared families: all predictions of one model at the learning rate.
    for model, names in (("quadratic", tuple(LABELS)), ("net", ON_NET)):
        size = len(names) * (len(DECADES) + 1)
        own = [
            row
            for row in result
            if (row["model"], row["learning_rate"]) == (model, rate) and "p_value" in row
        ]
        intervals.adjust(own, ("p_value", "p_equivalent"), size)
    return result


def _of(found: list[Record], model: str, name: str, rate: float) -> list[Record]:
    lines = [
        line
        for line in found
        if (line["model"], line["noise"], line["learning_rate"]) == (model, name, rate)
    ]
    return sorted(lines, key=lambda line: line["seed"])


def _row(lines: list[Record], base: list[Record], group: int, margin: float) -> Record:
    """The means over seeds in one group, with intervals and tests."""

    def of(lines: list[Record], name: str) -> Float[np.ndarray, " seeds"]:
        return np.array([decades(line, name)[group] for line in lines])

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = of(lines, "measured") / of(lines, "predicted")
        about = of(lines, "about_minimum") / of(lines, "predicted")
        reduced = {name: of(lines, name) / of(base, name) for name in ("measured", "predicted")}
    row: Record = {
        "group": group,
        "directions": float(of(lines, "eigenvalues").mean()),
        "ratio": intervals.mean(ratio),
        "about_ratio": intervals.mean(about),
        "measured_to_independent": intervals.mean(reduced["measured"]),
        "predicted_to_independent": intervals.mean(reduced["predicted"]),
        "trace_change": intervals.mean(
            np.array([line["trace_at_mean"] / line["trace_at_minimum"] - 1 for line in lines])
        ),
    }
    finite = ratio[np.isfinite(ratio)]
    if finite.size >= 2:
        row["p_value"] = statistics.difference(finite, np.ones_like(finite)).p_value
        row["p_equivalent"] = statistics.equivalence(finite, np.ones_like(finite), margin)
    return row


def table(rows: list[Record]) -> str:
    """Two tables: predictions against measurements, and the effect of memory on variances."""
    predictions = [
        [
            *_where(row),
            f"{row['directions']:.0f}",
            intervals.shown(row["ratio"]),
            *(intervals.p_value(row[p]) if p in row else "-" for p in _P_VALUES),
            _brief(row["about_ratio"]),
        ]
        for row in rows
    ]
    effects = [
        [
            *_where(row),
            *(_brief(row[f"{which}_to_independent"]) for which in ("predicted", "measured")),
        ]
        for row in rows
        if row["noise"] != "independent"
    ]
    traces = [
        [*_where(row)[:3], intervals.shown(row["trace_change"])]
        for row in rows
        if row["model"] == "net" and row["group"] == 0
    ]
    where = ["noise", "on the", "eta", "eigenvalues"]
    tests = ["directions", "measured / predicted", "p", "p of equivalence", "about the minimum"]
    return "\n".join(
        (
            "Variance between paths, measured / predicted, by eigenvalue of the Hessian, with 95 % "
            "intervals over seeds, each by itself; p by Holm's method over the noises and groups "
            "of one model, at the learning rate of both:",
            tables.text_table([*where, *tests], predictions, left=2),
            "\nVariance between paths, divided by that of independent batches:",
            tables.text_table([*where, "predicted", "measured"], effects, left=2),
            "\nTrace of the Hessian at the mean of the paths, relative change from the minimum:",
            tables.text_table([*where[:3], "change"], traces, left=2),
        )
    )


_P_VALUES = ("p_value", "p_equivalent")


def _where(row: Record) -> list[str]:
    rate = f"{row['learning_rate']:g}"
    return [LABELS[row["noise"]], row["model"], rate, group_name(row["group"])]


def group_name(group: int) -> str:
    """The name of a group of eigenvalues."""
    if group == 0:
        return f"below {DECADES[0]:g}"
    if group == len(DECADES):
        return f"above {DECADES[-1]:g}"
    return f"{DECADES[group - 1]:g} to {DECADES[group]:g}"


def _brief(mean: list[float] | None) -> str:
    return "-" if mean is None else f"{mean[0]:.3g} ± {mean[1]:.2g}"


def draw(found: list[Record], settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """Variances against eigenvalues on the quadratic and on the net, and their ratios."""
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    rate = settings["learning_rate"]
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(3, 1, figsize=(styles.WIDTH, 11.0), layout="constrained")
        for axis, model in zip(axes, ("quadratic", "net"), strict=False):
            for name in LABELS:
                lines = _of(found, model, name, rate)
                if lines:
                    _variances(axis, lines, name)
            axis.set_title(f"on the {model}: points are measured, lines are predicted")
            axis.set_ylabel("variance per direction")
        for name, own_rate, lines in _net_runs(found):
            _ratio(axes[2], lines, name, own_rate == rate, own_rate)
        axes[2].axhline(1, color=styles.NEUTRAL, lw=1, ls=":")
        axes[2].set_title("on the net: measured / predicted")
        for axis in axes:
            axis.set_xscale("log")
            axis.set_yscale("log")
        axes[2].set_xlabel("eigenvalue of the Hessian")
        figures.below_axes(figure, axes[0])
        seeds = len({line["seed"] for line in found})
        title = (
            f"Digits: variance of weights around a minimum, $\\eta$ = {rate:g} ({seeds} seeds, "
            "95 % intervals)"
        )
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _net_runs(found: list[Record]) -> Iterator[tuple[str, float, list[Record]]]:
    for name in ON_NET:
        for rate in sorted({line["learning_rate"] for line in found}):
            lines = _of(found, "net", name, rate)
            if lines:
                yield name, rate, lines


def _centres() -> Float[np.ndarray, " groups"]:
    """The geometric centres of the groups of a record; open groups are as wide as the others."""
    factor = (EDGES[1] / EDGES[0]) ** 0.5
    return np.array([*(EDGES / factor), EDGES[-1] * factor])


def _variances(axis: Any, lines: list[Record], name: str) -> None:
    counts = np.array([line["eigenvalues"] for line in lines])
    look, x = _STYLES[LABELS[name]], _centres()
    with np.errstate(divide="ignore", invalid="ignore"):
        predicted = np.array([line["predicted"] for line in lines]) / counts
        measured = np.array([line["measured"] for line in lines]) / counts
    kept = np.isfinite(measured).all(0) & (counts > 0).all(0)
    axis.plot(x[kept], predicted[:, kept].mean(0), color=look.colour, ls=look.line, lw=1.2)
    axis.plot(x[kept], measured[:, kept].mean(0), color=look.colour, ls="none", marker=look.marker)
    axis.plot([], [], color=look.colour, ls=look.line, marker=look.marker, label=LABELS[name])


def _ratio(axis: Any, lines: list[Record], name: str, main: bool, rate: float) -> None:
    look, x = _STYLES[LABELS[name]], _centres()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([line["measured"] for line in lines])
        ratios = ratios / np.array([line["predicted"] for line in lines])
    summaries = [intervals.mean(one) for one in ratios.T]
    kept = [i for i, one in enumerate(summaries) if one is not None]
    mean, half = np.array([summaries[i] for i in kept]).reshape(-1, 2).T
    # On the logarithmic axis, an interval may not reach below 0.
    low = np.minimum(half, 0.9 * mean)
    axis.errorbar(
        x[kept],
        mean,
        (low, half),
        color=look.colour,
        ls=look.line,
        lw=1,
        marker=look.marker,
        markerfacecolor=None if main else "none",
        capsize=2,
        label=f"$\\eta$ = {rate:g}" if name == "independent" else None,
    )
    axis.legend(loc="upper right")
