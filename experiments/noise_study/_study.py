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

from experiments import records
from experiments.noise_study._config import StudyConfig
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
    """

    name: str
    names: tuple[str, ...]
    fields: frozenset[str]
    plan: Callable[[Any], Sequence[tuple[Any, ...]]]
    make: Callable[[Any, list[tuple[Any, ...]]], Iterator[Record]]
    rows: Callable[[list[Record], Settings], list[Record]]
    table: Callable[[list[Record]], str]
    draw: Callable[[list[Record], Settings, pathlib.Path], None]

    def run(self, config: StudyConfig) -> pathlib.Path:
        """Makes the missing runs, prints the table, draws the picture; returns the folder.

        Raises:
            FileExistsError: if the folder belongs to another study or configuration.
            records.DamagedRecordError: if records are missing or cannot be read.
        """
        if config.report:
            return self._again(config)
        return runs.run_parts(
            f"noise-study-{self.name}",
            config,
            {self.name: lambda folder: self.part(config, folder)},
            {self.name: self.table},
        )

    def part(self, config: StudyConfig, folder: pathlib.Path) -> list[Record]:
        """Makes the missing runs and the picture; returns the rows of the table."""
        path = folder / f"{self.name}.jsonl"
        done = records.read_lines(path)
        # Write the records again without a last line that was cut short.
        records.replace_text(path, "".join(map(records.as_line, done)))
        have = {self._run_of(line) for line in done}
        missing = [run for run in self.plan(config) if run not in have]
        if missing:
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
