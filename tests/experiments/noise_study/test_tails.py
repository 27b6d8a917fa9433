"""``python -m experiments noise-study tails``: noises of known tails, a tiny study, bad input.

Expected numbers of the report are computed here by numpy and scipy, from made-up records.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.noise_study import TailsConfig, _tails_report, tails
from tests.experiments.noise_study.again import assert_made_again
from tests.support.statistics import assert_agree, assert_rejected

TINY = {
    "nets": ("relu",),
    "points": (0, 2),
    "batch_size": 4,
    "num_examples": 20,
    "width": 2,
    "num_draws": 64,
    "directions": 3,
    "seeds": 2,
}


# Noises -------------------------------------------------------------------------------------------


def test_stable_numbers_have_their_characteristic_function():
    """For the index 1.5, the mean of cos(2 x) is ``exp(-2^1.5)``; that of 1.7 is rejected."""
    x = tails.stable(jax.random.key(0), (200_000,), 1.5)
    cosines = jnp.cos(2 * x)
    mean, error = float(cosines.mean()), float(cosines.std()) / math.sqrt(200_000)
    assert_agree(mean, math.exp(-(2**1.5)), error)
    assert_rejected(mean, math.exp(-(2**1.7)), error)


@pytest.mark.parametrize("drawn", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_stable_numbers_are_finite_at_both_ends_of_the_angles(drawn, monkeypatch):
    """Their angles were NaN at one end, which is drawn once in 2^23 times."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, drawn))
    x = tails.stable(jax.random.key(0), (100,), 1.5)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("name", ["isotropic", "cov", "sgd"])
def test_the_noise_has_the_trace_of_sgds_covariance(name):
    """The near miss has uncentred gradients and a batch of 3."""
    config = TailsConfig(num_examples=20, batch_size=4, num_draws=6_400)
    gradients = jnp.sin(jnp.arange(60.0)).reshape(20, 3) * jnp.array([[1.0, 2.0, 4.0]])
    drawn = tails.draws(config, name, tails._laws(config), jax.random.key(3), gradients)
    squares = jnp.square(drawn).sum(1)
    error = float(squares.std()) / math.sqrt(6_400)
    assert_agree(float(squares.mean()), float(gradients.var(0).sum()) / 4, error)
    assert_rejected(float(squares.mean()), float(jnp.square(gradients).mean(0).sum()) / 3, error)


def test_the_relu_net_is_the_one_in_numpy():
    params = tails.initial("relu", jax.random.key(0), 5, 4)
    x, y = np.sin(np.arange(15.0)).reshape(3, 5), np.array([1, 0, 9])
    p = {name: np.asarray(leaf, float) for name, leaf in params.items()}
    hidden = np.maximum(np.maximum(x @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"], 0)
    outputs = hidden @ p["w3"] + p["b3"]
    wanted = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(3), y]
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}
    np.testing.assert_allclose(tails.LOSSES["relu"](params, examples), wanted, rtol=1e-5)


def test_weights_of_the_relu_net_have_variance_2_over_inputs():
    """The near miss has the variance 1.5 over inputs."""
    params = tails.initial("relu", jax.random.key(0), 64, 200)
    for name, inputs in (("w1", 64), ("w2", 200), ("w3", 200)):
        size = params[name].size
        squares = float(jnp.square(params[name]).mean()) * inputs
        assert_agree(squares, 2.0, 2 * math.sqrt(2 / size), comparisons=3)
        assert_rejected(squares, 1.5, 1.5 * math.sqrt(2 / size), comparisons=3)


# The study ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the finished tiny study."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert tails.STUDY.run(TailsConfig(**TINY, out=out)) == out
    return out


@pytest.mark.slow
def test_the_recorded_table_and_picture_are_made_again_from_the_records(folder, capsys):
    found = tails.STUDY.recorded(folder)
    assert [(line["net"], line["seed"]) for line in found] == [("relu", 0), ("relu", 1)]
    assert_made_again(tails.STUDY, folder, capsys)


