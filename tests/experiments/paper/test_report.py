"""Panels, the list of runs and the report, from end to end on the digits."""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest

import experiments
from experiments import data, records
from experiments.__main__ import main
from experiments.paper import panels, report
from experiments.paper._scales import AS_PUBLISHED, Reduction
from experiments.paper.panels import Panel
from experiments.training import loop, runs
from experiments.training.config import TrainConfig

BASE = TrainConfig(
    dataset="digits", steps=20, learning_rate=0.1, eval_every=10, seeds=3, microbatch_size=None
)
PANEL = Panel(
    "two of them",
    tuple(dataclasses.replace(BASE, algorithm=name) for name in ("sgd", "m-sgd-sparse-cov")),
    AS_PUBLISHED,
    Reduction({"steps": 10, "subset_per_seed": True, "num_train": 500}, ("each its own",)),
    Reduction({"steps": 10, "seeds": 2, "num_train": 200, "num_test": 50, "batch_size": 20}),
    ("everything",),
)


@pytest.fixture
def small_panel(monkeypatch):
    """Replaces the panel 1a by one of two algorithms on the digits."""
    monkeypatch.setattr(report, "PANELS", {**panels.PANELS, "1a": PANEL})


def never(*_, **__):
    """Stands for a function that must not be called."""
    raise AssertionError("nothing should be loaded or trained")


