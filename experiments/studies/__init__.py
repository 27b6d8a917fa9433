"""What all studies have in common: their options, their records and their intervals.

config     the options of every study, and the checks of them
study      records of runs that are never made twice, a table, a picture
intervals  means over seeds with their intervals, and adjusted p-values
"""

from experiments.studies.config import StudyConfig
from experiments.studies.study import Study

__all__ = ["Study", "StudyConfig"]
