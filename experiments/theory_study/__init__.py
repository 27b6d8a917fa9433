"""Studies of the paper's theory on nets, with controls.

regularizer   the regulariser in training, against GD at equal compute and at other rates
complexities  local complexities at equal training loss
network       smooth nets and others beside their SDE
"""

from collections.abc import Mapping
from typing import Any

from experiments.studies import Study
from experiments.theory_study import complexities, network, regularizer
from experiments.theory_study._complexities_config import ComplexitiesConfig
from experiments.theory_study._network_config import NetworkConfig
from experiments.theory_study._regularizer_config import RegularizerConfig

STUDIES: Mapping[str, tuple[Any, Study]] = {
    "regularizer": (RegularizerConfig, regularizer.STUDY),
    "complexities": (ComplexitiesConfig, complexities.STUDY),
    "network": (NetworkConfig, network.STUDY),
}
"""The options of each study, and the study, by name."""

__all__ = ["STUDIES", "ComplexitiesConfig", "NetworkConfig", "RegularizerConfig"]
