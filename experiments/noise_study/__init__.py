"""Studies of gradient noise along training, on real images.

edge    batch sharpness against 2 / eta: where laws with SGD's covariance stabilise
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.noise_study import edge
from experiments.noise_study._config import EdgeConfig, StudyConfig
from experiments.noise_study._study import Study

STUDIES: Mapping[str, tuple[Any, Study]] = {
    # In the order of docs/noise_study.md: scale, edge, escape, tails, memory.
    "edge": (EdgeConfig, edge.STUDY),
}
"""The options of each study, and the study, by name."""


def run(config: StudyConfig) -> pathlib.Path:
    """Runs the study that the options belong to; returns its folder."""
    (study,) = (study for options, study in STUDIES.values() if type(config) is options)
    return study.run(config)


__all__ = ["STUDIES", "EdgeConfig", "StudyConfig", "run"]
