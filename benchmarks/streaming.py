"""Examples that are read when they are needed: memory as N grows, and the time of reading.

``python -m benchmarks.streaming``. For memory, one fresh process per N (`--measure N`) trains LeNet
on images that are computed from their numbers, so that N may be any number, and reports its peak
above the memory before the first step. For time, steps on a memory-mapped file of 60,000 images and
steps on the same images on the device take turns.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro
from tqdm import tqdm

from benchmarks import machine, memory, problems, report, timing
from experiments import models
from msgd_jax import noise, streaming, train

MIB = 2**20
WARM_UP = 20  # Steps before memory counts, for compilation and grain's threads.


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures memory and time of training on examples that are read as they are needed.

    Attributes:
        examples: The numbers N of examples at which memory is measured.
        steps: The number of steps of one measurement of memory.
        stored: The number N of examples in the file with which time is measured.
        timed_steps: The number of steps of one measurement of time: a loop starts in about ten
            milliseconds, which counts.
        measure: The one N whose memory is measured in this process and printed, which is how the
            benchmark calls itself.
    """

    repeats: int = 3
    examples: tuple[int, ...] = (10**3, 10**6, 10**9)
    steps: int = 100
    stored: int = 60_000
    timed_steps: int = 1_000
    measure: int | None = None


class Computed:
    """Images that are not stored: each one is computed from its number."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        shape = models.LeNet.image_shape
        pixels = (index + np.arange(int(np.prod(shape)))) % 251
        return pixels.reshape(shape).astype(np.uint8), np.int32(index % 10)


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.measure is not None:
        print(json.dumps(measure(config.measure, config.steps)))
        return []
    if config.quick:
        config = dataclasses.replace(
            config, repeats=1, examples=(1_000, 10**6), steps=2, stored=200, timed_steps=2
        )
    peaks: dict[int, list[float]] = {n: [] for n in config.examples}
    for n in tqdm(config.repeats * config.examples, desc="memory", unit="process", leave=False):
        peaks[n].append(_in_fresh_process(n, config.steps))
    seconds = _seconds(config)
    ratio = timing.ratio(seconds, "streamed", "on the device")
    medians = {n: float(np.median(values)) for n, values in peaks.items()}
    growth = max(medians.values()) / min(medians.values())
    rows = [
        {
            "N": f"{n:,}",
            "peak above start, MiB": f"{medians[n] / MIB:.1f}",
            "range, MiB": f"{min(values) / MIB:.1f} to {max(values) / MIB:.1f}",
        }
        for n, values in peaks.items()
    ]
    headlines = [
        report.Headline(
            "streaming",
            f"peak memory, N = {config.examples[0]:,} to {config.examples[-1]:,}, "
            "largest over smallest",
            f"{growth:.2f}",
            "<= 1.1",
            growth <= 1.1,
        ),
        report.Headline(
            "streaming",
            f"step on a memory-mapped file over on the device, N = {config.stored:,}",
            f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f})",
            "<= 1.1",
            ratio.median <= 1.1,
        ),
    ]
    report.publish(
        "streaming",
        config,
        rows,
        headlines,
        functools.partial(_plot, peaks),
        peaks=peaks,
        seconds={name: values.tolist() for name, values in seconds.items()},
    )
    return headlines


def measure(num_examples: int, steps: int) -> float:
    """The peak bytes of training above the bytes after its first steps."""
    problem = problems.lenet(1)
    optimizer = optax.sgd(0.01)
    law = noise.sgd(num_examples, problems.BATCH_SIZE)
    source = Computed(num_examples)
    loop = streaming.make_loop(problem.loss_vector_fn, optimizer, law, source)
    state = train.init(problem.params, optimizer, jax.random.key(1))
    before = memory.start_over()
    for count in (WARM_UP, steps):
        state, _ = jax.block_until_ready(loop(state, count))
    return float(memory.peak_bytes() - before)


def _in_fresh_process(num_examples: int, steps: int) -> float:
    return machine.in_fresh_process("streaming", "--measure", num_examples, "--steps", steps)


def _seconds(config: Config) -> dict[str, np.ndarray]:
    """The seconds of `timed_steps` steps, on a file and on the device."""
    (image, label), steps = memory.images_in_place(config.stored), config.timed_steps
    problem, optimizer = problems.lenet(1), optax.sgd(0.01)
    law = noise.sgd(config.stored, problems.BATCH_SIZE)
    step = train.make_step(problem.loss_vector_fn, optimizer, law)
    resident = train.make_loop(step, max_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "images.npy"
        np.save(file, np.asarray(image))
        source = streaming.ArraySource((np.load(file, mmap_mode="r"), np.asarray(label)))
        streamed = streaming.make_loop(problem.loss_vector_fn, optimizer, law, source)
        contestants = {
            "on the device": _again(
                problem, optimizer, lambda state: resident(state, (image, label), steps)
            ),
            "streamed": _again(problem, optimizer, lambda state: streamed(state, steps)),
        }
        return timing.alternate(contestants, repeats=2 * config.repeats, description="time")


def _again(
    problem: problems.Problem, optimizer: Any, loop: Callable[[Any], Any]
) -> Callable[[], Any]:
    state = train.init(problem.params, optimizer, jax.random.key(1))

    def run() -> Any:
        nonlocal state
        state, metrics = loop(state)
        return state.params, metrics

    return run


def _plot(peaks: dict[int, list[float]], axes: Any) -> None:
    for n, values in peaks.items():
        axes.semilogx([n] * len(values), [value / MIB for value in values], "o", color="C0")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("examples N")
    axes.set_ylabel("MiB above what was held before")
    axes.set_title("LeNet on examples read as they are needed, b = 50", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
