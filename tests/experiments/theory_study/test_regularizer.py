"""``python -m experiments theory-study regularizer``: the plan, the runs, and the report."""

import inspect
import math

import jax
import numpy as np
import pytest
import scipy.stats

from experiments import data, training
from experiments.theory_study import RegularizerConfig, _regularizer_report, regularizer
from msgd_jax import complexity, noise

TINY = {"num_train": 20, "batch_size": 5, "steps": 4, "other_rates": (0.3,)}


def test_what_decides_is_run_at_all_rates_and_what_chooses_on_seeds_of_its_own():
    config = RegularizerConfig(**TINY, seeds=2, tuning_seeds=1, tuning_seed=7)
    runs = regularizer.plan(config)
    assert len(runs) == len(set(runs)) == 2 * (8 + 2) + 4
    chosen = {(name, rate) for name, rate, seed in runs if seed == 7}
    assert chosen == {(name, rate) for name in ("gd", "full") for rate in (0.1, 0.3)}
    assert {seed for _, _, seed in runs} == {0, 1, 7}


def test_cases_can_be_left_out():
    config = RegularizerConfig(**TINY, cases=("gd", "full"), seeds=1, tuning_seeds=1, tuning_seed=7)
    assert regularizer.plan(config) == [
        ("gd", 0.1, 0),
        ("gd", 0.3, 0),
        ("full", 0.1, 0),
        ("gd", 0.1, 7),
        ("gd", 0.3, 7),
    ]


def test_every_comparison_is_between_cases_that_are_run():
    for pair in _regularizer_report.FAMILY:
        for name, best in ((pair.case, pair.case_best), (pair.control, pair.control_best)):
            assert not best or len(regularizer.rates(RegularizerConfig(), name)) == 5
    assert set(_regularizer_report.LABELS) == set(regularizer.CASES)


def test_equal_compute_is_what_the_library_says_of_the_regulariser():
    """``1 + 2 * num_starts * (num_steps + 1)`` passes, and one for the gradient itself."""
    ascent = inspect.signature(complexity.add_local_complexity).parameters["ascent"].default
    passes = 1 + 1 + 2 * ascent.num_starts * (ascent.num_steps + 1)
    assert passes == regularizer.PASSES
    config, seeds = RegularizerConfig(**TINY), range(2)
    plans = {
        name: regularizer.plan_of(config, case, 0.1, seeds)
        for name, case in regularizer.CASES.items()
    }
    assert plans["gd"].steps == plans["full"].steps == 4
    assert plans["gd-longer"].steps == plans["sgd-longer"].steps == 4 * passes
    # The rate falls at the same fraction of the way.
    assert plans["gd"].decay_at == (3,)
    assert plans["gd-longer"].decay_at == (17,)


def test_seeds_are_grouped():
    assert regularizer.consecutive([5, 3, 4, 9]) == [range(3, 6), range(9, 10)]


def test_each_seed_has_a_split_and_wrong_labels_of_its_own():
    config = RegularizerConfig(num_train=50, label_noise=0.2, batch_size=5)
    drawn = regularizer.examples(config, range(2, 4))
    assert drawn.train.label.shape == (2, 50)
    assert drawn.test.label.shape == (2, 797)
    clean = data.load("digits", seed=3)
    labels = data.subset(clean, 50, None, seed=3).train.label
    assert (drawn.train.label[1] != labels).sum() == 10
    assert (drawn.test.label[1] == clean.test.label).all()
    assert (drawn.test.label[0] != drawn.test.label[1]).any()


@pytest.mark.slow
def test_a_seed_does_not_depend_on_its_neighbours():
    """GD with the regulariser: seeds 3 and 4 side by side, and seed 4 alone."""
    config = RegularizerConfig(**TINY)
    both = list(regularizer.train(config, "full", 0.1, range(3, 5)))
    (alone,) = regularizer.train(config, "full", 0.1, range(4, 5))
    assert [line["seed"] for line in both] == [3, 4]
    for name in _regularizer_report.QUANTITIES:
        assert both[1][name] == pytest.approx(alone[name], rel=1e-4)
        assert both[0][name] != both[1][name]


def test_the_regulariser_has_the_variance_of_sgds_noise():
    """Its first order moves the gradient by lambda/N sum a_i g_i, with lambda = sqrt(N/b)."""
    seen = {}

    def spy(law, key, **options):
        seen[law] = options["scale"]
        return key

    config = RegularizerConfig(num_train=80, batch_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complexity, "add_local_complexity", spy)
        for name in ("full", "tenth", "sgd-full"):
            make = regularizer.regularizer(config, regularizer.CASES[name])
            make(jax.random.key(0))
            seen[name] = seen.popitem()[1]
    assert seen == pytest.approx({"full": 4.0, "tenth": 0.4, "sgd-full": 0.1})
    assert noise.rademacher(80, 4.0).covariance.diagonal == pytest.approx(
        noise.fisher(80, 5).covariance.diagonal
    )
    assert regularizer.regularizer(config, regularizer.CASES["gd"]) is None


