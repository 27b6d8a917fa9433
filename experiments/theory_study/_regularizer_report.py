"""The comparisons, the table and the picture of the study of the regulariser in training."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import figures, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

QUANTITIES = ("test_accuracy", "test_loss", "train_loss")
ENDPOINT = "test_accuracy"
LABELS = {
    "gd": "GD",
    "gd-longer": "GD, as many gradients",
    "full": "GD, full regulariser",
    "tenth": "GD, a tenth of it",
    "no-sup": "GD-Rademacher, no sup, no abs",
    "sgd": "SGD",
    "sgd-longer": "SGD, as many gradients",
    "sgd-full": "SGD, full on b examples",
}


class Pair(NamedTuple):
    """A case and its control; `best` means the learning rate that the tuning seeds chose."""

    case: str
    control: str
    case_best: bool = False
    control_best: bool = False


FAMILY = (
    Pair("full", "gd"),
    Pair("full", "gd-longer"),
    Pair("full", "gd", control_best=True),
    Pair("full", "gd", case_best=True, control_best=True),
    Pair("tenth", "gd"),
    Pair("tenth", "gd-longer"),
    Pair("tenth", "gd", control_best=True),
    Pair("no-sup", "gd"),
    Pair("sgd-full", "sgd"),
    Pair("sgd-full", "sgd-longer"),
)
"""The declared comparisons of test accuracies: one family for Holm's method. Those of test losses
are a second family."""
Curves = Mapping[tuple[str, float], Mapping[int, Mapping[str, float]]]


def rows(found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per case and learning rate, and one per comparison."""
    deciding, choosing = _split(found, settings)
    rates = 1 + len(settings["other_rates"])
    best = {name: _best(choosing, name, rates) for name in ("gd", "full")}
    return [
        *_cases(deciding, best),
        *_comparisons(deciding, float(settings["learning_rate"]), best),
    ]


