"""The room of the study that decides whether SGD beats GD, and which noises go with SGD.

settings    what is compared on which data, declared before it is run
study       runs what is missing, records it, and chooses GD's own learning rate
statistics  paired differences, Holm, equivalence, the share of a gap that is closed
report      the table and the figure, from the records
command     ``python -m experiments decide``
"""

from experiments.decide.command import DecideConfig

__all__ = ["DecideConfig"]
