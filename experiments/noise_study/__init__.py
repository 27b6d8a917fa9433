"""Studies of gradient noise along training, on real images.

edge    batch sharpness against 2 / eta: where laws with SGD's covariance stabilise
tails   tail indices, estimated for noise of known tails
memory  correlated noise: the variance of weights around a minimum
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.noise_study import edge, memory, tails
from experiments.noise_study._config import EdgeConfig, StudyConfig
from experiments.noise_study._study import Study
from experiments.noise_study.memory import MemoryConfig
from experiments.noise_study.tails import TailsConfig

STUDIES: Mapping[str, tuple[Any, Study]] = {
    # In the order of docs/noise_study.md: scale, edge, escape, tails, memory.
    "edge": (EdgeConfig, edge.STUDY),
    "tails": (TailsConfig, tails.STUDY),
    "memory": (MemoryConfig, memory.STUDY),
}
"""The options of each study, and the study, by name."""


def run(config: StudyConfig) -> pathlib.Path:
    """Runs the study that the options belong to; returns its folder."""
    (study,) = (study for options, study in STUDIES.values() if type(config) is options)
    return study.run(config)


__all__ = ["STUDIES", "EdgeConfig", "MemoryConfig", "StudyConfig", "TailsConfig", "run"]
