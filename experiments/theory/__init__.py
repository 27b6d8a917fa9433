"""The room of the paper's theory: the SDE and the local complexities, measured.

sde           iterations side by side with their SDE: strong and weak orders, paths, a net
weak_order    exact expectations, to which the weak orders of SGD are compared
sde_problems  the small problems that the SDE is studied on
complexity    Theorem 1, the regulariser in training, a trace along training
config        what these commands are told
"""

from experiments.theory.config import ComplexityConfig, SDEConfig

__all__ = ["ComplexityConfig", "SDEConfig"]
