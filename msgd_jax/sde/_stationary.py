"""Stationary covariances of the parameters around the minimum of a quadratic loss."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float

from msgd_jax import _validate
from msgd_jax._typing import Scalar

Matrix = Float[np.ndarray, "D D"]


def stationary_covariance(
    hessian: ArrayLike,
    noise_covariance: ArrayLike,
    *,
    learning_rate: Scalar,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
) -> Matrix:
    """The covariance X of the parameters under M-SGD on a quadratic, after many steps.

    The loss is ``(theta - theta*)^T H (theta - theta*)/2``, and the noisy gradient has the same
    covariance C at all parameters; if it varies, take its value at the minimum. Without momentum X
    solves ``H X + X H - eta H X H = eta C``. With momentum it solves the discrete Lyapunov equation
    of parameters and momentum (as in `transform.msgd`). In the eigenbasis of H each entry of X is
    computed by itself, to the accuracy of float64. The mean loss exceeds its minimum by
    ``tr(H X)/2``.

    It is computed on the host, in float64 for all input dtypes, and not under `jax.jit`.

    Args:
        hessian: H, [D, D], symmetric and positive definite.
        noise_covariance: C, [D, D], as from `covariance.noise_covariance`.
        learning_rate: eta, above 0.
        momentum: mu, in [0, 1).
        nesterov: whether to use Nesterov's momentum.

    Returns:
        X, [D, D].

    Raises:
        TypeError: if a matrix is traced or not of real numbers, or `learning_rate` or `momentum` is
            traced or not a number.
        ValueError: if a matrix is not square, finite and symmetric, H is not positive definite, C
            is not positive semi-definite, or the learning rate is too large for an eigenvalue of H;
            the error names the eigenvalue.

    Example:
        >>> from msgd_jax import sde
        >>> H, C = jnp.eye(1) * 2, jnp.eye(1)
        >>> X = sde.stationary_covariance(H, C, learning_rate=0.1)
        >>> round(float(X[0, 0]), 6)  # eta s2 / (h (2 - eta h))
        0.027778
    """
    curvatures, basis, noise = _diagonalised(hessian, noise_covariance)
    eta, mu = check_rates(learning_rate, momentum)
    check_stable(curvatures, eta, mu, nesterov)
    return _back(in_eigenbasis(curvatures, noise, eta, mu, nesterov), basis)


def in_eigenbasis(
    curvatures: Float[np.ndarray, " D"], noise: Matrix, eta: float, mu: float, nesterov: bool
) -> Matrix:
    """X in the basis where H is diagonal, from H's eigenvalues and from C in this basis."""
    # In direction i of the eigenbasis, z = (theta, v) becomes (A - l_i B) z + b xi in each step.
    ahead = mu if nesterov else 0.0
    A = np.array([[1.0, -eta * mu * (ahead or 1.0)], [0.0, mu]])
    B = np.array([[eta * (1 + ahead), 0.0], [-1.0, 0.0]])
    b = np.array([-eta * (1 + ahead), 1.0])
    # For two directions, solve Z = (A - l_i B) Z (A - l_j B)^T + C_ij b b^T: four equations, four
    # unknowns. Powers of l are kept apart: 1 - (1 - eta l_i)(1 - eta l_j) would lose their digits.
    fixed, left, right, both = (np.kron(*p) for p in ((A, A), (B, A), (A, B), (B, B)))
    X = np.empty_like(noise)
    source = np.outer(b, b).reshape(4, 1)
    others = curvatures[:, None, None]
    for i, own in enumerate(curvatures):
        system = np.eye(4) - fixed + own * left + others * right - own * others * both
        X[i] = noise[i] * np.linalg.solve(system, source)[:, 0, 0]
    return X


def stationary_covariance_of_sde(
    hessian: ArrayLike,
    noise_covariance: ArrayLike,
    *,
    learning_rate: Scalar,
    momentum: Scalar | None = None,
) -> Matrix:
    """The stationary covariance of the SDE of `euler_maruyama`, or of `underdamped`.

    On a quadratic with noise of covariance C the SDE is an Ornstein-Uhlenbeck process, and
    ``H X + X H = eta C``: the equation of `stationary_covariance` without its term of order eta^2.
    With momentum, the SDE is the underdamped one. In the eigenbasis of H its variances are those at
    the effective learning rate eta/(1 - mu); its covariances are smaller if H and C do not commute.

    Args:
        hessian: H, [D, D], symmetric and positive definite.
        noise_covariance: C, [D, D].
        learning_rate: eta, above 0.
        momentum: mu, in [0, 1), of the underdamped SDE; None for the SDE without momentum.

    Returns:
        X, [D, D], in float64.

    Raises:
        TypeError, ValueError: as `stationary_covariance`, but no learning rate is too large.

    Example:
        >>> from msgd_jax import sde
        >>> H, C = jnp.eye(1) * 2, jnp.eye(1)
        >>> X = sde.stationary_covariance_of_sde(H, C, learning_rate=0.1)
        >>> round(float(X[0, 0]), 6)  # eta s2 / (2 h)
        0.025
    """
    curvatures, basis, noise = _diagonalised(hessian, noise_covariance)
    eta, mu = check_rates(learning_rate, 0.0 if momentum is None else momentum)
    sums = curvatures[:, None] + curvatures
    if momentum is not None:
        gaps = curvatures[:, None] - curvatures
        sums = (1 - mu) * sums + eta * gaps**2 / (2 * (1 - mu))
    return _back(eta * noise / sums, basis)


