"""What the command line's commands do."""

import itertools
import pathlib
import statistics
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import complexity, data, figures, runs, sde
from experiments.algorithms import ALGORITHMS
from experiments.config import ComplexityConfig, DemoConfig, SDEConfig, TrainConfig
from experiments.training import Evaluation, train_seeds


def run(config: ComplexityConfig | DemoConfig | SDEConfig | TrainConfig) -> pathlib.Path:
    """Runs a command; returns the folder with its results."""
    if isinstance(config, DemoConfig):
        return demo(config)
    if isinstance(config, SDEConfig):
        return sde.run(config)
    if isinstance(config, ComplexityConfig):
        return complexity.run(config)
    return train(config)


def train(config: TrainConfig) -> pathlib.Path:
    """Trains one algorithm; writes its folder and curves.png, and prints a table."""
    dataset = data.load(config.dataset, seed=config.data_seed, data_dir=config.data_dir)
    folder = config.out or runs.default_folder(f"{config.dataset}-{config.algorithm}")
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True) as progress:
        evaluations = _train(config, dataset, folder, progress)
    _report({config.algorithm: evaluations}, folder, _title(config, dataset))
    return folder


def demo(config: DemoConfig) -> pathlib.Path:
    """Trains six algorithms on the digits; writes their folders and curves.png, prints a table."""
    dataset = data.load("digits")
    folder = config.out or runs.default_folder("demo")
    runs.create(folder)
    plans = config.runs()
    results = {}
    with tqdm(total=config.steps * len(plans), unit="step", dynamic_ncols=True) as progress:
        for algorithm, plan in plans.items():
            results[algorithm] = _train(plan, dataset, folder / algorithm, progress)
    _report(results, folder, _title(next(iter(plans.values())), dataset))
    return folder


def _train(
    config: TrainConfig, dataset: data.Dataset, path: pathlib.Path, progress: Any
) -> list[Evaluation]:
    """Trains, logs every evaluation in the run's folder, and moves the progress bar."""
    training = train_seeds(config, dataset)
    folder = runs.RunFolder(
        path, config, data_source=dataset.source, train_indices=dataset.train_indices.tolist()
    )
    progress.set_description(ALGORITHMS[config.algorithm].label)
    evaluations = []
    for _, evaluation in training:
        folder.log(evaluation.record())
        progress.update(evaluation.step - (evaluations[-1].step if evaluations else 0))
        evaluations.append(evaluation)
    folder.finish(summary(evaluations))
    return evaluations


def summary(evaluations: list[Evaluation]) -> dict[str, Any]:
    """The end of a run: accuracies with their standard errors over seeds, and the speed."""
    last = evaluations[-1]
    numbers: dict[str, Any] = {"step": last.step, "seeds": len(last.test_accuracy)}
    for name in ("train_loss", "train_accuracy", "test_accuracy"):
        values = getattr(last, name)
        numbers[name] = float(values.mean())
        numbers[f"{name}_standard_error"] = float(figures.standard_error(values))
    numbers["seconds_per_1000_steps"] = _seconds_per_1000_steps(evaluations)
    return numbers


def _seconds_per_1000_steps(evaluations: list[Evaluation]) -> float | None:
    """Median over the stretches between evaluations but the first, which compiles.

    None where there is no second stretch.
    """
    rates = [
        1000 * after.seconds / (after.step - before.step)
        for before, after in itertools.pairwise(evaluations[1:])
    ]
    return statistics.median(rates) if rates else None


def _report(results: dict[Any, list[Evaluation]], folder: pathlib.Path, title: str) -> None:
    print(table({ALGORITHMS[name].label: summary(run) for name, run in results.items()}))
    curves = [
        figures.Curve(
            ALGORITHMS[name].label,
            np.array([evaluation.step for evaluation in run]),
            np.stack([evaluation.test_accuracy for evaluation in run]),
        )
        for name, run in results.items()
    ]
    figures.plot_curves(curves, folder / "curves.png", title)
    print(f"\n{title}.\n{folder / 'curves.png'}: test accuracy against iteration.")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The summaries as a table, one line an algorithm; accuracies in percent."""
    header = (
        f"{'algorithm':<18}{'train accuracy %':>18}{'test accuracy %':>18}{'s / 1000 steps':>16}"
    )
    lines = [header, "-" * len(header)]
    for label, numbers in summaries.items():
        cells = [f"{label:<18}"]
        for name in ("train_accuracy", "test_accuracy"):
            mean, error = numbers[name], numbers[f"{name}_standard_error"]
            cells.append(f"{100 * mean:.2f} ± {100 * error:.2f}".rjust(18))
        seconds = numbers["seconds_per_1000_steps"]
        cells.append(("-" if seconds is None else f"{seconds:.2f}").rjust(16))
        lines.append("".join(cells))
    return "\n".join(lines)


def _title(config: TrainConfig, dataset: data.Dataset) -> str:
    train_size, test_size = len(dataset.train.label), len(dataset.test.label)
    plural = "seed" if config.seeds == 1 else "seeds"
    return (
        f"{dataset.name}: {train_size:,} training and {test_size:,} test images, "
        f"{config.model_name}, learning rate {config.learning_rate:g}, "
        f"b = {config.noise.batch_size}, {config.seeds} {plural} (band: one standard error)"
    )
