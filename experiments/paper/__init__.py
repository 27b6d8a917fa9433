"""The paper's figures: its panels, and the comparison of many runs.

panels        the runs of each panel, with all their numbers
accuracies    the comparison of final accuracies: intervals, differences, tests of equivalence
listing       the runs in a folder
report        figures, the list of runs, and the report of many runs on one page
config        the options of these commands
"""

from experiments.paper.config import FigureConfig, ListConfig, ReportConfig
from experiments.paper.panels import PANELS, Panel
from experiments.paper.report import run_folder

__all__ = [
    "PANELS",
    "FigureConfig",
    "ListConfig",
    "Panel",
    "ReportConfig",
    "run_folder",
]
