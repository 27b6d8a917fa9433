"""The tables and the picture of tail indices, made from the records."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

LABELS = {
    "isotropic": "isotropic Gaussian",
    "cov": "M-SGD-Cov",
    "fisher": "M-SGD-Fisher",
    "sgd": "SGD",
    "student_t": "Student t",
    "stable": "stable",
}
SHARES = {"10": 0.1, "3": 0.03, "1": 0.01}
"""The shares of the draws that Hill's estimator uses, by their percentage."""
QUANTITIES = (
    "pooled",
    "permuted",
    "vector",
    "vector_limit",
    "projection",
    *(f"hill_{share}" for share in SHARES),
    "kurtosis",
    "gaussian_p",
)
FIELDS = frozenset(("points", "loss", "sgd_kurtosis", *QUANTITIES))
GAUSSIAN = ("cov", "fisher")
"""Noises that are Gaussian by construction: the comparisons of their published estimates with 2, at
all points of all nets, are one family."""
COMPARED = ("sgd", "student_t")
"""Noises with M-SGD-Cov's covariance and other tails: the comparisons with it are one family."""
LEVEL = 0.05
_STYLES = styles.assigned([*LABELS.values()])
Record = dict[str, Any]


def values(found: list[Record], quantity: str, name: str) -> Float[np.ndarray, "seeds points"]:
    """A quantity of one noise, of all seeds of one net in order."""
    return np.array([line[quantity][name] for line in found], float)


def _of_net(found: list[Record], net: str) -> list[Record]:
    return sorted((line for line in found if line["net"] == net), key=lambda line: line["seed"])


def rows(found: list[Record], settings: Mapping[str, Any]) -> list[Record]:
    """One row per net, noise and point: means over seeds with intervals, and comparisons."""
    result: list[Record] = []
    for net in dict.fromkeys(line["net"] for line in found):
        lines = _of_net(found, net)
        for name in LABELS:
            for place, point in enumerate(lines[0]["points"]):
                result.append(
                    {"net": net, "noise": name, "point": point, **_row(lines, name, place)}
                )
    for which, names in (("to_two", GAUSSIAN), ("to_cov", COMPARED)):
        family = [row[which] for row in result if row["noise"] in names and row[which]]
        intervals.adjust(family, ("p_value",))
    return result


def _row(lines: list[Record], name: str, place: int) -> Record:
    row: Record = {
        quantity: intervals.mean(values(lines, quantity, name)[:, place])
        for quantity in QUANTITIES
        if quantity != "gaussian_p"
    }
    row["rejected"] = int((values(lines, "gaussian_p", name)[:, place] <= LEVEL).sum())
    row["seeds"] = len(lines)
    row["loss"] = float(np.mean([line["loss"][place] for line in lines]))
    if name == "sgd":
        row["exact_kurtosis"] = float(np.mean([line["sgd_kurtosis"][place] for line in lines]))
    pooled = {other: values(lines, "pooled", other)[:, place] for other in LABELS}
    row["to_two"] = row["to_cov"] = row["share"] = None
    if name in GAUSSIAN:
        row["to_two"] = _compared(pooled[name], np.full(len(lines), 2.0))
    if name in COMPARED:
        row["to_cov"] = _compared(pooled[name], pooled["cov"])
    if name == "sgd":
        # The share of the distance of SGD's index from that of isotropic noise that noise without
        # heavy tails has too.
        share = statistics.share_of_gap(pooled["cov"], pooled["isotropic"], pooled["sgd"])
        row["share"] = list(share)
    return row


def _compared(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    difference = statistics.difference(one, other)
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
    }


