"""The comparison of final accuracies: intervals, differences, and tests of equivalence.

Seeds are paired: seed s starts from the same initial weights with every algorithm.
"""

import csv
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments import records, tables
from experiments.decide import statistics
from experiments.training import Evaluation

MARGIN = 0.01
AVERAGED = 5  # The number of evaluations at the end that are averaged.
CONFIDENCE = 0.95


class Result(NamedTuple):
    """The results of the runs of one algorithm.

    Attributes:
        label: the algorithm's name, with its numbers.
        steps: the steps of the evaluations, [E].
        train_loss: the mean loss over the training images, [E, seeds].
        train_accuracy: the training accuracy as a fraction, [E, seeds].
        test_accuracy: the test accuracy as a fraction, [E, seeds].
        seconds: the seconds of training, for all seeds together.
    """

    label: str
    steps: np.ndarray
    train_loss: np.ndarray
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray
    seconds: float


def of_evaluations(label: str, parts: list[list[Evaluation]]) -> Result:
    """Puts the seeds of several runs of one configuration side by side."""

    def stacked(name: str) -> np.ndarray:
        return np.concatenate(
            [np.stack([getattr(evaluation, name) for evaluation in part]) for part in parts], axis=1
        )

    return Result(
        label,
        np.array([evaluation.step for evaluation in parts[0]]),
        stacked("train_loss"),
        stacked("train_accuracy"),
        stacked("test_accuracy"),
        sum(evaluation.seconds for part in parts for evaluation in part),
    )


def of_folder(path: pathlib.Path) -> list[Evaluation]:
    """The evaluations that a run of `train` has logged; raises records.DamagedRecordError."""
    file = path / "metrics.jsonl"
    evaluations = []
    for record in records.read_lines(file):
        try:
            evaluation = Evaluation.of_record(record)
            values = [v for v in evaluation if isinstance(v, np.ndarray)]
            sound = len(values) == 4 and {v.shape for v in values} == {(len(values[0]),)}
            if not sound or values[0].size == 0 or any(v.dtype.kind not in "fi" for v in values):
                raise TypeError("its numbers are not one for each seed")
            float(evaluation.seconds)
        except (TypeError, ValueError) as error:
            raise records.DamagedRecordError(
                f"{file} has no evaluation at step {record['step']}: {str(error)[:120]}"
            ) from None
        evaluations.append(evaluation)
    return evaluations


def of_finished(path: pathlib.Path) -> list[Evaluation]:
    """The evaluations of a finished run, at least one; raises records.DamagedRecordError."""
    evaluations = of_folder(path)
    if not evaluations:
        raise records.DamagedRecordError(f"{path / 'metrics.jsonl'} has no evaluation")
    return evaluations


def until(result: Result, step: int) -> Result:
    """The evaluations up to a step; raises ValueError unless there is one at that step."""
    if step not in result.steps:
        raise ValueError(f"step must be one of {result.label}'s evaluations, got {step}.")
    kept = result.steps <= step
    return result._replace(
        steps=result.steps[kept],
        train_loss=result.train_loss[kept],
        train_accuracy=result.train_accuracy[kept],
        test_accuracy=result.test_accuracy[kept],
    )


class Row(NamedTuple):
    """One algorithm compared with the reference; accuracies and differences are fractions.

    Attributes:
        label: the algorithm.
        seeds: the number of seeds.
        steps: the number of iterations.
        train_loss: the mean over seeds at the end, or also over the last evaluations.
        train_accuracy: the training accuracy, averaged in the same way.
        test_accuracy: the test accuracy, averaged in the same way.
        half_width: half the width of the 95 % interval of `test_accuracy` (Student's t); NaN for
            one seed.
        difference: the mean of `test_accuracy` minus the reference's, seed by seed; NaN for the
            reference.
        difference_half_width: half the width of the 95 % interval of `difference`, by itself.
        difference_p: the two-sided p-value of the hypothesis that the mean difference is 0.
        equivalence_p: the p-value of the two one-sided tests that the mean difference is within
            `MARGIN`.
        adjusted_difference_p, adjusted_equivalence_p: the same by Holm's method, each over all
            comparisons with the reference that were made together.
    """

    label: str
    seeds: int
    steps: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    half_width: float
    difference: float
    difference_half_width: float
    difference_p: float
    equivalence_p: float
    adjusted_difference_p: float
    adjusted_equivalence_p: float

    @property
    def verdict(self) -> str:
        """The result of the tests at the 5 % level, adjusted by Holm's method, as text."""
        if np.isnan(self.difference):
            return "the reference"
        apart = self.adjusted_difference_p < 1 - CONFIDENCE
        if self.adjusted_equivalence_p < 1 - CONFIDENCE:
            return "equivalent, though different" if apart else "equivalent"
        return "different" if apart else "undecided"