def test_a_record_has_every_quantity_of_every_noise_at_every_point(folder):
    one, other = tails.STUDY.recorded(folder)
    for quantity in _tails_report.QUANTITIES:
        assert list(one[quantity]) == list(_tails_report.LABELS)
        assert all(np.shape(values) == (2,) for values in one[quantity].values())
        if quantity != "gaussian_p":  # Its few values may be equal by chance.
            assert one[quantity] != other[quantity]
    assert one["loss"][1] != one["loss"][0] != other["loss"][0]


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    lines = (folder / "tails.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tails.jsonl").write_text(lines[0] + lines[1][:50])
    asked = []

    def run(config, net, seed, *rest):
        asked.append((net, seed))
        return json.loads(lines[1])

    monkeypatch.setattr(tails, "_run", run)
    tails.STUDY.part(TailsConfig(**TINY), tmp_path)
    assert asked == [("relu", 1)]
    assert (tmp_path / "tails.jsonl").read_text() == "".join(lines)


# The report ---------------------------------------------------------------------------------------


def line_of(seed, pooled):
    """A record of one point, where all quantities but the published estimate are 1."""
    return {
        "step": 5,
        "net": "relu",
        "seed": seed,
        "points": [5],
        "loss": [0.5],
        "sgd_kurtosis": [0.3],
        **{name: {law: [1.0] for law in _tails_report.LABELS} for name in _tails_report.QUANTITIES},
        "gaussian_p": {law: [0.05 if seed else 0.06] for law in _tails_report.LABELS},
        "pooled": {law: [2.0 + 0.01 * seed**2] for law in _tails_report.LABELS}
        | {name: [value] for name, value in pooled.items()},
    }


def test_comparisons_by_hand():
    from scipy import stats

    sgd, cov = np.array([1.5, 1.6, 1.65]), np.array([1.6, 1.72, 1.7])
    found = [
        line_of(seed, {"sgd": sgd[seed], "cov": cov[seed], "isotropic": 2.0}) for seed in range(3)
    ]
    rows = {row["noise"]: row for row in _tails_report.rows(found, {})}
    assert rows["sgd"]["pooled"][0] == pytest.approx(sgd.mean())
    assert rows["sgd"]["rejected"] == 2
    assert rows["sgd"]["to_cov"]["mean"] == pytest.approx((sgd - cov).mean())
    # There are two families of two comparisons: Gaussian noises with the index 2, and other noises
    # with the Gaussian one.
    raw = stats.ttest_1samp(cov - 2, 0).pvalue
    assert rows["cov"]["to_two"]["p_value"] == pytest.approx(2 * raw)
    own = [stats.ttest_rel(one, cov).pvalue for one in (sgd, [2.0, 2.01, 2.04])]
    smaller = min(own)
    assert min(rows[name]["to_cov"]["p_value"] for name in ("sgd", "student_t")) == pytest.approx(
        2 * smaller
    )
    assert rows["sgd"]["share"][0] == pytest.approx((cov.mean() - 2) / (sgd.mean() - 2))
    assert rows["stable"]["to_two"] is rows["stable"]["to_cov"] is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nets": ()}, "nets must name one or more, each once"),
        ({"nets": ("relu", "relu")}, "each once"),
        ({"points": (5, 0)}, "points must be iterations from 0 on, in ascending order"),
        ({"points": (-1,)}, "points must be iterations from 0 on"),
        ({"learning_rate": math.inf}, "learning_rate must be finite and above 0"),
        ({"num_draws": 100}, "num_draws must be a multiple of 32, got 100"),
        ({"num_draws": 32}, "num_draws must be at least 64, got 32"),
        ({"directions": 2}, "directions must be at least 3, got 2"),
        ({"num_examples": 1_001}, "num_examples must be at most 1,000"),
        ({"degrees_of_freedom": 2.0}, "degrees_of_freedom must be finite and above 2"),
        ({"stable_index": 2.0}, "stable_index must be from 0.1 to below 2, got 2.0"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(ValueError, match=words) as caught:
        TailsConfig(**changed)
    assert len(str(caught.value)) <= 400