def test_a_panel_is_run_drawn_listed_and_reported(tmp_path, small_panel, monkeypatch, capsys):
    from matplotlib import image

    root = tmp_path / "runs"
    main(["figure", "1a", "--runs", str(root), "--seeds-at-once", "2"])
    folders = list(runs.find(root))
    assert len(folders) == 4  # Two algorithms, each with seeds 0 and 1 and with seed 2.
    assert all(runs.state(path) == "finished" for path in folders)
    page = (root / "figure-1a" / "README.md").read_text()
    assert "two of them" in page
    assert "* everything" in page
    assert image.imread(root / "figure-1a" / "figure-1a.png").shape[0] > 300
    with open(root / "figure-1a" / "figure-1a.csv", newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["SGD-50", "[M-SGD-Cov]-100"]
    assert rows["SGD-50"]["verdict"] == "the reference"
    finals = [
        value
        for path in folders
        if records.read_json(path / "config.json")["algorithm"] == "m-sgd-sparse-cov"
        for value in records.read_lines(path / "metrics.jsonl")[-1]["test_accuracy"]
    ]
    assert len(finals) == 3
    assert float(rows["[M-SGD-Cov]-100"]["test_accuracy"]) == pytest.approx(np.mean(finals))

    # Another panel with the same runs is drawn without training.
    monkeypatch.setattr("experiments.training.trainer.make_trainer", never)
    before = {path: (path / "metrics.jsonl").read_bytes() for path in folders}
    other = dataclasses.replace(PANEL, runs=PANEL.runs[:1], title="one of them")
    monkeypatch.setattr(report, "PANELS", {**panels.PANELS, "1b": other})
    main(["figure", "1b", "--runs", str(root), "--seeds-at-once", "2"])
    assert "one of them" in (root / "figure-1b" / "README.md").read_text()
    assert before == {path: (path / "metrics.jsonl").read_bytes() for path in folders}

    capsys.readouterr()
    long_name = "another" * 10
    stopped = runs.RunFolder(root / long_name, BASE)
    main(["list", "--runs", str(root)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert sum("finished" in line and "20/20" in line for line in lines) == 4
    assert sum("running" in line and "0/20" in line for line in lines) == 1
    assert sum(line.startswith(f"{long_name}  sgd ") for line in lines) == 1
    stopped.close()

    main(["report", "--runs", str(root), "--out", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    html = (tmp_path / "report" / "report.html").read_text()
    for label in ("SGD-50", "[M-SGD-Cov]-100"):
        assert f"| {label} |" in text
        assert f"<td>{label}</td>" in html
    assert text.count("![") == html.count('src="data:image/png;base64,') == 1
    assert (tmp_path / "report" / "runs-1.png").stat().st_size > 10_000


def test_the_recorded_figures_are_drawn_again_from_their_runs(tmp_path, monkeypatch):
    """The command of their page gives the recorded numbers, without training."""
    results = pathlib.Path(experiments.__file__).parent / "results"
    monkeypatch.setattr(loop, "load", never)
    for panel, scale, tables in (
        ("1a", "large", ("", "-averaged", "-constant")),
        ("3b", "medium", ("", "-large-batches")),
    ):
        options = ["--scale", scale, "--runs", str(results / "runs")]
        main(["figure", panel, *options, "--out", str(tmp_path / panel)])
        for name in (f"figure-{panel}{table}.csv" for table in tables):
            found, recorded = ((root / panel / name).read_text() for root in (tmp_path, results))
            for line, wanted in zip(found.splitlines(), recorded.splitlines(), strict=True):
                for value, number in zip(line.split(","), wanted.split(","), strict=True):
                    try:
                        assert float(value) == pytest.approx(float(number), rel=1e-9, nan_ok=True)
                    except ValueError:
                        assert value == number


@pytest.mark.slow
def test_the_small_scale_changes_the_settings_that_it_names(tmp_path, small_panel):
    root = tmp_path / "runs"
    main(["figure", "1a", "--scale", "small", "--runs", str(root)])
    for path in runs.find(root):
        asked = records.read_json(path / "config.json")
        assert (asked["steps"], asked["seeds"], asked["num_train"]) == (10, 2, 200)
        assert asked["noise"]["batch_size"] == 20
        drawn = records.read_json(path / "train_images.json")["train_indices"]
        assert len(set(drawn)) == 200
        # Accuracies are multiples of one in 50, the number of test images.
        last = np.array(records.read_lines(path / "metrics.jsonl")[-1]["test_accuracy"]) * 50
        np.testing.assert_allclose(last, np.round(last), atol=1e-3)
    assert "(small scale)" in (root / "figure-1a-small" / "README.md").read_text()


@pytest.mark.slow
def test_a_panel_of_a_file_is_drawn_again_without_the_file(tmp_path, monkeypatch):
    """At medium scale each seed has its own images, which the records know without the file."""
    root, file = tmp_path / "runs", tmp_path / "mine.npz"
    (x_train, y_train), (x_test, y_test) = data.load("digits").train, data.load("digits").test
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    panel = dataclasses.replace(PANEL, runs=PANEL.runs[:1])
    monkeypatch.setattr(report, "PANELS", {"1a": panel})
    options = ["figure", "1a", "--scale", "medium", "--dataset", str(file), "--runs", str(root)]
    main([*options, "--seeds-at-once", "2"])
    folders = list(runs.find(root))
    assert [path.name.rsplit("-", 1)[0] for path in folders] == [
        "mine-digits_net-sgd-seed2",
        "mine-digits_net-sgd-seeds0-1",
    ]
    drawn = [
        seed
        for path in reversed(folders)
        for seed in records.read_json(path / "train_images.json")["train_indices"]
    ]
    assert [len(set(seed)) for seed in drawn] == [500] * 3
    assert len({tuple(seed) for seed in drawn}) == 3
    page = (root / "figure-1a-medium" / "README.md").read_text()
    assert "(medium scale)" in page
    assert "3 seeds that draw training images of their own" in page
    assert "* each its own" in page

    file.unlink()
    monkeypatch.setattr(loop, "load", never)
    main([*options, "--seeds-at-once", "2", "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "README.md").read_text() == page
    with pytest.raises(SystemExit, match="which does not exist"):
        main([*options, "--seeds-at-once", "3"])


def test_seeds_that_drew_something_else_are_not_put_into_a_figure(tmp_path, small_panel):
    root = tmp_path / "runs"
    values = {
        f"{images}_{what}": [0.5] * 3
        for images in ("train", "test")
        for what in ("loss", "accuracy")
    }
    for plan in PANEL.runs:
        folder = runs.RunFolder(report.run_folder(root, plan), plan.resolved())
        folder.log({"step": 20, "seconds": 1.0} | values)
        folder.finish({})
        record = records.read_json(folder.path / "config.json")
        del record["draws"]  # Older records do not have this entry.
        records.replace_text(folder.path / "config.json", json.dumps(record))
        folder.close()
    with pytest.raises(SystemExit, match="2 runs of this figure from when a seed drew something"):
        main(["figure", "1a", "--runs", str(root)])


def test_a_folder_is_named_after_what_is_computed(tmp_path):
    """Where and how often a run writes does not count, nor does a net that is named or not."""
    name = report.run_folder(tmp_path, BASE).name
    assert name.startswith("digits-digits_net-sgd-seeds0-2-")
    free = dataclasses.replace(BASE, out=tmp_path, data_dir=tmp_path, checkpoint_every=7)
    assert report.run_folder(tmp_path, free).name == name
    named = dataclasses.replace(BASE, model="digits_net")  # This is the net if none is named.
    assert report.run_folder(tmp_path, named).name == name
    for change in ({"learning_rate": 0.2}, {"augment": True}, {"seeds": 1}, {"data_seed": 1}):
        assert report.run_folder(tmp_path, dataclasses.replace(BASE, **change)).name != name


def test_runs_are_reported_together_whether_their_net_was_named_or_not(tmp_path):
    plans = (
        dataclasses.replace(BASE, algorithm="gd", steps=2),
        dataclasses.replace(BASE, steps=2, model="digits_net"),
    )
    for plan in plans:
        folder = runs.RunFolder(tmp_path / plan.algorithm, plan)
        evaluation = {"step": 2, "seconds": 1.0} | {
            f"{images}_{what}": [0.5] * 3
            for images in ("train", "test")
            for what in ("loss", "accuracy")
        }
        folder.log(evaluation)
        folder.finish({})
    main(["report", "--runs", str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("![") == 1
    assert "| GD |" in text
    assert "| SGD-50 |" in text


def test_nothing_to_list_or_report(tmp_path):
    with pytest.raises(SystemExit, match="runs must be a folder, got"):
        main(["list", "--runs", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="found none below"):
        main(["report", "--runs", str(tmp_path)])
