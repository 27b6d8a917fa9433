"""Processes that hold contestants and run them on request.

On a CPU, each contestant of `against_torch` has a process of its own, since the C library's
treatment of freed memory is set once per process. On a GPU, where that matters little and a process
takes long to start, one process holds all contestants of a kind.
"""

import contextlib
import ctypes
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from benchmarks.rows import Reference, Row
from experiments import huge_pages

OURS, TORCH = "ours", "PyTorch"
AS_IS, KEPT, HUGE = "as it is", "keeps pages", "huge pages"
NO_TIME = "no time left to get ready"


class Contestant(NamedTuple):
    """A way to make the step of a row.

    Attributes:
        library: OURS or TORCH.
        microbatched: whether gradients are added up over micro-batches.
        channels_last: whether PyTorch's images and kernels have their channels last in memory.
        compiled: mode of `torch.compile`; None for eager PyTorch, and for ours.
        loop: whether ours makes its steps in one compiled loop.
        tf32: whether a GPU may round the factors of products to TF32.
    """

    library: str
    microbatched: bool
    channels_last: bool = False
    compiled: str | None = None
    loop: bool = False
    tf32: bool = True

    def __str__(self) -> str:
        how = [
            "channels-last" if self.channels_last else "",
            {None: "", "default": "torch.compile"}.get(self.compiled, "torch.compile, graphs"),
            "micro-batched" if self.microbatched else "whole batch",
            "compiled loop" if self.loop else "",
        ]
        return f"{self.library}: {', '.join(filter(None, how))}"


class Task(NamedTuple):
    """A contestant to get ready.

    Attributes:
        name: its name in later requests.
        contestant: the way in which it makes its steps.
        row: the row of the table.
        reference: the starting point.
    """

    name: Any
    contestant: Contestant
    row: Row
    reference: Reference


class Settings(NamedTuple):
    """The settings of a whole process.

    Attributes:
        library: OURS or TORCH.
        device: cpu or cuda.
        allocator: AS_IS; KEPT: freed memory stays with the process; or HUGE: memory is asked for in
            pages of 2 MiB, so that fresh memory costs 512 times fewer page faults.
        threads: the number of cores to use.
    """

    library: str
    device: str
    allocator: str
    threads: int


class WorkerError(RuntimeError):
    """A request to a process failed; the text is that of the process."""


class OutOfTimeError(WorkerError):
    """A process did not answer in time, and has been ended."""


class Worker:
    """A process that answers requests one after the other; its errors come back as `WorkerError`.

    The request ``prepare(tasks, seconds, threads)`` gets contestants ready, several at a time with
    several threads, and begins none after this many seconds. Its answer is, per task, the dict of
    `prepare`, or a text that says why there is none. The answer to ``measure(name, steps)`` is the
    seconds per step, after a step that is not timed: memory that was given back while others had
    their turns comes back slowly.
    """

    def __init__(self, settings: Settings):
        """Starts the process; `settled` waits for it.

        Args:
            settings: the settings of the whole process.
        """
        huge = settings.allocator == HUGE
        # The C library reads the setting of huge pages when a program starts.
        context = multiprocessing.get_context("spawn") if huge else _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        with huge_pages.requested() if huge else contextlib.nullcontext():
            self._process.start()
        theirs.close()

    def send(self, request: str, *arguments: Any) -> None:
        """Sends a request, and does not wait for the answer."""
        try:
            self._pipe.send((request, arguments))
        except (BrokenPipeError, OSError):
            raise WorkerError(self._last_words()) from None

    def answer(self, timeout: float) -> Any:
        """Waits for the answer to the oldest request that has none yet.

        Raises:
            OutOfTimeError: if there is none after `timeout` seconds; the process has been ended.
            WorkerError: if the request failed, or the process died.
        """
        try:
            if not self._pipe.poll(max(timeout, 0)):
                self.close()
                raise OutOfTimeError("it took too long")
            done, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerError(self._last_words()) from None
        if not done:
            raise WorkerError(value)
        return value

    def ask(self, request: str, *arguments: Any, timeout: float) -> Any:
        """`send`, then `answer`."""
        self.send(request, *arguments)
        return self.answer(timeout)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _last_words(self) -> str:
        self._process.join(5)
        return f"its process ended with exit code {self._process.exitcode} (out of memory?)"


def _context() -> Any:
    """A context for processes without inherited threads; if possible, forked after the imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workers", "benchmarks.torch_nets"])
    return context


def keep_pages() -> bool:
    """Makes glibc keep freed memory instead of returning it; False if there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # These are the numbers in glibc's malloc.h.
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def _serve(pipe: Any, settings: Settings) -> None:
    """Answers requests until the pipe is closed."""
    prepared: dict[str, Callable[[int], float]] = {}
    try:
        _settle(settings)
        failure = None
    except Exception:
        failure = _brief(traceback.format_exc())
    while True:
        try:
            request, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if failure is not None:
                raise WorkerError(failure)
            if request == "prepare":
                pipe.send((True, _prepare_all(prepared, settings.device, *arguments)))
            elif request == "measure":
                name, steps = arguments
                pipe.send((True, prepared[name](steps) / steps))
            else:
                raise ValueError(f"unknown request {request!r}.")
        except Exception:
            pipe.send((False, _brief(traceback.format_exc())))


