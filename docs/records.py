"""The records of experiments and benchmarks, as the pages show them."""

import csv
import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import figures, styles, tables
from experiments.paper.accuracies import of_evaluations, of_folder
from experiments.paper.panels import PANELS, Scale
from experiments.paper.report import run_folder
from experiments.studies import intervals

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


def read(path: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((ROOT / path).read_text())


def estimate(value: Any, digits: int = 3) -> str:
    """A number, with its standard error if it has one."""
    if isinstance(value, dict):
        return f"{value['value']:.{digits}f} ± {value['standard_error']:.{digits}f}"
    return f"{value:.{digits}f}"


def table(header: list[str], rows: list[list[Any]]) -> Any:
    """A Markdown table as a cell's output."""
    from IPython.display import Markdown

    return Markdown(tables.markdown_table(header, [[str(cell) for cell in row] for row in rows]))


def band(axes: Any, x: Any, runs: Any, label: str, **options: Any) -> None:
    """The mean over the last axis, and one standard error around it."""
    mean, error = runs.mean(-1), runs.std(-1, ddof=1) / np.sqrt(runs.shape[-1])
    (line,) = axes.plot(x, mean, label=label, **options)
    axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)


def log_rates(axes: Any, rates: Any) -> None:
    """Both axes logarithmic, ticks at the learning rates and nowhere else."""
    axes.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel="distance at T = 2")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def order(sweep: dict[str, Any]) -> list[str]:
    """The exponent of a sweep, and how well a line fits: chi-square, its degrees of freedom, and p.

    The exponent has a standard error only where a line fits the measured points; where nothing is
    random, there is neither a standard error nor a chi-square.
    """
    found, p_value = sweep["order"], sweep.get("p_value")
    if p_value is None:
        return [estimate(found["value"] if isinstance(found, dict) else found), ""]
    shown = estimate(found) if p_value >= 0.1 else f"{found['value']:.3f}, not a line"
    freedom = len(sweep["learning_rates"]) - 2
    return [shown, f"{sweep['chi_square']:.1f} ({freedom}), p {intervals.p_value(p_value)}"]


def theorem1(settings: list[dict[str, Any]]) -> Any:
    """Left side over right side of each inequality, violations in bold."""
    columns = {
        "gaussian_lower": "(10) lower",
        "gaussian_upper": "(10) upper",
        "without": "(11) without",
        "with": "(11) with",
        "with, corrected": "corrected, with",
    }

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        ratio = found["ratio"]
        text = estimate(ratio if ratio["standard_error"] > 0 else ratio["value"], 4)
        return f"**{text}**" if found["violated"] else text

    rows = [
        [s["label"], s["num_examples"], s["batch_size"]]
        + [cell(s["inequalities"].get(name)) for name in columns]
        for s in settings
    ]
    return table(["losses", "N", "b", *columns.values()], rows)


def beside_the_sde(rows: list[dict[str, Any]], time: float) -> Any:
    """Distances of nets to their SDE at a time, the exponent of the learning rate, and its fit."""
    names = {"relu": "ReLU", "-max": ", max-pooling", "-average": ", average pooling"}
    found = []
    for row in (row for row in rows if "net" in row and row["time"] == time):
        net, (order, half) = row["net"], row["order"]
        for short, name in names.items():
            net = net.replace(short, name)
        interval = f" ± {half:.2f}" if row["p_value"] >= 0.1 else ", not a line"
        fit = f"{row['chi_square']:.1f} ({row['degrees']}), p {intervals.p_value(row['p_value'])}"
        distances = ", ".join(f"{distance:#.2g}" for distance in row["distance"])
        path = "shared" if row["kind"] == "shared" else "its own"
        found.append([net, path, distances, f"{order:.2f}{interval}", fit])
    header = ["net", "path", "distance, by η in descending order", "order"]
    return table([*header, "Hotelling's statistic of a line (d.f.)"], found)


def at_equal_loss(rows: list[dict[str, Any]]) -> Any:
    """Quotients of local complexities at equal training loss, with intervals and Holm's p-values.

    The noise floor is compared outside the family that Holm's method counts.
    """
    names = {"gd": "GD", "sgd": "SGD", "sgd-other-key": "SGD, another key", "cov": "M-SGD-Cov"}
    found = []
    for row in (row for row in rows if "ratio" in row):
        first, second = (names[name] for name in row["compared"])
        floor = "sgd-other-key" in row["compared"]
        found.append(
            [
                f"{first} / {second}",
                row["law"],
                f"{row['target']:g}",
                "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
                "" if floor else f"{row['p']:.2g}",
                f"{row['loss_ratio']:.3f}",
            ]
        )
    header = ["quotient", "complexity", "training loss", "at equal loss", "Holm"]
    return table([*header, "quotient of the losses"], found)


def comparison(folder: str, which: str = "") -> Any:
    """A table of a panel: accuracies, differences from SGD-50, p-values by Holm's method.

    The folder is named after the panel, with "-large" if it was run at two scales. The table is the
    one of the last evaluation, or which="-averaged" or "-constant" (see its page).
    """
    panel = folder.removesuffix("-large")
    with (RESULTS / folder / f"figure-{panel}{which}.csv").open() as lines:
        records = list(csv.DictReader(lines))
    rows = []
    for row in records:
        test, width = 100 * float(row["test_accuracy"]), 100 * float(row["half_width"])
        difference = ["", "", ""]
        if row["verdict"] != "the reference":
            minus, around = (100 * float(row[k]) for k in ("difference", "difference_half_width"))
            names = ("adjusted_difference_p", "adjusted_equivalence_p")
            p_values = [f"{float(row[name]):.2g}" for name in names]
            difference = [f"{minus:+.2f} ± {around:.2f}", *p_values]
        trained = [f"{float(row['train_loss']):.4f}", f"{100 * float(row['train_accuracy']):.1f}"]
        tested = f"{test:.2f} ± {width:.2f}"
        rows.append([row["label"], *trained, tested, *difference, row["verdict"]])
    header = ["algorithm", "training loss", "training %", "test %", "minus SGD-50", "p (different)"]
    header += ["p (equivalent)", ""]
    return table(header, rows)


def curves(panel: str, scale: Scale, low: float) -> None:
    """Draws test accuracy against iteration of the recorded runs of a panel."""
    figure, axes = plt.subplots(figsize=(styles.WIDTH, 5))
    runs = PANELS[panel].at_scale(scale)
    looks = styles.assigned(run.label for run in runs)
    for i, run in enumerate(runs):
        evaluations = of_folder(run_folder(RESULTS / "runs", run))
        result = of_evaluations(run.label, [evaluations])
        options = looks[run.label].options(len(result.steps), first=i)
        accuracy = 100 * result.test_accuracy
        band(axes, result.steps, accuracy, run.label, linewidth=1, **options)
    axes.set(xlabel="iteration", ylabel="test accuracy (%)", ylim=(low, None))
    figures.below_axes(figure, axes)
