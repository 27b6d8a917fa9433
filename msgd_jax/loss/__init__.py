"""The fast algorithm (Algorithm 1): the gradient of weighted losses in one backward pass.

A **loss vector function** maps ``(params, batch)`` to one loss per example of the batch, [B]. The
gradient of its product with a weight vector is the noisy gradient. No gradient matrix and no
covariance matrix is computed, and nothing larger than the gradient itself.

* `per_example` makes a loss vector function of the loss of a single example.
* `LossVector` is a loss vector function with its data, the L(theta) of the paper; `covariance`,
  `measure`, `sde` and `complexity` take it.
* `noisy_value_and_grad` and `weighted_value_and_grad` are for training, with the data as an
  argument; `weighted_values_and_grads` computes many draws at one point.
* A loss vector function may have mutable statistics, extra outputs and keys: see `has_state`,
  `has_aux` and `has_keys` of these functions and of `train`, `transform` and `streaming`. It then
  takes ``(params, batch[, state][, keys])`` and returns ``losses`` or ``(losses[, state][, aux])``,
  with `aux` an `Outputs`. Parts of the state that never change, such as frozen layers, are a
  `Constants`.
* `with_output_noise` adds noise at the outputs of a net: `label_noise`, `sampled_labels` (whose
  covariance is the true Fisher matrix) or `gauss_newton`.
* `check` looks for mistakes in a loss vector function; call it once.
* `sum_over_examples` adds up anything else over the data, for example for an evaluation.
"""

from msgd_jax._typing import LossVectorFn as LossVectorFn
from msgd_jax.loss._check import check
from msgd_jax.loss._checks import checked as checked
from msgd_jax.loss._checks import checked_kind as checked_kind
from msgd_jax.loss._drawn import Evaluated as Evaluated
from msgd_jax.loss._drawn import evaluated as evaluated
from msgd_jax.loss._examples import per_example, sum_over_examples
from msgd_jax.loss._fixed import WithKeys
from msgd_jax.loss._gradients import noisy_value_and_grad, weighted_value_and_grad
from msgd_jax.loss._many_draws import weighted_values_and_grads
from msgd_jax.loss._output_noise import (
    gauss_newton,
    label_noise,
    sampled_labels,
    with_output_noise,
)
from msgd_jax.loss._outputs import Constants, Outputs
from msgd_jax.loss._outputs import Takes as Takes
from msgd_jax.loss._vector import LossVector

__all__ = [
    "Constants",
    "LossVector",
    "Outputs",
    "WithKeys",
    "check",
    "gauss_newton",
    "label_noise",
    "noisy_value_and_grad",
    "per_example",
    "sampled_labels",
    "sum_over_examples",
    "weighted_value_and_grad",
    "weighted_values_and_grads",
    "with_output_noise",
]
