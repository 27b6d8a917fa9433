"""``python -m experiments noise-study scale``: a tiny study, its fits by hand, and bad input."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import records
from experiments.noise_study import ScaleConfig, _fashion, _scale_report, scale
from tests.experiments.noise_study.again import assert_made_again

TINY = {
    "num_examples": 40,
    "width": 3,
    "targets": (2.2, 2.0),
    "batch_sizes": (32, 8, 2),
    "evaluated": 20,
    "most_epochs": 40,
    "reference_steps": 6,
    "microbatch_size": 4,
    "microbatches": 4,
    "windows": (2,),
    "checkpoints": 2,
    "law_draws": (2,),
    "hessian_draws": 3,
    "seeds": 2,
}


def made_up(seeds, num_examples):
    """Examples of ten classes around ten points in five dimensions."""
    draws = np.random.default_rng(0)
    y = draws.integers(10, size=(len(seeds), num_examples))
    x = draws.normal(size=(10, 5))[y] + draws.normal(size=(len(seeds), num_examples, 5))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the finished tiny study, on made-up examples."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_fashion, "images", made_up)
        assert scale.STUDY.run(ScaleConfig(**TINY, out=out)) == out
    return out


@pytest.mark.slow
def test_the_table_and_the_picture_are_made_again_from_the_records(folder, capsys):
    assert_made_again(scale.STUDY, folder, capsys)


def test_estimators_agree_with_the_exact_values(folder):
    """The library's tests hold the estimators; this holds which of them is recorded where.

    Traces of two draws scatter, and a factor of 3 is enough to tell a trace from other quantities.
    """
    (line,) = (one for one in scale.STUDY.recorded(folder) if one["kind"] == "reference")
    assert line["steps"] == [0, 2, 6]
    found = {name: np.asarray(values) for name, values in line["measured"].items()}
    names = ["exact", "2 draws", "4 micro-batches, 2 steps", "2 micro-batches, 2 steps"]
    assert [name for name in found if name not in ("trace_hs", "along", "loss")] == names
    assert all(found[name].shape == (3, 2, 5) for name in names)
    exact = found["exact"]
    assert np.allclose(exact[..., 0], exact[..., 1] / exact[..., 2], rtol=1e-3)
    # The squared gradient is exact, also where the trace is estimated from draws.
    assert np.allclose(found["2 draws"][..., 2], exact[..., 2], rtol=1e-3)
    for name in names[1:]:
        assert np.all(np.abs(np.log(found[name][1:, :, 1] / exact[1:, :, 1])) < math.log(3))
    assert line["cost"]["exact"][0] == 80
    assert line["cost"]["2 draws"][0] == 120
    assert line["cost"]["2 micro-batches, 2 steps"] == [0, 0]


def test_a_monitor_sees_the_mean_of_its_micro_batches():
    """The gradients 1, 3, 6 and 10 in two groups have the means 2 and 8, with a variance of 18."""
    _, each = scale.monitors(ScaleConfig(**TINY))["2 micro-batches, 2 steps"]
    gradients = jnp.asarray([[1.0], [3.0], [6.0], [10.0]])
    state = scale._shown_to(each, each.init(jnp.zeros(1)), gradients, 2)
    # The trace of one example's gradient is 8 times the variance of a mean of 8.
    assert float(state.trace[-1]) == pytest.approx(8 * 18)
    assert float(state.squared[-1]) == pytest.approx(25 - 18 / 2)


def test_steps_to_a_target_are_those_of_a_loop_by_hand():
    """The loop takes each step by itself, and interpolates between the losses around the target.

    With a growth of nearly zero, the loss of the first 20 examples is evaluated at every step.
    """
    config = ScaleConfig(**TINY | {"growth": 1e-6})
    examples = made_up(config.all_seeds, 40)
    keys, start = scale._start(config, examples)
    reached = scale._race(config, 8)(start, examples, keys, 0.5, 400)
    own = jax.tree.map(lambda leaf: leaf[1], (start, examples))
    params, data = own
    from msgd_jax import noise
    from msgd_jax._streams import Stream, derive

    law = noise.sgd(40, 8, replace=True)
    key = derive(jax.random.key(1), Stream.CASES, scale._RACES, 8)
    mean = jax.jit(lambda p, w: (_fashion.losses(p, data) * w).sum())
    part = jnp.zeros(40).at[:20].set(1 / 20)
    before = float(mean(params, part))
    for step in range(400):
        grads = jax.grad(mean)(params, law.sample(key, step).dense())
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        now = float(mean(params, part))
        if now <= 2.0:
            break
        before = now
    by_hand = step + (before - 2.0) / (before - now)
    assert float(reached[1, 1]) == pytest.approx(by_hand, abs=0.05)


def test_the_search_ends_with_every_best_rate_inside(folder):
    for line in scale.STUDY.recorded(folder):
        if line["kind"] == "batch":
            logs = np.log(np.asarray(line["reached"])).mean(1)
            assert set(logs.argmin(0)) <= set(range(1, len(line["rates"]) - 1))


def test_the_search_goes_to_both_sides_of_the_best_rates_and_gives_up():
    def steps(first, last):
        return np.array([[first, last]] * 2, float)

    tried = {1.0: steps(10, 30), 2.0: steps(8, 40)}
    assert scale._edges(tried) == {0.5, 1.0, 2.0, 4.0}
    nowhere = {1.0: steps(10, math.inf)}
    assert scale._edges(nowhere) == {0.5, 2.0}
    many = {2.0**i: steps(10 + i**2, math.inf) for i in range(-4, 4)}
    assert scale._edges(many) == {0.5, 2.0}


def test_a_stopped_study_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    lines = (folder / "scale.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scale.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    asked = []

    def best(config, examples, size):
        asked.append(size)
        return json.loads(lines[3])

    monkeypatch.setattr(scale, "best", best)
    monkeypatch.setattr(_fashion, "images", made_up)
    scale.STUDY.part(ScaleConfig(**TINY), tmp_path)
    assert asked == [2]
    assert (tmp_path / "scale.jsonl").read_text() == "".join(lines)


def test_a_curve_without_noise_is_fitted_exactly():
    sizes = np.array([4, 16, 64, 256])
    critical, fewest, misfit = _scale_report.fit(sizes, 30 * (1 + 50 / sizes))
    assert (critical, fewest) == (pytest.approx(50, rel=1e-4), pytest.approx(30, rel=1e-4))
    assert misfit < 1e-5


def test_the_prediction_is_the_mean_until_the_target():
    # The loss passes 2 at step 3, where the values have risen from 10 to 25. Their means are 15
    # over the first two steps and 22.5 over the third.
    steps, loss = np.array([0.0, 2.0, 4.0]), np.array([4.0, 3.0, 1.0])
    values = np.array([10.0, 20.0, 30.0])
    assert _scale_report._mean_until(steps, loss, values, 2.0) == pytest.approx(
        (2 * 15 + 1 * 22.5) / 3
    )
    assert math.isnan(_scale_report._mean_until(steps, loss, values, 0.5))
    assert math.isnan(_scale_report._mean_until(steps, loss, values, 5.0))


def test_p_values_are_adjusted_over_all_targets_and_predictors():
    """Two targets with three predictors each are declared, whether they are reached or not.

    Holm's method is written out here, with p-values of scipy's t-test on both sides.
    """
    seeds, sizes = 4, (4, 16, 64)
    draws = np.random.default_rng(0)
    critical = 10 * draws.uniform(1, 1.2, (2, seeds))
    batches = [
        {
            "kind": "batch",
            "batch_size": size,
            "rates": [0.1],
            "reached": [(50 * (1 + critical.T / size)).tolist()],
        }
        for size in sizes
    ]
    # The exact values are constant along the reference run, which passes the losses 2 and 1.8, but
    # not 1.
    simple, trace, along = draws.uniform(9, 14, (3, seeds))
    exact = np.stack([simple, trace, np.ones(seeds), simple, simple], -1)
    reference = {
        "kind": "reference",
        "steps": [0, 2, 4],
        "measured": {
            "exact": [exact.tolist()] * 3,
            "loss": [[3.0] * seeds, [2.5] * seeds, [1.5] * seeds],
            "trace_hs": [along.tolist()] * 3,
            "along": [[1.0] * seeds] * 3,
        },
        "cost": {"exact": [1, 1.0]},
    }
    rows = _scale_report.rows([reference, *batches], {"targets": (2.0, 1.8)})
    predicted = {"simple": simple, "pooled": trace, "curvature": along}

    def alone(place, name):
        logs = np.log(critical[place]) - np.log(predicted[name])
        tests = ((-math.log(2), "greater"), (math.log(2), "less"))
        return max(stats.ttest_1samp(logs, at, alternative=side).pvalue for at, side in tests)

    targets = [row for row in rows if "target" in row]
    family = [(place, name) for place in range(2) for name in predicted]
    expected = 0.0
    for times, (place, name) in zip(
        (6, 5, 4, 3, 2, 1), sorted(family, key=lambda x: alone(*x)), strict=True
    ):
        expected = max(expected, min(1.0, times * alone(place, name)))
        assert targets[place][name]["p_equivalent"] == pytest.approx(expected, rel=1e-4)
    # The comparisons of a loss that the reference run does not reach count as if p were 1.
    fewer = _scale_report.rows([reference, *batches], {"targets": (2.0, 1.0)})
    smallest = min(alone(0, name) for name in predicted)
    kept = next(row for row in fewer if row.get("target") == 2.0)
    assert min(kept[name]["p_equivalent"] for name in predicted) == pytest.approx(
        6 * smallest, rel=1e-4
    )


@pytest.mark.slow
def test_records_without_a_reference_run_are_named(folder):
    lines = scale.STUDY.recorded(folder)
    batches = [line for line in lines if line["kind"] == "batch"]
    with pytest.raises(records.DamagedRecordError, match="no reference run"):
        _scale_report.rows(batches, TINY)
    with pytest.raises(records.DamagedRecordError, match="at least 3 batch sizes, got 2"):
        _scale_report.rows([line for line in lines if line not in batches[:1]], TINY)


def test_images_are_pooled_and_differ_between_seeds(monkeypatch):
    draws = np.random.default_rng(0)
    pool = types.SimpleNamespace(
        image=draws.integers(256, size=(30, 28, 28, 1), dtype=np.uint8), label=np.arange(30) % 10
    )
    monkeypatch.setattr(_fashion.data, "load", lambda name: types.SimpleNamespace(test=pool))
    found = _fashion.images(range(2), 12)
    assert found["x"].shape == (2, 12, 196)
    assert np.allclose(found["x"].mean((1, 2)), 0, atol=1e-6)
    assert np.allclose(found["x"].std((1, 2)), 1, rtol=1e-6)
    assert not np.array_equal(found["y"][0], found["y"][1])
    # Pixels are means over squares of four, up to a shift and a scale: their correlation with the
    # means of one of the images is 1. Blank images would have no correlation.
    squares = np.stack([_squares(image) for image in pool.image])
    assert squares.any(1).all()
    first = np.asarray(found["x"][0, 0])
    correlations = sorted(np.corrcoef(first, one)[0, 1] for one in squares)
    assert correlations[-1] == pytest.approx(1, abs=1e-5)
    assert correlations[-2] < 0.9


def _squares(image):
    """The means over squares of 2 x 2 pixels, as one vector."""
    grey = image[..., 0].astype(float)
    return (grey[::2, ::2] + grey[1::2, ::2] + grey[::2, 1::2] + grey[1::2, 1::2]).ravel() / 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"targets": (0.5, 0.9)}, "targets must be in descending order"),
        ({"targets": (math.nan,)}, "targets must be finite and above 0"),
        ({"batch_sizes": (4, 8, 16)}, "batch_sizes must be in descending order"),
        ({"batch_sizes": (8, 4)}, "batch_sizes must be at least 3"),
        ({"first_rate": 0.0}, "first_rate must be finite and above 0, got 0.0"),
        ({"microbatches": 5}, "microbatches must be an even number of at least 4, got 5"),
        ({"windows": (1,)}, "windows must be different numbers of at least 2"),
        ({"law_draws": ()}, "law_draws must be different numbers"),
        ({"checkpoints": 500}, "checkpoints must be at most"),
        ({"evaluated": 5000}, "num_examples must be from evaluated = 5000"),
        ({"num_examples": 70_000}, "num_examples must be from"),
        ({"hessian_draws": 2}, "hessian_draws must be at least 3, got 2"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(ValueError, match=words) as caught:
        ScaleConfig(**changed)
    assert len(str(caught.value)) <= 400