def compare(results: list[Result], reference: str, last: int = 1) -> list[Row]:
    """Compares the last evaluations with those of one of the algorithms.

    Args:
        results: one result per algorithm, with the same seeds.
        reference: the label of the algorithm to compare with.
        last: the number of evaluations at the end that are averaged, per seed.

    Raises:
        ValueError: if no result has that label, the numbers of seeds differ, or there are fewer
            evaluations than `last`.
    """
    for result in results:
        if not 1 <= last <= len(result.steps):
            raise ValueError(
                f"last must be between 1 and the {len(result.steps)} evaluations of "
                f"{result.label}, got {last}."
            )
    by_label = {result.label: result for result in results}
    if reference not in by_label:
        raise ValueError(f"reference must be one of {', '.join(by_label)}, got {reference!r}.")
    against = by_label[reference].test_accuracy[-last:].mean(axis=0)
    rows = []
    for result in results:
        final = result.test_accuracy[-last:].mean(axis=0)
        if final.shape != against.shape:
            raise ValueError(
                f"{result.label} has {final.size} seeds and {reference} has {against.size}: "
                "they are compared seed by seed."
            )
        itself = result.label == reference
        differences = np.full(2, np.nan) if itself else final - against
        p_values = difference(differences), equivalence(differences, MARGIN)
        rows.append(
            Row(
                label=result.label,
                seeds=final.size,
                steps=int(result.steps[-1]),
                train_loss=float(result.train_loss[-last:].mean()),
                train_accuracy=float(result.train_accuracy[-last:].mean()),
                test_accuracy=float(final.mean()),
                half_width=half_width(final),
                difference=float(differences.mean()),
                difference_half_width=np.nan if itself else half_width(differences),
                difference_p=p_values[0],
                equivalence_p=p_values[1],
                adjusted_difference_p=np.nan,
                adjusted_equivalence_p=np.nan,
            )
        )
    return _adjusted(rows)


def _adjusted(rows: list[Row]) -> list[Row]:
    """Applies Holm's method over all comparisons, apart for differences and for equivalence."""
    tested = [i for i, row in enumerate(rows) if not np.isnan(row.difference_p)]
    apart = statistics.holm([rows[i].difference_p for i in tested])
    within = statistics.holm([rows[i].equivalence_p for i in tested])
    adjusted = list(rows)
    for i, different, equivalent in zip(tested, apart, within, strict=True):
        adjusted[i] = rows[i]._replace(
            adjusted_difference_p=different, adjusted_equivalence_p=equivalent
        )
    return adjusted


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; NaN for a single value."""
    if values.size < 2:
        return float("nan")
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(values.size))


def difference(differences: np.ndarray) -> float:
    """The p-value of a paired two-sided t test that the mean is 0; NaN for a single difference."""
    if differences.size < 2 or np.isnan(differences).any():
        return float("nan")
    return statistics.difference(differences, np.zeros_like(differences)).p_value


def equivalence(differences: np.ndarray, margin: float) -> float:
    """The p-value of two one-sided t-tests (Schuirmann 1987) that the mean is within ±margin.

    Args:
        differences: paired differences, normal by assumption.
        margin: the margin, above 0.

    Returns:
        The larger of the two p-values, which is small if the tests show that the mean is within the
        margin. NaN for a single difference.
    """
    if differences.size < 2 or np.isnan(differences).any():
        return float("nan")
    return statistics.equivalence(differences, np.zeros_like(differences), margin)


def write_csv(rows: list[Row], path: pathlib.Path) -> None:
    """Writes one line per algorithm, with all numbers unrounded."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields, "verdict"])
        for row in rows:
            writer.writerow([*row, row.verdict])


def markdown_table(rows: list[Row]) -> str:
    """The rows as a table, accuracies in percent, p-values adjusted."""
    header = [
        "algorithm",
        "train loss",
        "train accuracy %",
        "test accuracy %",
        f"minus {reference_of(rows)}",
        "p (different)",
        f"p (equivalent within {100 * MARGIN:g} %)",
        "",
    ]
    lines = []
    for row in rows:
        accuracy = _with_interval(row.test_accuracy, row.half_width)
        if np.isnan(row.difference):
            minus = ""
        else:
            minus = _with_interval(row.difference, row.difference_half_width, sign="+")
        p_values = [_p_value(row.adjusted_difference_p), _p_value(row.adjusted_equivalence_p)]
        verdict = row.verdict if row.seeds > 1 else ""
        trained = [f"{row.train_loss:.4f}", f"{100 * row.train_accuracy:.1f}"]
        lines.append([row.label, *trained, accuracy, minus, *p_values, verdict])
    return tables.markdown_table(header, lines)


def reference_of(rows: list[Row]) -> str:
    """The label of the row that the others are compared with."""
    return next(row.label for row in rows if np.isnan(row.difference))


def _p_value(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2g}"


def _with_interval(value: float, width: float, sign: str = "") -> str:
    text = f"{100 * value:{sign}.2f}"
    return text if np.isnan(width) else f"{text} ± {100 * width:.2f}"
