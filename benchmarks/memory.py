"""The peak memory of a full-batch step as N grows, at a fixed micro-batch: it is that of the data.

``python -m benchmarks.memory``. One fresh process per N (`--measure N`) compiles the step, makes
random images in place, as uint8, and trains three steps of M-SGD-Fisher on LeNet. It reports the
peak of its memory above that before the images: resident memory on CPU, the device's own count
elsewhere. (Compiling takes ten times as much, and varies by tens of megabytes.)
"""

import ctypes
import dataclasses
import functools
import gc
import json
import sys
from typing import Any

import jax
import numpy as np
import optax
import tyro
from tqdm import tqdm

from benchmarks import machine, problems, report
from experiments import models
from msgd_jax import noise, train

STEPS = 3
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures the peak memory of a full-batch step against N.

    Attributes:
        examples: The numbers N of examples, the smallest first.
        microbatch_size: The number of examples in one pass.
        measure: The one N to measure in this process and to print as JSON, which is how the
            benchmark calls itself.
    """

    repeats: int = 2
    examples: tuple[int, ...] = (1_000, 15_000, 60_000)
    microbatch_size: int = 100
    measure: int | None = None


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headline."""
    if config.measure is not None:
        print(json.dumps(measure(config.measure, config.microbatch_size)))
        return []
    if config.quick:
        config = dataclasses.replace(config, repeats=1, examples=(100, 200), microbatch_size=50)
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in config.examples}
    for n in tqdm(config.repeats * config.examples, desc="memory", unit="process", leave=False):
        samples[n].append(_in_fresh_process(n, config.microbatch_size))
    peaks = {n: min(s["peak"] for s in runs) for n, runs in samples.items()}
    data = {n: runs[0]["data"] for n, runs in samples.items()}
    rows = [_row(n, samples[n], peaks, data, config.examples[0]) for n in config.examples]
    first, last = config.examples[0], config.examples[-1]
    more, more_data = peaks[last] - peaks[first], data[last] - data[first]
    headline = report.Headline(
        "memory",
        f"peak memory, N = {first:,} to {last:,}, over the data's own growth",
        f"{more / more_data:.2f} ({more / MIB:.1f} of {more_data / MIB:.1f} MiB)",
        "<= 1.1",
        more <= 1.1 * more_data,
    )
    plot = functools.partial(_plot, peaks, data)
    report.publish("memory", config, rows, [headline], plot, samples=samples)
    return [headline]


def measure(num_examples: int, microbatch_size: int) -> dict[str, float]:
    """The bytes of the peak above the memory before, of the data, and of the program's buffers."""
    problem = problems.lenet(1)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_examples, *leaf.shape[1:]), leaf.dtype),
        problem.data,
    )
    law = noise.fisher(num_examples, problems.BATCH_SIZE)
    optimizer = optax.sgd(0.01)
    step = train.make_step(problem.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size)
    state = train.init(problem.params, optimizer, jax.random.key(1))
    compiled = jax.jit(step, donate_argnums=0).lower(state, shapes).compile()
    before = start_over()
    data = jax.block_until_ready(images_in_place(num_examples))
    start_over()  # Now the steps alone are measured, and not the making of the images.
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(compiled(state, data))
    analysis = compiled.memory_analysis()
    return {
        "peak": float(peak_bytes() - before),
        "data": float(sum(leaf.nbytes for leaf in data)),
        "buffers": float(getattr(analysis, "temp_size_in_bytes", float("nan"))),
    }


def images_in_place(num_examples: int) -> tuple[jax.Array, jax.Array]:
    """Random images and labels, made in slices so that only the result takes memory."""
    rng = np.random.default_rng(0)
    image = np.empty((num_examples, *models.LeNet.image_shape), np.uint8)
    for start in range(0, num_examples, 1_000):
        part = image[start : start + 1_000]
        part[...] = rng.integers(0, 256, part.shape, np.uint8)
    label = rng.integers(0, 10, num_examples, np.int32)
    # With may_alias, jax uses numpy's memory on CPU instead of holding the images twice.
    return jax.device_put((image, label), may_alias=True)


def start_over() -> int:
    """Returns freed memory to the system and resets the peak; returns the bytes held now."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The device's peak if it counts one, else the peak resident memory of the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    try:
        # Not getrusage: on Linux its ru_maxrss starts from the peak of the process that forked us.
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _in_fresh_process(num_examples: int, microbatch_size: int) -> dict[str, float]:
    options = ["--measure", num_examples, "--microbatch-size", microbatch_size]
    return machine.in_fresh_process("memory", *options)


def _row(
    n: int,
    runs: list[dict[str, float]],
    peaks: dict[int, float],
    data: dict[int, float],
    first: int,
) -> dict[str, Any]:
    spread = max(r["peak"] for r in runs) - min(r["peak"] for r in runs)
    return {
        "N": f"{n:,}",
        "data, MiB": f"{data[n] / MIB:.1f}",
        "peak, MiB": f"{peaks[n] / MIB:.1f}",
        "range of peaks, MiB": f"{spread / MIB:.1f}",
        f"more data than at N = {first:,}": f"{(data[n] - data[first]) / MIB:.1f}",
        "more peak": f"{(peaks[n] - peaks[first]) / MIB:.1f}",
        "the step's buffers, MiB": f"{runs[0]['buffers'] / MIB:.2f}",
    }


def _plot(peaks: dict[int, float], data: dict[int, float], axes: Any) -> None:
    sizes = list(peaks)
    first = sizes[0]
    axes.plot(sizes, [peaks[n] / MIB for n in sizes], "o-", label="peak above what was held before")
    expected = [(peaks[first] + data[n] - data[first]) / MIB for n in sizes]
    axes.plot(sizes, expected, "--", color="gray", label="first peak + data")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("examples N")
    axes.set_ylabel("MiB")
    axes.set_title("Full-batch step, LeNet, fixed micro-batch", fontsize=11)
    axes.legend()


if __name__ == "__main__":
    main(tyro.cli(Config))
