"""The study on tiny settings: its draws, its computations, and its records."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import models
from experiments.decide import (
    _calibration,
    _datasets,
    _nets,
    _records,
    _runs,
    report,
    settings,
    study,
)
from msgd_jax import loss
from tests.support.statistics import FALSE_ALARMS

TINY = dataclasses.replace(
    settings.DIGITS,
    steps=12,
    evaluations=3,
    num_train=20,
    pool=60,
    num_test=50,
    batch_size=4,
    supports=(8, 10),
    seeds=(100, 4),
    tuning_seeds=(40, 2),
    tuning_factors=(1.0, 2.0),
    longer=2,
    refresh_every=5,
    family=("sgd-other-key", "cov", "isotropic", "diagonal", "gd-best"),
    others=(),
)


@pytest.fixture(scope="module")
def images() -> _datasets.Images:
    """The images of the tiny setting."""
    return _datasets.load(TINY)


@pytest.fixture(scope="module")
def runner(images) -> _runs.Runner:
    """The runner that all tests share, with its compiled programs."""
    return _runs.Runner(TINY, images, _runs.Options())


def quiet(runner, images, folder: pathlib.Path, seeds_at_once: int = 2) -> study.Study:
    """A study with records in a folder, which prints nothing."""
    return study.Study(runner, images, folder, seeds_at_once=seeds_at_once, told=lambda text: None)


# Draws --------------------------------------------------------------------------------------------


def test_the_stated_share_of_labels_is_of_another_class(images):
    for share, flipped in ((0.0, 0), (0.2, 4), (1.0, 20)):
        noisy = dataclasses.replace(TINY, label_noise=share)
        sample = _datasets.draw(noisy, jax.random.key(1), jnp.asarray(images.pool_labels))
        true = images.pool_labels[sample.positions]
        assert int((sample.labels != true).sum()) == flipped
        assert ((sample.labels >= 0) & (sample.labels < 10)).all()


def test_every_other_class_is_as_likely():
    """Nine counts with mean 1,000 have a chi-square with 8 degrees of freedom."""
    many = dataclasses.replace(TINY, num_train=9_000, pool=9_000, label_noise=1.0)
    sample = _datasets.draw(many, jax.random.key(2), jnp.zeros(9_000, jnp.int32))
    counts = np.bincount(sample.labels, minlength=10)
    assert counts[0] == 0
    assert ((counts[1:] - 1_000) ** 2 / 1_000).sum() < scipy.stats.chi2.isf(FALSE_ALARMS, 8)


@pytest.mark.slow
def test_every_seed_draws_its_own_subset_labels_and_weights(runner):
    state, _ = runner._started("gd", [100, 101], None)
    kernel, keys = state.params["conv1"]["kernel"], jax.random.key_data(state.noise_keys)
    for values in map(np.asarray, (*state.examples, kernel, keys)):
        assert not (values[0] == values[1]).all()


def test_contestants_share_data_and_weights_but_no_noise_key(runner):
    one, other = (runner._started(name, [100, 101], None)[0] for name in ("sgd", "sgd-other-key"))
    for a, b in ((one.examples, other.examples), (one.params, other.params)):
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    assert (jax.random.key_data(one.noise_keys) != jax.random.key_data(other.noise_keys)).any()
    numbers = {_runs.noise_number(c.key) for c in settings.CONTESTANTS.values()}
    # The three variants of GD, which draw nothing, share one number.
    assert len(numbers) == len(settings.CONTESTANTS) - 2


# Computations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "convolution", "groups"),
    [
        ("digits_net", "product", 1),
        ("digits_net", "lax", 1),
        ("vgg11", "product", 3),
        ("vgg11", "product", 1),
        ("vgg11", "lax", 3),
    ],
)
def test_the_nets_are_those_of_the_models(net, convolution, groups):
    """Logits and their derivatives are those of `experiments.models`, whose code is another."""
    setting = dataclasses.replace(TINY, net=net, width=2)
    kwargs = {"width": 2} if net == "vgg11" else {}
    model = models.functional(models.MODELS[net], **kwargs)
    made, rng = _nets.make(setting, convolution, groups), np.random.default_rng(0)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    assert shapes == jax.eval_shape(model.init, jax.random.key(0))
    # With these variances, eight layers neither shrink nor enlarge what passes through them.
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * (2 / max(x.size // x.shape[-1], 1)) ** 0.5).astype(
            np.float32
        ),
        shapes,
    )
    pixels = rng.integers(0, 17, (6, 32, 32, 3) if net == "vgg11" else (6, 8, 8, 1), np.uint8)
    scaled = (pixels / _datasets.max_value(setting)).astype(np.float32)

    def both(logits_of, params):
        logits, pull_back = jax.vjp(logits_of, params)
        return logits, pull_back(jnp.cos(logits))

    ours = jax.jit(lambda p: both(lambda q: made.logits(q, jnp.asarray(pixels)), p))(params)
    theirs = jax.jit(lambda p: both(lambda q: model.apply(q, {}, scaled)[0], p))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)
    assert float(jnp.abs(ours[0]).max()) > 0.1


def test_the_diagonal_of_s_is_that_of_the_dense_matrix():
    """The reference is the variance over all gradients, by numpy in float64."""
    losses = loss.per_example(lambda theta, example: (theta @ example.image) ** 2 + example.label)
    theta = jnp.asarray([1.0, -2.0])
    x = jax.random.normal(jax.random.key(0), (250, 2))
    examples = _runs.Example(x, jnp.zeros(250))
    gradients = loss.LossVector(losses, examples).gradient_matrix(theta)
    got = _runs.covariance_diagonal(losses, theta, examples)
    np.testing.assert_allclose(got, np.var(np.asarray(gradients, np.float64), axis=0), rtol=1e-5)


@pytest.mark.slow
def test_isotropic_noise_has_the_trace_of_the_diagonal_one(runner):
    traces = []
    for name in ("isotropic", "diagonal"):
        state, advance = runner._started(name, [100, 101], None)
        variances = [np.asarray(x[0]) for x in jax.tree.leaves(advance(state, 0, 1).variances)]
        traces.append(sum(x.sum() for x in variances))
        spread = np.ptp(np.concatenate([x.ravel() for x in variances]))
        assert (spread == 0) == (name == "isotropic")
    assert traces[0] > 0
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_gd_is_gradient_descent_with_the_decay(runner):
    """The reference descends the mean loss by a loop of its own, with the rate doubled.

    Parameters of size one agree up to the rounding of twelve float32 steps.
    """
    state, advance = runner._started("gd", [100, 101], [2.0, 1.0])
    params, examples = (
        jax.tree.map(lambda x: x[0], part) for part in (state.params, state.examples)
    )
    net = _nets.make(TINY)

    def mean_loss(params):
        log_p = jax.nn.log_softmax(net.logits(params, examples.image))
        return -jnp.take_along_axis(log_p, examples.label[:, None], 1).mean()

    descend = jax.jit(
        lambda p, rate: jax.tree.map(lambda x, g: x - rate * g, p, jax.grad(mean_loss)(p))
    )
    for step in range(12):
        params = descend(params, 0.2 if step < 8 else 0.02)  # It decays after 70 % of 12 steps.
    final = advance(state, 0, 12).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=2e-5), final, params)


def test_a_seed_does_not_depend_on_the_seeds_beside_it(runner):
    losses = [runner.run("cov", seeds).scores.train_loss for seeds in ([100, 101], [101, 102])]
    np.testing.assert_allclose(losses[0][:, 1], losses[1][:, 0], rtol=1e-4)
    assert not np.allclose(losses[0][-1, 0], losses[0][-1, 1], rtol=1e-3)


@pytest.mark.slow
def test_the_fastest_choice_comes_first_and_the_budget_ends_the_search(images):
    choices, told = [(_runs.Options(groups=groups), 2) for groups in (1, 2)], []
    timings = _calibration.calibrate(
        TINY, images, choices, name="sgd", steps=3, budget_seconds=0.0, told=told.append
    )
    assert [timing.runner.options for timing in timings] == [_runs.Options(groups=1)]
    assert len(told) == 2
    timings = _calibration.calibrate(
        TINY,
        images,
        [*choices, (_runs.Options(microbatch_size=2), 2)],
        name="sgd",
        steps=3,
        budget_seconds=1e6,
        told=told.append,
    )
    assert len(timings) == 3
    speeds = [timing.seconds_per_seed_step for timing in timings]
    assert speeds == sorted(speeds)


def test_svag_makes_more_and_smaller_steps():
    svag = settings.CONTESTANTS["svag"]
    assert svag.steps(TINY) == 24
    assert svag.learning_rate(TINY) == TINY.learning_rate / 2
    assert settings.CONTESTANTS["gd-longer"].evaluation_steps(TINY) == [8, 16, 24]


# Records ------------------------------------------------------------------------------------------


def test_a_study_end_to_end_is_recorded_resumed_and_reported(runner, images, tmp_path, monkeypatch):
    one = quiet(runner, images, tmp_path)
    seeds = study.main_seeds(TINY)
    assert study.run_setting(one, TINY.contestants, seeds, shows_progress=False) == []
    before = one.path.read_text()
    # There are 7 contestants with 4 seeds, and 2 learning rates with 2 seeds; a line has 2 runs.
    assert len(one.runs()) == 7 * 4 + 4
    assert len(before.splitlines()) == 7 * 2 + 2
    assert str(tmp_path) not in before

    monkeypatch.setattr(_runs.Runner, "run", None)  # A call would fail.
    again = quiet(runner, images, tmp_path)
    assert study.run_setting(again, TINY.contestants, seeds, shows_progress=False) == []
    assert one.path.read_text() == before

    page, text = report.write(TINY, tmp_path)
    assert page.read_text().startswith("## digits")
    for name in TINY.contestants:
        assert f"| {settings.label(name, TINY)} " in text
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_a_line_that_was_cut_short_is_run_again(runner, images, tmp_path):
    one = quiet(runner, images, tmp_path)
    job = one.job("sgd", [100, 101, 102, 103])
    assert one.run(job)
    first, second = one.path.read_text().splitlines()
    one.path.write_text(first + "\n" + second[:100])
    assert one.missing(job) == [(102, 1.0), (103, 1.0)]
    assert one.run(job)
    assert one.missing(job) == []
    assert one.path.read_text().splitlines()[0] == first


def test_nothing_is_started_after_the_deadline(runner, images, tmp_path):
    one = quiet(runner, images, tmp_path)
    assert study.run_setting(one, ["gd"], [100], deadline=0.0, shows_progress=False) == ["gd"]
    assert not one.path.exists()
    assert one.run(one.job("gd", [100, 101]))  # Now the study knows how long a job takes.
    assert not one.run(one.job("gd", [102, 103]), latest_end=0.0)


def test_records_of_another_setting_are_refused(runner, images, tmp_path):
    one = quiet(runner, images, tmp_path)
    one.run(one.job("gd", [100, 101]))
    other = dataclasses.replace(TINY, learning_rate=0.2)
    with pytest.raises(ValueError, match="records of another setting"):
        quiet(_runs.Runner(other, images, _runs.Options()), images, tmp_path)
    # Seeds, margin and family belong to the analysis, and may change.
    same = dataclasses.replace(TINY, seeds=(0, 7), margin=0.5, family=("cov",))
    assert same.fingerprint == TINY.fingerprint
    moved = images._replace(test_labels=np.roll(images.test_labels, 1))
    with pytest.raises(ValueError, match="records of other images"):
        quiet(runner, moved, tmp_path)


def test_gds_own_rate_is_the_best_on_the_tuning_seeds_alone():
    """The main seed 100 would choose another factor. Without all tuning runs there is no choice."""

    def curve(accuracy):
        return _records.Curve(np.asarray([12]), *(np.asarray([accuracy]) for _ in range(4)))

    found = {
        _records.Run("gd", factor, seed): curve(accuracy)
        for factor, seed, accuracy in (
            (1.0, 40, 0.5),
            (1.0, 41, 0.7),
            (2.0, 40, 0.9),
            (2.0, 41, 0.4),
            (1.0, 100, 0.0),
            (2.0, 100, 1.0),
        )
    }
    assert study.best_factor(TINY, found) == 2.0
    found[_records.Run("gd", 2.0, 41)] = curve(0.2)
    assert study.best_factor(TINY, found) == 1.0
    del found[_records.Run("gd", 2.0, 41)]
    assert study.best_factor(TINY, found) is None


def test_gd_is_compared_where_its_loss_first_is_sgds():
    """At the first evaluation with that loss or less, of the longer run if there is none."""
    steps = np.asarray([1, 2, 3])
    accuracy = np.asarray([0.1, 0.2, 0.4])
    gd = _records.Curve(steps, np.asarray([1.0, 0.5, 0.1]), accuracy, accuracy, accuracy)
    longer = gd._replace(train_loss=np.asarray([0.9, 0.05, 0.01]), test_accuracy=accuracy + 0.5)
    for wanted, expected, without in (
        (2.0, 0.1, 0.1),
        (0.5, 0.2, 0.2),
        (0.3, 0.4, 0.4),
        (0.05, 0.7, 0.4),
        (0.001, 0.9, 0.4),
    ):
        sgd = gd._replace(train_loss=np.asarray([0.0, 0.0, wanted]))
        for runs, accuracy_then in (({7: longer}, expected), ({}, without)):
            stopped = report._at_equal_loss({7: gd}, runs, {7: sgd})[7]
            assert stopped.test_accuracy.tolist() == [accuracy_then]


def test_the_report_adjusts_over_the_declared_family():
    rng = np.random.default_rng(0)
    seeds = range(100, 120)
    setting = dataclasses.replace(TINY, seeds=(100, 20))
    found = {}
    for name, mean in (("gd", 0.5), ("sgd", 0.6), ("cov", 0.6), ("isotropic", 0.5)):
        for seed in seeds:
            values = np.asarray([mean + 0.01 * rng.normal()])
            found[_records.Run(name, 1.0, seed)] = _records.Curve(np.asarray([12]), *[values] * 4)
    rows = report.rows(setting, found)
    table = {row.label: row for row in rows}
    notes = report._notes(setting, rows, [])
    assert "2 of 5 contestants" in notes
    assert "Not run: SGD, another key, GD + diagonal noise, GD at its best rate." in notes
    # The gap between GD and SGD is 10 points, which the declared margin is far below.
    assert "GD may be equivalent to SGD too" not in notes
    wide = dataclasses.replace(setting, margin=0.06)
    assert "GD may be equivalent to SGD too" in report._notes(wide, rows, [])
    cov, isotropic = table["M-SGD-Cov"], table["GD + isotropic noise"]
    assert cov.to_gd
    assert cov.share
    assert isotropic.to_sgd
    assert isotropic.share
    # With five declared contestants there are ten p-values: the smallest is multiplied by ten.
    smallest = min(cov.to_gd.p_value, isotropic.to_sgd.p_value)
    assert min(cov.adjusted_to_gd, isotropic.adjusted_to_sgd) == pytest.approx(10 * smallest)
    assert cov.share.low < 1 < cov.share.high
    assert isotropic.share.low < 0 < isotropic.share.high
    assert cov.adjusted_to_sgd > 0.05
    assert np.isnan(table[report.AT_EQUAL_LOSS].adjusted_to_gd)
