"""The comparisons, the table and the picture of the study of complexities at equal loss."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, styles, tables
from experiments.decide import statistics
from experiments.studies import intervals

LABELS = {
    "gd": "GD",
    "sgd": "SGD",
    "sgd-other-key": "SGD, another key",
    "cov": "M-SGD-Cov",
}
LAWS = ("Rademacher", "SGD")
FAMILY = (("sgd", "gd"), ("cov", "gd"))
"""The comparisons that are declared, for each law of multipliers and each target: one family for
Holm's method."""
FLOOR = ("sgd-other-key", "sgd")
"""Two equal algorithms, whose difference shows what is left to chance; outside the family."""


def rows(found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per algorithm and target, and one per comparison, law and target."""
    targets = [float(target) for target in settings["targets"]]
    made: list[dict[str, Any]] = []
    for name in dict.fromkeys(line["algorithm"] for line in found):
        own = [line for line in found if line["algorithm"] == name]
        for place, target in enumerate(targets):
            values = {law: _values(own, law)[:, place] for law in LAWS}
            steps = np.array([line["reached"][place] for line in own], float)
            losses = np.array([line["train_loss"][place] for line in own], float)
            made.append(
                {
                    "algorithm": name,
                    "target": target,
                    "seeds": int(np.isfinite(steps).sum()),
                    "steps": intervals.mean(steps),
                    "train_loss": intervals.mean(losses),
                    **{law: intervals.mean(own) for law, own in values.items()},
                }
            )
    return [*made, *_comparisons(found, targets)]


def _values(own: Sequence[Mapping[str, Any]], law: str) -> Float[np.ndarray, "seeds targets"]:
    return np.array([line["complexities"][law]["mean"] for line in own], float)


def _comparisons(
    found: Sequence[Mapping[str, Any]], targets: Sequence[float]
) -> list[dict[str, Any]]:
    """The ratios of complexities and of training losses, paired by seed."""
    by_run = {(line["algorithm"], line["seed"]): line for line in found}
    seeds = sorted({line["seed"] for line in found})
    declared: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for first, second in (*FAMILY, FLOOR):
        both = [seed for seed in seeds if {(first, seed), (second, seed)} <= by_run.keys()]
        pairs = [(by_run[first, seed], by_run[second, seed]) for seed in both]
        for law in LAWS:
            for place, target in enumerate(targets):
                logs = np.log(
                    [[line["complexities"][law]["mean"][place] for line in pair] for pair in pairs]
                ).reshape(-1, 2)
                losses = np.log(
                    [[line["train_loss"][place] for line in pair] for pair in pairs]
                ).reshape(-1, 2)
                reached = np.isfinite(logs).all(1)
                if reached.sum() < 2:
                    continue
                difference = statistics.difference(logs[reached, 0], logs[reached, 1])
                line = {
                    "compared": [first, second],
                    "law": law,
                    "target": target,
                    "seeds": int(reached.sum()),
                    "ratio": [float(np.exp(x)) for x in difference[:3]],
                    "loss_ratio": float(np.exp((losses[:, 0] - losses[:, 1])[reached].mean())),
                    "p": difference.p_value,
                }
                (others if (first, second) == FLOOR else declared).append(line)
    intervals.adjust(declared, ["p"], len(FAMILY) * len(LAWS) * len(targets))
    return [*declared, *others]


def table(rows: list[dict[str, Any]]) -> str:
    """Two tables: the complexities at each target, and their ratios."""
    measured = [
        [
            LABELS[row["algorithm"]],
            f"{row['target']:g}",
            f"{row['seeds']}",
            intervals.shown(row["steps"], 0),
            intervals.shown(row["train_loss"], 4),
            *(intervals.shown(row[law], 4) for law in LAWS),
        ]
        for row in rows
        if "algorithm" in row
    ]
    compared = [
        [
            " / ".join(LABELS[name] for name in row["compared"]),
            row["law"],
            f"{row['target']:g}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
            f"{row['loss_ratio']:.3f}",
            "-" if tuple(row["compared"]) == FLOOR else intervals.p_value(row["p"]),
        ]
        for row in rows
        if "compared" in row
    ]
    header = ["algorithm", "target", "seeds", "steps", "training loss", *(f"R {x}" for x in LAWS)]
    return "\n".join(
        [
            "Local complexities where the training loss first reaches a target (95 % intervals "
            "over seeds):",
            tables.text_table(header, measured),
            "\nRatios at equal training loss, geometric means of pairs of seeds with 95 % "
            "intervals (single), and p-values by Holm's method:",
            tables.text_table(["ratio", "R", "target", "", "of losses", "p"], compared, left=2),
        ]
    )


def draw(
    found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: pathlib.Path
) -> None:
    """The complexities against the training loss, and their ratios."""
    import matplotlib

    matplotlib.use("Agg")  # also where there is no display
    import matplotlib.pyplot as plt

    made = rows(found, settings)
    looks = styles.assigned(LABELS.values())
    with matplotlib.rc_context(styles.RC):
        figure, panels = plt.subplots(
            2, 2, figsize=(styles.WIDTH, 8), layout="constrained", sharex=True
        )
        for (above, below), law in zip(panels.T, LAWS, strict=True):
            for name, label in LABELS.items():
                own = [row for row in made if row.get("algorithm") == name and row[law]]
                _bars(above, own, [row[law] for row in own], label, looks[label])
            for first, second in (*FAMILY, FLOOR):
                own = [
                    row
                    for row in made
                    if row.get("compared") == [first, second] and row["law"] == law
                ]
                for row in own:
                    mean, low, high = row["ratio"]
                    look = looks[LABELS[first]]
                    below.errorbar(
                        row["target"],
                        mean,
                        [[mean - low], [high - mean]],
                        color=look.colour,
                        marker=look.marker,
                        capsize=2,
                    )
            above.set_title(f"local {law} complexity")
            below.axhline(1, color=styles.NEUTRAL, lw=1)
            below.set_xlabel("training loss")
        targets = [float(target) for target in settings["targets"]]
        for axes in panels.flat:
            axes.set_xscale("log")
            axes.set_xticks(targets, [f"{target:g}" for target in targets])
            axes.minorticks_off()
        panels[0, 0].invert_xaxis()
        panels[0, 0].set_ylabel("means over seeds")
        panels[1, 0].set_ylabel("ratio to GD; SGD's other key: to SGD")
        figures.below_axes(figure, panels[0, 0])
        count = len({line["seed"] for line in found})
        title = f"Local complexities at equal training loss, FashionMNIST ({count} seeds)"
        figure.suptitle(figures.wrapped(title))
    figures.save(figure, path)


def _bars(
    axes: Any, own: Sequence[Mapping[str, Any]], values: Sequence[Any], label: str, look: Any
) -> None:
    """Means with 95 % intervals against the training loss."""
    if not own:
        return
    means, halves = np.array(values).T
    axes.errorbar(
        [row["target"] for row in own],
        means,
        halves,
        label=label,
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        capsize=2,
    )
