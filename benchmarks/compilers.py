"""The compilers of TPUs and of H100s, without one: what they make of a program for many chips.

They give an account of a program (operations, bytes, memory of one chip, collectives), and nothing
is run. They need `libtpu` and `jax-cuda12-plugin`, but no driver and no chip: see `make test-pods`.
"""

import collections
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

# A card of 80 GB in the compiler's own format, which it needs where there is no card to ask.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_PACKAGES = {"v5e": "libtpu", "H100": "jax_cuda12_plugin"}
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


class Account(NamedTuple):
    """What a compiler says of one chip's program.

    Attributes:
        flops: the number of operations, where the body of a loop counts once; None where the
            compiler does not say.
        bytes: the bytes that are read from and written to memory, counted in the same way.
        temporaries: the bytes of intermediate results.
        peak: the largest number of bytes in use at the same time, arguments included.
        collectives: the bytes of the results of all collectives of a step, by kind and dtype. Those
            in a loop count once per iteration, and are infinite where this number is not known.
    """

    flops: float | None
    bytes: float | None
    temporaries: int
    peak: int
    collectives: dict[tuple[str, str], float]

    @property
    def sent(self) -> float:
        """The bytes of all collectives."""
        return sum(self.collectives.values())


def missing(chip: str) -> str | None:
    """The reason why there is no compiler for "v5e" or "H100"; None where there is one."""
    package = _PACKAGES[chip]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed, which compiles for {chip} (make test-pods installs it)"
    return None


def mesh(chip: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    """A mesh of chips that are not there."""
    count = math.prod(shape)
    if chip == "H100":
        described = topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x1x{count}", target_config=_H100
        )
    else:
        # The first variable keeps libtpu from asking a cloud for the machine, and the second lets
        # several processes have it.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        side = math.isqrt(count)
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{count // side}x{side}"
        )
    return Mesh(np.asarray(described.devices).reshape(shape), axes)


def account(program: Any, *arguments: Any) -> Account:
    """Compiles a function for the chips on which its arguments (shapes with shardings) lie."""
    compiled = jax.jit(program).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    try:
        costs = compiled.cost_analysis() or {}
    except jax.errors.JaxRuntimeError:  # The CUDA compiler counts nothing without a card.
        costs = {}
    return Account(
        costs.get("flops"),
        costs.get("bytes accessed"),
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        collectives_of(compiled.as_text() or ""),
    )


def collectives_of(text: str) -> dict[tuple[str, str], float]:
    """The bytes of the collectives of a compiled program, by kind and dtype."""
    computations, entry = _computations(text)
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        for line in computations[name]:
            for kind, dtype, size in collective(line):
                totals[kind, dtype] += times * size
            trips = times * _trips(line) if " while(" in line else times
            for called in _called(line):
                if called in computations:
                    visit(called, trips)

    visit(entry, 1.0)
    return dict(totals)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if start:
            name = start[2]
            found[name] = []
            entry = name if start[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def collective(line: str) -> list[tuple[str, str, int]]:
    """Kind, dtype and bytes of each result of a collective; [] for another instruction."""
    found = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(_KINDS)})(-start)?\(", line)
    if found is None:
        return []
    shapes = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}", "", found[1]))
    if found[3] and found[2] != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # The start of a collective lists its operands too.
    sizes = [(t, math.prod(int(n) for n in shape.split(",") if n)) for t, shape in shapes]
    return [(found[2], t, _BYTES[t] * n) for t, n in sizes]


def _trips(line: str) -> float:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    return int(known[1]) if known else math.inf


def _called(line: str) -> list[str]:
    """The computations that an instruction runs, but for the one that a reduction applies."""
    names = re.findall(
        r"(?:body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)", line
    )
    if " call(" in line:
        names += re.findall(r"to_apply=%?([\w.\-]+)", line)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%?([\w.\-]+)", branches)
    return names
