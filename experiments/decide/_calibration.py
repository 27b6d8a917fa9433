"""Finds the options with which a setting is computed fastest on the device."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from experiments.decide import _datasets
from experiments.decide._runs import Options, Runner
from experiments.decide.settings import Setting


class Timing(NamedTuple):
    """The speed of a choice of options, with its runner, which has compiled already.

    Attributes:
        runner: the runner with the options that were timed.
        seeds_at_once: the number of runs side by side.
        seconds_per_seed_step: the seconds for one step of one seed.
        compile_seconds: the seconds before the first step.
    """

    runner: Runner
    seeds_at_once: int
    seconds_per_seed_step: float
    compile_seconds: float


def calibrate(
    setting: Setting,
    images: _datasets.Images,
    choices: Sequence[tuple[Options, int]],
    *,
    name: str = "cov",
    steps: int = 20,
    budget_seconds: float = 60.0,
    told: Callable[[str], None] = print,
) -> list[Timing]:
    """Times a few steps of each choice of options and seeds at once; returns the fastest first.

    Choices that need more memory than the device has are left out. Except for the first, a choice
    is not tried if it would end after `budget_seconds` in case it took as long as the slowest so
    far.

    Args:
        setting: the setting to time.
        images: the images of the setting.
        choices: the choices to try, the most promising first.
        name: the contestant that is timed.
        steps: the number of steps that are timed.
        budget_seconds: the time limit, in seconds; see above.
        told: called with a text for each result.

    Raises:
        RuntimeError: if no choice works.
    """
    began, slowest = time.perf_counter(), 0.0
    timings, failures = [], []
    for options, at_once in choices:
        before = time.perf_counter()
        if timings and before - began + slowest > budget_seconds:
            told(f"calibrate: no other choice is tried, {budget_seconds:g} s are enough")
            break
        seeds = range(setting.tuning_seeds[0], setting.tuning_seeds[0] + at_once)
        try:
            runner = Runner(setting, images, options)
            seconds, compiling = runner.time_steps(name, seeds, steps)
        except jax.errors.JaxRuntimeError as error:  # In general, the memory was not enough.
            failures.append(f"{options}, {at_once} seeds: {str(error)[:200]}")
            told(f"calibrate: {failures[-1]}")
            continue
        timing = Timing(runner, at_once, seconds / at_once, compiling)
        timings.append(timing)
        slowest = max(slowest, time.perf_counter() - before)
        told(
            f"calibrate: {options.convolution}, groups {options.groups}, {at_once} seeds at once: "
            f"{1e3 * seconds:.2f} ms per step ({compiling:.1f} s to compile)"
        )
    if not timings:
        raise RuntimeError(f"no choice of options works on this device: {'; '.join(failures)}")
    return sorted(timings, key=lambda timing: timing.seconds_per_seed_step)
