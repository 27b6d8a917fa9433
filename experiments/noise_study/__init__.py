"""Studies of gradient noise along training, on real images.

scale   three estimators of the noise scale, and the batch sizes that it predicts
edge    batch sharpness against 2 / eta: where laws with SGD's covariance stabilise
escape  noises of equal trace and different shapes at a minimum that GD has found
tails   tail indices, estimated for noises of known tails
memory  noise with a memory: the variance of weights around a minimum
"""

from collections.abc import Mapping
from typing import Any

from experiments.noise_study import edge, escape, memory, scale, tails
from experiments.noise_study._config import EdgeConfig
from experiments.noise_study._escape_config import EscapeConfig
from experiments.noise_study._scale_config import ScaleConfig
from experiments.noise_study.memory import MemoryConfig
from experiments.noise_study.tails import TailsConfig
from experiments.studies.study import Study

STUDIES: Mapping[str, tuple[Any, Study]] = {
    # In the order of docs/noise_study.md: scale, edge, escape, tails, memory.
    "scale": (ScaleConfig, scale.STUDY),
    "edge": (EdgeConfig, edge.STUDY),
    "escape": (EscapeConfig, escape.STUDY),
    "tails": (TailsConfig, tails.STUDY),
    "memory": (MemoryConfig, memory.STUDY),
}
"""The options of each study, and the study, by name."""

__all__ = [
    "STUDIES",
    "EdgeConfig",
    "EscapeConfig",
    "MemoryConfig",
    "ScaleConfig",
    "TailsConfig",
]