def test_a_run_that_diverges_is_recorded_as_such(monkeypatch):
    def diverging(*_):
        raise training.DivergedError(3, [0])
        yield

    monkeypatch.setattr(training, "train_seeds", diverging)
    found = list(regularizer.train(RegularizerConfig(**TINY), "gd", 0.1, range(2)))
    assert [line["seed"] for line in found] == [0, 1]
    assert all(math.isnan(line["test_accuracy"]) for line in found)


def line_of(case, rate, seed, accuracy):
    return {
        "case": case,
        "rate": rate,
        "seed": seed,
        "test_accuracy": accuracy,
        "test_loss": 1 - accuracy,
        "train_loss": 0.1,
    }


SETTINGS = {"learning_rate": 0.1, "other_rates": [0.3], "tuning_seed": 100, "tuning_seeds": 2}
FULL, GD, BETTER, FULL_BETTER = [0.95, 0.93, 0.96], [0.90, 0.91, 0.92], [0.94, 0.9, 0.93], [0.9] * 3


def records():
    """Three seeds that decide, for which GD's best rate is 0.1, and two that choose 0.3."""
    found = []
    for seed in range(3):
        found += [
            line_of("full", 0.1, seed, FULL[seed]),
            line_of("gd", 0.1, seed, GD[seed]),
            line_of("gd", 0.3, seed, BETTER[seed]),
            line_of("full", 0.3, seed, FULL_BETTER[seed]),
        ]
    for seed in (100, 101):
        found += [
            line_of("gd", 0.1, seed, 0.5),
            line_of("gd", 0.3, seed, 0.6 + 0.1 * (seed - 100)),
            line_of("full", 0.1, seed, 0.7),
            line_of("full", 0.3, seed, float("nan")),
        ]
    return found


def test_best_rates_are_those_of_the_other_seeds():
    """A rate at which a run diverged is never the best one."""
    rows = _regularizer_report.rows(records(), SETTINGS)
    best = {(row["case"], row["rate"]) for row in rows if row.get("best")}
    assert best == {("gd", 0.3), ("full", 0.1)}
    assert all(row["seeds"] == 3 for row in rows if "case" in row)


def test_a_best_rate_is_chosen_among_all_rates():
    """Here one of them was not tried on the tuning seeds."""
    rows = _regularizer_report.rows(records(), SETTINGS | {"other_rates": [0.3, 0.5]})
    assert not any(row.get("best") for row in rows)


def test_differences_are_paired_and_holm_has_the_declared_family(tmp_path):
    rows = _regularizer_report.rows(records(), SETTINGS)
    compared = {tuple(row["compared"]): row for row in rows if "compared" in row}
    assert set(compared) == {
        ("full", "gd", False, False),
        ("full", "gd", False, True),
        ("full", "gd", True, True),
    }
    plain, against_best = compared["full", "gd", False, False], compared["full", "gd", False, True]
    differences = np.subtract(FULL, GD)
    mean, low, high = plain["test_accuracy"]
    assert mean == pytest.approx(differences.mean())
    half = scipy.stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert against_best["rates"] == [0.1, 0.3]
    assert against_best["test_accuracy"][0] == pytest.approx(np.subtract(FULL, BETTER).mean())
    smallest = min(
        scipy.stats.ttest_1samp(np.subtract(FULL, other), 0).pvalue for other in (GD, BETTER)
    )
    found = min(row["test_accuracy_p"] for row in compared.values())
    assert found == pytest.approx(min(1, len(_regularizer_report.FAMILY) * smallest))
    table = _regularizer_report.table(rows)
    assert "GD, full regulariser - GD at its best rate 0.3" in table
    _regularizer_report.draw(records(), SETTINGS, tmp_path / "regularizer.png")
    assert (tmp_path / "regularizer.png").stat().st_size > 10_000


def test_one_seed_has_a_table_without_comparisons():
    few = [line for line in records() if line["seed"] == 0]
    assert "compared" not in str(_regularizer_report.rows(few, SETTINGS))
    assert "GD" in _regularizer_report.table(_regularizer_report.rows(few, SETTINGS))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": ()}, "cases must name one or more, each once"),
        ({"num_train": 1_001}, "num_train must be at most 1000, got 1001"),
        ({"batch_size": 1_001}, "batch_size must be at most num_train = 1000, got 1001"),
        ({"other_rates": (0.1,)}, "other_rates must be different from learning_rate"),
        ({"label_noise": 1.5}, "label_noise must be between 0 and 1, got 1.5"),
        ({"decay_at": -0.1}, "decay_at must be between 0 and 1, got -0.1"),
        ({"tuning_seed": 20}, "tuning_seed must leave the seeds 0 to 29 alone, got 20"),
        ({"tuning_seeds": -1}, "tuning_seeds must be at least 0, got -1"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        RegularizerConfig(**wrong)
