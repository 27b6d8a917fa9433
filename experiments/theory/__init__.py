"""Measurements of the paper's theory: the SDE and the local complexities.

sde           iterations side by side with their SDE: strong and weak orders, paths, a net
weak_order    weak orders from exact expectations, for comparison
sde_problems  the small problems on which the SDE is studied
complexity    Theorem 1, the regulariser in training, and a trace along training
config        the options of these commands
"""

from experiments.theory.config import ComplexityConfig, SDEConfig

__all__ = ["ComplexityConfig", "SDEConfig"]
