"""The folder of a run: its configuration, its metrics and its results, none of which is ever lost.

    config.json        the configuration, with versions and the source of the images
    train_images.json  the images of the original split that were drawn for training
    metrics.jsonl      one line per evaluation
    checkpoints/       the last states, by orbax
    tensorboard/       the metrics as scalars
    summary.json       the final results; or failure.json, if the run diverged

A folder belongs to one configuration. An unfinished run is continued from its last checkpoint; the
folder of a finished run is never written to again. All functions that read records check them: for
a file that is cut short, or not ours, they raise a `records.DamagedRecordError` that names it.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock
import jax

import msgd_jax
from experiments import records
from experiments.records import brief

DRAWS = 2
"""Increased when a change makes the same key and step draw something else, from streams or data
sets. Runs with different numbers are not continued in each other's folders or compared by seed."""

# Options that do not affect results, so they may change when a run is continued.
_FREE = ("out", "data_dir", "checkpoint_every", "collect")
_FILES = {"config.json", "metrics.jsonl", "summary.json", "failure.json", ".lock"}
_NOT_RUNS = {"checkpoints", "tensorboard"}


def default_folder(name: str) -> pathlib.Path:
    """The folder runs/NAME-DATE-TIME."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs") / f"{name}-{now}"


def create(path: pathlib.Path) -> None:
    """Makes a new folder; raises a FileExistsError that names it if it exists."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise _exists(path) from None


def check_writable(path: pathlib.Path | None, name: str = "out") -> None:
    """Raises ValueError unless a folder exists or can be made, and files can be made in it.

    The check leaves nothing behind. It is made before anything is loaded or trained.
    """
    if path is None:
        return
    above = path
    try:
        while not above.exists() and not above.is_symlink() and above != above.parent:
            above = above.parent
        if not above.is_dir():
            what = "no folder" if above == path else f"below {brief(above)}, which is no folder"
            raise ValueError(f"{name} must be a folder, got {brief(path)}, {what}.")
        with tempfile.TemporaryDirectory(dir=above, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {brief(path)}: {error.strerror}."
        ) from None


def settings(config: Any) -> dict[str, Any]:
    """The settings that determine the results of a run, as JSON values.

    A file is represented by its checksum, not by its path. Fields marked `config.LATER` are left
    out at their defaults.
    """
    later = {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("later")}
    record = dataclasses.asdict(config).items()
    record = {k: v for k, v in record if k not in _FREE and not (k in later and v == later[k])}
    return _by_contents(json.loads(json.dumps(record, default=str)))


def _by_contents(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"dataset": "a file"} if record.get("dataset_sha256") else record