def check_momentum(momentum: Any) -> None:
    """Raises TypeError or ValueError unless `momentum` is in [0, 1) or traced."""
    _validate.nonnegative_scalar("momentum", momentum)
    if not isinstance(momentum, Tracer) and float(momentum) >= 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")


def check_rates(learning_rate: Any, momentum: Any) -> tuple[float, float]:
    _validate.positive_scalar("learning_rate", learning_rate)
    check_momentum(momentum)
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        if isinstance(value, Tracer):
            raise TypeError(f"{name} must not be traced: this is computed on the host.")
    return float(learning_rate), float(momentum)


def _diagonalised(
    hessian: Any, noise_covariance: Any
) -> tuple[Float[np.ndarray, " D"], Matrix, Matrix]:
    """The eigenvalues and eigenvectors of H, and C in their basis.

    Raises TypeError or ValueError as `stationary_covariance`.
    """
    H, rounding = _symmetric("hessian", hessian)
    C, rounding_of_C = _symmetric("noise_covariance", noise_covariance)
    if H.shape != C.shape:
        raise ValueError(f"noise_covariance must be {list(H.shape)} as hessian, got {C.shape}.")
    curvatures, basis = np.linalg.eigh(H)
    check_positive(float(curvatures[0]), float(curvatures[-1]), rounding)
    spectrum = np.linalg.eigvalsh(C)
    if spectrum[0] < -rounding_of_C * max(float(spectrum[-1]), 0.0):
        raise ValueError(
            "noise_covariance must be positive semi-definite, got the eigenvalue "
            f"{spectrum[0]:.6g} (the largest is {spectrum[-1]:.6g})."
        )
    return curvatures, basis, basis.T @ C @ basis


def check_positive(lowest: float, highest: float, rounding: float) -> None:
    """Raises ValueError unless the lowest eigenvalue of H is above the rounding of the highest."""
    if lowest <= rounding * max(highest, 0.0):
        raise ValueError(
            f"hessian must be positive definite to settle, got the eigenvalue {lowest:.6g} (the "
            f"largest is {highest:.6g}), along whose eigenvector the parameters move away."
        )


def _symmetric(name: str, value: Any) -> tuple[Matrix, float]:
    """A symmetric matrix in float64 and the error of its eigenvalues; raises for other values."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} must not be traced: this is computed on the host, in float64.")
    given = np.asarray(value)
    if given.dtype.kind not in "fiu" and not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"{name} must be a matrix of real numbers, got {_validate.shown(value)}.")
    matrix = given.astype(np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{name} must be a matrix [D, D], got shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got numbers that are not.")
    floating = jnp.issubdtype(given.dtype, jnp.floating)
    rounding = len(matrix) * float(jnp.finfo(given.dtype if floating else "float64").eps)
    largest = np.abs(matrix).max()
    if (gap := np.abs(matrix - matrix.T).max()) > 10 * rounding * largest:
        raise ValueError(
            f"{name} must be symmetric, got entries that differ from their mirror images by "
            f"{gap:.3g} (the largest is {largest:.3g})."
        )
    return (matrix + matrix.T) / 2, rounding


def check_stable(
    curvatures: Float[np.ndarray, " D"], eta: float, mu: float, nesterov: bool
) -> None:
    """Raises ValueError if the iteration does not settle in the steepest direction."""
    limit = 2 * (1 + mu) / (1 + 2 * mu if nesterov else 1.0)
    steepest = float(curvatures[-1])
    if eta * steepest >= limit:
        raise ValueError(
            f"learning_rate must be below {limit:.6g} / {steepest:.6g} = {limit / steepest:.6g} "
            f"to settle, since hessian has the eigenvalue {steepest:.6g}, got {eta:g}."
        )


def _back(matrix: Matrix, basis: Matrix) -> Matrix:
    """The matrix transformed back from the eigenbasis, symmetric to the last bit."""
    full = basis @ matrix @ basis.T
    return (full + full.T) / 2
