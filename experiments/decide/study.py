"""Makes the missing runs of a setting, in chunks of seeds that are recorded when they are done."""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments import terminal
from experiments.decide import _datasets, _records
from experiments.decide._runs import Runner, Shape, shape_of
from experiments.decide.settings import CONTESTANTS, Setting, label


class Job(NamedTuple):
    """Runs of one contestant, which are made in chunks.

    Attributes:
        contestant: the name of the contestant.
        runs: pairs of a seed and a factor of the learning rate.
    """

    contestant: str
    runs: tuple[tuple[int, float], ...]


def tuning_job(setting: Setting) -> Job:
    """GD at every learning rate that is tried, on the tuning seeds."""
    first, count = setting.tuning_seeds
    runs = [(seed, f) for f in setting.tuning_factors for seed in range(first, first + count)]
    return Job("gd", tuple(runs))


def best_factor(setting: Setting, runs: dict[_records.Run, _records.Curve]) -> float | None:
    """GD's own learning rate divided by the setting's.

    It is the one with the best mean test accuracy at the endpoint, and the smallest of equally good
    ones. None while tuning runs are missing.
    """
    means = {}
    for factor in setting.tuning_factors:
        wanted = [
            _records.Run("gd", f, seed) for seed, f in tuning_job(setting).runs if f == factor
        ]
        if not all(run in runs for run in wanted):
            return None
        means[factor] = np.mean([runs[run].test_accuracy[-1] for run in wanted])
    return max(sorted(means), key=lambda factor: means[factor])


