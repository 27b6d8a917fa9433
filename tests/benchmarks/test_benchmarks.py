"""The benchmarks run, write their files, and compute ratios and slopes correctly."""

import dataclasses
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as everything
from benchmarks import memory, problems, report, timing


def test_contestants_take_turns_in_every_round_in_another_order():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.alternate(contestants, repeats=30, warmups=1)
    rounds = ["".join(calls[3 * i : 3 * i + 3]) for i in range(31)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys("abc", (30,))
    assert all((values >= 0).all() for values in seconds.values())
    assert timing.alternate(contestants, repeats=9, warmups=0, budget=0)["a"].shape == (3,)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timing.alternate(contestants, repeats=0)


def test_ratios_are_formed_round_by_round():
    samples = {"ours": np.array([1.0, 20, 3, 40, 5]), "theirs": np.array([2.0, 40, 6, 80, 20])}
    assert timing.ratio(samples, "ours", "theirs") == timing.Spread(0.5, 0.5, 0.5)
    assert timing.spread([1, 2, 3, 4, 5]) == timing.Spread(3, 2, 4)


def test_growth_is_the_exponent_of_a_power_law():
    sizes = np.array([10, 100, 1_000, 10_000])
    fit = timing.growth(sizes, 3e-5 * sizes**1.5)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.standard_error == pytest.approx(0, abs=1e-9)
    assert timing.growth(sizes, [1, 20, 90, 1_100]).standard_error > 0.01
    with pytest.raises(ValueError, match="at least two"):
        timing.growth([1], [1])


def count_flops(function, *args) -> float:
    """The floating-point operations of one call, as XLA counts them, with loop bodies once."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_flops_of_a_matrix_product_are_counted():
    left, right = jnp.ones((30, 40)), jnp.ones((40, 50))
    assert count_flops(jnp.matmul, left, right) == pytest.approx(2 * 30 * 40 * 50, rel=0.01)


@pytest.mark.parametrize("wanted", [100, 300, 1_000, 3_000, 11_330, 100_000])
def test_nets_have_about_the_parameters_asked_for(wanted):
    problem = problems.two_layer_net(wanted, 3)
    assert problem.num_parameters == pytest.approx(wanted, rel=0.05)
    assert problem.loss_vector_fn(problem.params, problem.data).shape == (3,)
    assert wanted != 11_330 or problem.num_parameters == 11_330


def test_reports_are_never_overwritten(tmp_path):
    config = report.Config(out=tmp_path / "here")
    headline = report.Headline("b", "f", "1", "<= 2", True)
    args = ("name", config, [{"a": 1, "raw": [1, 2]}], [headline], lambda axes: None)
    folder = report.publish(*args)
    record = json.loads((folder / "result.json").read_text())
    assert record["rows"] == [{"a": 1, "raw": [1, 2]}]
    assert record["machine"]["cores"] >= 1
    with pytest.raises(FileExistsError, match="never overwritten"):
        report.publish(*args)
    with pytest.raises(FileExistsError, match="never overwritten"):
        report.Config(out=tmp_path / "here")  # The refusal comes before anything is measured.


def test_a_failing_benchmark_leaves_the_summary_of_those_before_it(tmp_path, monkeypatch):
    measured = report.Headline("import_time", "f", "1", "<= 2", True)
    monkeypatch.setattr("benchmarks.import_time.main", lambda config: [measured])
    monkeypatch.setattr("benchmarks.memory.main", lambda config: 1 / 0)
    config = everything.Config(only=("import_time", "memory"), quick=True, out=tmp_path / "all")
    with pytest.raises(ZeroDivisionError):
        everything.main(config)
    record = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert record["headlines"] == [measured._asdict()]


def test_peak_memory_of_a_child_does_not_start_from_its_parents():
    here = np.ones(300 * 2**20, np.uint8)  # Memory that was written to is resident.
    script = "from benchmarks import memory; print(memory.peak_bytes())"
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    child = int(ran.stdout)
    assert memory.peak_bytes() > here.nbytes
    assert 2**20 < child < memory.peak_bytes() - here.nbytes // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", everything.NAMES)
def test_each_benchmark_writes_its_table_and_picture(name, tmp_path, capsys):
    if name == "against_torch":
        pytest.importorskip("torch", reason="the contestant is not installed")
    module = importlib.import_module(f"benchmarks.{name}")
    headlines = module.main(module.Config(quick=True, out=tmp_path / name))
    record = json.loads((tmp_path / name / "result.json").read_text())
    assert record["benchmark"] == name
    assert record["headlines"] == [headline._asdict() for headline in headlines] != []
    assert record["rows"]
    assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert headlines[0].figure in capsys.readouterr().out


@pytest.mark.slow
def test_all_together_end_in_one_summary(tmp_path):
    config = everything.Config(only=("import_time",), quick=True, out=tmp_path / "all")
    folder = everything.main(config)
    assert "from msgd_jax import noise, train" in (folder / "summary.md").read_text()
    assert len(json.loads((folder / "summary.json").read_text())["headlines"]) == 1
    with pytest.raises(FileExistsError, match="never overwritten"):
        everything.main(config)
    with pytest.raises(ValueError, match=r"got \['speed'\]"):
        dataclasses.replace(config, only=("speed",))
