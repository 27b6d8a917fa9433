"""`list` and `report` read any folder of runs, and say what is wrong in it."""

import dataclasses
import json
import os
import shlex
import shutil

import pytest

from experiments.__main__ import main
from experiments.noise_study import EdgeConfig
from experiments.paper import listing
from experiments.theory.config import ComplexityConfig, SDEConfig
from experiments.training import runs
from experiments.training.config import TrainConfig

PLAN = TrainConfig(algorithm="gd", dataset="digits", steps=2, seeds=2, eval_every=1)
EVALUATION = {"step": 2, "seconds": 1.0} | {
    f"{images}_{what}": [0.5, 0.75] for images in ("train", "test") for what in ("loss", "accuracy")
}
ALONE = EVALUATION | {name: [0.8] for name in EVALUATION if name not in ("step", "seconds")}
LOSSES = {"step": 2, "seconds": 4.0, "devices": 8, "losses": [2.3, 2.2]}


def write(folder, plan=PLAN, records=(EVALUATION,), command="train", ended=None):
    """Writes the folder of a run with these records, finished if `ended` is its summary."""
    run = runs.RunFolder(folder, plan, command)
    for record in records:
        run.log(record)
    if ended is not None:
        run.finish(ended)
    run.close()


def damage(root):
    """Writes folders that are each damaged in another way, and returns words of their messages."""
    write(root / "whole", ended={"seconds_per_1000_steps": 500.0})

    asked = json.loads((root / "whole" / "config.json").read_text())
    line = (root / "whole" / "metrics.jsonl").read_text()
    short = {k: v for k, v in EVALUATION.items() if k != "test_loss"}

    def config(**changes):
        return json.dumps(asked | changes)

    cases = [
        ("empty-config", "config.json", "", "config.json is empty"),
        ("half-config", "config.json", '{"algorithm": "gd", ', "config.json is not JSON"),
        ("binary-config", "config.json", b"\xff\xfe\x00", "config.json is not text"),
        ("folder-config", "config.json", os.mkdir, "config.json cannot be read: Is a directory"),
        ("no-config", "config.json", None, "config.json is missing"),
        ("list-config", "config.json", "[1, 2]", "not of a run of this package"),
        ("deep-config", "config.json", "[" * 100_000, "config.json is not JSON"),
        ("others-config", "config.json", '{"model_type": "bert"}', "not of a run of this package"),
        ("unknown-command", "config.json", config(command="fly"), "not of a run of this package"),
        ("unknown-algorithm", "config.json", config(algorithm="adam"), "algorithm must be one of"),
        ("wrong-type", "config.json", config(steps=[3]), "no run that can be"),
        ("no-field", "config.json", '{"algorithm": "gd", "noise": {}}', "no run that can be"),
        ("others-noise", "config.json", config(noise={"colour": 1}), "no run that can be"),
        ("broken-line", "metrics.jsonl", f'{line}{{"step":\n{line}', "not JSON in line 2"),
        ("no-step", "metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl has no step in line 1"),
        ("number-line", "metrics.jsonl", "17\n", "metrics.jsonl has no step in line 1"),
        ("lacks-one", "metrics.jsonl", json.dumps(short) + "\n", "has no evaluation at step 2"),
        ("others-line", "metrics.jsonl", json.dumps(LOSSES) + "\n", "no evaluation at step 2"),
        (
            "uneven-seeds",
            "metrics.jsonl",
            json.dumps(EVALUATION | {"test_loss": [1.0]}) + "\n",
            "not one for each seed",
        ),
        ("no-metrics", "metrics.jsonl", None, "metrics.jsonl has no evaluation"),
        ("empty-summary", "summary.json", "", "summary.json is empty"),
        ("list-summary", "summary.json", "[]", "summary.json must be a JSON object"),
        (
            "word-summary",
            "summary.json",
            '{"seconds_per_1000_steps": "fast"}',
            "no number for seconds_per",
        ),
    ]
    for name, file, content, _ in cases:
        shutil.copytree(root / "whole", root / name)
        path = root / name / file
        path.unlink()
        if content is os.mkdir:
            path.mkdir()
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "bad-failure").mkdir()
    write(root / "bad-failure")
    (root / "bad-failure" / "failure.json").write_text("{}")
    (root / "nothing-yet").mkdir()
    (root / "nothing-yet" / ".lock").touch()
    return {name: words for name, _, _, words in cases} | {
        "bad-failure": "failure.json has no step",
        "nothing-yet": "nothing written yet",
    }


def lines_of(text):
    """The lines of a table by their first words."""
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_every_kind_of_damage_is_listed_and_left_out_of_the_report(tmp_path, capsys):
    wrong = damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(["list", "--runs", str(tmp_path)])
    assert sorted(tmp_path.rglob("*")) == before  # `list` writes nothing.
    listed = lines_of(capsys.readouterr().out)
    assert {"run", "whole", *wrong} <= set(listed)
    assert len(listed) == 3 + len(wrong)
    for name, words in wrong.items():
        assert words in listed[name], listed[name]
        assert any(state in listed[name] for state in ("damaged", "foreign", "empty"))
        assert len(listed[name]) < 400
    assert "finished" in listed["whole"]
    assert listed["whole"].split()[-3:] == ["2/2", "62.50", "500.0"]

    main(["report", "--runs", str(tmp_path)])
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| GD |" in page
    for name, words in wrong.items():
        assert f"* {name}: " in page
        assert words in page


