"""The list of the runs in a folder: their state and numbers, or what is wrong with them."""

import dataclasses
import pathlib
from typing import Any

from experiments import records, tables
from experiments.paper import accuracies
from experiments.training import runs
from experiments.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One folder.

    Attributes:
        path: the folder.
        command: the command that made it: train, distributed, sde, complexity, or a study's with
            its name; "" if unknown.
        state: the state from `runs.state`, or "damaged", "foreign" or "empty".
        problem: a text that says what is wrong with it; "" if nothing is.
        plan: the configuration, for `train` and `distributed`.
        label: the algorithm, or the parts that are measured.
        step: the number of iterations made, for `train` and `distributed`.
        accuracy: the test accuracy, averaged over seeds; None if it is not known yet.
        seconds: the seconds per 1,000 steps; None if they are not known yet.
        draws: see `runs.DRAWS`.
    """

    path: pathlib.Path
    command: str
    state: str
    problem: str = ""
    plan: TrainConfig | None = None
    label: str = ""
    step: int = 0
    accuracy: float | None = None
    seconds: float | None = None
    draws: int = 1


def read(root: pathlib.Path) -> list[Entry]:
    """All folders below `root` that hold a run, the remains of one, or another program's record."""
    return [_entry(path) for path in runs.find(root)]


def _entry(path: pathlib.Path) -> Entry:
    try:
        return _whole(path)
    except records.DamagedRecordError as error:
        # The list shows the path of the folder already.
        return Entry(path, "", "damaged", str(error).replace(f"{path}/", ""))


def _whole(path: pathlib.Path) -> Entry:
    state = runs.state(path)
    asked = records.read_json(path / "config.json")
    if asked is None:
        files = [file.name for file in path.iterdir() if file.name != ".lock"]
        if not files:
            return Entry(path, "", "empty" if state == "stopped" else state, "nothing written yet")
        return Entry(path, "", "damaged", "config.json is missing")
    command = _command(asked)
    if command is None:
        return Entry(path, "", "foreign", "config.json is not of a run of this package")
    draws = asked.get("draws", 1)
    if command not in ("train", "distributed"):
        parts = asked.get("parts", [])
        label = f"{command}: {' '.join(map(str, parts))}" if parts else command
        if state == "finished":
            records.read_object(path / "summary.json")
        return Entry(path, command, state, label=label, draws=draws)
    plan = _plan(path, asked)
    ended = records.read_object(path / "summary.json") if state == "finished" else None
    entry = Entry(path, command, state, plan=plan, label=plan.algorithm, draws=draws)
    return dataclasses.replace(entry, **_trained(path, ended))


# What the commands that train no single algorithm, and have no curves, begin with.
_MEASUREMENTS = ("sde", "complexity", "noise-study-", "theory-study-")


def _command(asked: Any) -> str | None:
    """The command that a configuration belongs to; None if it is none of ours."""
    if not isinstance(asked, dict):
        return None
    if "algorithm" in asked and "noise" in asked:
        command = asked.get("command", "train")  # Older records, all of `train`, have no command.
        return command if command in ("train", "distributed") else None
    if not isinstance(asked.get("parts", []), list):
        return None
    # Older records have no command, and are known by an option.
    known = {"strong_paths": "sde", "regularizer_steps": "complexity"}
    older = next((command for name, command in known.items() if name in asked), "")
    command = str(asked.get("command", older))
    return command if command.startswith(_MEASUREMENTS) else None


def _plan(path: pathlib.Path, asked: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.of_record(asked)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise records.DamagedRecordError(
            f"{path / 'config.json'} is of no run that can be made here: {str(error)[:160]}"
        ) from None


def _trained(path: pathlib.Path, ended: dict[str, Any] | None) -> dict[str, Any]:
    evaluations = accuracies.of_finished(path) if ended is not None else accuracies.of_folder(path)
    if not evaluations:
        return {}
    return {
        "step": evaluations[-1].step,
        "accuracy": float(evaluations[-1].test_accuracy.mean()),
        "seconds": _number(path, ended, "seconds_per_1000_steps"),
    }


def _number(path: pathlib.Path, ended: dict[str, Any] | None, name: str) -> float | None:
    value = (ended or {}).get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise records.DamagedRecordError(f"{path / 'summary.json'} has no number for {name}")
    return value


def table(entries: list[Entry], root: pathlib.Path) -> str:
    """A table with one line per folder; for a damaged folder it shows the problem, not numbers."""
    lines = []
    for entry in entries:
        label = entry.label + (" (distributed)" if entry.command == "distributed" else "")
        start = [str(entry.path.relative_to(root)), label, entry.state]
        if entry.plan is None:
            lines.append([*start, entry.problem])
            continue
        accuracy = "" if entry.accuracy is None else f"{100 * entry.accuracy:.2f}"
        seconds = "" if entry.seconds is None else f"{entry.seconds:.1f}"
        step = f"{entry.step:,}/{entry.plan.total_steps:,}"
        lines.append([*start, step, accuracy, seconds])
    header = ["run", "what", "state", "step", "test %", "s/1000"]
    return tables.text_table(header, lines, left=3)