def table(rows: list[Record]) -> str:
    """Two tables: all estimates, and the comparisons."""
    means = [
        [
            LABELS[row["noise"]],
            row["net"],
            f"{row['point']:,}",
            *(
                intervals.shown(row[name], 2)
                for name in ("pooled", "permuted", "projection", "vector", "vector_limit")
            ),
            *(intervals.shown(row[f"hill_{share}"], 1) for share in SHARES),
            intervals.shown(row["kurtosis"], 2),
            f"{row['rejected']} of {row['seeds']}",
        ]
        for row in rows
    ]
    header = ["noise", "net", "step", "published", "permuted", "projections", "vectors"]
    header += ["their limit", *(f"Hill {share} %" for share in SHARES), "kurtosis", "not Gaussian"]
    comparisons = [
        [
            LABELS[row["noise"]],
            row["net"],
            f"{row['point']:,}",
            against,
            f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]",
            intervals.p_value(one["p_value"]),
        ]
        for row in rows
        for against, one in (("2", row["to_two"]), (LABELS["cov"], row["to_cov"]))
        if one
    ]
    details = [
        [
            row["net"],
            f"{row['point']:,}",
            f"{row['loss']:.4f}",
            f"{row['exact_kurtosis']:.2f}",
            f"{row['share'][0]:.2f} [{row['share'][1]:.2f}, {row['share'][2]:.2f}]",
        ]
        for row in rows
        if row["noise"] == "sgd"
    ]
    return "\n".join(
        (
            "Tail indices, with 95 % intervals over seeds (published: all coordinates of all draws "
            "in one sample):",
            tables.text_table(header, means, left=2),
            "\nThe published estimate, minus 2 or minus that of M-SGD-Cov, seed by seed, "
            "each interval by itself; p by Holm's method over each of the two families:",
            tables.text_table(
                ["noise", "net", "step", "minus", "difference", "p"], comparisons, left=2
            ),
            "\nSGD: training loss, exact kurtosis on the directions, and the share of its distance "
            "from isotropic noise that M-SGD-Cov has too (Fieller's interval):",
            tables.text_table(["net", "step", "loss", "kurtosis", "share"], details),
        )
    )


def draw(found: list[Record], settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """The published estimate along training for each net, and Hill's at the end for the first."""
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    nets = [*dict.fromkeys(line["net"] for line in found)]
    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(
            len(nets) + 1, 1, figsize=(styles.WIDTH, 3.5 * (len(nets) + 1)), layout="constrained"
        )
        for axis, net in zip(axes, nets, strict=False):
            lines = _of_net(found, net)
            ticks = [f"{point:,}" for point in lines[0]["points"]]
            _lines(axis, ticks, {name: values(lines, "pooled", name) for name in LABELS})
            axis.axhline(2, color=styles.NEUTRAL, lw=1, ls=":")
            axis.set_title(f"{net} net: the published estimate")
            axis.set_xlabel("iteration")
        last = _of_net(found, nets[0])
        hill = {
            name: np.stack([values(last, f"hill_{share}", name)[:, -1] for share in SHARES], 1)
            for name in LABELS
        }
        _lines(axes[-1], [f"{share} %" for share in SHARES], hill)
        axes[-1].set_title(f"{nets[0]} net, after {last[0]['step']:,} iterations: Hill's estimate")
        axes[-1].set_xlabel("largest draws that are used")
        for axis in axes:
            axis.set_ylabel("tail index")
        figures.below_axes(figure, axes[0])
        title = f"Digits: what tail-index estimators say ({len(last)} seeds, 95 % intervals)"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _lines(axis: Any, ticks: list[str], drawn: dict[str, np.ndarray]) -> None:
    """One line per noise through the means over seeds, at places side by side."""
    for i, (name, own) in enumerate(drawn.items()):
        summaries = [intervals.mean(one) for one in own.T]
        kept = [place for place, one in enumerate(summaries) if one is not None]
        mean, half = np.array([summaries[place] for place in kept]).reshape(-1, 2).T
        look = _STYLES[LABELS[name]]
        x = np.array(kept) + 0.06 * (i - len(drawn) / 2)
        style = {"color": look.colour, "ls": look.line, "marker": look.marker}
        axis.errorbar(x, mean, half, lw=1.2, capsize=2, label=LABELS[name], **style)
    axis.set_xticks(range(len(ticks)), ticks)
