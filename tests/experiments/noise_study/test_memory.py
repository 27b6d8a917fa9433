"""``python -m experiments noise-study memory``: exact variances, a tiny study, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records, terminal
from experiments.noise_study import MemoryConfig, _memory_report, _minimum, memory
from msgd_jax import noise, sde
from tests.experiments.noise_study.again import assert_made_again
from tests.support.statistics import assert_agree, assert_rejected

TINY = {
    "other_rates": (),
    "batch_size": 5,
    "num_examples": 20,
    "width": 1,
    "weight_decay": 0.05,
    "steps": 20,
    "measure_every": 5,
    "paths": 2,
    "descent_steps": 500,
    "seeds": 2,
}
N, B, CYCLE = 12, 3, 4
LAWS = {name: law(N, B) for name, law in memory.LAWS.items()}
CURVATURES, NOISE = np.array([0.01, 1.0, 6.0]), np.array([0.5, 2.0, 1.0])


# Exact variances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_predictions_are_those_of_the_dense_covariance_of_all_steps(name):
    """The last point is a sum of the noises of all steps: its variance is a quadratic form."""
    law, rate, steps = LAWS[name], 0.1, (3, 10)
    found = _minimum.predicted_variances(
        law, CURVATURES, NOISE, learning_rate=rate, measured_at=steps, cycle=CYCLE
    )
    wanted = np.zeros(3)
    for last in steps:
        between = np.array(
            [[law.covariance_between(s, t).alpha for t in range(last)] for s in range(last)]
        )
        for i, curvature in enumerate(CURVATURES):
            factors = rate * (1 - rate * curvature) ** np.arange(last)[::-1]
            wanted[i] += N * NOISE[i] * factors @ between @ factors / len(steps)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_the_prediction_for_independent_noise_after_many_steps_is_stationary():
    law = LAWS["independent"]
    found = _minimum.predicted_variances(
        law, CURVATURES, NOISE, learning_rate=0.1, measured_at=(20_000,), cycle=CYCLE
    )
    covariance = np.diag(N * law.covariance.alpha * NOISE)
    wanted = sde.stationary_covariance(np.diag(CURVATURES), covariance, learning_rate=0.1)
    np.testing.assert_allclose(found, np.diag(wanted), rtol=1e-6)


def problem():
    """Quadratic losses, whose Hessian has the curvatures on its diagonal, and their minimum."""
    places = np.sin(np.arange(3 * N)).reshape(N, 3) * NOISE
    places -= places.mean(0)

    def losses(params, examples):
        return (jnp.square(params[None] - examples["x"]) * jnp.asarray(CURVATURES)[None]).sum(1) / 2

    examples = {"x": jnp.asarray(places, jnp.float32)}
    slopes = -places * CURVATURES
    point = jnp.zeros(3, jnp.float32)
    return losses, _minimum.Minimum(examples, point, 0.0, 0.0, CURVATURES, np.eye(3), slopes)


def walked(model, name, paths, steps=8, measure_every=3):
    """The measurements and the last points of paths from the minimum, by a law's name."""
    config = MemoryConfig(
        num_examples=N, batch_size=B, steps=steps, measure_every=measure_every, paths=paths
    )
    losses, minimum = problem()
    advance = memory._make_advance(model, LAWS[name], losses)
    return memory.walk(config, minimum, advance, model, jax.random.key(1), 0.1, terminal.Silent())


@pytest.mark.parametrize("name", LAWS)
def test_measured_variances_are_the_predicted_ones(name):
    """The variances of 4,000 paths after 6 steps reject the prediction for another law."""
    paths, noises = 4_000, np.square(problem()[1].slopes).mean(0)
    found, _ = walked("quadratic", name, paths)
    options = {"learning_rate": 0.1, "measured_at": (6,), "cycle": CYCLE}
    wanted = _minimum.predicted_variances(LAWS[name], CURVATURES, noises, **options)
    # The standard error of a sample variance of numbers that are nearly normal.
    error = wanted * np.sqrt(2 / paths)
    assert_agree(found["measured"], wanted, error, comparisons=6)
    assert_agree(found["about_minimum"], wanted, error, comparisons=6)
    other = LAWS["persistent" if name != "persistent" else "independent"]
    wrong = _minimum.predicted_variances(other, CURVATURES, noises, **options)
    assert_rejected(found["measured"][0], wrong[0], wrong[0] * np.sqrt(2 / paths), comparisons=6)


@pytest.mark.parametrize("name", ["reshuffled", "anti"])
def test_a_net_with_quadratic_losses_takes_the_steps_of_the_quadratic(name):
    (one, last), (other, end) = (walked(model, name, 3) for model in ("quadratic", "net"))
    for quantity, values in one.items():
        np.testing.assert_allclose(other[quantity], values, rtol=1e-3)
    np.testing.assert_allclose(last, end, atol=1e-6)


# The study ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the finished tiny study, of two laws."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory_report, "ON_NET", ("independent", "reshuffled"))
        patch.setattr(memory, "LAWS", {"independent": noise.sgd})
        patch.setitem(memory.LAWS, "reshuffled", noise.random_reshuffling)
        assert memory.STUDY.run(MemoryConfig(**TINY, out=out)) == out
    return out


