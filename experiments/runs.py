"""The folder of a run: what was asked for, what happened, and how it ended. Never overwritten."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax

import msgd_jax


def default_folder(name: str) -> pathlib.Path:
    """runs/NAME-DATE-TIME."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs") / f"{name}-{now}"


class RunFolder:
    """A new folder with config.json, metrics.jsonl and, at the end, summary.json."""

    def __init__(self, path: pathlib.Path, config: Any, **details: Any):
        """Makes the folder and writes config.json.

        Args:
            path: the folder; parents are made.
            config: a dataclass.
            **details: what else belongs to the record, as JSON values.

        Raises:
            FileExistsError: if the folder exists, whatever is in it.
        """
        create(path)
        self.path = path
        record = {
            **dataclasses.asdict(config),
            **details,
            "versions": {
                "msgd_jax": msgd_jax.__version__,
                **{name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")},
                "python": platform.python_version(),
            },
            "device": str(jax.devices()[0].device_kind),
        }
        self._write("config.json", record)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(as_line(record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._write("summary.json", summary)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(record, indent=2, default=str) + "\n")


def as_line(record: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record) + "\n"


def create(path: pathlib.Path) -> None:
    """Makes a new folder; raises FileExistsError, naming it, if there is one."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{path} exists already, and results are never overwritten: choose another --out."
        ) from None
