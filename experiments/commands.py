"""What the command line's commands do."""

import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import complexity, data, distributed, execution, figures, reporting, runs, sde
from experiments.config import DemoConfig, FigureConfig, ListConfig, ReportConfig, TrainConfig
from experiments.theory_config import ComplexityConfig, SDEConfig
from experiments.training import Evaluation

Config = (
    ComplexityConfig
    | DemoConfig
    | distributed.DistributedConfig
    | FigureConfig
    | ListConfig
    | ReportConfig
    | SDEConfig
    | TrainConfig
)


def run(config: Config) -> pathlib.Path | None:
    """Runs a command; returns the folder with its results, if it has any."""
    match config:
        case DemoConfig():
            return demo(config)
        case FigureConfig():
            return reporting.figure(config)
        case ListConfig():
            return reporting.list_runs(config)
        case ReportConfig():
            return reporting.report(config)
        case SDEConfig():
            return sde.run(config)
        case ComplexityConfig():
            return complexity.run(config)
        case TrainConfig():
            return train(config)
        case distributed.DistributedConfig():
            return distributed.run(config)


def train(config: TrainConfig) -> pathlib.Path:
    """Trains one algorithm, or goes on; writes its folder and curves.png, and prints a table."""
    dataset = execution.load(config)
    folder = config.out or runs.default_folder(f"{config.dataset}-{config.algorithm}")
    with tqdm(total=config.total_steps, unit="step", dynamic_ncols=True) as progress:
        progress.set_description(config.label)
        evaluations = execution.run(config, dataset, folder, progress)
    _report({config: evaluations}, folder, _title(config, dataset))
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
            progress.set_description(plan.label)
            results[plan] = execution.run(plan, dataset, folder / algorithm, progress)
    _report(results, folder, _title(next(iter(results)), dataset))
    return folder


def _report(results: dict[TrainConfig, list[Evaluation]], folder: pathlib.Path, title: str) -> None:
    print(table({plan.label: execution.summary(run) for plan, run in results.items()}))
    curves = [
        figures.Curve(
            plan.label,
            np.array([evaluation.step for evaluation in run]),
            np.stack([evaluation.test_accuracy for evaluation in run]),
        )
        for plan, run in results.items()
    ]
    figures.plot_curves(curves, folder / "curves.png", title)
    print(f"\n{title}.\n{folder / 'curves.png'}: test accuracy against iteration.")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The summaries as a table, one line an algorithm; accuracies in percent."""
    header = (
        f"{'algorithm':<26}{'train accuracy %':>18}{'test accuracy %':>18}{'s / 1000 steps':>16}"
    )
    lines = [header, "-" * len(header)]
    for label, numbers in summaries.items():
        cells = [f"{label:<26}"]
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
