"""Parts of a study that were made with other seeds are put together, and nothing is made twice."""

import dataclasses
import pathlib
from typing import ClassVar

import pytest

from experiments import records
from experiments.studies.config import StudyConfig, check
from experiments.studies.study import Study


@dataclasses.dataclass(frozen=True)
class SquaresConfig(StudyConfig):
    parts: ClassVar = ("squares",)

    factor: int = 1
    seeds: int = 2
    seed: int = 0
    report: bool = False
    collect: tuple[pathlib.Path, ...] = ()
    out: pathlib.Path | None = None

    def __post_init__(self):
        check(self, {"factor": 1}, {}, fewest_seeds=1)


@pytest.fixture
def made():
    """The seeds whose records were made, in order."""
    return []


@pytest.fixture
def study(made):
    """The squares of the seeds; its table lists them."""

    def make(config, missing):
        for (seed,) in missing:
            made.append(seed)
            yield {"step": 0, "seed": seed, "square": config.factor * seed**2}

    return Study(
        name="squares",
        names=("seed",),
        fields=frozenset({"square"}),
        plan=lambda config: [(seed,) for seed in config.all_seeds],
        make=make,
        rows=lambda found, settings: [{"squares": [line["square"] for line in found]}],
        table=lambda rows: " ".join(map(str, rows[0]["squares"])),
        draw=lambda found, settings, path: None,
        command="test",
    )


def test_parts_with_other_seeds_are_put_together(study, made, tmp_path, capsys):
    """The records of both parts, and a new one for the seed that neither of them has."""
    parts = (tmp_path / "first", tmp_path / "second")
    study.run(SquaresConfig(seed=0, out=parts[0]))
    study.run(SquaresConfig(seed=2, out=parts[1]))
    study.run(SquaresConfig(seeds=5, collect=parts, out=tmp_path / "whole"))
    assert made == [0, 1, 2, 3, 4]
    assert "0 1 4 9 16" in capsys.readouterr().out
    found = study.recorded(tmp_path / "whole")
    assert [line["square"] for line in found] == [0, 1, 4, 9, 16]


def test_seeds_that_were_not_asked_for_and_second_copies_are_left_out(study, made, tmp_path):
    part = tmp_path / "part"
    study.run(SquaresConfig(seeds=4, out=part))
    study.run(SquaresConfig(seed=1, collect=(part, part), out=tmp_path / "whole"))
    assert [line["seed"] for line in study.recorded(tmp_path / "whole")] == [1, 2]
    assert made == [0, 1, 2, 3]


def test_a_part_that_differs_in_more_than_its_seeds_is_refused(study, tmp_path):
    study.run(SquaresConfig(factor=3, out=tmp_path / "part"))
    with pytest.raises(ValueError, match=r"collect must name folders .* differs in factor\."):
        study.run(SquaresConfig(collect=(tmp_path / "part",), out=tmp_path / "whole"))


def test_a_part_with_other_draws_is_refused(study, tmp_path):
    part = tmp_path / "part"
    study.run(SquaresConfig(out=part))
    asked = records.read_object(part / "config.json") | {"draws": 1}
    records.replace_text(part / "config.json", records.as_text(asked))
    with pytest.raises(ValueError, match=r"differs in draws\."):
        study.run(SquaresConfig(collect=(part,), out=tmp_path / "whole"))


def test_a_study_that_is_finished_is_shown_again(study, made, tmp_path, capsys):
    """Also without the folders from which it was collected."""
    part = tmp_path / "part"
    study.run(SquaresConfig(out=part))
    study.run(SquaresConfig(collect=(part,), out=tmp_path / "whole"))
    made.clear()
    capsys.readouterr()
    study.run(SquaresConfig(out=tmp_path / "whole"))
    assert "has finished before" in capsys.readouterr().out
    assert not made
