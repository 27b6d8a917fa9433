"""Trains over the devices of several processes: ``python -m experiments distributed --help``.

Every process runs the same command with its own ``--process-id``. If one of them dies, jax stops
the others with an error once its heartbeat is missed; started again, with any number of processes
and devices, the run goes on from the last checkpoint with the same weight vectors.
"""

import contextlib
import dataclasses
import pathlib
import time
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from experiments import data, terminal
from experiments.training import _optimizers, loop, runs, trainer
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig
from msgd_jax import sharding, train
from msgd_jax._streams import Stream, derive
from msgd_jax._validate import shown


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """Which processes train together.

    Attributes:
        coordinator: address and port of process 0, as in ``10.0.0.1:1234``; None for one process,
            or where jax finds out by itself (Slurm, GKE, TPU pods), with `num_processes` None too.
        num_processes: how many there are.
        process_id: which one this is.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
    """

    coordinator: str | None = None
    num_processes: int | None = 1
    process_id: int | None = None
    heartbeat_timeout: int = 30

    def __post_init__(self):
        for name in ("num_processes", "heartbeat_timeout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.num_processes is None or self.num_processes == 1:
            return
        if self.coordinator is None or self.process_id is None:
            raise ValueError(
                f"num_processes = {self.num_processes} needs coordinator and process_id, got "
                f"{self.coordinator} and {self.process_id}."
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id must be between 0 and {self.num_processes - 1}, for num_processes = "
                f"{self.num_processes}, got {self.process_id}."
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                f"coordinator must be an address and a port, as in 10.0.0.1:1234, got "
                f"{shown(self.coordinator)}."
            )

    def start(self) -> None:
        """Connects to the others; before anything is computed."""
        if self.num_processes == 1:
            return
        jax.distributed.initialize(
            self.coordinator,
            self.num_processes,
            self.process_id,
            heartbeat_timeout_seconds=self.heartbeat_timeout,
        )


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Trains one algorithm over the devices of all processes.

    Attributes:
        plan: as for `train`, one seed; `checkpoint_every` steps are a checkpoint, and `out` has to
            be a folder that all processes see.
        processes: which processes train together.
    """

    plan: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    processes: Annotated[ProcessesConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ProcessesConfig
    )


def train_distributed(config: DistributedConfig) -> pathlib.Path:
    """Trains to the end, from the last checkpoint if there is one; returns the run's folder.

    Raises:
        ValueError: if the plan is not one for several devices.
        FileExistsError: if the folder is of another run, or that has finished.
        trainer.DivergedError: at the first loss that is not finite.
    """
    plan = config.plan.resolved()
    _check(plan)
    loop.check(plan)
    assert plan.out is not None
    # Every process looks, before any of them waits for the others.
    if runs.finished(plan.out, plan, "distributed"):
        print(_result(plan, runs.read_object(plan.out / "summary.json")))
        print(f"{plan.out} has finished before: this is its result.")
        return plan.out
    runs.check_writable(plan.out)
    config.processes.start()
    dataset = loop.load(plan)
    with contextlib.ExitStack() as stack:
        folder = None
        if jax.process_index() == 0:
            folder = runs.RunFolder(plan.out, plan, "distributed", data_source=dataset.source)
            stack.callback(folder.close)
        _train(plan, dataset, folder)
    return plan.out


def _result(plan: TrainConfig, summary: dict[str, Any]) -> str:
    train, test = (summary.get(f"{images}_accuracy") for images in ("train", "test"))
    if not (isinstance(train, float) and isinstance(test, float)):
        raise runs.DamagedRecordError(f"{plan.out}/summary.json has no accuracies")
    return (
        f"{plan.label} after {plan.total_steps:,} steps: {100 * train:.2f} % of the training "
        f"images, {100 * test:.2f} % of the test images."
    )


def _train(plan: TrainConfig, dataset: data.Dataset, folder: runs.RunFolder | None) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    examples = sharding.shard_examples(dataset.train, rows)
    functions = trainer.functions_of(plan, dataset)
    stats = functions.init_stats()
    optimizer = _optimizers.make(plan)
    step = train.make_step(
        functions.losses,
        optimizer,
        ALGORITHMS[plan.algorithm].make(len(dataset.train.label), plan.noise),
        microbatch_size=plan.microbatch_size,
        has_aux=bool(jax.tree.leaves(stats)),
        sharding=rows,
    )
    advance = train.make_loop(step, max_steps=plan.checkpoint_every)
    key = jax.random.key(plan.seed)
    params_key = derive(key, Stream.PARAMETERS)
    params = jax.tree.map(lambda leaf: leaf[0], functions.init_params(params_key[None]))
    state = train.init(params, optimizer, key, aux=stats)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.jit(lambda state: state, out_shardings=everywhere)(state)

    assert plan.out is not None
    with contextlib.closing(loop.Checkpoints(plan.out / "checkpoints")) as checkpoints:
        latest = checkpoints.latest() or 0
        if latest:
            state = checkpoints.restore(latest, state)
        if folder is not None:
            folder.cut_metrics(latest)
        shown = terminal.Silent() if folder is None else terminal.Progress(plan.total_steps)
        with shown as progress:
            if latest:
                progress.update(latest)
            progress.compiling(plan.label)
            for done in range(latest, plan.total_steps, plan.checkpoint_every):
                num_steps = min(plan.checkpoint_every, plan.total_steps - done)
                before = time.perf_counter()
                state, metrics = advance(state, examples, num_steps)
                losses = np.asarray(metrics.loss)
                trainer.check_finite(losses[:, None], done, plan.seed)
                seconds = time.perf_counter() - before
                if folder is not None:
                    record = {"step": done + num_steps, "seconds": seconds}
                    record |= {"devices": jax.device_count(), "losses": losses.tolist()}
                    folder.log(record)
                checkpoints.save(done + num_steps, state)
                progress.update(num_steps)
    if folder is not None:
        summary = _summary(functions, jax.device_get((state.params, state.aux)), dataset)
        folder.finish(summary)
        print(_result(plan, summary))


def _summary(functions: Any, params_and_stats: Any, dataset: data.Dataset) -> dict[str, float]:
    params, stats = jax.tree.map(lambda leaf: leaf[None], params_and_stats)
    _, train_accuracy = functions.evaluate(params, stats, dataset.train)
    _, test_accuracy = functions.evaluate(params, stats, dataset.test)
    return {"train_accuracy": float(train_accuracy[0]), "test_accuracy": float(test_accuracy[0])}


def _check(plan: TrainConfig) -> None:
    if plan.out is None:
        raise ValueError("out must be given: a folder that all processes see.")
    if plan.seeds != 1:
        raise ValueError(f"seeds must be 1 where a run is spread over devices, got {plan.seeds}.")
    if plan.augment or ALGORITHMS[plan.algorithm].diagonal_langevin:
        raise ValueError(
            "augment and the diagonal Langevin baseline work on the examples of one device: use "
            f"`train`, got augment = {plan.augment}, algorithm = {plan.algorithm}."
        )
