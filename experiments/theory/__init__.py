"""Measurements of the paper's theory: the SDE and the local complexities.

sde           iterations side by side with their SDE: strong and weak orders, paths
weak_order    weak orders from exact expectations, for comparison
sde_problems  the small problems on which the SDE is studied
complexity    how tight the inequalities of Theorem 1 are
config        the options of these commands
"""

from experiments.theory.config import ComplexityConfig, SDEConfig

__all__ = ["ComplexityConfig", "SDEConfig"]