def _split(
    found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> tuple[Curves, Curves]:
    """The results of the seeds that decide and of those that choose, by case and learning rate."""
    tuning = range(settings["tuning_seed"], settings["tuning_seed"] + int(settings["tuning_seeds"]))
    parts: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for line in found:
        own = parts[line["seed"] in tuning].setdefault((line["case"], line["rate"]), {})
        own[line["seed"]] = {name: float(line[name]) for name in QUANTITIES}
    return parts


def _best(choosing: Curves, name: str, rates: int) -> float | None:
    """The learning rate with the highest mean endpoint on the tuning seeds.

    None unless all of the rates were tried on these seeds.
    """
    means = {
        rate: np.mean([one[ENDPOINT] for one in seeds.values()])
        for (case, rate), seeds in choosing.items()
        if case == name
    }
    if len(means) < rates:
        return None
    finite = {rate: mean for rate, mean in means.items() if np.isfinite(mean)}
    return max(finite, key=lambda rate: finite[rate], default=None)


def _cases(deciding: Curves, best: Mapping[str, float | None]) -> list[dict[str, Any]]:
    lines = []
    for (name, rate), seeds in deciding.items():
        values = {
            quantity: np.array([one[quantity] for one in seeds.values()]) for quantity in QUANTITIES
        }
        lines.append(
            {
                "case": name,
                "rate": rate,
                "seeds": len(seeds),
                "best": best.get(name) == rate,
                **{quantity: intervals.mean(own) for quantity, own in values.items()},
            }
        )
    return lines


def _comparisons(
    deciding: Curves, rate: float, best: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """The declared comparisons that can be made, paired by seed, with Holm's p-values."""
    found: list[dict[str, Any]] = []
    for pair in FAMILY:
        at = (
            best.get(pair.case) if pair.case_best else rate,
            best.get(pair.control) if pair.control_best else rate,
        )
        if at[0] is None or at[1] is None:
            continue
        first, second = deciding.get((pair.case, at[0])), deciding.get((pair.control, at[1]))
        both = sorted(set(first or ()) & set(second or ()))
        if first is None or second is None or len(both) < 2:
            continue
        line: dict[str, Any] = {"compared": list(pair), "rates": list(at)}
        for quantity in (ENDPOINT, "test_loss"):
            values, reference = (
                np.array([own[seed][quantity] for seed in both]) for own in (first, second)
            )
            difference = _difference(values, reference)
            line[quantity] = None if difference is None else list(difference[:3])
            line[f"{quantity}_p"] = 1.0 if difference is None else difference.p_value
            line["seeds"] = len(both)
        found.append(line)
    intervals.adjust(found, [f"{name}_p" for name in (ENDPOINT, "test_loss")], len(FAMILY))
    return found


def _difference(
    values: Float[np.ndarray, " seeds"], reference: Float[np.ndarray, " seeds"]
) -> statistics.Difference | None:
    """The paired difference; None where a run has diverged."""
    if not np.isfinite(values - reference).all():
        return None
    return statistics.difference(values, reference)


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: the cases at their learning rates, and the comparisons."""
    cases = [
        [
            LABELS[row["case"]],
            f"{row['rate']:g}" + (" (best)" if row["best"] else ""),
            f"{row['seeds']}",
            _percent(row["test_accuracy"]),
            intervals.shown(row["test_loss"]),
            intervals.shown(row["train_loss"], 4),
        ]
        for row in rows
        if "case" in row
    ]
    compared = [
        [
            title(row),
            _points(row[ENDPOINT]),
            intervals.p_value(row[f"{ENDPOINT}_p"]),
            _range(row["test_loss"], 4),
            intervals.p_value(row["test_loss_p"]),
        ]
        for row in rows
        if "compared" in row
    ]
    header = ["training", "rate", "seeds", "test accuracy %", "test loss", "training loss"]
    return "\n".join(
        [
            "At the end of training, means over seeds with 95 % intervals; the best rates are "
            "those of other seeds:",
            tables.text_table(header, cases),
            "\nPaired differences with 95 % intervals (single), and p-values by Holm's method over "
            f"{len(FAMILY)} comparisons:",
            tables.text_table(
                ["difference", "test accuracy, points", "p", "test loss", "p"], compared
            ),
        ]
    )


def title(row: Mapping[str, Any]) -> str:
    """The name of a comparison, with learning rates where they are chosen."""
    pair = Pair(*row["compared"])
    sides = zip(
        (pair.case, pair.control), (pair.case_best, pair.control_best), row["rates"], strict=True
    )
    named = [
        LABELS[name] + (f" at its best rate {rate:g}" if best else "") for name, best, rate in sides
    ]
    return " - ".join(named)


def _percent(mean: list[float] | None) -> str:
    return "-" if mean is None else f"{100 * mean[0]:.2f} ± {100 * mean[1]:.2f}"


def _points(values: list[float] | None) -> str:
    return _range(None if values is None else [100 * x for x in values], 2)


def _range(values: list[float] | None, digits: int) -> str:
    if values is None:
        return "-"
    mean, low, high = (f"{x:+.{digits}f}" for x in values)
    return f"{mean} [{low}, {high}]"


def draw(
    found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: pathlib.Path
) -> None:
    """Test accuracy against the learning rate, and the declared differences."""
    import matplotlib

    matplotlib.use("Agg")  # also where there is no display
    import matplotlib.pyplot as plt

    made = rows(found, settings)
    compared = [row for row in made if "compared" in row and row[ENDPOINT] is not None]
    with matplotlib.rc_context(styles.RC):
        figure, (above, below) = plt.subplots(
            2,
            1,
            figsize=(styles.WIDTH, 6.4 + 0.5 * len(compared)),
            layout="constrained",
            height_ratios=(4, 2 + 0.5 * len(compared)),
        )
        _against_rate(above, [row for row in made if "case" in row])
        for height, row in enumerate(reversed(compared)):
            mean, low, high = (100 * x for x in row[ENDPOINT])
            look = styles.style(1 if row[f"{ENDPOINT}_p"] < 0.05 else 0)
            below.errorbar(
                mean,
                height,
                xerr=[[mean - low], [high - mean]],
                fmt=look.marker,
                color=look.colour,
            )
        labels = [figures.wrapped(title(row), 44) for row in reversed(compared)]
        below.set_yticks(range(len(compared)), labels, fontsize=styles.FONT - 2)
        below.set_ylim(-0.6, len(compared) - 0.4)
        below.axvline(0, color=styles.NEUTRAL, lw=1)
        below.set_xlabel("difference of test accuracies, points (95 % intervals)")
        figures.below_axes(figure, above)
        figure.suptitle(figures.wrapped("The full regulariser in training, and its controls"))
    figures.save(figure, path)


def _against_rate(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    for place, name in enumerate(LABELS):
        own = sorted(
            (row for row in cases if row["case"] == name and row[ENDPOINT] is not None),
            key=lambda row: row["rate"],
        )
        if not own:
            continue
        means, halves = (100 * np.array([row[ENDPOINT][i] for row in own]) for i in range(2))
        look = styles.style(place)
        axes.errorbar(
            [row["rate"] * (1 + 0.01 * (place - 4)) for row in own],
            means,
            halves,
            label=LABELS[name],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line if len(own) > 1 else "",
            capsize=2,
        )
    axes.set_xscale("log")
    ticks = sorted({row["rate"] for row in cases})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    axes.set_xlabel("learning rate $\\eta$")
    axes.set_ylabel("test accuracy (%)")
