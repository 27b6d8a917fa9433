"""Runs one training configuration to its end, in its folder, with interruptions.

A run that is killed at any moment and started again ends with the same bits in its parameters and
the same lines in metrics.jsonl, except for the seconds. Weights are functions of (key, step), any
number of steps runs the same compiled loop, and lines logged after the last checkpoint are logged
again.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from experiments import data, figures, models, records, terminal
from experiments.training import runs, trainer
from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig
from experiments.training.trainer import Evaluation

# How long, in seconds, a signal may have to wait for the compiled loop.
_PATIENCE = 2.0


class Stopped(SystemExit):
    """A signal asked the run to stop; it has written a checkpoint.

    Attributes:
        number: the number of the signal; the exit code is 128 more, as in shells.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number, self.code = number, 128 + number


def sizes(config: TrainConfig) -> tuple[int, int]:
    """The numbers of training and test images of a run, without loading them."""
    train, test = data.find(config.dataset, config.train_part).sizes
    return config.num_train or train, config.num_test or test


def check(config: TrainConfig) -> None:
    """Raises ValueError for mistakes in a configuration that can be found without loading data."""
    original = data.find(config.dataset, config.train_part)
    available_of = (original.whole() if config.subset_per_seed else original).sizes
    for name, available in zip(("num_train", "num_test"), available_of, strict=True):
        count = getattr(config, name)
        if count is not None and count > available:
            raise ValueError(f"{name} must be between 1 and {available}, or None, got {count}.")
    algorithm = ALGORITHMS[config.algorithm]
    law = algorithm.make(sizes(config)[0], config.noise)
    if models.MODELS[config.model_name].has_batch_norm:
        trainer.check_ghost_batches(law, config.microbatch_size, config.ghost_batch_size)
        if algorithm.additive != "none":
            raise ValueError(
                "algorithm must not be a baseline with additive noise with "
                f"{config.model_name}, got {config.algorithm!r}: it needs losses of single "
                "examples, which batch norm does not have."
            )


def load(config: TrainConfig) -> data.Dataset:
    """The images of a configuration; with `subset_per_seed`, those of each seed side by side."""
    dataset = data.load(
        config.dataset,
        seed=config.data_seed,
        data_dir=config.data_dir,
        train_part=config.train_part,
        whole=config.subset_per_seed,
    )
    if config.dataset_sha256 not in (None, dataset.sha256):
        raise ValueError(
            f"dataset must hold what it held when the run began, got {config.dataset} with other "
            "contents."
        )
    if not config.subset_per_seed:
        return _drawn(config, dataset, config.num_train, config.data_seed)
    own_seeds = range(config.seed, config.seed + config.seeds)
    num_train, _ = sizes(config)
    return data.side_by_side([_drawn(config, dataset, num_train, seed) for seed in own_seeds])


def _drawn(
    config: TrainConfig, dataset: data.Dataset, num_train: int | None, seed: int
) -> data.Dataset:
    """The subset of a seed, with its wrong labels."""
    drawn = data.subset(dataset, num_train, config.num_test, seed=seed)
    if not config.label_noise:
        return drawn
    return data.with_wrong_labels(drawn, config.label_noise, seed=seed)


def run(
    config: TrainConfig,
    dataset: data.Dataset,
    path: pathlib.Path,
    progress: terminal.Silent,
    *,
    over: NamedSharding | None = None,
) -> list[Evaluation]:
    """Trains from the beginning, or from the last checkpoint of the folder.

    Args:
        config: the configuration of the run.
        dataset: the images.
        path: the folder of the run; see `runs.RunFolder`.
        progress: updated with the number of steps; steps made earlier count too.
        over: the sharding of the training images over the devices of all processes, each of which
            calls this with the same arguments; None for one device. Process 0 writes the folder,
            and all processes write checkpoints.

    Returns:
        All evaluations of the run; an empty list in processes other than 0.

    Raises:
        trainer.DivergedError: at the first loss that is not finite. The checkpoints written
            before are kept.
        Stopped: on SIGTERM or SIGINT, after a checkpoint.
    """
    config = config.resolved()
    made = trainer.make_trainer(config, dataset, over=over)
    if jax.process_index() != 0:
        return _Run(config, made, path, None, progress).to_the_end()
    command = "train" if over is None else "distributed"
    folder = runs.RunFolder(path, config, command, data_source=dataset.source)
    records.replace_text(
        path / "train_images.json",
        records.as_line({"train_indices": dataset.train_indices.tolist()}),
    )
    try:
        return _Run(config, made, path, folder, progress).to_the_end()
    except trainer.DivergedError as error:
        folder.fail({"step": error.step, "seeds": error.seeds})
        raise
    finally:
        folder.close()