class RunFolder:
    """The folder of one run, new or continued, which is locked while this process has it open.

    Attributes:
        path: the folder.
        is_new: whether this object made it.
    """

    def __init__(self, path: pathlib.Path, config: Any, command: str = "train", **details: Any):
        """Makes the folder and writes config.json, or opens that of the same unfinished run.

        Args:
            path: the folder; parents are made.
            config: the configuration, a dataclass.
            command: the command that makes the run; runs of other commands cannot be continued.
            **details: further entries of the record, as JSON values.

        Raises:
            FileExistsError: if the folder exists and belongs to another run, the run has finished,
                or another process has it open.
            records.DamagedRecordError: if a record in the folder cannot be read.
            ValueError: if the folder cannot be made or written to.
        """
        self.path = path
        self.is_new = not path.exists()
        if not self.is_new and finished(path, config, command):
            raise _exists(path)
        check_writable(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise FileExistsError(f"{brief(path)} is being written by another process.") from None
        if self.is_new or not (path / "config.json").exists():
            records.replace_text(
                path / "config.json", records.as_text(_asked(config, command) | details)
            )
        elif records.read_object(path / "config.json").get("versions") != versions():
            warnings.warn(
                f"{path} was begun with other versions: what follows may differ in the last bits.",
                stacklevel=2,
            )

    def close(self) -> None:
        """Lets other processes open the folder."""
        self._lock.release()

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl, which is on the disk when this returns."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(records.as_line(record))
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return records.read_lines(self.path / "metrics.jsonl")

    def cut_metrics(self, last_step: int) -> list[dict[str, Any]]:
        """Drops the lines after a step, and lines cut short; returns the others."""
        kept = [record for record in self.metrics() if record["step"] <= last_step]
        records.replace_text(self.path / "metrics.jsonl", "".join(map(records.as_line, kept)))
        return kept

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        records.replace_text(self.path / "summary.json", records.as_text(summary))

    def fail(self, failure: dict[str, Any]) -> None:
        """Writes failure.json."""
        records.replace_text(self.path / "failure.json", records.as_text(failure))


def finished(path: pathlib.Path, config: Any, command: str = "train") -> bool:
    """Whether the folder holds this run and it has finished; False if it can be run there.

    Raises:
        FileExistsError: if the folder holds something else, or a run that diverged.
        records.DamagedRecordError: if a record in the folder cannot be read.
    """
    if not path.is_dir() or not any(file.name != ".lock" for file in path.iterdir()):
        return False  # The folder is new, or its run was killed before anything was written.
    if not (path / "config.json").exists():
        raise _exists(path)
    record = records.read_object(path / "config.json")
    found = record.get("command", command)
    if found != command:
        raise FileExistsError(
            f"{brief(path)} holds a run of `{found}`, not of `{command}`, and results are never "
            "overwritten: choose another --out."
        )
    wanted = settings(config)
    held = _by_contents(record)
    differing = [name for name, value in wanted.items() if held.get(name) != value]
    if differing:
        names = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise FileExistsError(
            f"{brief(path)} holds a run that differs in {names}, and results are never "
            "overwritten: choose another --out."
        )
    if (path / "failure.json").exists():
        step = records.read_object(path / "failure.json").get("step")
        raise FileExistsError(
            f"{brief(path)} holds a run that diverged after {step} steps, and would again: choose "
            "a smaller learning_rate and another --out."
        )
    if (path / "summary.json").exists():
        return True
    if draws(path) != DRAWS:
        raise FileExistsError(
            f"{brief(path)} holds a run that was begun when a seed drew something else, so it "
            "cannot go on: choose another --out."
        )
    return False


def run_parts(
    name: str,
    config: Any,
    steps: Mapping[str, Callable[[pathlib.Path], Any]],
    tables: Mapping[str, Callable[[Any], str]],
) -> pathlib.Path:
    """Runs ``config.parts`` in order, and prints each when it is done; no part is run twice.

    Args:
        name: the name of the experiment, for the folder if the configuration names none.
        config: a configuration with `parts` and `out`.
        steps: by part, a function from the folder to the results, as JSON values.
        tables: by part, if it has a table, a function from the results to its text.
    """
    path = config.out or default_folder(name)
    results = {}

    def show(part: str) -> None:
        if part in tables:
            print(f"\n{tables[part](results[part])}", flush=True)

    if finished_parts(name, config):
        results = records.read_object(path / "summary.json")
        missing = [part for part in config.parts if part not in results]
        if missing:
            raise records.DamagedRecordError(
                f"{path}/summary.json has no results of {', '.join(missing)}"
            )
        for part in config.parts:
            show(part)
        print(f"\n{path} has finished before: this is its result.")
        return path
    folder = RunFolder(path, config, name)
    partial = path / "parts.json"
    try:
        results = records.read_object(partial) if partial.exists() else {}
        for part in config.parts:
            if part not in results:
                results[part] = steps[part](path)
                records.replace_text(partial, records.as_text(results))
            show(part)
        folder.finish(results)
        partial.unlink()
    finally:
        folder.close()
    print(f"\nThe pictures and summary.json are in {path}.")
    return path


def draws(path: pathlib.Path) -> int:
    """The value of `DRAWS` when the run in a folder was begun."""
    return records.read_object(path / "config.json").get("draws", 1)


def finished_parts(name: str, config: Any) -> bool:
    """Whether `run_parts` will only show finished results; raises if it can do neither."""
    check_writable(config.out)
    return config.out is not None and finished(config.out, config, name)


def find(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders below a folder that hold a run or the remains of one, in alphabetical order."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_RUNS]
        # A folder with the name of a record is found too, and reported as damaged.
        if _FILES & {*files, *below}:
            found.append(pathlib.Path(folder))
    return iter(sorted(found))


def state(path: pathlib.Path) -> str:
    """The state of a run: finished, diverged, running, or stopped. Nothing is written."""
    if (path / "summary.json").exists():
        return "finished"
    if (path / "failure.json").exists():
        step = records.read_object(path / "failure.json").get("step")
        if not isinstance(step, int):
            raise records.DamagedRecordError(f"{path / 'failure.json'} has no step")
        return f"diverged at {step:,}"
    if not (path / ".lock").exists():
        return "stopped"
    try:
        with filelock.FileLock(path / ".lock").acquire(timeout=0):
            return "stopped"
    except filelock.Timeout:
        return "running"
    except OSError:  # We may not lock it.
        return "unfinished"


def versions() -> dict[str, str]:
    """The versions of the packages that the last bits of a run depend on."""
    return {
        "msgd_jax": msgd_jax.__version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")},
        "python": platform.python_version(),
    }


def _asked(config: Any, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "draws": DRAWS,
        **json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "versions": versions(),
        "device": str(jax.devices()[0].device_kind),
    }


def _exists(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(
        f"{brief(path)} exists already, and results are never overwritten: choose another --out."
    )
