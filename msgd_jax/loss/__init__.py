"""The fast algorithm (Algorithm 1): per-example losses, weighted, in one backward pass.

A **loss vector function** maps ``(params, batch)`` to one loss per example of the batch, [B]. The
gradient of its product with a weight vector is the noisy gradient: no gradient matrix, no
covariance matrix, nothing larger than the gradient itself.

* `per_example` makes one of the loss of a single example;
* `LossVector` is such a function with its data, the L(theta) of the paper: `covariance`, `sde` and
  `complexity` take it;
* `noisy_value_and_grad` and `weighted_value_and_grad` are the steps of training, where data are an
  argument; `weighted_values_and_grads` gives many draws at one place;
* a loss vector function may do more than that, with `has_state`, `has_aux` and `has_keys` in these
  steps and in `train`, `transform` and `streaming`: ``(params, batch[, state][, keys])`` are its
  arguments, and ``losses`` or ``(losses[, state][, aux])`` its result, `aux` an `Outputs`; what of
  the state never changes, such as frozen layers, is a `Constants` in it;
* `with_output_noise` adds noise at the outputs of a net: `label_noise`, that of `sampled_labels`
  (the true Fisher matrix), or `gauss_newton`;
* `check` looks, once, for what is wrong with such a function;
* `sum_over_examples` goes through the data for anything else, an evaluation, say.
"""

from msgd_jax._typing import LossVectorFn as LossVectorFn
from msgd_jax.loss._check import check
from msgd_jax.loss._checks import checked as checked
from msgd_jax.loss._checks import checked_kind as checked_kind
from msgd_jax.loss._drawn import Evaluated as Evaluated
from msgd_jax.loss._drawn import evaluated as evaluated
from msgd_jax.loss._examples import per_example, sum_over_examples
from msgd_jax.loss._fixed_keys import WithKeys
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
