"""``python -m experiments noise-study escape``: a tiny study, and its predictions by algebra."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

from experiments import records
from experiments.noise_study import EscapeConfig, _escape_report, _problem, _shapes, escape
from tests.experiments.noise_study.again import assert_made_again
from tests.support.statistics import assert_agree, assert_rejected

TINY = {
    "noises": ("gd", "sgd", "diagonal"),
    "gd_steps": 4,
    "steps": 4,
    "short_steps": 4,
    "repetitions": 2,
    "checkpoints": 2,
    "path_checkpoints": 2,
    "num_examples": 20,
    "batch_size": 4,
    "width": 2,
    "probes": 2,
    "lanczos_steps": 3,
    "seeds": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the finished tiny study."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert escape.STUDY.run(EscapeConfig(**TINY, out=out)) == out
    return out


@pytest.mark.slow
def test_the_table_and_the_picture_are_made_again_from_the_records(folder, capsys):
    assert_made_again(escape.STUDY, folder, capsys)


def test_all_noises_start_at_gds_end(folder):
    lines = escape.STUDY.recorded(folder)
    (path,) = (one for one in lines if (one["kind"], one["noise"]) == ("path", "gd"))
    runs = {one["noise"]: one for one in lines if one["kind"] == "escape"}
    assert list(runs) == ["gd", "sgd", "diagonal"]
    for one in runs.values():
        assert one["loss"][0] == pytest.approx(path["loss"][-1], rel=1e-5)
        assert one["distance"][0] == [0.0, 0.0]
        assert np.shape(one["short_loss"]) == (2, 4)
    assert runs["sgd"]["loss"][2] != runs["diagonal"]["loss"][2]
    # GD draws nothing, so that its short run is the beginning of its long run.
    assert np.allclose(np.asarray(runs["gd"]["short_loss"])[:, 3], runs["gd"]["loss"][2], rtol=1e-4)


def test_a_stopped_study_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    lines = (folder / "escape.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "escape.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])
    asked = []

    def one(run, examples, minimum, measured):
        asked.append(run.name)
        return json.loads(lines[-1])

    monkeypatch.setattr(escape, "escape", one)
    escape.STUDY.part(EscapeConfig(**TINY), tmp_path)
    assert asked == ["diagonal"]
    assert (tmp_path / "escape.jsonl").read_text() == "".join(lines)


def small():
    """Parameters and examples of a net with 60 parameters."""
    params = _problem.initial(jax.random.key(0), 5, 3)
    own = {"x": jnp.linspace(-1, 1, 35).reshape(7, 5) ** 2, "y": jnp.arange(7)}
    return params, own


def dense(params, own):
    """H and S as matrices, from derivatives with respect to the parameters as one vector."""
    flat, unravel = ravel_pytree(params)
    each = lambda p: _problem.losses(unravel(p), own)  # noqa: E731
    hessian = jax.jit(jax.hessian(lambda p: each(p).mean()))(flat)
    return np.asarray(hessian, np.float64), np.cov(jax.jit(jax.jacrev(each))(flat).T, ddof=0)


def test_matrices_and_shapes_are_those_of_dense_algebra():
    """All shapes have the trace of S, and the last one is along the top eigenvector of H."""
    params, own = small()
    hessian, s = (np.asarray(x) for x in jax.jit(_shapes.matrices)(params, own))
    expected, covariance = dense(params, own)
    assert np.allclose(hessian, expected, atol=1e-5)
    assert np.allclose(s, covariance, atol=1e-6)
    shapes = _shapes.covariances(jnp.asarray(hessian), jnp.asarray(s))
    for name, c in shapes.items():
        assert np.trace(c) == pytest.approx(np.trace(covariance), rel=1e-4), name
    top = np.linalg.eigvalsh(expected)[-1]
    assert np.sum(expected * np.asarray(shapes["top_eigenvector"])) == pytest.approx(
        top * np.trace(covariance), rel=1e-3
    )


def test_the_predicted_rise_is_that_of_the_recursion():
    """The recursion of the covariance is ``X <- (I - eta H) X (I - eta H) + eta^2 C / b``.

    It is written out in numpy, and the rise of the loss is ``trace(H X) / 2``.
    """
    params, own = small()
    found = jax.jit(
        lambda p, o: _shapes.numbers(p, o, rate=0.3, batch_size=4, steps=5),
    )(params, own)
    hessian, s = dense(params, own)
    once = np.eye(len(s)) - 0.3 * hessian
    for name, c in (("cov", s), ("diagonal", np.diag(np.diag(s)))):
        x, rise = np.zeros_like(s), []
        for _ in range(5):
            x = once @ x @ once + 0.3**2 * c / 4
            rise.append(np.sum(hessian * x) / 2)
        assert np.allclose(found[name]["rise"], rise, rtol=1e-3), name
        alignment = len(s) * np.sum(hessian * c) / (np.trace(hessian) * np.trace(c))
        assert float(found[name]["alignment"]) == pytest.approx(alignment, rel=1e-3)
        cosine = np.sum(hessian * c) / (np.linalg.norm(hessian) * np.linalg.norm(c))
        assert float(found[name]["cosine"]) == pytest.approx(cosine, rel=1e-3)
    assert float(found["isotropic"]["alignment"]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", _shapes.ADDITIVE)
def test_additive_noise_has_the_trace_of_sgds(name):
    """The trace of 4,000 draws is that of S / b, and not that of a batch which is 20 % larger.

    Noise along the top eigenvector is a line, and diagonal noise has each variance of S.
    """
    params, own = small()
    _, s = dense(params, own)
    zero = jax.tree.map(jnp.zeros_like, params)
    deviations = jax.jit(lambda p, o: _shapes.spread(name, p, o, 4, zero))(params, own)
    draws = jax.jit(jax.vmap(lambda t: _shapes.additive(name, jax.random.key(1), t, deviations)))(
        jnp.arange(4000)
    )
    flat = np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(draws))
    squares = np.sum(flat**2, 1)
    number = 1 + len(s)
    error = squares.std() / math.sqrt(4000)
    assert_agree(squares.mean(), np.trace(s) / 4, error, comparisons=number)
    assert_rejected(squares.mean(), np.trace(s) / 4.8, error, comparisons=number)
    if name == "top_eigenvector":
        assert np.linalg.matrix_rank(flat[:50], tol=1e-4) == 1
    if name == "diagonal":
        wanted = np.diag(s) / 4
        # The slack is for variances of zero, which rounding leaves a little above it.
        assert_agree(
            flat.var(0), wanted, wanted * math.sqrt(2 / 4000), comparisons=number, slack=1e-6
        )


# Noises of a made-up study, and the size of their quantities.
SIZES = {"sgd": 1.0, "sgd-other-key": 1.3, "cov": 1.1, "isotropic": 0.5}


def run_of(noise, value, seeds=3):
    """A record of a run from the minimum, whose quantities are `value` times 1, 2, 3 by seed."""
    by_seed = [value * (1 + i) for i in range(seeds)]
    every = [[9.0] * seeds, [9.0] * seeds, by_seed]
    return {
        "step": 8,
        "kind": "escape",
        "noise": noise,
        "seeds": list(range(seeds)),
        "steps": [0, 4, 8],
        "short_loss": [[1.0, 1.0, 1.0 + x, 1.0 + x] for x in by_seed],
        **dict.fromkeys(("loss", "eigenvalue", "trace_h", "distance", "test_accuracy"), every),
    }


def path_of(noise):
    """A record of a path of three seeds to the minimum."""
    shape = {
        "alignment": [[5.0] * 3, [1.0, 2.0, 3.0]],
        "cosine": [[0.5] * 3, [0.1, 0.2, 0.3]],
        "rise": [[0.1, 0.2, 0.5, 0.5]] * 3,
    }
    return {
        "step": 8,
        "kind": "path",
        "noise": noise,
        "seeds": [0, 1, 2],
        "steps": [0, 8],
        "shapes": dict.fromkeys(("cov", "diagonal", "isotropic", "top_eigenvector"), shape),
        "loss": [[1.0] * 3] * 2,
    }


def test_endpoints_and_ratios_by_hand():
    paths = [path_of("gd"), path_of("sgd")]
    gd = run_of("gd", 0.0) | {"eigenvalue": [[1.0] * 3] * 3, "trace_h": [[1.0] * 3] * 3}
    found = [*paths, gd, run_of("sgd", 2.0), run_of("cov", 3.0)]
    rows = _escape_report.rows(found, {})
    assert rows[0]["alignment"][0] == pytest.approx(2.0)
    cov = rows[-1]
    assert cov["rise"][0] == pytest.approx(6.0)
    assert cov["rise_to_sgd"]["mean"] == pytest.approx(1.5)
    # The ratio is the same for each seed, so that its interval is a point.
    assert cov["eigenvalue_to_sgd"]["low"] == pytest.approx(1.5)
    # The prediction is 0.5 in the second half, and the rises are 3, 6 and 9: the geometric mean.
    assert cov["rise_to_predicted"]["mean"] == pytest.approx((3 * 6 * 9) ** (1 / 3) / 0.5)
    assert "M-SGD-Cov" in _escape_report.table(rows)


def test_p_values_are_adjusted_over_the_declared_family_alone():
    """Of 12 declared comparisons, 6 were made. GD and SGD with another key are not among them.

    Holm's method is written out here, with p-values of scipy's paired t-test.
    """
    draws = np.random.default_rng(0)

    def varied(noise, size):
        eigenvalue, trace, rise = size * draws.uniform(1, 1.2, (3, 3))
        return run_of(noise, 1.0) | {
            "eigenvalue": [[1.0] * 3, [1.0] * 3, eigenvalue.tolist()],
            "trace_h": [[1.0] * 3, [1.0] * 3, trace.tolist()],
            "short_loss": [[9.0, 9.0, 9.0 + x, 9.0 + x] for x in rise.tolist()],
        }

    gd = varied("gd", 1.0) | {"short_loss": [[9.0] * 4] * 3}
    runs = {name: varied(name, size) for name, size in SIZES.items()}
    rows = _escape_report.rows([path_of("gd"), path_of("sgd"), gd, *runs.values()], {})
    found = {row["noise"]: row for row in rows if "noise" in row}

    def alone(noise, quantity):
        ends = [_escape_report.endpoint(runs[name], quantity, gd) for name in (noise, "sgd")]
        return stats.ttest_rel(*np.log(ends)).pvalue

    family = [(noise, name) for noise in ("cov", "isotropic") for name in _escape_report.QUANTITIES]
    expected = 0.0
    for times, (noise, name) in zip(
        (12, 11, 10, 9, 8, 7), sorted(family, key=lambda x: alone(*x)), strict=True
    ):
        expected = max(expected, min(1.0, times * alone(noise, name)))
        assert found[noise][f"{name}_to_sgd"]["p_value"] == pytest.approx(expected)
    own = found["sgd-other-key"]["rise_to_sgd"]["p_value"]
    assert own == pytest.approx(alone("sgd-other-key", "rise"))


def test_records_without_sgd_are_named(folder):
    lines = [one for one in escape.STUDY.recorded(folder) if one["noise"] != "sgd"]
    with pytest.raises(records.DamagedRecordError, match="no path of sgd"):
        _escape_report.rows(lines, {})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"noises": ("gd",)}, "noises must name sgd"),
        ({"noises": ("sgd", "sgd", "gd")}, "each once"),
        ({"learning_rate": math.inf}, "learning_rate must be finite and above 0"),
        ({"batch_size": 501}, "batch_size must be between 1 and 500, got 501"),
        ({"num_examples": 1_001}, "num_examples must be at most 1000, got 1001"),
        ({"checkpoints": 3_000}, "checkpoints must be at most"),
        ({"path_checkpoints": 3_000}, "path_checkpoints must be at most"),
        ({"repetitions": 1}, "repetitions must be at least 2, got 1"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"seed": -1}, "seed"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(ValueError, match=words) as caught:
        EscapeConfig(**changed)
    assert len(str(caught.value)) <= 400
