"""Weak scaling over virtual devices: k devices with n examples each against one with all k n.

``python -m benchmarks.weak_scaling``. The devices share this machine's cores, so more devices
cannot make a step quicker: the ratio to one device with the same work is the cost of spreading. The
bytes that a device sends are read from the compiled step. Both contestants run in one separate
process (`--measure`).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import compilers, machine, problems, report, timing
from msgd_jax import noise, sharding, train

KIB = 2**10


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures steps of M-SGD-Cov on LeNet as devices and examples grow together.

    Attributes:
        devices: The numbers of devices.
        examples: The number of examples of each device.
        microbatch_size: The number of examples in one pass, on each device.
        measure: Whether to measure in this process and print JSON, which is how the benchmark calls
            itself.
    """

    repeats: int = 10
    devices: tuple[int, ...] = (1, 2, 4, 8)
    examples: int = 500
    microbatch_size: int = 100
    measure: bool = False


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.measure:
        print(json.dumps(measure(config)))
        return []
    if config.quick:
        config = dataclasses.replace(config, repeats=2, devices=(1, 2), examples=60)
    measured = _in_fresh_process(config)
    rows, ratios = [], {}
    for found in measured:
        k = found["devices"]
        ratios[k] = timing.ratio(found["seconds"], "spread", "one device")
        rows.append(_row(found, ratios[k]))
    last = measured[-1]
    most = max(ratios, key=lambda k: ratios[k].median)
    parameters = problems.lenet(1).num_parameters
    fits = last["bytes"] <= 4 * parameters + KIB
    headlines = [
        report.Headline(
            "weak_scaling",
            f"step on k devices over one device with the same examples, largest (k = {most})",
            f"{ratios[most].median:.2f} (quartiles {ratios[most].low:.2f} to "
            f"{ratios[most].high:.2f})",
            "<= 1.15",
            ratios[most].median <= 1.15,
        ),
        report.Headline(
            "weak_scaling",
            f"bytes reduced per device and step, k = {last['devices']}, {parameters:,} parameters",
            f"{last['bytes']:,}",
            f"<= {4 * parameters + KIB:,}",
            fits,
        ),
    ]
    report.publish(
        "weak_scaling", config, rows, headlines, functools.partial(_plot, ratios), measured=measured
    )
    return headlines


def measure(config: Config) -> list[dict[str, Any]]:
    """The seconds of both contestants per k, and the bytes that the spread step reduces."""
    return [_of_devices(config, k) for k in config.devices]


def _of_devices(config: Config, k: int) -> dict[str, Any]:
    problem = problems.lenet(k * config.examples)
    mesh = jax.make_mesh((k,), ("data",), devices=jax.devices()[:k])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    _, alone = _contestant(problem, config.microbatch_size, None)
    program, spread = _contestant(problem, config.microbatch_size, rows)
    seconds = timing.alternate(
        {"one device": alone, "spread": spread},
        repeats=config.repeats,
        description=f"{k} devices",
    )
    reduced = reductions(program)
    return {
        "devices": k,
        "seconds": {name: values.tolist() for name, values in seconds.items()},
        "reductions": len(reduced),
        "bytes": sum(reduced),
    }


def _contestant(
    problem: problems.Problem, microbatch_size: int, rows: NamedSharding | None
) -> tuple[str, Callable[[], Any]]:
    """The compiled step as text, and a function that makes one step."""
    n = len(jax.tree.leaves(problem.data)[0])
    law, optimizer = noise.cov(n, problems.BATCH_SIZE), optax.sgd(0.01)
    step = train.make_step(
        problem.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size, sharding=rows
    )
    data, params = problem.data, problem.params
    if rows is not None:
        data = sharding.shard_examples(data, rows)
        params = jax.device_put(params, NamedSharding(rows.mesh, PartitionSpec()))
    state = train.init(params, optimizer, jax.random.key(1))
    compiled = jax.jit(step).lower(state, data).compile()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, data)
        return state.params, metrics

    return compiled.as_text() or "", run


def reductions(program: str) -> list[int]:
    """The bytes of each all-reduce of a compiled program; a tuple of arrays counts as one."""
    found = map(compilers.collective, program.splitlines())
    return [sum(size for _, _, size in one) for one in found if one and one[0][0] == "all-reduce"]


def _in_fresh_process(config: Config) -> list[dict[str, Any]]:
    """Measures in a fresh process, since jax fixes the number of devices when it starts."""
    flags = f"--xla_force_host_platform_device_count={max(config.devices)}"
    environment = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
    }
    options = ["--repeats", config.repeats, "--examples", config.examples]
    options += ["--microbatch-size", config.microbatch_size, "--devices", *config.devices]
    return machine.in_fresh_process("weak_scaling", "--measure", *options, environment=environment)


def _row(found: dict[str, Any], ratio: timing.Spread) -> dict[str, Any]:
    return {
        "devices k": found["devices"],
        **{f"{n}, ms": f"{1e3 * np.median(s):.1f}" for n, s in found["seconds"].items()},
        "ratio": f"{ratio.median:.2f}",
        "quartiles": f"{ratio.low:.2f} to {ratio.high:.2f}",
        "all-reduces": found["reductions"],
        "KiB reduced": f"{found['bytes'] / KIB:.1f}",
    }


def _plot(ratios: dict[int, timing.Spread], axes: Any) -> None:
    devices = list(ratios)
    medians = np.array([ratio.median for ratio in ratios.values()])
    errors = [
        medians - [ratio.low for ratio in ratios.values()],
        [ratio.high for ratio in ratios.values()] - medians,
    ]
    axes.axhline(1, color="gray", linewidth=1)
    axes.errorbar(devices, medians, yerr=errors, fmt="o-", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("virtual devices k")
    axes.set_ylabel("time over one device with as many examples")
    axes.set_title("M-SGD-Cov on LeNet, examples in proportion to devices", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
