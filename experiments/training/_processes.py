"""Training in several processes: ``python -m experiments distributed --help``.

The run is made by `loop`, with a sharding. Every process runs the same command with its own
``--process-id``. If one of them dies, jax stops the others with an error when its heartbeat is
missing. Started again, with any number of processes and devices, the run continues from the last
checkpoint with the same weight vectors.
"""

import dataclasses
import pathlib
from typing import Annotated

import jax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from experiments.training.algorithms import ALGORITHMS
from experiments.training.config import TrainConfig
from msgd_jax._validate import shown


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """Which processes train together.

    Attributes:
        coordinator: The address and port of process 0, as in ``10.0.0.1:1234``. None stands for one
            process, or, with `num_processes` None too, for what jax finds out by itself (Slurm,
            GKE, TPU pods).
        num_processes: The number of processes.
        process_id: The number of this process, from 0.
        heartbeat_timeout: The seconds without a sign of life after which a process counts as dead.
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
        """Connects to the other processes; call it before anything is computed."""
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
        plan: What to train, as for `train`, with one seed; all processes must see its folder `out`.
        processes: The processes that train together.
    """

    plan: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    processes: Annotated[ProcessesConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ProcessesConfig
    )


def over_all_devices() -> NamedSharding:
    """The sharding of the examples over the devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def check_distributed(plan: TrainConfig) -> pathlib.Path:
    """Returns the folder of the run; raises ValueError if the plan cannot use several devices."""
    if plan.out is None:
        raise ValueError("out must be given: a folder that all processes see.")
    if plan.seeds != 1:
        raise ValueError(f"seeds must be 1 where a run is spread over devices, got {plan.seeds}.")
    if plan.augment or ALGORITHMS[plan.algorithm].additive != "none":
        raise ValueError(
            "augment and the baselines with additive noise work on the examples of one device: use "
            f"`train`, got augment = {plan.augment}, algorithm = {plan.algorithm}."
        )
    if plan.subset_per_seed:
        raise ValueError("subset_per_seed is for several seeds on one device: use data_seed.")
    return plan.out