def test_runs_of_every_command_are_listed_and_those_with_curves_reported(tmp_path, capsys):
    """A run of `distributed` has the folder of one of `train`, and is reported with it."""
    alone = dataclasses.replace(PLAN, seeds=1, out=tmp_path / "many")
    ended = {"seconds_per_1000_steps": 4000.0}
    write(tmp_path / "many", alone, [ALONE | {"step": 1}, ALONE], "distributed", ended)
    write(tmp_path / "sde", SDEConfig(parts=("weak",)), (), "sde", {"weak": []})
    write(tmp_path / "complexity", ComplexityConfig(), (), "complexity")
    write(tmp_path / "study", EdgeConfig(), (), "noise-study-edge")
    main(["list", "--runs", str(tmp_path)])
    listed = lines_of(capsys.readouterr().out)
    assert " ".join(listed["many"].split()[1:]) == "gd (distributed) finished 2/2 80.00 4000.0"
    assert listed["sde"].split()[1:] == ["sde:", "weak", "finished"]
    assert listed["complexity"].split()[1:] == ["complexity", "stopped"]
    assert listed["study"].split()[1:] == ["noise-study-edge", "stopped"]
    with pytest.raises(SystemExit, match=r"found none below .*; 1 other folders"):
        main(["report", "--runs", str(tmp_path / "sde")])
    main(["report", "--runs", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| GD | 0.8000 | 80.0 | 80.00 |" in (tmp_path / "report" / "report.md").read_text()
    assert "* sde: a run of `sde`, without curves" in printed
    assert "* complexity: stopped" in printed


@pytest.mark.slow
def test_a_real_distributed_run_is_listed(tmp_path, capsys):
    """After ten steps on eight devices, the run is listed, and shown by the same command."""
    out = tmp_path / "runs" / "many"
    plan = "distributed --dataset digits --algorithm m-sgd-cov --steps 10"
    every = "--eval-every 5 --checkpoint-every 5 --microbatch-size None"
    command = [*shlex.split(f"{plan} {every}"), "--out", str(out)]
    main(command)
    shown = capsys.readouterr().out
    main(["list", "--runs", str(tmp_path / "runs")])
    (entry,) = listing.read(tmp_path / "runs")
    assert (entry.command, entry.step, entry.state) == ("distributed", 10, "finished")
    assert f"{100 * entry.accuracy:.2f}" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main(command)
    again = capsys.readouterr().out
    assert f"{100 * entry.accuracy:.2f}" in again
    assert again.splitlines()[0] == shown.splitlines()[0]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="a run of `distributed`, not of `train`"):
        main(["train", *command[1:]])


def test_a_run_below_a_folder_named_checkpoints_is_found(tmp_path):
    write(tmp_path / "checkpoints" / "one")
    assert [e.path.name for e in listing.read(tmp_path / "checkpoints")] == ["one"]
    # A folder of that name in a run has checkpoints, and no runs.
    (tmp_path / "checkpoints" / "one" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "one" / "checkpoints" / "3" / "config.json").write_text("{}")
    assert len(listing.read(tmp_path / "checkpoints")) == 1


def test_a_report_counts_a_seed_once_and_pairs_like_with_like(tmp_path, capsys):
    write(tmp_path / "first", ended={})
    write(tmp_path / "repeated", dataclasses.replace(PLAN, eval_every=2), ended={})
    more = dataclasses.replace(PLAN, seed=2, out=tmp_path / "more")
    write(tmp_path / "more", more, ended={})
    sgd = dataclasses.replace(PLAN, algorithm="sgd", seed=1)
    write(tmp_path / "others", sgd, ended={})
    old = tmp_path / "old"
    write(old, dataclasses.replace(PLAN, algorithm="sgd", seeds=4), ended={})
    record = json.loads((old / "config.json").read_text()) | {"draws": 1}
    (old / "config.json").write_text(json.dumps(record))
    main(["report", "--runs", str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "* repeated: seeds that another run has as well" in text
    # Three sections have these runs: seeds 0 to 3 of GD, seeds 1 and 2 of SGD, and SGD with older
    # draws. The fourth has the runs that are left out.
    assert text.count("## ") == 4
    assert "4 seeds" in text


def test_nothing_to_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["list"])
    printed = capsys.readouterr().out
    assert "no runs in runs yet" in printed
    assert "python -m experiments train --dataset digits" in printed
    (tmp_path / "runs").mkdir()
    main(["list"])
    assert "no runs in runs yet" in capsys.readouterr().out
    write(tmp_path / "runs" / "a", ended={})
    main(["list"])
    assert capsys.readouterr().out.split()[:2] == ["run", "what"]
    main(["list", "--runs", "runs/a"])
    assert capsys.readouterr().out.split()[:2] == ["run", "what"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"runs must be a folder, got file, which is no folder\."):
        main(["list", "--runs", "file"])