@dataclasses.dataclass
class _Run:
    """One process's part of a run."""

    config: TrainConfig
    trainer: trainer.Trainer
    path: pathlib.Path
    folder: runs.RunFolder | None  # None in processes that do not write the folder.
    progress: terminal.Silent
    step: int = 0
    logged: int = -1  # The step of the last evaluation.
    saved: int = 0  # The step of the last checkpoint.
    seconds: float = 0.0  # The time of training since the last evaluation.
    rate: float = 0.0  # Steps per second; 0 before it is known.
    compiled: bool = False

    def to_the_end(self) -> list[Evaluation]:
        with (
            contextlib.closing(Checkpoints(self.path / "checkpoints")) as checkpoints,
            _signals() as stop,
        ):
            self.progress.compiling(self.config.label)
            state = self._begin(checkpoints)
            with self._scalars() as scalars:
                if self.step:
                    self.progress.update(self.step)
                self.progress.compiling(self.config.label)
                while True:
                    if self._evaluation_is_due():
                        self._evaluate(state, scalars, checkpoints)
                    if self.step == self.config.total_steps:
                        break
                    # All processes make the same number of steps, and stop at the same one.
                    num_steps, stopped_by = _agreed(self._num_steps(), stop.number)
                    if stopped_by:
                        self._save(checkpoints, state)
                        raise Stopped(
                            f"stopped after {self.step} steps; the same command goes on from there",
                            stopped_by,
                        )
                    state = self._advance(state, num_steps)
        if self.folder is None:
            return []
        evaluations = [Evaluation.of_record(record) for record in self.folder.metrics()]
        self.folder.finish(summary(evaluations))
        return evaluations

    def _begin(self, checkpoints: "Checkpoints") -> Any:
        """The state of the last checkpoint, or the initial one; drops later lines of metrics."""
        state = self.trainer.start()
        latest = checkpoints.latest()
        kept = (
            [] if self.folder is None else self.folder.cut_metrics(-1 if latest is None else latest)
        )
        if latest is None:
            return state
        if self.folder is not None and not kept:
            raise records.DamagedRecordError(
                f"{self.path}/metrics.jsonl has no evaluation up to step {latest}, of which "
                "there is a checkpoint: choose another --out"
            )
        restored = checkpoints.restore(latest, {"state": state, "seconds": np.float64(0)})
        self.step, self.saved, self.seconds = latest, latest, float(restored["seconds"])
        self.logged, _ = _agreed(kept[-1]["step"] if kept else 0, 0)
        return restored["state"]

    def _evaluation_is_due(self) -> bool:
        at_end = self.step == self.config.total_steps
        return self.logged < self.step and (self.step % self.config.eval_every == 0 or at_end)

    def _scalars(self) -> contextlib.AbstractContextManager["_Scalars | None"]:
        if self.folder is None:
            return contextlib.nullcontext()
        return contextlib.closing(_Scalars(self.path, self.step, self.config))

    def _evaluate(self, state: Any, scalars: "_Scalars | None", checkpoints: "Checkpoints") -> None:
        evaluation = self.trainer.evaluate(state, self.step, self.seconds)
        trainer.check_finite(evaluation.train_loss[None], self.step, self.config.seed)
        self.seconds, self.logged = 0.0, self.step
        if self.folder is not None and scalars is not None:
            self.folder.log(evaluation.record())
            scalars.write(evaluation)
        at_end = self.step == self.config.total_steps
        if at_end or self.step - self.saved >= self.config.checkpoint_every:
            self._save(checkpoints, state)

    def _num_steps(self) -> int:
        """As many steps as fit into `_PATIENCE`, at most to the next evaluation."""
        to_evaluation = self.config.eval_every - self.step % self.config.eval_every
        most = min(to_evaluation, self.config.total_steps - self.step)
        return max(1, min(most, int(_PATIENCE * self.rate)))

    def _advance(self, state: Any, num_steps: int) -> Any:
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(self.trainer.advance(state, num_steps))
        took = time.perf_counter() - before
        trainer.check_finite(metrics.loss, self.step, self.config.seed)
        if self.compiled:
            self.rate = num_steps / took
        self.compiled = True
        self.step += num_steps
        self.seconds += took
        self.progress.update(num_steps)
        return state

    def _save(self, checkpoints: "Checkpoints", state: Any) -> None:
        bad = [
            ~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1)
            for x in jax.tree.leaves(state.params)
        ]
        trainer.check_finite(
            np.where(np.any(bad, 0), np.nan, 0.0)[None], self.step, self.config.seed
        )
        if checkpoints.latest() != self.step:
            checkpoints.save(self.step, {"state": state, "seconds": np.float64(self.seconds)})
        self.saved = self.step


