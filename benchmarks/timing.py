"""Timing contestants side by side: they take turns, and ratios are formed within a round."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(samples: Any) -> Spread:
    """Median and quartiles of some samples."""
    low, median, high = np.percentile(np.asarray(samples, np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def ratio(samples: Mapping[Any, Any], name: Any, reference: Any) -> Spread:
    """The ratio of two contestants, formed round by round, so that load that slows both cancels."""
    return spread(np.asarray(samples[name]) / np.asarray(samples[reference]))


def alternate(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmups: int = 2,
    budget: float = float("inf"),
    description: str = "",
) -> dict[str, np.ndarray]:
    """Times contestants in turn, in every round in another order.

    What ran just before leaves its marks, in caches and in memory that it gave back; in a random
    order these marks are the same for all.

    Args:
        contestants: functions of no arguments by name; the timer waits for their results.
        repeats: the number of rounds that count.
        warmups: the number of rounds before them, for compilation.
        budget: the seconds after which no further round begins, once three count.
        description: the text of the progress bar.

    Returns:
        The seconds of each round, [repeats], by name.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    orders = np.random.default_rng(0)
    start = time.perf_counter()
    for round_ in tqdm(range(warmups + repeats), desc=description, unit="round", leave=False):
        for name in shuffled(contestants, orders):
            elapsed = once(contestants[name])
            if round_ >= warmups:
                seconds[name].append(elapsed)
        if round_ - warmups >= 2 and time.perf_counter() - start > budget:
            break
    return {name: np.array(values) for name, values in seconds.items()}


def shuffled(names: Iterable[Any], orders: np.random.Generator) -> list[Any]:
    """The names in the next random order."""
    names = list(names)
    return [names[i] for i in orders.permutation(len(names))]


def once(contestant: Callable[[], Any]) -> float:
    """The seconds of one call and its result, with Python's garbage collector disabled."""
    gc.disable()
    try:
        start = time.perf_counter()
        jax.block_until_ready(contestant())
        return time.perf_counter() - start
    finally:
        gc.enable()


class Growth(NamedTuple):
    """The exponent of a power law and its standard error."""

    exponent: float
    standard_error: float


def growth(sizes: Any, seconds: Any) -> Growth:
    """Fits seconds = c * size ** exponent by least squares of the logarithms.

    Raises:
        ValueError: if there are fewer than two sizes.
    """
    x, y = (np.log(np.asarray(values, np.float64)) for values in (sizes, seconds))
    if len(x) < 2:
        raise ValueError(f"sizes must be at least two to fit an exponent, got {len(x)}.")
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    residual = y - y.mean() - slope * x
    freedom = max(len(x) - 2, 1)
    return Growth(float(slope), float(np.sqrt(residual @ residual / freedom / (x @ x))))
