"""Mini-batches without replacement from N examples: `noise.permute` against `jax.random.choice`.

``python -m benchmarks.index_sampling``. `jax.random.choice(replace=False)` sorts N numbers;
`permute` only computes the b indices. Memory is what XLA allocates for one draw. The sizes of
`permute` take turns, so that the ratio between them is exact.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import report, timing
from msgd_jax import noise

OURS, BASELINE = "permute", "jax.random.choice"
KIB = 2**10
FLAT_FROM = 10_000  # For smaller N, `permute` sorts too (up to 1,024), or its grid is small.


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures draws of a mini-batch's indices without replacement, as N grows.

    Attributes:
        examples: The numbers N of examples; two of them are primes, which fill no grid.
        batch_sizes: The batch sizes b.
        largest_sorted: The largest N that the baseline is timed at.
        inner: The number of draws in one measurement of `permute`, which is quicker than a clock
            can tell.
    """

    examples: tuple[int, ...] = (
        10**3,
        10**4,
        10**5,
        100_003,
        10**6,
        10**7,
        10**8,
        10**9,
        2**31 - 1,
    )
    batch_sizes: tuple[int, ...] = (50, 1_000)
    largest_sorted: int = 10**7
    inner: int = 20


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines."""
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, examples=(2_000, 10**4, 10**5), largest_sorted=10**4, inner=2
        )
    rows, headlines, ours, baseline = [], [], {}, {}
    for b in config.batch_sizes:
        draws = {n: _permute(n, b) for n in config.examples}
        ours[b] = timing.alternate(
            {str(n): _again(draw, config.inner) for n, draw in draws.items()},
            repeats=config.repeats,
            description=f"{OURS}, b = {b:,}",
        )
        ours[b] = {n: seconds / config.inner for n, seconds in ours[b].items()}
        baseline[b] = {}
        for n, draw in draws.items():
            memory = {OURS: _memory(draw), BASELINE: _memory(_choice(n, b))}
            if n <= config.largest_sorted:
                baseline[b][str(n)] = _seconds_sorted(n, b, config.repeats)
            rows.append(_row(n, b, ours[b][str(n)], baseline[b].get(str(n)), memory))
        headlines += _headlines(config, b, draws, ours[b])
    report.publish(
        "index_sampling",
        config,
        rows,
        headlines,
        functools.partial(_plot, ours, baseline),
        seconds={
            name: {str(b): {n: v.tolist() for n, v in s.items()} for b, s in of_b.items()}
            for name, of_b in ((OURS, ours), (BASELINE, baseline))
        },
    )
    return headlines


def _permute(n: int, b: int) -> Any:
    return jax.jit(lambda key: noise.permute(key, jnp.arange(b), n))


def _choice(n: int, b: int) -> Any:
    return jax.jit(lambda key: jax.random.choice(key, n, (b,), replace=False))


def _again(draw: Any, times: int) -> Any:
    keys = list(jax.random.split(jax.random.key(1), times))
    return lambda: [draw(key) for key in keys]


def _seconds_sorted(n: int, b: int, repeats: int) -> np.ndarray:
    """The seconds of the baseline at one size; with fewer rounds if one takes seconds or more."""
    draw = _choice(n, b).lower(jax.random.key(0)).compile()
    repeats, warmups = (repeats, 1) if n < 10**6 else (3, 1) if n < 10**7 else (1, 0)
    seconds = timing.alternate(
        {BASELINE: _again(draw, 1)},
        repeats=repeats,
        warmups=warmups,
        description=f"{BASELINE}, N={n:,}",
    )
    return seconds[BASELINE]


def _memory(draw: Any) -> float:
    """The bytes that one draw allocates, with its result; nan if the backend does not report it."""
    analysis = draw.lower(jax.random.key(1)).compile().memory_analysis()
    if analysis is None:
        return float("nan")
    return float(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _row(
    n: int, b: int, ours: np.ndarray, baseline: np.ndarray | None, memory: dict[str, float]
) -> dict[str, Any]:
    ran = baseline is not None
    return {
        "b": f"{b:,}",
        "N": f"{n:,}",
        f"{OURS}, time": report.duration(float(np.median(ours))),
        f"{OURS}, KiB": f"{memory[OURS] / KIB:,.1f}",
        f"{BASELINE}, time": report.duration(float(np.median(baseline))) if ran else "not run",
        f"{BASELINE}, KiB": f"{memory[BASELINE] / KIB:,.1f}",
        "times quicker": f"{np.median(baseline) / np.median(ours):,.0f}" if ran else "",
    }


def _headlines(
    config: Config, b: int, draws: dict[int, Any], seconds: dict[str, np.ndarray]
) -> list[report.Headline]:
    """The time and memory at each N, divided by those at the first N of at least `FLAT_FROM`."""
    sizes = [n for n in config.examples if n >= FLAT_FROM]
    first = sizes[0]
    ratios = {n: timing.ratio(seconds, str(n), str(first)) for n in sizes[1:]}
    worst = max(ratios, key=lambda n: ratios[n].median)
    memory = [_memory(draws[n]) for n in sizes]
    growth = max(memory) / min(memory)
    where = f"b = {b:,}, N = {first:,} to {sizes[-1]:,}"
    ratio = ratios[worst]
    return [
        report.Headline(
            "index_sampling",
            f"time of a draw, largest over that of the smallest N, {where}",
            f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f}) at N = {worst:,}",
            "<= 1.1",
            ratio.median <= 1.1,
        ),
        report.Headline(
            "index_sampling",
            f"memory of a draw, largest over smallest, {where}",
            f"{growth:.2f} ({max(memory) / KIB:.1f} KiB)",
            "<= 1.1",
            growth <= 1.1,
        ),
    ]


def _plot(
    ours: dict[int, dict[str, np.ndarray]], baseline: dict[int, dict[str, np.ndarray]], axes: Any
) -> None:
    for name, of_b, style in ((OURS, ours, "o-"), (BASELINE, baseline, "s--")):
        for b, seconds in of_b.items():
            sizes = [int(n) for n in seconds]
            medians = [1e3 * float(np.median(v)) for v in seconds.values()]
            axes.loglog(sizes, medians, style, label=f"{name}, b = {b:,}")
    axes.set_xlabel("examples N")
    axes.set_ylabel("ms per draw (median)")
    axes.set_title("Mini-batch indices without replacement", fontsize=11)
    axes.legend()


if __name__ == "__main__":
    main(tyro.cli(Config))
