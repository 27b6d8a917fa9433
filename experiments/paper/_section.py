"""The picture, the tables and the page of algorithms that were trained alike."""

import pathlib
from typing import NamedTuple

from experiments import figures
from experiments.paper import accuracies
from experiments.training import TrainConfig


def write(
    folder: pathlib.Path,
    name: str,
    title: str,
    plan: TrainConfig,
    results: list[accuracies.Result],
    constant_until: int | None = None,
) -> str:
    """Writes NAME.png, and a CSV file for each table; returns the Markdown page.

    Args:
        folder: the folder of the files.
        name: how the names of the files begin.
        title: the title of the picture and of the page.
        plan: one of the runs; the settings in which they agree are those that are shown.
        results: the results, one per algorithm.
        constant_until: the step up to which the learning rate is constant, if they are compared at
            that step as well.
    """
    labels = [result.label for result in results]
    reference = next((label for label in labels if label.startswith("SGD")), labels[0])
    compared = _tables(plan, results, reference, constant_until)
    for table in compared:
        accuracies.write_csv(table.rows, folder / f"{name}{table.suffix}.csv")
    tables = "".join(f"{t.heading}:\n\n{accuracies.markdown_table(t.rows)}\n\n" for t in compared)
    curves = [figures.Curve(r.label, r.steps, r.test_accuracy) for r in results]
    number = compared[0].rows[0].seeds
    seeds = f"{number} {'seed' if number == 1 else 'seeds'}"
    subtitle = (
        f"{plan.dataset_name}, {plan.model_name}, learning rate {plan.learning_rate:g}, "
        f"b = {plan.noise.batch_size}, {seeds} (band: one standard error)"
    )
    figures.plot_curves(curves, folder / f"{name}.png", f"{title}\n{subtitle}")
    own = " that draw training images of their own" if plan.subset_per_seed else ""
    setting = f"{plan.dataset_name}, {plan.recipe}; {seeds}{own}"
    return (
        f"## {title}\n\n{setting[0].upper()}{setting[1:]}; bands are one standard error.\n\n"
        f"![{_alternative(curves)}]({name}.png)\n\n"
        f"{tables}"
        "±: 95 % intervals over seeds (Student's t), each by itself; differences are paired, seed "
        "by seed. The p-values, and with them the last column, are adjusted by Holm's method over "
        "all comparisons of a table, apart for differences and for equivalence.\n"
    )


class _Table(NamedTuple):
    """A comparison of algorithms.

    Attributes:
        heading: what is compared.
        suffix: what tells the table's file from those of the others.
        rows: the algorithms.
    """

    heading: str
    suffix: str
    rows: list[accuracies.Row]


def _tables(
    plan: TrainConfig,
    results: list[accuracies.Result],
    reference: str,
    constant_until: int | None,
) -> list[_Table]:
    """The last evaluation, and what else is worth comparing."""
    tables = [_Table("The last evaluation", "", accuracies.compare(results, reference))]
    # What sparse laws win over SGD that computes as many examples in each step.
    of_sgd = [r for r in results if r.label.startswith("SGD-") and "," not in r.label]
    sparse = [r for r in results if r.label.startswith("[M-SGD")]
    if len(of_sgd) == 2 and sparse:
        rows = accuracies.compare([of_sgd[1], *sparse], of_sgd[1].label)
        tables.append(_Table("The same, minus SGD with batches as large", "-large-batches", rows))
    before = ""
    if constant_until is not None:
        results = [accuracies.until(result, constant_until) for result in results]
        before = " before the learning rate falls"
        heading = f"After {constant_until:,} iterations,{before}"
        tables.append(_Table(heading, "-constant", accuracies.compare(results, reference)))
    is_long = min(len(result.steps) for result in results) > 2 * accuracies.AVERAGED
    if is_long and (constant_until is not None or not plan.decay_at):
        heading = (
            f"The mean over the last {accuracies.AVERAGED} evaluations of each seed{before}, since "
            "at a constant learning rate a single one may fall on a spike of the loss"
        )
        rows = accuracies.compare(results, reference, accuracies.AVERAGED)
        tables.append(_Table(heading, "-averaged", rows))
    return tables


def _alternative(curves: list[figures.Curve]) -> str:
    """What the picture shows, for readers who do not see it."""
    ends = {curve.label: 100 * curve.accuracy[-1].mean() for curve in curves}
    low, high = min(ends, key=lambda label: ends[label]), max(ends, key=lambda label: ends[label])
    # Brackets in a name would end the text that Markdown takes for the description.
    text = (
        f"Test accuracy against iteration, a line per algorithm: {'; '.join(ends)}. At the last "
        f"evaluation, means are from {ends[low]:.1f} % ({low}) to {ends[high]:.1f} % ({high})."
    )
    return text.replace("[", "\\[").replace("]", "\\]")
