"""One run: its configuration, its compiled steps, its folder, its interruptions.

algorithms    the algorithms of the paper by name
config        the configuration of a run, which is also the command line of `train`
trainer       start, steps and evaluation as compiled functions
loop          a run from start to end, in its folder, with interruptions
runs          the folder of a run: records that are never lost
"""

from experiments.training._processes import DistributedConfig, check_distributed, over_all_devices
from experiments.training.algorithms import ALGORITHMS, NoiseSettings
from experiments.training.config import AlgorithmName, TrainConfig
from experiments.training.trainer import (
    DivergedError,
    Evaluation,
    check_finite,
    check_ghost_batches,
    make_trainer,
    model_functions,
    train_seeds,
)

__all__ = [
    "ALGORITHMS",
    "AlgorithmName",
    "DistributedConfig",
    "DivergedError",
    "Evaluation",
    "NoiseSettings",
    "TrainConfig",
    "check_distributed",
    "check_finite",
    "check_ghost_batches",
    "make_trainer",
    "model_functions",
    "over_all_devices",
    "train_seeds",
]