def _prepare_all(
    prepared: dict[Any, Callable[[int], float]],
    device: str,
    tasks: Sequence[Task],
    seconds: float,
    threads: int,
) -> list[dict[str, float] | str]:
    """Fills `prepared`; returns the result of each task."""
    until = time.monotonic() + seconds

    def one(task: Task) -> dict[str, float] | str:
        if time.monotonic() > until:
            return NO_TIME
        try:
            prepared[task.name], found = prepare(task.contestant, task.row, task.reference, device)
        except Exception:
            return _brief(traceback.format_exc())
        return found

    if threads == 1:  # PyTorch compiles in the thread in which it runs.
        return [one(task) for task in tasks]
    with futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, tasks))


def _brief(text: str) -> str:
    """The last line of a traceback, which says what went wrong."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), text)[:300]


def _settle(settings: Settings) -> None:
    """Sets allocator, platform and threads, before anything is allocated or run."""
    if settings.allocator == KEPT and not keep_pages():
        raise WorkerError("this system's C library has no mallopt")
    if settings.allocator == HUGE and not huge_pages.are_requested():
        raise WorkerError("this system has no huge pages on request")
    if settings.library == TORCH:
        from benchmarks import torch_nets

        torch_nets.settle(settings.device, settings.threads)
        return
    import jax

    if settings.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() == "cpu":
        raise WorkerError("jax finds no GPU")


def prepare(
    contestant: Contestant, row: Row, reference: Reference, device: str
) -> tuple[Callable[[int], float], dict[str, float]]:
    """Compiles a contestant in this process and makes its first steps.

    Returns:
        A function that makes some steps and returns their seconds, and a dict: loss and
        gradient_norm of the first step, parameters (the number of scalars), setup (seconds).
    """
    begin = time.perf_counter()
    make = _ours if contestant.library == OURS else _torch
    run, found = make(contestant, row, reference, device)

    def measure(steps: int) -> float:
        run(1)  # Not timed: in its turn a contestant trains on, as it would alone.
        start = time.perf_counter()
        run(steps)
        return time.perf_counter() - start

    measure(1)
    return measure, {**found, "setup": time.perf_counter() - begin}


def _ours(
    contestant: Contestant, row: Row, reference: Reference, device: str
) -> tuple[Callable[[int], None], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from benchmarks import rows
    from msgd_jax import train

    step = rows.step(row, row.microbatch_size if contestant.microbatched else None)
    state = rows.start(row, reference.params)
    data = jax.tree.map(jnp.asarray, (reference.images, reference.labels))
    # None means XLA's default, which is TF32 on GPUs that have it.
    precision = None if contestant.tf32 else "float32"

    if contestant.loop:
        loop = train.make_loop(step, max_steps=1_000)

        def advance(state: Any, steps: int) -> Any:
            with jax.default_matmul_precision(precision):  # It is part of the compiled program.
                return loop(state, data, steps)
    else:
        with jax.default_matmul_precision(precision):
            compiled = jax.jit(step, donate_argnums=0).lower(state, data).compile()

        def advance(state: Any, steps: int) -> Any:
            metrics = None
            for _ in range(steps):
                state, metrics = compiled(state, data)
            return state, metrics

    state, metrics = advance(state, 1)
    metrics = jax.tree.map(jnp.ravel, metrics)  # Those of the loop have an axis of steps.

    def run(steps: int) -> None:
        nonlocal state
        state, _ = advance(state, steps)
        jax.block_until_ready(state)

    return run, {
        "loss": float(metrics.loss[0]),
        "gradient_norm": float(metrics.gradient_norm[0]),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }


def _torch(
    contestant: Contestant, row: Row, reference: Reference, device: str
) -> tuple[Callable[[int], None], dict[str, float]]:
    from benchmarks import torch_nets

    torch_nets.allow_tf32(contestant.tf32)
    step = torch_nets.Step(
        row,
        reference,
        device=device,
        microbatched=contestant.microbatched,
        channels_last=contestant.channels_last,
        compiled=contestant.compiled,
    )
    loss, norm = step.check(reference.weights)

    def run(steps: int) -> None:
        torch_nets.allow_tf32(contestant.tf32)
        for _ in range(steps):
            step()
        torch_nets.synchronize(device)

    count = sum(parameter.numel() for parameter in step.net.parameters())
    return run, {"loss": loss, "gradient_norm": norm, "parameters": count}
