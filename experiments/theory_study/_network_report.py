"""The exponents, the table and the picture of the study of nets beside their SDE."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import figures, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

DISTANCES = ("shared", "own", "displacement")
LABELS = {
    "relu-max": "ReLU, max-pooling",
    "tanh-average": "tanh, average pooling",
    "relu-average": "ReLU, average pooling",
    "tanh-max": "tanh, max-pooling",
}
REFERENCE = "relu-max"


class Line(NamedTuple):
    """A straight line through means of vectors whose entries may be correlated.

    Attributes:
        slopes: the least-squares slope of each seed.
        chi_square: Hotelling's statistic of what is left: the distance of the mean residuals from
            0 in units of their covariance, for as many degrees of freedom as there are points more
            than two.
        degrees: these degrees of freedom.
        p_value: the probability of a statistic at least as large if the means are on a line, by
            the F distribution; NaN if there are too few seeds.
    """

    slopes: Float[np.ndarray, " seeds"]
    chi_square: float
    degrees: int
    p_value: float


def line(x: Float[np.ndarray, " points"], values: Float[np.ndarray, "seeds points"]) -> Line:
    """Fits a line to the mean over seeds; all learning rates of a seed may depend on each other.

    Hotelling's test needs normal means only, no independence between the points of a seed.
    """
    from scipy import stats

    seeds, points = values.shape
    centred = x - x.mean()
    slopes = values @ centred / (centred @ centred)
    degrees = points - 2
    if seeds <= degrees:
        return Line(slopes, float("nan"), degrees, float("nan"))
    # An orthonormal basis of what no line can reach: these contrasts have mean 0 on a line.
    design = np.stack([np.ones(points), centred], axis=1)
    contrasts = values @ np.linalg.qr(design, mode="complete")[0][:, 2:]
    mean = contrasts.mean(0)
    covariance = np.atleast_2d(np.cov(contrasts, rowvar=False)) / seeds
    if np.linalg.matrix_rank(covariance) < degrees:
        return Line(slopes, float("nan"), degrees, float("nan"))
    statistic = float(mean @ np.linalg.solve(covariance, mean))
    scaled = statistic * (seeds - degrees) / (degrees * (seeds - 1))
    return Line(slopes, statistic, degrees, float(stats.f.sf(scaled, degrees, seeds - degrees)))


def rows(found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per net, kind of distance and time, and one per net that is compared with the first."""
    rates = np.asarray(settings["learning_rates"], float)
    times = _times(settings)
    made: list[dict[str, Any]] = []
    ends: dict[str, dict[int, float]] = {}
    for net in dict.fromkeys(line["net"] for line in found):
        own = [one for one in found if one["net"] == net]
        for kind in ("shared", "own"):
            values = _distances(own, kind)
            for place, time in enumerate(times):
                fitted = line(np.log(rates), np.log(values[:, :, place]))
                made.append(
                    {
                        "net": net,
                        "kind": kind,
                        "time": time,
                        "seeds": len(own),
                        "distance": np.sqrt((values[:, :, place] ** 2).mean(0)).tolist(),
                        "order": intervals.mean(fitted.slopes),
                        "chi_square": fitted.chi_square,
                        "degrees": fitted.degrees,
                        "p_value": fitted.p_value,
                    }
                )
                if kind == "shared" and place == len(times) - 1:
                    seeds = [one["seed"] for one in own]
                    ends[net] = dict(zip(seeds, fitted.slopes.tolist(), strict=True))
    return [*made, *_comparisons(ends)]


def _times(settings: Mapping[str, Any]) -> list[float]:
    between = settings["iterations"] // settings["points"] * settings["learning_rates"][0]
    return [round(between * (i + 1), 10) for i in range(settings["points"])]


def _distances(
    own: Sequence[Mapping[str, Any]], kind: str
) -> Float[np.ndarray, "seeds rates points"]:
    return np.asarray([one[kind] for one in own], float)


