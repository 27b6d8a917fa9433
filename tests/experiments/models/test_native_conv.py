"""The compiled convolutions: values and derivatives, where they are used, and how they are made."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.models import __main__ as command
from experiments.models import _native as native
from experiments.models._conv_same import conv_same
from tests.experiments.models.convolutions import assert_equal_to_float64

needs_library = pytest.mark.skipif(
    not native.is_compiled(), reason="no C++ compiler: `python -m experiments.models` says more"
)

# Shapes of images and kernel and the stride. Some sizes fill the tiles, vectors and groups of
# images of the compiled code, and some do not.
SIZES = {
    "a single image": ((1, 7, 6, 3), (3, 3, 3, 4), 1),
    "a larger kernel than the images": ((2, 1, 3, 3), (5, 5, 3, 4), 1),
    "a pixel, strides": ((2, 7, 6, 3), (1, 1, 3, 4), 2),
    "strides, more channels than a vector has": ((9, 7, 6, 20), (3, 3, 20, 17), 2),
    "strides of three, channels that fill no block": ((2, 8, 8, 16), (3, 3, 16, 40), 3),
    "small images, a group that is not full": ((37, 2, 2, 9), (3, 3, 9, 33), 1),
    "several runs of images": ((7, 16, 16, 3), (3, 3, 3, 32), 1),
    "large images, in parts": ((3, 20, 18, 9), (3, 3, 9, 17), 1),
    "a kernel that is not square": ((5, 8, 8, 24), (5, 3, 24, 16), 1),
    "Winograd's, sides that are odd": ((22, 7, 8, 32), (3, 3, 32, 48), 1),
    "Winograd's gradients of kernels, in parts": ((43, 7, 6, 64), (3, 3, 64, 80), 1),
}


@needs_library
@pytest.mark.parametrize("name", SIZES)
def test_values_and_derivatives_equal_those_in_float64(name):
    assert_equal_to_float64(native.conv, *SIZES[name])


@needs_library
@pytest.mark.parametrize("mapped", [(0, 0), (1, None), (None, 2)])
def test_mapped_over_images_kernels_or_both(mapped):
    images = jax.random.normal(jax.random.key(0), (3, 4, 5, 4, 3))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 6))
    count = 3
    arguments = [
        x[0] if axis is None else jnp.moveaxis(x, 0, axis)
        for x, axis in zip((images, kernels), mapped, strict=True)
    ]

    def gradients(images, kernel):
        losses = lambda *args: jnp.sum(native.conv(*args, 1) ** 3)  # noqa: E731
        return jax.grad(losses, (0, 1))(images, kernel)

    found = jax.jit(jax.vmap(gradients, mapped))(*arguments)
    for i in range(count):
        expected = gradients(
            *(
                x[0 if axis is None else i]
                for x, axis in zip((images, kernels), mapped, strict=True)
            )
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, rtol=1e-5), found, expected)  # noqa: B023


def uses_the_library(function, *arguments):
    """Whether the compiled program of a function calls the compiled convolutions."""
    return "msgd_ConvForward" in str(jax.jit(function).lower(*arguments).compile().as_text())


@needs_library
def test_several_devices_use_it_on_what_each_of_them_holds():
    """Without `shard_map`, XLA would send all images to all devices, since the call is opaque."""
    images, kernel = jnp.ones((16, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    convolution = functools.partial(conv_same, stride=1)
    assert jax.device_count() == 8
    assert not uses_the_library(convolution, images, kernel)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("batch")
    local = jax.shard_map(
        convolution, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    assert uses_the_library(local, images, kernel)
    np.testing.assert_allclose(jax.jit(local)(images, kernel), convolution(images, kernel), 1e-6)


# Prints the gradients as they are on so many cores of this machine, for a check of their bits.
ON_CPUS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, jax.numpy as jnp, numpy as np
from experiments.models import _native as native
from experiments.models._conv_same import conv_same
from experiments.models.conv import conv_pool_relu

def check(function, arrays, name):
    every = range(len(arrays))
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(function(*args) ** 2), every))
    text = gradients.lower(*arrays).as_text()
    assert f"msgd_{name}OfKernel" in text and f"msgd_{name}OfImages" in text
    half = [x.astype(jnp.bfloat16) for x in arrays]
    assert "msgd_" not in gradients.lower(*half).as_text()
    for gradient in gradients(*arrays):
        print(hashlib.sha256(np.asarray(gradient)).hexdigest())

images = jax.random.normal(jax.random.key(0), (40, 9, 8, 20))
# With one core, each task is a row of the kernel's gradient, and with two one tap.
kernel = jax.random.normal(jax.random.key(1), (3, 3, 20, 20))
check(conv_same, (images, kernel), "Conv")
# Winograd's.
images = jax.random.normal(jax.random.key(2), (20, 9, 8, 64))
kernel = jax.random.normal(jax.random.key(3), (3, 3, 64, 64))
check(conv_same, (images, kernel), "Conv")
images = jax.random.normal(jax.random.key(4), (10, 12, 12, 300))
kernel = jax.random.normal(jax.random.key(5), (5, 5, 10, 12))
check(conv_pool_relu, (images, kernel, jnp.ones(12)), "Pool")
# An image alone may be mapped over.
one = jax.jit(conv_pool_relu).lower(images[..., :1], kernel, jnp.ones(12))
assert "msgd_" not in one.as_text()
"""


