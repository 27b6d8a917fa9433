"""Examples spread over virtual devices, and gradients against dense algebra."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import noise
from tests.support.problems import Regression


def spread(num_devices: int, mode: AxisType = AxisType.Auto, **other: int) -> NamedSharding:
    """A sharding of examples over an axis "data" of a mesh.

    Args:
        num_devices: the number of devices along that axis.
        mode: the kind of all axes of the mesh.
        **other: names and sizes of the axes of the mesh that follow it.
    """
    sizes = (num_devices, *other.values())
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, ("data", *other), axis_types=(mode,) * len(sizes), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data"))


def assert_is_dense_gradient(problem: Regression, weights: noise.Weights, value, grads) -> None:
    """Asserts that value and gradients are the dense products in float64, up to rounding.

    A float32 sum of n terms, in whatever order, is off by at most ``(n - 1) u`` times the sum of
    the sizes of its terms, where ``u = 2^-24``. Another ``32 u`` is for the terms themselves: a dot
    product of 5, a sigmoid and a product. Leaving out one example of 1,003 changes the sum by about
    ten times this bound.
    """
    w = np.abs(np.asarray(weights.dense(), np.float64))  # for the sum of the sizes
    unit = (len(w) + 32) * 2.0**-24
    exact, sizes = np.asarray(weights.dense(), np.float64), {}
    for leaf, matrix in problem.gradient_matrix().items():
        sizes[leaf] = np.tensordot(w, np.abs(matrix), 1)
        error = np.abs(np.asarray(grads[leaf], np.float64) - np.tensordot(exact, matrix, 1))
        assert (error <= unit * sizes[leaf]).all()
    losses = problem.losses()
    assert abs(float(value) - exact @ losses) <= unit * (w @ losses)


def sent(program: str) -> int:
    """The bytes of the results of all collectives of a compiled program.

    Raises:
        AssertionError: if a collective is in a loop, which would send its bytes many times.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    lines = re.findall(rf"^.* = .*? (?:{kinds})(?:-start)?\(.*$", program, re.MULTILINE)
    assert not [line for line in lines if "/while/" in line]
    results = [re.split(rf" (?:{kinds})", line)[0] for line in lines]
    arrays = re.findall(r"[a-z](\d+)\[([\d,]*)\]", " ".join(results))
    return sum(
        int(bits) // 8 * math.prod(map(int, filter(None, n.split(",")))) for bits, n in arrays
    )
