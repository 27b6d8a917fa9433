"""Studies of gradient noise along training, on real images.

edge    batch sharpness against 2 / eta: where laws with SGD's covariance stabilise
config  the options of the command
"""

from experiments.noise_study.config import NoiseStudyConfig

__all__ = ["NoiseStudyConfig"]
