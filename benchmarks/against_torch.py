"""The same full-batch M-SGD step in PyTorch, in all variants that may be its fastest.

``python -m benchmarks.against_torch``. The table has five rows: LeNet, and VGG-11 and ResNet-18 at
two widths each. PyTorch computes the batch whole or in micro-batches, with channels first or last,
eagerly or with `torch.compile`. On a CPU each of these also runs with an allocator that keeps freed
memory, and with memory in huge pages, since libraries otherwise give small pages back to the system
at every step. Our step is shown as the experiments make it, in huge pages. The first step of
every contestant is compared with ours. Contestants that there was no time for are listed.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from benchmarks import machine, report, rows, timing
from benchmarks.workers import (
    AS_IS,
    HUGE,
    KEPT,
    NO_TIME,
    OURS,
    TORCH,
    Contestant,
    Settings,
    Task,
    Worker,
    WorkerError,
)

Name = tuple[Contestant, str]  # A contestant and its allocator.
MIN_ROUNDS = 3
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}  # For the first step. TF32 keeps ten bits.


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compares our full-batch step with PyTorch's best.

    Attributes:
        repeats: The largest number of rounds that count.
        device: The device; cuda stands for ROCm too.
        rows: The rows of the table to measure.
        seconds: The seconds for all rows together; three rounds of the most important contestants
            are measured at least, even if that takes longer.
        compile_seconds: The longest time, in seconds, that one contestant may take to get ready.
        full_float32: Whether, on a GPU, the last row is measured with products in full float32 too,
            not only in TF32.
    """

    repeats: int = 40
    device: Literal["cpu", "cuda"] = "cpu"
    rows: tuple[str, ...] = tuple(rows.ROWS)
    seconds: float = 300.0
    compile_seconds: float = 100.0
    full_float32: bool = True

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.rows) - set(rows.ROWS))
        if unknown or not self.rows:
            raise ValueError(f"rows must name some of {tuple(rows.ROWS)}, got {self.rows}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")


@dataclasses.dataclass
class Measured:
    """The results of one row.

    Attributes:
        row: the row.
        seconds: the seconds of a step in each round, by contestant.
        left_out: the contestants without results, and the reasons.
        checks: the loss and the gradient norm of each contestant's first step, and its seconds to
            get ready.
    """

    row: rows.Row
    seconds: dict[Name, np.ndarray] = dataclasses.field(default_factory=dict)
    left_out: dict[Name, str] = dataclasses.field(default_factory=dict)
    checks: dict[Name, dict[str, float]] = dataclasses.field(default_factory=dict)

    def ours(self) -> Name | None:
        """Our step as in the experiments: in micro-batches, in huge pages where there are any."""
        mine = [n for n in self.seconds if n[0].library == OURS and n[1] != KEPT]

        def how_unlike(name: Name) -> tuple[bool, ...]:
            contestant, allocator = name
            return not contestant.microbatched, contestant.loop, allocator != HUGE

        return min(mine, key=how_unlike) if mine else None

    def best(self, library: str, statistic: Any = np.median) -> Name | None:
        """The fastest contestant of a library."""
        theirs = {n: statistic(s) for n, s in self.seconds.items() if n[0].library == library}
        return min(theirs, key=lambda n: theirs[n]) if theirs else None


