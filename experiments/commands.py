"""The commands of the command line."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments import figures, noise_study, tables, terminal, theory_study
from experiments.decide import DecideConfig, DemoConfig, demo_records, run_demo
from experiments.decide import command as decide
from experiments.paper import FigureConfig, ListConfig, ReportConfig, accuracies, report
from experiments.studies import StudyConfig
from experiments.theory import ComplexityConfig, SDEConfig, complexity, sde
from experiments.training import (
    DistributedConfig,
    Evaluation,
    TrainConfig,
    check_distributed,
    loop,
    over_all_devices,
    runs,
)

Config = (
    ComplexityConfig
    | DecideConfig
    | DemoConfig
    | DistributedConfig
    | FigureConfig
    | ListConfig
    | ReportConfig
    | SDEConfig
    | StudyConfig
    | TrainConfig
)
CONFIGS: dict[str, Any] = {
    "demo": DemoConfig,
    "train": TrainConfig,
    "distributed": DistributedConfig,
    "sde": SDEConfig,
    "complexity": ComplexityConfig,
    "decide": DecideConfig,
    "theory-study": {name: options for name, (options, _) in theory_study.STUDIES.items()},
    "noise-study": {name: options for name, (options, _) in noise_study.STUDIES.items()},
    "figure": FigureConfig,
    "list": ListConfig,
    "report": ReportConfig,
}
"""The options of the commands by name; a command with a further choice has a dictionary of them."""


def version() -> str:
    """The versions of the library and of the packages that results depend on."""
    return " ".join(f"{name} {number}" for name, number in runs.versions().items())


def run(config: Config) -> pathlib.Path | None:
    """Runs a command; returns the folder with its results, if it has any."""
    match config:
        case DemoConfig():
            return demo(config)
        case FigureConfig():
            return report.figure(config)
        case ListConfig():
            return report.list_runs(config)
        case ReportConfig():
            return report.report(config)
        case SDEConfig():
            return sde.run(config)
        case ComplexityConfig():
            return complexity.run(config)
        case StudyConfig():
            return study(config)
        case TrainConfig():
            return train(config)
        case DecideConfig():
            runs.check_writable(config.out)
            return decide.run(config)
        case DistributedConfig():
            return distributed(config)


def study(config: StudyConfig) -> pathlib.Path:
    """Runs the study that the options belong to; returns its folder."""
    every = [*theory_study.STUDIES.values(), *noise_study.STUDIES.values()]
    (found,) = (one for options, one in every if type(config) is options)
    return found.run(config)


def train(config: TrainConfig) -> pathlib.Path:
    """Trains one algorithm; writes its folder and curves.png, and prints a table.

    A run that was stopped is continued. For a run that has finished, the table is printed again.
    """
    config = config.resolved()
    folder = config.out or runs.default_folder(f"{config.dataset_name}-{config.algorithm}")
    loop.check(config)
    runs.check_writable(folder)
    if runs.finished(folder, config):
        _report(config, accuracies.of_finished(folder), folder)
        print(f"{folder} has finished before: this is its result.")
        return folder
    dataset = loop.load(config)
    with (
        _stopped_in(folder, named=config.out is not None),
        terminal.Progress(config.total_steps) as progress,
    ):
        evaluations = loop.run(config, dataset, folder, progress)
    _report(config, evaluations, folder)
    return folder


def demo(config: DemoConfig) -> pathlib.Path:
    """Runs the reduced study on the digits; writes its records and demo.png, prints a table.

    A demo that was stopped is continued. For one that has finished, the table is printed again.
    """
    folder = config.out or runs.default_folder("demo")
    runs.check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not demo_records(folder).exists():
        runs.create(folder)  # This raises, since the folder is something else.
    try:
        run_demo(config, folder)
    except KeyboardInterrupt:
        if demo_records(folder).exists():
            print(f"\nthe same command goes on, with --out {folder}", file=sys.stderr)
        raise
    return folder


def distributed(config: DistributedConfig) -> pathlib.Path:
    """Trains as `train` does, over the devices of all processes, each of which calls this.

    Raises:
        ValueError: if the plan cannot run on several devices.
        FileExistsError: if the folder belongs to another run.
        training.DivergedError: at the first loss that is not finite.
    """
    plan = config.plan.resolved()
    folder = check_distributed(plan)
    loop.check(plan)
    # Every process checks the folder before any of them waits for the others.
    if runs.finished(folder, plan, "distributed"):
        _report(plan, accuracies.of_finished(folder), folder)
        print(f"{folder} has finished before: this is its result.")
        return folder
    runs.check_writable(folder)
    config.processes.start()
    dataset = loop.load(plan)
    writes = jax.process_index() == 0
    with terminal.Progress(plan.total_steps) if writes else terminal.Silent() as progress:
        evaluations = loop.run(plan, dataset, folder, progress, over=over_all_devices())
    if writes:
        _report(plan, evaluations, folder)
    return folder


@contextlib.contextmanager
def _stopped_in(folder: pathlib.Path, named: bool) -> Iterator[None]:
    """Adds --out to the message of a stopped run if the command did not name the folder."""
    try:
        yield
    except loop.Stopped as stopped:
        if named:
            raise
        more = f"{stopped.args[0]}, with --out {folder}"
        raise loop.Stopped(more, stopped.number) from None


def _report(plan: TrainConfig, evaluations: list[Evaluation], folder: pathlib.Path) -> None:
    """Prints the table, and draws the picture if it is not there."""
    title = _title(plan)
    print(table({plan.label: loop.summary(evaluations)}))
    curve = figures.Curve(
        plan.label,
        np.array([evaluation.step for evaluation in evaluations]),
        np.stack([evaluation.test_accuracy for evaluation in evaluations]),
    )
    if not (folder / "curves.png").exists():
        figures.plot_curves([curve], folder / "curves.png", title)
    print(f"\n{title}.\n{folder / 'curves.png'}: test accuracy against iteration.")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The summaries as a table with one line per algorithm; accuracies are in percent."""
    header = ["algorithm", "train accuracy %", "test accuracy %", "s / 1000 steps"]
    lines = []
    for label, numbers in summaries.items():
        cells = [label]
        for name in ("train_accuracy", "test_accuracy"):
            mean, error = numbers[name], numbers[f"{name}_standard_error"]
            cells.append(f"{100 * mean:.2f} ± {100 * error:.2f}")
        seconds = numbers["seconds_per_1000_steps"]
        lines.append([*cells, "-" if seconds is None else f"{seconds:.2f}"])
    return tables.text_table(header, lines)


def _title(config: TrainConfig) -> str:
    train_size, test_size = loop.sizes(config)
    plural = "seed" if config.seeds == 1 else "seeds"
    return (
        f"{config.dataset_name}: {train_size:,} training and {test_size:,} test images, "
        f"{config.model_name}, learning rate {config.learning_rate:g}, "
        f"b = {config.noise.batch_size}, {config.seeds} {plural} (band: one standard error)"
    )
