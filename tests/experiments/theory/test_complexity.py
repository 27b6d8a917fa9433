"""``python -m experiments complexity`` on small settings: tables, pictures and numbers."""

import dataclasses
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data, training
from experiments.__main__ import main
from experiments.theory import _complexity_tables
from experiments.theory import complexity as complexity_experiment
from experiments.theory.config import ComplexityConfig
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig
from msgd_jax import complexity


def few_digits():
    """The data set of 60 digits to train on and 20 to test on."""
    digits = data.load("digits")
    first = lambda examples, n: jax.tree.map(lambda x: x[:n], examples)  # noqa: E731
    return dataclasses.replace(digits, train=first(digits.train, 60), test=first(digits.test, 20))


def run(out, *arguments):
    """Runs the command, and returns its summary."""
    main(["complexity", "--seeds", "2", "--batch-size", "5", "--out", str(out), *arguments])
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_a_trace_of_the_digits(tmp_path, capsys, monkeypatch):
    """Complexities at both ends of a short run are in the table, the record and the picture.

    A supremum over a ball is at least the value at its centre.
    """
    from matplotlib import image

    digits = few_digits()
    monkeypatch.setattr(complexity_experiment.data, "load", lambda *_, **__: digits)
    laws = {"Rademacher": complexity.rademacher(60), "Gaussian": None, "SGD": None}
    laws["Gaussian"] = laws["SGD"] = laws["Rademacher"]  # One program serves all three.
    monkeypatch.setattr(complexity_experiment, "laws", lambda *_: laws)
    out = tmp_path / "out"
    plan = "--parts trace --algorithms sgd --steps 20 --every 20 --microbatch-size None"
    few = "--trace-draws 2 --ascent-steps 2"
    start, end = run(out, *shlex.split(f"{plan} {few}"))["trace"]
    assert (start["step"], end["step"]) == (0, 20)
    for record in (start, end):
        found = record["complexities"]["Rademacher"]
        assert len(found["mean"]) == len(record["test_loss"]) == 2
        assert (np.array(found["mean"]) >= np.array(found["at_centre"])).all()
    assert start["complexities"] != end["complexities"]
    assert len((out / "trace.jsonl").read_text().splitlines()) == 2
    assert image.imread(out / "trace.png").shape[0] > 300
    printed = capsys.readouterr().out
    assert "R Rademacher" in printed
    assert re.search(r"SGD-\d+ +20 ", printed)
    assert set(complexity_experiment.laws(ComplexityConfig(), 60)) == set(laws)


@pytest.mark.slow
def test_theorem1_and_the_regulariser(tmp_path, capsys, monkeypatch):
    """Two classes of losses and two ways to train give verdicts, losses, tables and a picture."""
    from matplotlib import image

    digits = few_digits()
    monkeypatch.setattr(complexity_experiment.data, "load", lambda *_, **__: digits)
    monkeypatch.setattr(complexity_experiment, "_digits_problems", lambda _: [None, None])
    cases = complexity_experiment.settings(ComplexityConfig(theorem1_draws=50))
    chosen = [case for case in cases if case.label in ("affine", "one loss, b = 4")]
    monkeypatch.setattr(complexity_experiment, "settings", lambda _: chosen)
    ways = complexity_experiment.regularizers(ComplexityConfig(batch_size=5), 60)
    few = {name: ways[name] for name in ("SGD", "SGD, full on b examples, scale 0.1")}
    monkeypatch.setattr(complexity_experiment, "regularizers", lambda *_: few)
    results = run(
        tmp_path / "out", "--parts", "theorem1", "regularizer", "--regularizer-steps", "120"
    )
    printed = capsys.readouterr().out

    affine, spike = results["theorem1"]
    assert set(affine["inequalities"]) == set(_complexity_tables.COLUMNS)
    assert set(spike["inequalities"]) == {"without", "with", "with, corrected"}
    verdicts = {name: found["violated"] for name, found in spike["inequalities"].items()}
    assert verdicts == {"without": False, "with": True, "with, corrected": False}
    # The exact ratio for one loss of N = 8 that is not zero, and batches of b = 4 with replacement.
    assert f"{(1 - 1 / 8) ** 4 / (1 - 4 / 8):.4f} ± 0.0000!" in printed
    assert image.imread(tmp_path / "out" / "theorem1.png").shape[0] > 300

    plain, full = results["regularizer"]
    assert plain["test_loss"]["value"] != full["test_loss"]["value"]
    assert full["test_loss"]["value"] < np.log(10)


def test_each_seed_has_a_regulariser_of_its_own():
    """The transformation here replaces the gradient by a number that is drawn with its key."""
    plan = TrainConfig(
        algorithm="gd",
        dataset="digits",
        steps=1,
        seeds=2,
        eval_every=1,
        learning_rate=1.0,
        microbatch_size=None,
        noise=NoiseSettings(batch_size=5),
    )

    def drawn(key):
        def update(updates, state, params=None):
            del params
            number = jax.random.uniform(jax.random.fold_in(state, 0))
            return jax.tree.map(lambda u: jnp.full_like(u, number), updates), state

        return optax.GradientTransformation(lambda params: key, update)

    (before, after) = (
        np.asarray(jax.tree.leaves(params)[0])
        for params, _ in training.train_seeds(plan, few_digits(), drawn)
    )
    moved = (before - after).reshape(2, -1)
    assert (np.ptp(moved, axis=1) < 1e-6).all()
    assert abs(moved[0, 0] - moved[1, 0]) > 1e-3


@pytest.mark.parametrize("part", ["theorem1", "regularizer", "trace"])
def test_every_part_trains_with_the_learning_rate_that_was_asked_for(part, monkeypatch):
    """Training is replaced by a function that notes its plan and stops the command."""
    seen = []

    def spy(plan, *_):
        seen.append(plan)
        raise ZeroDivisionError

    digits = few_digits()
    monkeypatch.setattr(complexity_experiment.data, "load", lambda *_, **__: digits)
    monkeypatch.setattr(training, "train_seeds", spy)
    config = ComplexityConfig(parts=(part,), learning_rate=0.037)
    first = {
        "theorem1": lambda: complexity_experiment._digits_problems(config),
        "regularizer": lambda: next(complexity_experiment.regularizer(config)),
        "trace": lambda: next(complexity_experiment.trace(config, digits)),
    }[part]
    with pytest.raises(ZeroDivisionError):
        first()
    assert seen[0].learning_rate == 0.037


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ()}, "parts must name one or more"),
        ({"algorithms": ("gd", "gd")}, "algorithms must name one or more, each once"),
        ({"theorem1_draws": 1}, "theorem1_draws must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"radius": 0.0}, "radius must be finite and above 0, got 0.0"),
        ({"seed": -1}, "seed must be between 0 and 2.31 - 3, for 3 seeds, got -1"),
        (
            {"parts": ("trace",), "regularizer_radius": 0.2},
            "regularizer_radius is read by the part regularizer only, got 0.2",
        ),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        ComplexityConfig(**wrong)
