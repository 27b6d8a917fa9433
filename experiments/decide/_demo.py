"""``python -m experiments demo``: the study on the digits, reduced to about a minute."""

import dataclasses
import pathlib
import textwrap

from experiments import tables
from experiments.decide import _datasets, _records, _runs, report, settings, study


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Asks on real images whether SGD beats GD, and which noises go with SGD, in about a minute.

    It is `decide` on the digits with fewer steps, seeds and algorithms: every seed draws its own
    images, wrong labels, initial weights and noise. Prints the differences with 95 % intervals,
    and writes demo.png, demo.md and the records, demo.jsonl. A demo that was stopped is continued.

    Attributes:
        seeds: The number of runs of each algorithm; more of them make the intervals narrower.
        steps: The number of iterations of each run.
        out: The folder of the results, which must be new or that of the same demo; None stands for
            runs/demo-DATE-TIME.
    """

    seeds: int = settings.DEMO.seeds[1]
    steps: int = settings.DEMO.steps
    out: pathlib.Path | None = None

    def __post_init__(self):
        for name, least in (("seeds", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def setting(self) -> settings.Setting:
        """The setting of the study."""
        return dataclasses.replace(
            settings.DEMO,
            steps=self.steps,
            evaluations=min(settings.DEMO.evaluations, self.steps),
            seeds=(settings.DEMO.seeds[0], self.seeds),
        )


def demo_records(folder: pathlib.Path) -> pathlib.Path:
    """The file of the records of a demo."""
    return _records.path_of(folder, settings.DEMO)


def run_demo(config: DemoConfig, folder: pathlib.Path) -> None:
    """Makes the missing runs, prints the table, and writes the page and the picture.

    Raises:
        ValueError: if the folder holds records of other steps, or of something else.
    """
    setting = config.setting
    if _is_complete(setting, folder):
        print(f"{folder} has finished before: this is its result.\n")
    else:
        images = _datasets.load(setting)
        one = study.Study(
            _runs.Runner(setting, images, _runs.Options()),
            images,
            folder,
            seeds_at_once=config.seeds,
            told=lambda text: None,
        )
        study.run_setting(one, setting.contestants, study.main_seeds(setting))
    page, _ = report.write(setting, folder)
    found = _records.curves(_records.lines(demo_records(folder), setting))
    print(text(setting, report.rows(setting, found)))
    print(f"\n{page.with_suffix('.png')}: the differences, with intervals.")


def _is_complete(setting: settings.Setting, folder: pathlib.Path) -> bool:
    found = _records.curves(_records.lines(demo_records(folder), setting))
    return all(
        _records.Run(name, 1.0, seed) in found
        for name in setting.contestants
        for seed in study.main_seeds(setting)
    )


def text(setting: settings.Setting, table: list[report.Row]) -> str:
    """The table for a terminal, with what was done above it and how to read it below."""
    header = ["algorithm", "test accuracy %", "minus GD", "gap closed %", "minus SGD", "train loss"]
    lines = [
        [
            row.label,
            f"{row.accuracy:.2f}",
            report.shown(row.to_gd),
            report.share(row.share).replace(" %", ""),
            report.shown(row.to_sgd),
            f"{row.train_loss:.2g}",
        ]
        for row in table
    ]
    gap = next(row.to_gd for row in table if row.to_sgd is None)
    assert gap is not None
    return "\n".join(
        [
            textwrap.fill(report.described(setting), 100) + "\n",
            tables.text_table(header, lines),
            f"\nSGD minus GD: {report.shown(gap)} points. Gap closed: 0 is GD, 100 is SGD. All "
            "intervals\nare 95 %, paired by seed.",
        ]
    )