def contestants(row: rows.Row, device: str, *, tf32: bool = True) -> list[Name]:
    """The contestants of a row, the most important first."""
    splits = row.microbatch_size < row.num_examples
    batchings = (True, False) if splits else (False,)
    # With ghost batch norm, our step in one batch would be another function.
    mine = [
        Contestant(OURS, m, tf32=tf32) for m in batchings if m or not (splits and row.normalises)
    ]
    theirs = [Contestant(TORCH, m, tf32=tf32) for m in batchings]
    theirs += [Contestant(TORCH, m, channels_last=True, tf32=tf32) for m in batchings]
    compiled = [Contestant(TORCH, m, compiled="default", tf32=tf32) for m in batchings]
    if device == "cpu":
        # Where time is short, every way of writing PyTorch's step counts before every allocator,
        # and the allocator with which PyTorch is fastest in most rows before the others.
        order = [(HUGE, mine), (KEPT, theirs), (HUGE, theirs), (HUGE, compiled), (AS_IS, theirs)]
        order += [(KEPT, mine), (AS_IS, mine), (KEPT, compiled), (AS_IS, compiled)]
        return [(contestant, allocator) for allocator, some in order for contestant in some]
    last = {"channels_last": True, "tf32": tf32}
    whole = [Contestant(TORCH, False, compiled=m, **last) for m in ("default", "reduce-overhead")]
    loop = mine[-1]._replace(loop=True)
    return [(c, AS_IS) for c in (*mine, *theirs, *whole, *compiled[: len(batchings) - 1], loop)]


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines (none without PyTorch)."""
    if importlib.util.find_spec("torch") is None:
        print("against_torch needs PyTorch (pip install torch): left out.")
        return []
    if config.quick:
        config = dataclasses.replace(
            config, repeats=2, rows=config.rows[:1], seconds=min(config.seconds, 90.0)
        )
    table = rows.TINY if config.quick else rows.ROWS
    chosen = [(table[name], True) for name in config.rows]
    if config.device == "cuda" and config.full_float32:
        chosen.append((chosen[-1][0], False))
    measure = _on_cpu if config.device == "cpu" else _on_gpu
    measured = list(measure(config, chosen))
    headlines = [_headline(found) for found in measured if found.ours() and found.best(TORCH)]
    report.publish(
        "against_torch",
        config,
        [line for found in measured for line in _lines(found)],
        headlines,
        functools.partial(_plot, measured),
        torch=importlib.metadata.version("torch"),
        samples=[_record(found) for found in measured],
    )
    for found in measured:
        for (contestant, allocator), why in found.left_out.items():
            print(f"Left out of {_title(found)}: {contestant} ({allocator}): {why}")
    return headlines


def _on_cpu(config: Config, chosen: list[tuple[rows.Row, bool]]) -> Iterable[Measured]:
    """Measures row by row, with one process per contestant."""
    end = time.monotonic() + config.seconds
    for i, (row, _) in enumerate(chosen):
        found = Measured(row)
        share = (end - time.monotonic()) / (len(chosen) - i)
        prepared_by, until = (time.monotonic() + part * share for part in (0.6, 1.0))
        reference = rows.reference(row)
        workers: dict[Name, Worker] = {}
        for name in tqdm(contestants(row, "cpu"), desc=f"ready: {row}", leave=False):
            left = prepared_by - time.monotonic()
            if left <= 0 and len({n[0].library for n in workers}) == 2:
                found.left_out[name] = NO_TIME
                continue
            workers[name] = worker = Worker(_settings(name, "cpu"))
            limit = config.compile_seconds if left <= 0 else min(config.compile_seconds, left + 10)
            worker.send("prepare", [Task((id(found), name), name[0], row, reference)], limit, 1)
            if not _collect([(found, name)], worker, limit):
                workers.pop(name).close()
        _check(found, TOLERANCE["cpu"])
        try:
            _take_turns(found, workers, config.repeats, until, at_least=1.0)
        finally:
            for worker in workers.values():
                worker.close()
        yield found


def _on_gpu(config: Config, chosen: list[tuple[rows.Row, bool]]) -> Iterable[Measured]:
    """Measures with one process for ours, one for eager PyTorch, and one per compiled PyTorch.

    Everything is compiled first, on all cores, and nothing else runs during a measurement.
    """
    start = time.monotonic()
    prepared_by, end = start + 0.6 * config.seconds, start + config.seconds
    found = [Measured(row) for row, _ in chosen]
    jobs: dict[Any, list[tuple[Measured, Name]]] = {}
    for measured, (row, tf32) in zip(found, chosen, strict=True):
        for name in contestants(row, "cuda", tf32=tf32):
            alone = name[0].compiled is not None
            jobs.setdefault((id(measured), name) if alone else name[0].library, []).append(
                (measured, name)
            )
    references = {row: rows.reference(row) for row, _ in chosen}
    workers = {job: Worker(_settings(names[0][1], config.device)) for job, names in jobs.items()}
    try:
        for job, names in jobs.items():
            # Loops come last, since they are a second program of the same step.
            names.sort(key=lambda who: who[1][0].loop)
            tasks = [Task((id(m), n), n[0], m.row, references[m.row]) for m, n in names]
            threads = min(4, machine.usable_cores()) if job == OURS else 1
            workers[job].send("prepare", tasks, prepared_by - time.monotonic(), threads)
        where: dict[int, dict[Name, Worker]] = {id(measured): {} for measured in found}
        # Shared processes first, since they are not ended if one contestant is slow.
        for job in sorted(jobs, key=lambda job: job not in (OURS, TORCH)):
            limit = min(start + config.compile_seconds, prepared_by) - time.monotonic()
            for measured, name in _collect(
                jobs[job], workers[job], config.seconds if job in (OURS, TORCH) else limit
            ):
                where[id(measured)][name] = workers[job]
        for i, measured in enumerate(found):
            _check(measured, TOLERANCE["cuda"])
            until = time.monotonic() + (end - time.monotonic()) / (len(found) - i)
            _take_turns(measured, where[id(measured)], config.repeats, until, at_least=0.05)
            yield measured
    finally:
        for worker in workers.values():
            worker.close()


def _settings(name: Name, device: str) -> Settings:
    return Settings(name[0].library, device, name[1], machine.usable_cores())


def _collect(
    who: list[tuple[Measured, Name]], worker: Worker, timeout: float
) -> list[tuple[Measured, Name]]:
    """Waits until contestants are ready; returns those that are."""
    try:
        answers = worker.answer(timeout)
    except WorkerError as error:
        answers = [str(error)] * len(who)
    ready = []
    for (found, name), answer in zip(who, answers, strict=True):
        if isinstance(answer, str):
            found.left_out[name] = answer
        else:
            found.checks[name] = answer
            ready.append((found, name))
    return ready


def _check(found: Measured, tolerated: float) -> None:
    """Leaves out contestants whose first step does not compute what ours does."""
    first = next((c for n, c in found.checks.items() if n[0].library == OURS), None)
    for name, check in found.checks.items():
        for quantity, wanted in (first or {}).items():
            tolerance = {"setup": float("inf"), "parameters": 0.0}.get(quantity, tolerated)
            if not abs(check[quantity] - wanted) <= tolerance * abs(wanted):
                found.left_out[name] = (
                    f"its {quantity} in the first step is {check[quantity]:.6g}, ours {wanted:.6g}"
                )


def _take_turns(
    found: Measured, workers: dict[Name, Worker], repeats: int, until: float, at_least: float
) -> None:
    """Measures in rounds until the time is up, in every round in another order.

    Args:
        found: the results, which are filled in.
        workers: the contestants and their processes.
        repeats: the largest number of rounds.
        until: the `time.monotonic` after which no round begins, once there are MIN_ROUNDS.
        at_least: the smallest seconds of one measurement; quicker steps are made several times.
    """
    steps: dict[Name, int] = {}
    samples: dict[Name, list[float]] = {n: [] for n in workers if n not in found.left_out}
    orders = np.random.default_rng(0)
    for round_ in tqdm(range(repeats + 1), desc=str(found.row), unit="round", leave=False):
        for name in timing.shuffled(samples, orders):
            try:
                count = steps.get(name, 1)
                seconds = workers[name].ask("measure", (id(found), name), count, timeout=120)
            except WorkerError as error:
                found.left_out[name] = str(error)
                del samples[name]
                continue
            if round_:
                samples[name].append(seconds)
            else:  # The first round is not counted: it determines the number of steps.
                steps[name] = int(np.clip(np.ceil(at_least / seconds), 1, 500))
        if round_ >= MIN_ROUNDS and time.monotonic() > until:
            break
    found.seconds = {name: np.array(values) for name, values in samples.items() if values}


def _title(found: Measured) -> str:
    full = any(not name[0].tf32 for name in (*found.seconds, *found.left_out))
    return f"{found.row}{', full float32' if full else ''}"


def _lines(found: Measured) -> list[dict[str, Any]]:
    """The lines of a row's table, the fastest first; ratios are to PyTorch's fastest."""
    best = found.best(TORCH)
    lines = []
    for name in sorted(found.seconds, key=lambda n: np.median(found.seconds[n])):
        ms = timing.spread(1e3 * found.seconds[name])
        over = "" if best is None else f"{timing.ratio(found.seconds, name, best).median:.2f}"
        lines.append(
            {
                "row": _title(found),
                "contestant": str(name[0]),
                "allocator": name[1],
                "ms per step": f"{ms.median:.3g}",
                "quartiles": f"{ms.low:.3g} to {ms.high:.3g}",
                "least": f"{1e3 * found.seconds[name].min():.3g}",
                "over PyTorch's best": over,
                "rounds": len(found.seconds[name]),
                "s to get ready": f"{found.checks[name]['setup']:.0f}",
            }
        )
    return lines


def _headline(found: Measured) -> report.Headline:
    """The ratio of our step to PyTorch's best, by medians and by minima."""
    ours, best, quickest = found.ours(), found.best(TORCH), found.best(TORCH, np.min)
    assert ours is not None
    assert best is not None
    assert quickest is not None
    ratio = timing.ratio(found.seconds, ours, best)
    minima = found.seconds[ours].min() / found.seconds[quickest].min()
    fastest = found.best(OURS)
    assert fastest is not None
    also = ""
    if fastest != ours:
        other = timing.ratio(found.seconds, fastest, best).median
        also = f"; our fastest ({fastest[0]}, {fastest[1]}): {other:.2f}"
    return report.Headline(
        "against_torch",
        f"{_title(found)}: {ours[0]}, over PyTorch's best ({best[0]}, {best[1]})",
        f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f}); "
        f"of the minima {minima:.2f}{also}",
        "<= 1",
        ratio.median <= 1,
    )


def _record(found: Measured) -> dict[str, Any]:
    """The raw samples of a row, as JSON values."""
    return {
        "row": _title(found),
        "seconds": {" | ".join(map(str, n)): s.tolist() for n, s in found.seconds.items()},
        "first_step": {" | ".join(map(str, n)): c for n, c in found.checks.items()},
        "left_out": {" | ".join(map(str, n)): why for n, why in found.left_out.items()},
    }


def _plot(measured: list[Measured], axes: Any) -> None:
    names = [_title(found) for found in measured if found.ours() and found.best(TORCH)]
    ratios = [
        timing.ratio(found.seconds, ours, best)
        for found in measured
        if (ours := found.ours()) and (best := found.best(TORCH))
    ]
    medians = np.array([ratio.median for ratio in ratios])
    errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axes.errorbar(medians, np.arange(len(names)), xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="gray", linewidth=1)
    axes.set_xlabel("time of our step over PyTorch's best (median, quartiles)")
    axes.set_title("Full-batch step with weights of `cov`", fontsize=11)


if __name__ == "__main__":
    import tyro  # It is imported here, since `main` needs no command line.

    main(tyro.cli(Config))
