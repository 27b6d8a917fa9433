"""What importing the library pulls in, and what it exports."""

import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import msgd_jax

MODULES = ["complexity", "covariance", "loss", "noise", "sde", "sharding", "streaming", "train",
           "transform"]  # fmt: skip
# Everything else (flax, tensorflow_datasets, matplotlib, ...) belongs to the extras.
FORBIDDEN = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "tyro",
             "tqdm", "diffrax", "equinox", "lineax", "psutil", "torch", "grain", "experiments",
             "benchmarks", "pytest", "hypothesis", "beartype")  # fmt: skip


@pytest.mark.parametrize("module", ["msgd_jax", *(f"msgd_jax.{name}" for name in MODULES)])
def test_each_module_alone_pulls_in_the_core_only(module):
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(FORBIDDEN) & set(ran.stdout.split())


@pytest.mark.parametrize("lower", ["noise", "loss"])
def test_arrows_point_down(lower):
    """`noise` and `loss` know nothing of what stands on them: the sources import nothing above."""
    module = importlib.import_module(f"msgd_jax.{lower}")
    top = ("complexity", "covariance", "sde", "streaming", "transform", "train")
    above = {"loss": top, "noise": ("loss", *top)}[lower]
    files = [module]
    if lower == "noise":
        parts = [part.stem for part in pathlib.Path(str(module.__file__)).parent.glob("_*.py")]
        files = [importlib.import_module(f"msgd_jax.noise.{n}") for n in parts if n != "__init__"]
        assert len(files) >= 7
    for file in files:
        source = inspect.getsource(file)
        for name in above:
            assert f"import {name}" not in source
            assert f"msgd_jax.{name}" not in source


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name):
    module = getattr(msgd_jax, name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, public
