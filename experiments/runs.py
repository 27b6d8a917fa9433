"""The folder of a run: what was asked for, what happened, how it ended. Nothing in it is lost.

    config.json        what was asked for, with versions and the source of the images
    train_images.json  which images of their original split were drawn for training
    metrics.jsonl      one line an evaluation
    checkpoints/       the last states, by orbax
    tensorboard/       the metrics as scalars
    summary.json       how it ended; or failure.json, where it diverged

A folder belongs to one configuration. Unfinished, it goes on from its last checkpoint; finished, it
is never written to again.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock
import jax

import msgd_jax

# Not part of what a run computes, so free to change when it goes on.
_FREE = ("out", "data_dir", "checkpoint_every")


def default_folder(name: str) -> pathlib.Path:
    """runs/NAME-DATE-TIME."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs") / f"{name}-{now}"


def create(path: pathlib.Path) -> None:
    """Makes a new folder; raises FileExistsError, naming it, if there is one."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise _exists(path) from None


def as_line(record: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record) + "\n"


def settings(config: Any) -> dict[str, Any]:
    """What decides the results of a run, as JSON values."""
    record = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    return json.loads(json.dumps(record, default=str))


class RunFolder:
    """The folder of one run, new or going on, locked while this process has it open.

    Attributes:
        path: the folder.
        is_new: whether it was made now.
    """

    def __init__(self, path: pathlib.Path, config: Any, **details: Any):
        """Makes the folder and writes config.json, or opens that of the same unfinished run.

        Args:
            path: the folder; parents are made.
            config: a dataclass.
            **details: what else belongs to the record, as JSON values.

        Raises:
            FileExistsError: if the folder exists and is not of the same run, or that has finished,
                or another process is at it.
        """
        self.path = path
        self.is_new = not path.exists()
        if not self.is_new:
            self._check_goes_on(config)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise FileExistsError(f"{path} is being written by another process.") from None
        if self.is_new or not (path / "config.json").exists():
            replace_text(path / "config.json", _pretty(_asked(config) | details))

    def _check_goes_on(self, config: Any) -> None:
        if not any(file.name != ".lock" for file in self.path.iterdir()):
            return  # killed before anything was written
        record = read_json(self.path / "config.json")
        if record is None or (self.path / "summary.json").exists():
            raise _exists(self.path)
        failure = read_json(self.path / "failure.json")
        if failure is not None:
            raise FileExistsError(
                f"{self.path} holds a run that diverged after {failure['step']} steps, and would "
                "again: choose a smaller learning_rate and another --out."
            )
        wanted = settings(config)
        differing = [name for name, value in wanted.items() if record.get(name) != value]
        if differing:
            raise FileExistsError(
                f"{self.path} holds a run that differs in {', '.join(differing)}, and results are "
                "never overwritten: choose another --out."
            )
        if record["versions"] != versions():
            warnings.warn(
                f"{self.path} was begun with other versions: what follows may differ in the last "
                "bits.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Lets other processes open the folder."""
        self._lock.release()

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl, on the disk when this returns."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(as_line(record))
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def cut_metrics(self, last_step: int) -> list[dict[str, Any]]:
        """Drops the lines after a step, half-written ones too; returns the others."""
        kept = [record for record in self.metrics() if record["step"] <= last_step]
        replace_text(self.path / "metrics.jsonl", "".join(map(as_line, kept)))
        return kept

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        replace_text(self.path / "summary.json", _pretty(summary))

    def fail(self, failure: dict[str, Any]) -> None:
        """Writes failure.json."""
        replace_text(self.path / "failure.json", _pretty(failure))


def run_parts(
    name: str, config: Any, steps: Mapping[str, Callable[[pathlib.Path], Any]]
) -> pathlib.Path:
    """Runs ``config.parts`` in order; the results so far are in the folder after each of them.

    Args:
        name: of the experiment, for the folder if the configuration names none.
        config: a configuration with `parts` and `out`.
        steps: for each part, what runs it: given the folder, it returns the results.
    """
    folder = RunFolder(config.out or default_folder(name), config)
    results = {}
    for part in config.parts:
        results[part] = steps[part](folder.path)
        folder.finish(results)
    print(f"\nThe pictures and summary.json are in {folder.path}.")
    return folder.path


def find(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders of runs below a folder, in alphabetical order."""
    for file in sorted(root.rglob("config.json")):
        if "checkpoints" not in file.parts:
            yield file.parent


def state(path: pathlib.Path) -> str:
    """How a run stands: finished, diverged, running, or stopped."""
    if (path / "summary.json").exists():
        return "finished"
    failure = read_json(path / "failure.json")
    if failure is not None:
        return f"diverged at {failure['step']:,}"
    lock = filelock.FileLock(path / ".lock")
    try:
        with lock.acquire(timeout=0):
            return "stopped"
    except filelock.Timeout:
        return "running"


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON value a line; a last line cut short does not count."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file so that at any moment it is the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Of what a run's last bits depend on."""
    return {
        "msgd_jax": msgd_jax.__version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")},
        "python": platform.python_version(),
    }


def _asked(config: Any) -> dict[str, Any]:
    return {
        **json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "versions": versions(),
        "device": str(jax.devices()[0].device_kind),
    }


def _pretty(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, default=str) + "\n"


def _exists(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already, and results are never overwritten: choose another --out."
    )
