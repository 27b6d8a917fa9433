"""``python -m experiments sde`` on small settings: tables, pictures and numbers."""

import json

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.theory import sde as sde_experiment
from experiments.theory import sde_problems, weak_order
from experiments.theory.config import SDEConfig
from experiments.training import runs
from msgd_jax import sde


def read(path):
    """The object of a JSON file."""
    return json.loads(path.read_text())


def test_orders_and_pictures(tmp_path, capsys, monkeypatch):
    """With some of the cases, the orders are in the table, the record and the picture."""
    from matplotlib import image

    cases = sde_experiment.strong_cases(32)
    monkeypatch.setattr(sde_experiment, "strong_cases", lambda n: [cases[0]])
    exact = weak_order.table()[:6]
    monkeypatch.setattr(sde_experiment, "weak", lambda config: iter(exact[:1]))
    monkeypatch.setattr(weak_order, "table", lambda: exact)
    out = tmp_path / "out"
    main(["sde", "--parts", "strong", "weak", "--strong-paths", "32", "--out", str(out)])
    results, printed = read(out / "summary.json"), capsys.readouterr().out
    assert set(results) == {"strong", "weak"}
    (coupled,) = results["strong"]
    # With 32 paths the order has a standard error of 0.007, and finite rates raise it by 0.02. The
    # constant has a standard error of 0.6 %, and differs by 1 % from the last ratio.
    assert abs(coupled["order"]["value"] - 1) < 0.05
    assert coupled["deterministic"]["value"] == pytest.approx(
        coupled["errors"][-1] / coupled["learning_rates"][-1], rel=0.05
    )
    for row in [*results["strong"], *exact]:
        assert row["label"] in printed
    assert len(results["weak"]) == 7
    for name in ("strong_order.png", "weak_order.png"):
        assert image.imread(out / name).shape[0] > 300
    with pytest.raises(SystemExit, match="differs in parts, strong_paths, and results are never"):
        main(["sde", "--parts", "weak", "--out", str(out)])
    # The same command prints the same tables, and computes nothing.
    monkeypatch.setattr(sde_experiment, "strong", None)
    main(["sde", "--parts", "strong", "weak", "--strong-paths", "32", "--out", str(out)])
    tables = printed[: printed.index("The pictures")]
    assert capsys.readouterr().out.startswith(tables)


def test_parts_that_are_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    """A command that was stopped in its second part goes on with this part."""
    exact = weak_order.table()[:2]
    monkeypatch.setattr(weak_order, "table", lambda: exact)
    monkeypatch.setattr(sde_experiment, "weak", lambda config: iter(exact[:1]))
    command = ["sde", "--parts", "weak", "paths", "--out", str(tmp_path / "out")]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sde_experiment, "paths", stopped)
    with pytest.raises(SystemExit) as interrupted:
        main(command)
    assert interrupted.value.code == 130
    assert runs.state(tmp_path / "out") == "stopped"
    monkeypatch.setattr(sde_experiment, "weak", None)
    monkeypatch.setattr(
        sde_experiment,
        "paths",
        lambda *_: sde_experiment.Paths(np.zeros(1), {}, {}, 0.2),
    )
    monkeypatch.setattr(sde_experiment._sde_figures, "plot_paths", lambda *_: None)
    capsys.readouterr()
    main(command)
    assert exact[0]["label"] in capsys.readouterr().out
    results = read(tmp_path / "out" / "summary.json")
    assert (len(results["weak"]), len(results["paths"])) == (3, 2)
    assert not (tmp_path / "out" / "parts.json").exists()


@pytest.mark.slow
def test_paths_on_the_plane_start_together_and_the_coupled_ones_stay_close(tmp_path, monkeypatch):
    from experiments.theory import _sde_figures

    monkeypatch.setattr(sde_experiment, "DRAWN", 2)
    part = sde_experiment.paths(SDEConfig(), learning_rate=0.2, horizon=1.0, many=8)
    assert part.times == pytest.approx(0.2 * np.arange(6))
    for points in part.points.values():
        assert points.shape == (2, 6, 2)
        np.testing.assert_array_equal(points[:, 0], np.broadcast_to(points[0, 0], (2, 2)))
    assert (part.distances["M-SGD-Gaussian"][1:] < part.distances["SGD"][1:]).all()
    _sde_figures.plot_paths(sde_problems.two_wells(), [part, part], tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 10_000


def test_the_drift_vanishes_at_the_minimum_and_not_at_the_start():
    problem = sde_problems.at_minimum(sde_problems.logistic())
    assert np.abs(sde.drift(problem.losses, problem.params)).max() < 1e-4
    start = sde_problems.logistic()
    assert np.abs(sde.drift(start.losses, start.params)).max() > 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ()}, "parts must name one or more"),
        ({"parts": ("weak", "weak")}, "each once"),
        ({"weak_paths": 3}, "weak_paths must be at least 4, got 3"),
        ({"strong_paths": 31}, "strong_paths must be at least 32, got 31"),
        ({"seed": 2**32}, "seed must be between 0 and 2"),
        (
            {"parts": ("weak",), "strong_paths": 64},
            "strong_paths is read by the part strong only, got 64 with parts = weak",
        ),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        SDEConfig(**wrong)