def _comparisons(ends: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """The exponents at the last time minus those of the reference, paired by seed."""
    found = []
    for net, slopes in ends.items():
        both = sorted(set(slopes) & set(ends.get(REFERENCE, {})))
        if net == REFERENCE or len(both) < 2:
            continue
        first, second = (np.array([of[seed] for seed in both]) for of in (slopes, ends[REFERENCE]))
        difference = statistics.difference(first, second)
        found.append(
            {
                "compared": net,
                "seeds": len(both),
                "difference": list(difference[:3]),
                "p": difference.p_value,
            }
        )
    intervals.adjust(found, ["p"], len(LABELS) - 1)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The exponents at some times, and the comparisons at the last one."""
    every = sorted({row["time"] for row in rows if "net" in row})
    shown = {every[0], every[len(every) // 2 - 1], every[-1]} if len(every) > 1 else set(every)
    orders = [
        [
            LABELS[row["net"]],
            "shared" if row["kind"] == "shared" else "its own",
            f"{row['time']:g}",
            *(f"{x:.3g}" for x in row["distance"]),
            intervals.shown(row["order"], 2),
            *_fit(row),
        ]
        for row in rows
        if "net" in row and row["time"] in shown
    ]
    rates = len(next(row for row in rows if "net" in row)["distance"])
    compared = [
        [
            LABELS[row["compared"]],
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"]),
            intervals.p_value(row["p"]),
        ]
        for row in rows
        if "compared" in row
    ]
    header = [
        "net",
        "path",
        "time",
        *(["distance at each rate, descending"] + [""] * (rates - 1)),
        "order",
        "chi-square (d.f.)",
        "p of a line",
    ]
    return "\n".join(
        [
            "Root mean square distances to the SDE, and the exponent of the learning rate (mean "
            "over seeds, 95 % interval):",
            tables.text_table(header, orders, left=2),
            f"\nThe order at the last time on the shared path, minus that of {LABELS[REFERENCE]} "
            f"(Holm over {len(LABELS) - 1}):",
            tables.text_table(["net", "difference", "p"], compared),
        ]
    )


def _fit(row: Mapping[str, Any]) -> tuple[str, str]:
    """Chi-square with its degrees of freedom, and p; "-" where there are too few seeds."""
    if np.isnan(row["p_value"]):
        return "-", "-"
    return f"{row['chi_square']:.1f} ({row['degrees']})", intervals.p_value(row["p_value"])


def draw(
    found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: pathlib.Path
) -> None:
    """The distance against the learning rate at the last time, and the order against time."""
    import matplotlib

    matplotlib.use("Agg")  # also where there is no display
    import matplotlib.pyplot as plt

    made = [row for row in rows(found, settings) if "net" in row]
    rates, last = settings["learning_rates"], max(row["time"] for row in made)
    looks = styles.assigned(LABELS)
    with matplotlib.rc_context(styles.RC):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(styles.WIDTH, 10), layout="constrained"
        )
        for row in made:
            look, own = looks[row["net"]], row["kind"] == "own"
            if row["time"] == last:
                label = LABELS[row["net"]] + (", another path" if own else "")
                style = {"linestyle": ":" if own else "-", "marker": look.marker}
                above.plot(rates, row["distance"], color=look.colour, label=label, **style)
        for net in dict.fromkeys(row["net"] for row in made):
            for kind, style in (("shared", "-"), ("own", ":")):
                own = [row for row in made if (row["net"], row["kind"]) == (net, kind)]
                if own[0]["order"] is None:  # a single seed has no interval
                    continue
                means, halves = np.array([row["order"] for row in own]).T
                times = [row["time"] for row in own]
                look = looks[net]
                below.errorbar(
                    times, means, halves, color=look.colour, marker=look.marker, ls=style, capsize=2
                )
        above.set_xscale("log")
        above.set_yscale("log")
        above.set_xticks(rates, [f"{rate:g}" for rate in rates])
        above.minorticks_off()
        above.set_xlabel("learning rate $\\eta$")
        above.set_ylabel(f"distance to the SDE at time {last:g}")
        for order in (0.5, 1.0):
            below.axhline(order, color=styles.NEUTRAL, lw=1)
        below.set_xlabel("time $k\\eta$")
        below.set_ylabel("exponent of the learning rate (95 % intervals)")
        figures.below_axes(figure, above, columns=1)
        title = f"M-SGD-Fisher beside its SDE, FashionMNIST ({_numbers(found)})"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _numbers(found: Sequence[Mapping[str, Any]]) -> str:
    """How many paths each net has."""
    paths = collections.Counter(row["net"] for row in found)
    if len(set(paths.values())) == 1:
        return f"{next(iter(paths.values()))} paths of each net"
    return "; ".join(f"{LABELS[net]}: {number} paths" for net, number in paths.items())
