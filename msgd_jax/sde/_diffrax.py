"""The SDE as diffrax terms, in the interpretation that a solver of diffrax converges to."""

import inspect
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.sde import _dynamics


def diffrax_terms(
    loss_vector_fn: LossVectorFn,
    noise: _dynamics.Law,
    control: Any,
    solver: Any,
    *,
    learning_rate: float | Float[Array, ""],
    order: int = 1,
    microbatch_size: int | None = None,
) -> Any:
    """The SDE dTheta = -grad L dt + sqrt(eta) C dW (Eqs. 12 and 68) for `diffrax.diffeqsolve`.

    `args` are the data, so that they are not constants of the compiled program::

      motion = diffrax.VirtualBrownianTree(0, T, tol=eta / 64, shape=(N,), key=key)
      solver = diffrax.Euler()
      terms = sde.diffrax_terms(losses, noise.cov(N, b), motion, solver, learning_rate=eta)
      solution = diffrax.diffeqsolve(
          terms, solver, 0, T, dt0=eta / 8, y0=params, args=data,
          saveat=diffrax.SaveAt(ts=times),
      )

    **The paper's SDE is Itô's, and most solvers are Stratonovich's.** The terms are for the solver
    that they are made for: for one that converges to Stratonovich solutions the drift has
    -eta/4 grad tr(C C^T) added, with which both have the same solution; that costs a Hessian-vector
    product for every example. Given to a solver of the other kind, the terms have another solution.

    * Itô: `Euler`, and `ItoMilstein`.
    * Stratonovich: `EulerHeun`, `Heun`, `Midpoint`, `Ralston`, `ReversibleHeun`,
      `StratonovichMilstein`, and with a `control` that has space-time Lévy areas (a Brownian path
      with ``levy_area=diffrax.SpaceTimeLevyArea``) `GeneralShARK`, `SlowRK` and `SPaRK`.
    * `HalfSolver` of one of these.

    For all but two, a step needs products with C alone, each of them one backward pass, and C is
    never formed. `ReversibleHeun` keeps C in its state, N times the size of the parameters;
    `ItoMilstein` differentiates it, which needs N^2 times their size and is for small problems.
    The noise does not commute in general, and the Milstein methods then have strong order 1/2.
    Refused are solvers for ordinary differential equations (`Tsit5`, `Dopri5`, `KenCarp4`, ...),
    those for additive noise (`ShARK`, `SRA1`, `SEA`), for C depends on the parameters, and those
    for Langevin dynamics (`ALIGN`, `QUICSORT`, `ShOULD`).

    diffrax keeps the programs that it compiles for a loss and a law, and with them what these hold.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B]. For
            Stratonovich solvers, and for `ItoMilstein`, it is given batches of one example, and
            losses must not depend on each other.
        noise: whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        control: a diffrax path of increments [N], such as a `diffrax.VirtualBrownianTree`.
        solver: the diffrax solver that the terms are for.
        learning_rate: eta, above 0.
        order: 1, or 2 for the drift ``-grad(L + eta/4 |grad L|^2)``.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.

    Returns:
        A `diffrax.MultiTerm` of drift and diffusion.

    Raises:
        ImportError: if diffrax is not installed (``pip install 'msgd-jax[solvers]'``).
        TypeError, ValueError: if an argument is not as described, or the solver is none for this
            SDE; when traced, if `args` are not N examples.
    """
    try:
        import diffrax

        from msgd_jax.sde import _diffrax_terms
    except ImportError as error:
        raise ImportError(
            "diffrax_terms needs diffrax: pip install 'msgd-jax[solvers]'."
        ) from error
    _validate.function("loss_vector_fn", loss_vector_fn)
    _dynamics.check_law(noise)
    _validate.positive_scalar("learning_rate", learning_rate)
    _dynamics.check_order(order)
    if microbatch_size is not None:
        _validate.positive_int("microbatch_size", microbatch_size)
    if not isinstance(control, diffrax.AbstractPath):
        raise TypeError(
            "control must be a diffrax path of N increments, such as a "
            f"diffrax.VirtualBrownianTree, got {_validate.shown(control)}."
        )
    interpretation = _interpretation(diffrax, solver, control)
    model = _diffrax_terms.SDE(
        loss_vector_fn, noise, jnp.asarray(learning_rate), order, interpretation, microbatch_size
    )
    return _diffrax_terms.terms(model, control)


def _interpretation(diffrax: Any, solver: Any, control: Any) -> str:
    """What the solver converges to, "ito" or "stratonovich"; raises if it is none for this SDE."""
    if not isinstance(solver, diffrax.AbstractSolver):
        got = f"the class {solver.__name__}" if inspect.isclass(solver) else _validate.shown(solver)
        raise TypeError(f"solver must be a diffrax solver, such as diffrax.Euler(), got {got}.")
    while isinstance(solver, diffrax.AbstractWrappedSolver):
        solver = solver.solver
    name = type(solver).__name__
    instead = "Use diffrax.Euler() (Itô), or diffrax.Heun() (Stratonovich), say."
    if isinstance(solver, diffrax.AbstractFosterLangevinSRK):
        raise ValueError(f"solver must not be {name}: it is for Langevin dynamics. {instead}")
    if isinstance(solver, diffrax.AbstractSRK) and solver.tableau.is_additive_noise():
        raise ValueError(
            f"solver must not be {name}: it is for additive noise, and the diffusion of this SDE "
            f"depends on the parameters. {instead}"
        )
    ito = isinstance(solver, diffrax.AbstractItoSolver)
    if not ito and not isinstance(solver, diffrax.AbstractStratonovichSolver):
        raise ValueError(
            f"solver must not be {name}: diffrax does not say that it converges to an Itô or a "
            "Stratonovich solution; it is for ordinary differential equations. " + instead
        )
    _check_levy_area(diffrax, solver, control, name)
    return "ito" if ito else "stratonovich"


def _check_levy_area(diffrax: Any, solver: Any, control: Any, name: str) -> None:
    """Raises unless `control` has the Lévy areas that a stochastic Runge-Kutta method needs."""
    if not isinstance(solver, diffrax.AbstractSRK):
        return
    needed = solver.minimal_levy_area
    has = getattr(control, "levy_area", None)
    if has is None or not issubclass(has, needed):
        got = "none" if has is None else has.__name__
        wanted = needed.__name__.removeprefix("Abstract")
        raise ValueError(
            f"control must be a Brownian path with levy_area=diffrax.{wanted} for {name}, got a "
            f"{type(control).__name__} with {got}."
        )
