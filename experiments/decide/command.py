"""``python -m experiments decide``: runs a setting of the study, and draws its table and figure."""

import dataclasses
import pathlib
from typing import Literal

from experiments.decide import _calibration, _datasets, _nets, _runs, report, settings, study
from msgd_jax._validate import shown


@dataclasses.dataclass(frozen=True)
class DecideConfig:
    """Asks whether SGD beats GD in a setting, and which noises go with SGD.

    Runs what is missing, records every finished chunk of seeds in SETTING.jsonl, and draws
    SETTING.md and SETTING.png from all that is recorded. What is recorded is never run again.

    Attributes:
        setting: The declared setting to run.
        dataset: A .npz file with x_train, y_train, x_test and y_test (Keras' convention). The
            digits take none: they come with scikit-learn.
        seeds: The first seed and the number of seeds; None stands for those that were declared. The
            report is about the declared ones alone.
        contestants: The algorithms to run; if none is named, all those of the setting.
        convolution: How convolutions are computed: as a product of patches, or by jax.lax.
        groups: The number of parts into which the images of a step are divided, each with a kernel
            gradient of its own; meant for graphics cards.
        seeds_at_once: The number of runs side by side, as memory allows.
        microbatch_size: The number of images of a run in one pass; None stands for all those of a
            step.
        calibrate: Whether to time both convolutions with 5, 10 and 20 runs side by side first, and
            to use the fastest in place of the four options above.
        report: Whether only the table and the figure are drawn again, and nothing is run.
        out: The folder of the records; it is made if it is not there.
    """

    setting: Literal["digits", "svhn", "cifar10"] = "digits"
    dataset: pathlib.Path | None = None
    seeds: tuple[int, int] | None = None
    contestants: tuple[str, ...] = ()
    convolution: _nets.Convolution = "product"
    groups: int = 1
    seeds_at_once: int = 10
    microbatch_size: int | None = None
    calibrate: bool = False
    report: bool = False
    out: pathlib.Path = pathlib.Path("runs/decide")

    def __post_init__(self):
        if self.setting not in settings.SETTINGS:
            allowed = ", ".join(settings.SETTINGS)
            raise ValueError(f"setting must be one of {allowed}, got {shown(self.setting)}.")
        allowed = settings.SETTINGS[self.setting].contestants
        unknown = [name for name in self.contestants if name not in allowed]
        if unknown:
            raise ValueError(
                f"contestants must be among {', '.join(allowed)} for {self.setting}, got "
                f"{shown(', '.join(unknown))}."
            )
        if self.seeds is not None and not (
            self.seeds[0] >= 0 and self.seeds[1] >= 1 and sum(self.seeds) < 2**31
        ):
            raise ValueError(
                "seeds must be a first seed of at least 0 and a number of seeds of at least 1, got "
                f"{self.seeds[0]} {self.seeds[1]}."
            )
        for name in ("groups", "seeds_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(
                f"microbatch_size must be at least 1, or None, got {self.microbatch_size}."
            )


def run(config: DecideConfig) -> pathlib.Path:
    """Runs a setting and draws its report; returns the folder.

    Raises:
        ValueError: if the data set is missing or holds other images than the setting's, or the
            folder holds records of something else.
    """
    setting = settings.SETTINGS[config.setting]
    if not config.report:
        _run(config, setting)
    page, text = report.write(setting, config.out)
    print(f"{text}\n{page}")
    return config.out


def _run(config: DecideConfig, setting: settings.Setting) -> None:
    images = _datasets.load(setting, config.dataset)
    options = _runs.Options(config.convolution, config.groups, config.microbatch_size)
    runner, at_once = _runs.Runner(setting, images, options), config.seeds_at_once
    if config.calibrate:
        choices = [
            (options, at_once)
            for at_once in (20, 10, 5)
            for options in (_runs.Options(), _runs.Options(groups=10), _runs.Options("lax"))
        ]
        best = _calibration.calibrate(setting, images, choices)[0]
        runner, at_once = best.runner, best.seeds_at_once
    one = study.Study(runner, images, config.out, seeds_at_once=at_once, told=_told)
    first, count = config.seeds or setting.seeds
    names = config.contestants or setting.contestants
    study.run_setting(one, names, range(first, first + count))


def _told(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text)