class Checkpoints:
    """The last two states of a run, by orbax; a state that is half written does not count."""

    def __init__(self, path: pathlib.Path):
        # Imported here, since orbax is slow to import and the rest does not need it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(path.resolve(), options=options)

    def latest(self) -> int | None:
        """The step of the last state; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes a pytree of arrays, which is on the disk when this returns."""
        self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, laid out over devices as `like` is.

        Raises:
            records.DamagedRecordError: if it cannot be read.
        """
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax and the packages under it raise many types.
            path = records.brief(f"{self._manager.directory}/{step}")
            raise records.DamagedRecordError(
                f"the checkpoint {path} cannot be read, choose another --out: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            ) from error

    def close(self) -> None:
        """Ends the threads of the manager."""
        self._manager.close()


class _Scalars:
    """The metrics for TensorBoard, with one curve per seed."""

    def __init__(self, path: pathlib.Path, step: int, config: TrainConfig):
        import tensorboardX

        self._seeds = range(config.seed, config.seed + config.seeds)
        # Scalars written after the checkpoint are purged, since they are written again. The name of
        # a file contains its second only: without the suffix, a run continued within the same
        # second would overwrite the file.
        self._writer = tensorboardX.SummaryWriter(
            str(path / "tensorboard"),
            purge_step=step + 1 if step else None,
            filename_suffix=f".from{step:010d}",
        )

    def write(self, evaluation: Evaluation) -> None:
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            for seed, value in zip(self._seeds, getattr(evaluation, name), strict=True):
                self._writer.add_scalar(f"{name}/seed_{seed}", float(value), evaluation.step)

    def close(self) -> None:
        self._writer.close()


def _agreed(number: int, stopped_by: int) -> tuple[int, int]:
    """The number of process 0, and a signal that any process received, for all processes."""
    if jax.process_count() == 1:
        return number, stopped_by
    said = multihost_utils.process_allgather(np.array([number, stopped_by], np.int32))
    return int(said[0, 0]), int(said[:, 1].max())


@dataclasses.dataclass
class _Stop:
    """The signal that asked to stop; 0 for none yet."""

    number: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Notes the first SIGTERM or SIGINT; a second SIGINT interrupts as usual."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }

    def ask(number: int, _: Any) -> None:
        stop.number = number
        signal.signal(number, before[number])
        # Written directly to the file, since printing inside a print is an error.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b"\nstopping, after the steps under way ...\n")

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(evaluations: list[Evaluation]) -> dict[str, Any]:
    """The end of a run: accuracies with their standard errors over seeds, and the speed."""
    last = evaluations[-1]
    numbers: dict[str, Any] = {"step": last.step, "seeds": len(last.test_accuracy)}
    for name in ("train_loss", "train_accuracy", "test_accuracy"):
        values = getattr(last, name)
        numbers[name] = float(values.mean())
        numbers[f"{name}_standard_error"] = float(figures.standard_error(values))
    numbers["seconds_per_1000_steps"] = _seconds_per_1000_steps(evaluations)
    return numbers


def _seconds_per_1000_steps(evaluations: list[Evaluation]) -> float | None:
    """The median over the intervals between evaluations, without the first, which compiles.

    None if there is no second interval.
    """
    rates = [
        1000 * after.seconds / (after.step - before.step)
        for before, after in itertools.pairwise(evaluations[1:])
    ]
    return statistics.median(rates) if rates else None