@needs_library
def test_one_device_uses_it_and_any_number_of_cores_gives_the_same_bits():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", ON_CPUS, str(count)],
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for count in (1, os.cpu_count())
    ]
    assert len(outputs[0].split()) == 2 + 2 + 3
    assert outputs[0] == outputs[1]


def _fake_compiler(tmp_path, monkeypatch, last_line):
    """A script that notes its calls; its last line sees the file that it should make as `$last`."""
    compiler = tmp_path / "compiler"
    lines = ["#!/bin/sh", 'echo "$@" >> "$0.log"', "for last; do :; done", last_line]
    compiler.write_text("\n".join(lines) + "\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_the_library_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "made" / "conv.so")
    _fake_compiler(tmp_path, monkeypatch, 'touch "$last"')
    assert native.build() == native.build() == tmp_path / "made" / "conv.so"
    log = (tmp_path / "compiler.log").read_text().splitlines()
    assert sum(" -c " in line for line in log) == 2
    assert sum("-shared" in line for line in log) == 1
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["conv.so"]


@needs_library
def test_the_first_net_that_asks_has_the_library_compiled(tmp_path, monkeypatch, capsys):
    """The compiler copies the library that is there; XLA knows its functions by other names."""
    there = native.library()
    monkeypatch.setattr(native, "library", lambda: tmp_path / "conv.so")
    monkeypatch.setattr(native, "target", lambda name: f"first_net_{name}")
    _fake_compiler(tmp_path, monkeypatch, f'cp "{there}" "$last"')
    assert native._load()
    assert "Compiling convolutions for this processor, once" in capsys.readouterr().err
    monkeypatch.setattr(native, "target", lambda name: f"second_net_{name}")
    assert native._load()
    assert not capsys.readouterr().err
    assert len((tmp_path / "compiler.log").read_text().splitlines()) == 3


def test_without_a_compiler_nets_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "conv.so")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert not native._load()
    assert not "".join(capsys.readouterr())


def test_nets_warn_of_a_compiler_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "conv.so")
    _fake_compiler(tmp_path, monkeypatch, "exit 1")
    with pytest.warns(UserWarning, match="convolutions will be slower"):
        assert not native._load()


def test_without_a_compiler_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "conv.so")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert command.main() == 0
    assert "Without a C++ compiler, convolutions will be slower" in capsys.readouterr().out


def test_the_message_of_a_compiler_that_fails_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "conv.so")
    _fake_compiler(tmp_path, monkeypatch, "echo a line is wrong >&2; exit 1")
    assert command.main() == 1
    assert "a line is wrong" in capsys.readouterr().err
    assert not (tmp_path / "conv.so").exists()


def test_another_processor_or_source_is_another_library(monkeypatch):
    here = native.library()
    monkeypatch.setattr(native, "_processor", lambda: "flags: another")
    assert native.library() != here
