"""``python -m experiments noise-study edge``: a tiny study, its table from records, bad input.

Expected numbers of the report are computed here by hand, from made-up records.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records
from experiments.noise_study import EdgeConfig, _edge_report, _problem, edge
from tests.experiments.noise_study.again import assert_made_again
from tests.support.statistics import assert_agree

TINY = {
    "noises": ("sgd", "gd"),
    "other_rates": (),
    "steps": 4,
    "checkpoints": 2,
    "width": 3,
    "law_draws": 2,
    "lanczos_steps": 3,
    "seeds": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the finished tiny study."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert edge.STUDY.run(EdgeConfig(**TINY, out=out)) == out
    return out


@pytest.mark.slow
def test_the_recorded_table_and_picture_are_made_again_from_the_records(folder, capsys):
    rows = json.loads((folder / "summary.json").read_text())["edge"]
    found = edge.STUDY.recorded(folder)
    assert [row["noise"] for row in rows] == ["sgd", "gd"]
    assert _edge_report.rows(found, {"learning_rate": 0.2, "margin": 0.1}) == rows
    assert_made_again(edge.STUDY, folder, capsys)


def test_runs_start_at_the_same_place_and_part(folder):
    sgd, other = edge.STUDY.recorded(folder)
    for name in ("loss", "eigenvalue", "sgd_sharpness"):
        assert np.shape(sgd[name]) == (3, 2)
        assert sgd[name][0] == other[name][0]
        assert sgd[name][0][0] != sgd[name][0][1]  # Each seed has its own images and parameters.
    assert sgd["loss"][2] != other["loss"][2]


def test_a_finished_study_is_not_overwritten(folder, capsys, monkeypatch):
    monkeypatch.setattr(edge, "train", None)  # A call would fail.
    edge.STUDY.run(EdgeConfig(**TINY, out=folder))
    assert "has finished before" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"differs in learning_rate.*choose another --out"):
        edge.STUDY.run(EdgeConfig(**TINY, learning_rate=0.3, out=folder))


def test_a_stopped_study_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    lines = (folder / "edge.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "edge.jsonl").write_text(lines[0] + lines[1][:50])
    asked = []

    def train(config, examples, name, rate, advanced):
        asked.append(name)
        return json.loads(lines[1])

    monkeypatch.setattr(edge, "train", train)
    edge.STUDY.part(EdgeConfig(**TINY), tmp_path)
    assert asked == ["gd"]
    assert (tmp_path / "edge.jsonl").read_text() == "".join(lines)


def test_records_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "edge.jsonl"
    for text, words in (
        ('{"step": 1, "noise": "sgd"}\n', "line without"),
        ("", "no runs"),
        ("{\n", "not JSON in line 1"),
    ):
        path.write_text(text)
        with pytest.raises(records.DamagedRecordError, match=words):
            edge.STUDY.recorded(tmp_path)


AT = {"learning_rate": 0.5, "margin": 0.1}


def line_of(noise, values, rate=0.5):
    """A record of four measurements of three seeds, of which those in the second half count."""
    every = [[9.0] * 3, [9.0] * 3, values, values]
    return {
        "step": 8,
        "noise": noise,
        "learning_rate": rate,
        "seeds": [0, 1, 2],
        "steps": [0, 4, 6, 8],
        **dict.fromkeys((*_edge_report.QUANTITIES, "loss", "sgd_mean_of_ratios"), every),
    }


def test_the_endpoint_and_the_paired_difference_by_hand():
    sgd, cov = line_of("sgd", [3.0, 4.0, 5.0]), line_of("cov", [3.4, 4.8, 5.6])
    row = _edge_report.rows([sgd, cov], AT)[1]
    # Values are multiplied by eta / 2 = 1/4. The t quantile of 2 degrees of freedom is 4.303.
    mean, half = row["eigenvalue"]
    assert mean == pytest.approx(1.15)
    assert half == pytest.approx(4.302653 * np.std([0.85, 1.2, 1.4], ddof=1) / math.sqrt(3))
    compared = row["eigenvalue_to_sgd"]
    assert compared["mean"] == pytest.approx(0.15)
    spread = 4.302653 * np.std([0.1, 0.2, 0.15], ddof=1) / math.sqrt(3)
    assert compared["high"] == pytest.approx(0.15 + spread)
    # There are three equal comparisons of a declared family of 12, each with p = 0.035.
    assert compared["p_value"] == pytest.approx(12 * 0.03509, rel=1e-3)
    assert compared["p_equivalent"] == 1


def test_a_seed_that_diverged_is_counted_and_left_out():
    sgd, cov = line_of("sgd", [3.0, 4.0, 5.0]), line_of("cov", [3.4, math.nan, 5.6])
    row = _edge_report.rows([sgd, cov], AT)[1]
    assert row["diverged"] == 1
    assert row["eigenvalue"][0] == pytest.approx(1.125)
    assert row["eigenvalue_to_sgd"]["mean"] == pytest.approx(0.125)
    assert "2 of 3" in _edge_report.table([row])
    gone = _edge_report.rows([sgd, line_of("cov", [math.inf] * 3)], AT)
    assert gone[1]["eigenvalue"] is None
    assert "0 of 3" in _edge_report.table(gone)


def test_isotropic_noise_has_the_trace_of_sgd_noise():
    """The trace is that of all gradients by numpy, and the normals have variance one."""
    params = _problem.initial(jax.random.key(0), 5, 3)
    examples = {"x": jnp.linspace(-1, 1, 35).reshape(7, 5), "y": jnp.arange(7)}
    variance = float(jax.jit(_problem.isotropic_variance, static_argnums=2)(params, examples, 4))
    own_loss = lambda p, x, y: _problem.losses(p, {"x": x[None], "y": y[None]}).sum()  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(own_loss), in_axes=(None, 0, 0)))
    gradients = each(params, examples["x"], examples["y"])
    flat = np.concatenate([np.reshape(g, (7, -1)) for g in jax.tree.leaves(gradients)], 1)
    assert variance * flat.shape[1] == pytest.approx(flat.var(0).sum() / 4, rel=1e-4)
    normals = _problem.isotropic(jax.random.key(1), 0, {"a": jnp.zeros(100_000)})["a"]
    assert_agree(float(jnp.square(normals).mean()), 1, math.sqrt(2 / 100_000))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"noises": ("gd",)}, "noises must name sgd"),
        ({"noises": ("sgd", "sgd")}, "each once"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"other_rates": (0.1, math.inf)}, "other_rates must be finite"),
        ({"other_rates": (0.2,)}, "other_rates must be different"),
        ({"batch_size": 401}, "batch_size must be between 1 and 400, got 401"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"checkpoints": 7_000}, "checkpoints must be at most the 6000 steps, got 7000"),
        ({"law_draws": 1}, "law_draws must be at least 2, got 1"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"degrees_of_freedom": 2.0}, "degrees_of_freedom must be finite and above 2"),
        ({"margin": -1.0}, "margin must be finite and above 0"),
        ({"seed": -1}, "seed"),
        ({"report": True}, "out must name the folder"),
    ],
)
def test_bad_input_is_named(changed, words):
    with pytest.raises(ValueError, match=words) as caught:
        EdgeConfig(**changed)
    assert len(str(caught.value)) <= 400
