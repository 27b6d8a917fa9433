"""The records of a setting: a file of JSON lines, one per chunk of a contestant's seeds.

Lines are added and never changed. If a run was killed while it wrote, the last line is cut short;
it is ignored, and its seeds are run again.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.decide._runs import Options, Outcome
from experiments.decide.settings import Setting, summary

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


class Run(NamedTuple):
    """The identity of a run: equal ones give equal results up to rounding."""

    contestant: str
    factor: float
    seed: int


class Curve(NamedTuple):
    """The evaluations of one run, [evaluations] each; accuracies are fractions.

    Attributes:
        steps: the numbers of steps after which it was evaluated; the last one is the endpoint.
        train_loss: the mean loss over its training images, with the labels that it was given.
        train_accuracy: the accuracy on its training images, with the same labels.
        test_loss: the mean loss over the test images, with their true labels.
        test_accuracy: the accuracy on the test images.
    """

    steps: np.ndarray
    train_loss: np.ndarray
    train_accuracy: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray


def path_of(folder: pathlib.Path, setting: Setting) -> pathlib.Path:
    """The file of a setting's records."""
    return folder / f"{setting.name}.jsonl"


def add(
    path: pathlib.Path,
    setting: Setting,
    *,
    checksum: str,
    contestant: str,
    seeds: Sequence[int],
    factors: Sequence[float],
    num_test: int,
    outcome: Outcome,
    options: Options,
) -> None:
    """Adds the results of a chunk of runs (seeds, and factors of the learning rate) as one line."""
    device = jax.devices()[0]
    scores = outcome.scores
    line = {
        "setting": setting.name,
        "fingerprint": setting.fingerprint,
        "declared": summary(setting),
        "data": checksum,
        "contestant": contestant,
        "seeds": list(seeds),
        "factors": list(factors),
        "num_test": num_test,
        "steps": outcome.steps,
        "train_loss": _rounded(scores.train_loss),
        "train_correct": np.asarray(scores.train_correct).tolist(),
        "test_loss": _rounded(scores.test_loss),
        "test_correct": np.asarray(scores.test_correct).tolist(),
        "seconds": round(outcome.seconds, 3),
        "compile_seconds": round(outcome.compile_seconds, 3),
        "device": f"{device.platform}: {device.device_kind}",
        "precision": f"float32, products at {_precision()}"
        + (" (TF32 where the card has it)" if device.platform == "gpu" else ""),
        "options": dataclasses.asdict(options),
        "versions": _versions(),
    }
    text = json.dumps(line, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # If the last line was cut short, begin a new one.
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: pathlib.Path, setting: Setting) -> list[dict[str, Any]]:
    """Reads the records of a setting; an empty list if there is no file.

    Raises:
        ValueError: if the file holds records of another setting, or of different images.
    """
    if not path.exists():
        return []
    found = list(_parsed(path))
    for line in found:
        if line["fingerprint"] != setting.fingerprint:
            raise ValueError(
                f"{path} holds records of another setting ({line['setting']}, fingerprint "
                f"{line['fingerprint']}, not {setting.fingerprint}): choose another folder."
            )
    if len({line["data"] for line in found}) > 1:
        raise ValueError(f"{path} holds records of different images.")
    return found


def check_data(found: list[dict[str, Any]], path: pathlib.Path, checksum: str) -> None:
    """Raises ValueError if records were made with other images than those with this checksum."""
    if found and found[0]["data"] != checksum:
        raise ValueError(
            f"{path} holds records of other images (checksum {found[0]['data']}, not {checksum}): "
            "choose another folder, or the same data set."
        )


def _parsed(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(path.read_text().split("\n"), start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # The line was cut short: its seeds count as not run.
        if not isinstance(line, dict) or "fingerprint" not in line:
            raise ValueError(f"{path}, line {number}, is no record of this study.")
        yield line


def curves(found: list[dict[str, Any]]) -> dict[Run, Curve]:
    """The runs of these records; of a run that was made twice, the first."""
    runs: dict[Run, Curve] = {}
    for line in found:
        numbers = {
            name: np.asarray(line[name], float)
            for name in ("train_loss", "train_correct", "test_loss", "test_correct")
        }
        pairs = zip(line["seeds"], line["factors"], strict=True)
        for column, (seed, factor) in enumerate(pairs):
            curve = Curve(
                np.asarray(line["steps"]),
                numbers["train_loss"][:, column],
                numbers["train_correct"][:, column] / line["declared"]["num_train"],
                numbers["test_loss"][:, column],
                numbers["test_correct"][:, column] / line["num_test"],
            )
            runs.setdefault(Run(line["contestant"], factor, seed), curve)
    return runs


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    """The values to six significant digits; None if a run has diverged."""
    return [
        [float(f"{value:.6g}") if math.isfinite(value) else None for value in row]
        for row in np.asarray(values, float).tolist()
    ]


def _precision() -> str:
    return getattr(jax.config, "jax_default_matmul_precision", None) or "default precision"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
