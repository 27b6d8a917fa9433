"""The study that decides whether SGD beats GD, and which laws perform like SGD.

settings    the comparisons and their data, declared before they are run
study       makes and records the missing runs, and chooses GD's own learning rate
statistics  paired differences, Holm, equivalence, the share of a gap that is closed
report      the table and the figure, from the records
command     ``python -m experiments decide``; `run_demo` is its reduced version, ``demo``
"""

from experiments.decide._demo import DemoConfig, demo_records, run_demo
from experiments.decide.command import DecideConfig

__all__ = ["DecideConfig", "DemoConfig", "demo_records", "run_demo"]