class Study:
    """One setting with its images, its records and its runner.

    Attributes:
        setting: the setting that is run.
        path: the file of the records.
    """

    def __init__(
        self,
        runner: Runner,
        images: _datasets.Images,
        folder: pathlib.Path,
        *,
        seeds_at_once: int,
        told: Callable[[str], None] = print,
    ):
        """Reads the records that are there.

        Args:
            runner: makes the runs.
            images: the images that `runner` holds.
            folder: the folder of the records.
            seeds_at_once: the number of runs side by side.
            told: called with texts that say what happens.

        Raises:
            ValueError: if the folder has records of another setting or of other images.
        """
        self.setting, self.path = runner.setting, _records.path_of(folder, runner.setting)
        self._runner, self._at_once, self._told = runner, seeds_at_once, told
        self._checksum, self._num_test = _datasets.checksum(images), len(images.test_labels)
        found = _records.lines(self.path, self.setting)
        _records.check_data(found, self.path, self._checksum)
        self._seconds: dict[Shape, float] = {}
        self._longest_start = 0.0
        # A chunk that is not full would be compiled anew, which takes longer on a graphics card.
        self._fills_up = jax.default_backend() != "cpu"

    def runs(self) -> dict[_records.Run, _records.Curve]:
        """All runs that are recorded."""
        return _records.curves(_records.lines(self.path, self.setting))

    def job(self, name: str, seeds: Sequence[int]) -> Job | None:
        """The main runs of a contestant; None if it needs GD's own rate and that is not chosen."""
        factor = best_factor(self.setting, self.runs()) if CONTESTANTS[name].tuned else 1.0
        return None if factor is None else Job(name, tuple((seed, factor) for seed in seeds))

    def missing(self, job: Job) -> list[tuple[int, float]]:
        """The runs of a job that are not recorded yet."""
        runs = self.runs()
        return [
            (seed, factor)
            for seed, factor in job.runs
            if _records.Run(job.contestant, factor, seed) not in runs
        ]

    def expected_seconds(self, job: Job) -> float:
        """The expected seconds for one chunk, from earlier chunks; 0 if there was none.

        For the first chunk of a shape, the longest compile time so far is added.
        """
        seconds = self._seconds.get(shape_of(self.setting, job.contestant))
        if seconds is None:
            return self._longest_start
        return CONTESTANTS[job.contestant].steps(self.setting) * seconds

    def run(
        self,
        job: Job,
        *,
        deadline: float | None = None,
        latest_end: float | None = None,
        progress: terminal.Silent | None = None,
    ) -> bool:
        """Makes and records the missing runs of a job; returns whether the job is complete.

        Args:
            job: the runs to make.
            deadline: a time of `time.monotonic` after which no chunk is started.
            latest_end: a time of `time.monotonic`; a chunk that is expected to end later is not
                started.
            progress: advanced by the steps of every run.
        """
        missing = self.missing(job)
        for first in range(0, len(missing), self._at_once):
            now = time.monotonic()
            if deadline is not None and now > deadline:
                self._told(f"{self._name(job)}: not started, the time is over")
                return False
            expected = self.expected_seconds(job)
            if latest_end is not None and now + expected > latest_end:
                self._told(f"{self._name(job)}: not started, it would take {expected:.0f} s")
                return False
            self._run_chunk(job.contestant, missing[first : first + self._at_once], progress)
        return True

    def _run_chunk(
        self, name: str, chunk: list[tuple[int, float]], progress: terminal.Silent | None
    ) -> None:
        size = len(chunk)
        filled = chunk + [chunk[-1]] * (self._at_once - size if self._fills_up else 0)
        seeds, factors = zip(*filled, strict=True)

        def advanced(steps: int) -> None:
            if progress is not None:
                progress.update(steps * size)

        outcome = self._runner.run(name, seeds, factors=factors, advanced=advanced)
        kept = type(outcome.scores)(*(values[:, :size] for values in outcome.scores))
        _records.add(
            self.path,
            self.setting,
            checksum=self._checksum,
            contestant=name,
            seeds=seeds[:size],
            factors=factors[:size],
            num_test=self._num_test,
            outcome=outcome._replace(scores=kept),
            options=self._runner.options,
        )
        self._seconds[shape_of(self.setting, name)] = outcome.seconds / outcome.steps[-1]
        self._longest_start = max(self._longest_start, outcome.compile_seconds)
        self._told(
            f"{self.setting.name}, {name}: {size} runs, test accuracy "
            f"{100 * kept.test_correct[-1].mean() / self._num_test:.2f} %, training loss "
            f"{kept.train_loss[-1].mean():.2g}; {outcome.seconds:.1f} s, and "
            f"{outcome.compile_seconds:.1f} s before the first step"
        )

    def _name(self, job: Job) -> str:
        return f"{self.setting.name}, {job.contestant}"


def main_seeds(setting: Setting) -> range:
    """The seeds of the main runs."""
    return range(setting.seeds[0], sum(setting.seeds))


def run_setting(
    study: Study,
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    deadline: float | None = None,
    latest_end: float | None = None,
    shows_progress: bool = True,
) -> list[str]:
    """Runs contestants in this order; the tuning runs of GD come before its tuned runs.

    Args:
        study: the study of a setting.
        names: the names of the contestants.
        seeds: the seeds of the main runs.
        deadline: see `Study.run`.
        latest_end: see `Study.run`.
        shows_progress: whether to show a progress bar with the time left.

    Returns:
        The names of those that are not complete.
    """
    setting, unfinished = study.setting, []
    total = sum(CONTESTANTS[name].steps(setting) * len(seeds) for name in names)
    with terminal.Progress(total) if shows_progress else terminal.Silent() as progress:
        for name in names:
            progress.compiling(label(name, setting))
            if CONTESTANTS[name].tuned:
                study.run(tuning_job(setting), deadline=deadline, latest_end=latest_end)
            job = study.job(name, seeds)
            # Recorded runs count as done, so that the time left is correct.
            if job is not None and len(study.missing(job)) < len(job.runs):
                done = len(job.runs) - len(study.missing(job))
                progress.update(done * CONTESTANTS[name].steps(setting))
            complete = job is not None and study.run(
                job, deadline=deadline, latest_end=latest_end, progress=progress
            )
            if not complete:
                unfinished.append(name)
    return unfinished
