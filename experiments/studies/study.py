"""What all studies have in common: records of runs that are never made twice, a table, a picture.

config.json   the configuration
NAME.jsonl    one line per run, written when it is done
NAME.png      the picture, made from the records
summary.json  the rows of the table, made from the records
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import records, terminal
from experiments.studies.config import StudyConfig
from experiments.training import runs

Record = dict[str, Any]
Settings = Mapping[str, Any]


def rounded(values: Any, digits: int) -> Any:
    """A number with so many significant digits; for an array, lists of them."""
    if np.ndim(values):
        return [rounded(value, digits) for value in values]
    return float(f"{values:.{digits}g}")


@dataclasses.dataclass(frozen=True)
class Study:
    """One study, as functions.

    Attributes:
        name: the name on the command line, of the records and of the picture.
        names: the fields of a record that say which run it is.
        fields: the other fields that each record has.
        plan: from a configuration, the runs to make, each as the values of `names`.
        make: from a configuration and some of these runs, their records, one after the other; it
            shows the progress.
        rows: from all records and the settings, the rows of the table as JSON values.
        table: from the rows, the text of the table.
        draw: from all records, the settings and a path, the picture.
        command: the command of the command line that has this study.
        seconds: from a configuration and some runs, about how long they take on one core; None for
            a study that does not say.
    """

    name: str
    names: tuple[str, ...]
    fields: frozenset[str]
    plan: Callable[[Any], Sequence[tuple[Any, ...]]]
    make: Callable[[Any, list[tuple[Any, ...]]], Iterator[Record]]
    rows: Callable[[list[Record], Settings], list[Record]]
    table: Callable[[list[Record]], str]
    draw: Callable[[list[Record], Settings, pathlib.Path], None]
    command: str = "noise-study"
    seconds: Callable[[Any, Sequence[tuple[Any, ...]]], float] | None = None

    def run(self, config: StudyConfig) -> pathlib.Path:
        """Makes the missing runs, prints the table, draws the picture; returns the folder.

        Raises:
            FileExistsError: if the folder belongs to another study or configuration.
            records.DamagedRecordError: if records are missing or cannot be read.
        """
        if config.report:
            return self._again(config)
        return runs.run_parts(
            f"{self.command}-{self.name}",
            config,
            {self.name: lambda folder: self.part(config, folder)},
            {self.name: self.table},
        )

    def part(self, config: StudyConfig, folder: pathlib.Path) -> list[Record]:
        """Makes the missing runs and the picture; returns the rows of the table.

        Raises:
            ValueError: if a folder of `collect` holds another study.
            records.DamagedRecordError: if records are missing or cannot be read.
        """
        path = folder / f"{self.name}.jsonl"
        done = records.read_lines(path)
        done += self._collected(config, done)
        # Write the records again without a last line that was cut short.
        records.replace_text(path, "".join(map(records.as_line, done)))
        have = {self._run_of(line) for line in done}
        missing = [run for run in self.plan(config) if run not in have]
        if missing:
            if self.seconds is not None:
                expected = terminal.duration(self.seconds(config, missing))
                print(f"{len(missing)} runs are to be made: about {expected} on one core.")
            for line in self.make(config, missing):
                with path.open("a", encoding="utf-8") as file:
                    file.write(records.as_line(line))
        found, settings = self.recorded(folder), runs.settings(config)
        self.draw(found, settings, folder / f"{self.name}.png")
        return self.rows(found, settings)

    def recorded(self, folder: pathlib.Path) -> list[Record]:
        """The records of a folder; raises records.DamagedRecordError."""
        path = folder / f"{self.name}.jsonl"
        found = records.read_lines(path)
        for line in found:
            lacking = {*self.names, *self.fields} - line.keys()
            if lacking:
                raise records.DamagedRecordError(f"{path} has a line without {min(lacking)}")
        if not found:
            raise records.DamagedRecordError(f"{path} has no runs")
        return found

    def _collected(self, config: StudyConfig, done: list[Record]) -> list[Record]:
        """The planned runs that the folders of `collect` have and `done` has not, in their order.

        Raises:
            ValueError: if one of the folders differs in more than its seeds.
            records.DamagedRecordError: if records are missing or cannot be read.
        """
        wanted = {k: v for k, v in runs.settings(config).items() if k not in config.varied}
        planned, have = set(self.plan(config)), {self._run_of(line) for line in done}
        found: list[Record] = []
        for other in config.collect:
            held = records.read_object(other / "config.json")
            differing = [name for name, value in wanted.items() if held.get(name) != value]
            if runs.draws(other) != runs.DRAWS:
                differing.append("draws")
            if differing:
                raise ValueError(
                    "collect must name folders that differ in their seeds only, got "
                    f"{records.brief(other)}, which differs in {', '.join(differing[:5])}."
                )
            for line in self.recorded(other):
                if self._run_of(line) in planned - have:
                    have.add(self._run_of(line))
                    found.append(line)
        return found

    def _again(self, config: StudyConfig) -> pathlib.Path:
        """Makes the table and the picture from the records, without new runs."""
        assert config.out is not None  # The configuration has checked this.
        found = self.recorded(config.out)
        settings = records.read_object(config.out / "config.json")
        print(self.table(self.rows(found, settings)))
        self.draw(found, settings, config.out / f"{self.name}.png")
        return config.out

    def _run_of(self, line: Record) -> tuple[Any, ...]:
        return tuple(line.get(name) for name in self.names)
