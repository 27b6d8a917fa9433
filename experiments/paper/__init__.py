"""The room of the paper's figures: its panels, and the comparison of many runs.

panels        the runs that each panel draws, every number in one place
accuracies    final accuracies compared: intervals, differences, tests of equivalence
listing       what lies in a folder of runs
report        figures, the list of runs, and the report of many runs on one page
config        what these commands are told
"""

from experiments.paper.config import DemoConfig, FigureConfig, ListConfig, ReportConfig
from experiments.paper.panels import PANELS, Panel
from experiments.paper.report import run_folder

__all__ = [
    "PANELS",
    "DemoConfig",
    "FigureConfig",
    "ListConfig",
    "Panel",
    "ReportConfig",
    "run_folder",
]