def test_the_recorded_table_and_picture_are_made_again_from_the_records(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(_memory_report, "ON_NET", ("independent", "reshuffled"))
    found = memory.STUDY.recorded(folder)
    assert [line["seed"] for line in found] == [0] * 4 + [1] * 4
    assert_made_again(memory.STUDY, folder, capsys)


def test_paths_start_at_a_minimum(folder):
    """In float32 a gradient of losses of order 1 is rounded to a few 1e-6 of its terms."""
    for line in memory.STUDY.recorded(folder):
        assert line["slope_at_minimum"] < 5e-5
        assert line["smallest_curvature"] > 0
        size = 64 * 1 + 1 + 1 + 1 + 10 + 10  # The parameters of the net of width 1.
        assert sum(line["eigenvalues"]) == size
        assert min(line["predicted"]) >= 0 < max(line["predicted"])


def test_a_stopped_study_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    lines = (folder / "memory.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "memory.jsonl").write_text("".join(lines[:7]) + lines[7][:50])
    asked = []

    def make(config, missing):
        asked.extend(missing)
        yield json.loads(lines[7])

    study = dataclasses.replace(
        memory.STUDY,
        make=make,
        plan=lambda config: [
            tuple(json.loads(line)[name] for name in memory.STUDY.names) for line in lines
        ],
    )
    study.part(MemoryConfig(**TINY), tmp_path)
    assert asked == [(1, "net", "reshuffled", 0.1)]
    assert (tmp_path / "memory.jsonl").read_text() == "".join(lines)


# The report ---------------------------------------------------------------------------------------


def line_of(name, seed, measured, model="net"):
    """A record with one direction at an eigenvalue of 0.05, whose predicted variance is 2."""
    values = {"predicted": 2.0, "measured": measured, "about_minimum": 3 * measured}
    return {
        "seed": seed,
        "model": model,
        "noise": name,
        "learning_rate": 0.1,
        "trace_at_minimum": 10.0,
        "trace_at_mean": 9.0,
        **_memory_report.binned(
            np.array([0.05]), {key: np.array([value]) for key, value in values.items()}
        ),
    }


def test_ratios_and_tests_by_hand():
    found = [line_of("independent", seed, x) for seed, x in enumerate((1.9, 2.0, 2.4))]
    found += [line_of("anti", seed, x) for seed, x in enumerate((0.19, 0.4, 0.6))]
    rows = _memory_report.rows(found, {"learning_rate": 0.1, "margin": 0.1})
    assert len(rows) == 2 * 5
    kept = [row for row in rows if row["ratio"]]
    assert [row["group"] for row in kept] == [2, 2]
    assert _memory_report.group_name(2) == "0.01 to 0.1"
    ratios = np.array([0.95, 1.0, 1.2])
    # The t quantile of 2 degrees of freedom is 4.303.
    assert kept[0]["ratio"] == pytest.approx(
        [ratios.mean(), 4.302653 * ratios.std(ddof=1) / np.sqrt(3)]
    )
    assert kept[0]["about_ratio"][0] == pytest.approx(3 * ratios.mean())
    assert kept[1]["measured_to_independent"][0] == pytest.approx((0.1 + 0.2 + 0.25) / 3)
    assert kept[1]["predicted_to_independent"][0] == pytest.approx(1)
    assert kept[1]["trace_change"][0] == pytest.approx(-0.1)
    from scipy import stats

    # With a declared family of 3 noises with 5 groups, the smaller p-value is multiplied by 15.
    raw = stats.ttest_1samp(np.array([0.095, 0.2, 0.3]), 1.0).pvalue
    assert kept[1]["p_value"] == pytest.approx(15 * raw)


def test_groups_of_the_tables_are_unions_of_those_of_the_records():
    curvatures = np.array([1e-5, 5e-4, 2e-3, 8e-3, 0.02, 0.2, 0.9, 1.5, 20.0, 90.0])
    line = _memory_report.binned(curvatures, {"measured": curvatures})
    assert sum(line["eigenvalues"]) == 10
    assert _memory_report.decades(line, "eigenvalues").tolist() == [2, 2, 1, 2, 3]
    assert _memory_report.decades(line, "measured")[1] == pytest.approx(0.01)


def test_records_without_independent_batches_are_refused():
    with pytest.raises(records.DamagedRecordError, match="independent batches for each seed"):
        _memory_report.rows([line_of("anti", 0, 1.0)], {"learning_rate": 0.1, "margin": 0.1})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"other_rates": (0.1,)}, "other_rates must be different"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and above 0"),
        ({"batch_size": 7}, "num_examples must be a multiple of batch_size"),
        ({"num_examples": 5}, "num_examples must be a multiple of batch_size, at least twice"),
        ({"num_examples": 2_000}, "num_examples must be at most 1,000, got 2000"),
        ({"steps": 99}, "steps must be at least twice measure_every = 50, got 99"),
        ({"paths": 1}, "paths must be at least 2, got 1"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(ValueError, match=words) as caught:
        MemoryConfig(**changed)
    assert len(str(caught.value)) <= 400
