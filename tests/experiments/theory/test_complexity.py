"""``python -m experiments complexity`` on small settings: tables, pictures and numbers."""

import dataclasses
import json

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


def few_digits():
    """The data set of 60 digits to train on and 20 to test on."""
    digits = data.load("digits")
    first = lambda examples, n: jax.tree.map(lambda x: x[:n], examples)  # noqa: E731
    return dataclasses.replace(digits, train=first(digits.train, 60), test=first(digits.test, 20))


@pytest.mark.slow
def test_two_classes_of_theorem1(tmp_path, capsys, monkeypatch):
    """Verdicts, table and picture: the paper's bound is false with replacement for one loss."""
    from matplotlib import image

    monkeypatch.setattr(complexity_experiment, "_digits_problems", lambda _: [None, None])
    cases = complexity_experiment.settings(ComplexityConfig(theorem1_draws=50))
    chosen = [case for case in cases if case.label in ("affine", "one loss, b = 4")]
    monkeypatch.setattr(complexity_experiment, "settings", lambda _: chosen)
    out = tmp_path / "out"
    main(["complexity", "--out", str(out)])
    results = json.loads((out / "summary.json").read_text())
    printed = capsys.readouterr().out

    affine, spike = results["theorem1"]
    assert set(affine["inequalities"]) == set(_complexity_tables.COLUMNS)
    assert set(spike["inequalities"]) == {"without", "with", "with, corrected"}
    verdicts = {name: found["violated"] for name, found in spike["inequalities"].items()}
    assert verdicts == {"without": False, "with": True, "with, corrected": False}
    # The exact ratio for one loss of N = 8 that is not zero, and batches of b = 4 with replacement.
    assert f"{(1 - 1 / 8) ** 4 / (1 - 4 / 8):.4f} ± 0.0000!" in printed
    assert image.imread(out / "theorem1.png").shape[0] > 300


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


def test_the_net_is_trained_with_the_learning_rate_that_was_asked_for(monkeypatch):
    """Training is replaced by a function that notes its plan and stops the command."""
    seen = []

    def spy(plan, *_):
        seen.append(plan)
        raise ZeroDivisionError

    digits = few_digits()
    monkeypatch.setattr(complexity_experiment.data, "load", lambda *_, **__: digits)
    monkeypatch.setattr(training, "train_seeds", spy)
    with pytest.raises(ZeroDivisionError):
        complexity_experiment._digits_problems(ComplexityConfig(learning_rate=0.037))
    assert seen[0].learning_rate == 0.037


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"theorem1_draws": 1}, "theorem1_draws must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"seed": -1}, "seed must be between 0 and 2.31 - 1, got -1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        ComplexityConfig(**wrong)
