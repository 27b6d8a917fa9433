"""The SDE as diffrax terms, in the interpretation that a solver of diffrax converges to."""

import inspect
import math
from typing import Any

import jax.numpy as jnp
import optax
from jax.core import Tracer

from msgd_jax import _validate
from msgd_jax._laws import Law
from msgd_jax.sde import _dynamics, _schedules


def diffrax_terms(
    law: Law, control: Any, solver: Any, *, learning_rate: optax.ScalarOrSchedule, order: int = 1
) -> Any:
    """The SDE ``dTheta = -grad L dt + sqrt(eta) C dW`` (Eqs. 12 and 68) for `diffrax.diffeqsolve`.

    The loss vector is given as `args`, so that its data are not constants of compiled programs::

      motion = diffrax.VirtualBrownianTree(0, T, tol=eta / 64, shape=(N,), key=key)
      solver = diffrax.Euler()
      terms = sde.diffrax_terms(noise.cov(N, b), motion, solver, learning_rate=eta)
      solution = diffrax.diffeqsolve(
          terms, solver, 0, T, dt0=eta / 8, y0=params, args=losses,
          saveat=diffrax.SaveAt(ts=times),
      )

    **The paper's SDE is Itô's, and most solvers are Stratonovich's.** The terms are made for one
    solver. For a solver that converges to Stratonovich solutions, ``-eta/4 grad tr(C C^T)`` is
    added to the drift, which gives the same solution as Itô's SDE; it costs one Hessian-vector
    product per example. With a solver of the other kind, the terms have another solution.

    * Itô: `Euler`, and `ItoMilstein`.
    * Stratonovich: `EulerHeun`, `Heun`, `Midpoint`, `Ralston`, `ReversibleHeun`,
      `StratonovichMilstein`, and with a `control` that has space-time Lévy areas (a Brownian path
      with ``levy_area=diffrax.SpaceTimeLevyArea``) `GeneralShARK`, `SlowRK` and `SPaRK`.
    * `HalfSolver` of one of these.

    All solvers but two need only products with C, each of which takes one backward pass, and C is
    never formed. `ReversibleHeun` keeps C in its state, N times the size of the parameters.
    `ItoMilstein` differentiates C, which needs N^2 times their size and is for small problems. The
    noise does not commute in general, and then the Milstein methods have strong order 1/2. Refused
    are solvers for ordinary differential equations (`Tsit5`, `Dopri5`, `KenCarp4`, ...), solvers
    for additive noise (`ShARK`, `SRA1`, `SEA`), since C depends on the parameters, and solvers for
    Langevin dynamics (`ALIGN`, `QUICSORT`, `ShOULD`).

    **With an optax schedule, the time of diffrax is in iterations**, from 0 to the number of steps,
    and the SDE is ``dTheta = -eta_k grad L dt + eta_k C dW`` between t = k and k + 1, the one of
    `euler_maruyama`. The rate jumps at whole times, so take steps that end there (``dt0 = 1/8``, or
    ``jump_ts`` for a solver that chooses its steps). Solvers evaluate the drift at both ends of a
    step, and so are off by the step times the change of the rate.

    diffrax keeps the programs that it compiles, and with them the loss function and the law.

    Args:
        law: the law whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        control: a diffrax path of increments [N], such as a `diffrax.VirtualBrownianTree`.
        solver: the diffrax solver that the terms are for.
        learning_rate: eta, above 0; or an optax schedule, a function of the iteration from 0, which
            must be finite and at least 0 at all iterations from ``control.t0`` to ``control.t1``.
        order: 1, or 2 for the drift ``-grad(L + eta/4 |grad L|^2)``.

    Returns:
        A `diffrax.MultiTerm` of drift and diffusion.

    Raises:
        ImportError: if diffrax is not installed (``pip install 'msgd-jax[solvers]'``).
        TypeError: if `law` is not a law, `control` is not a diffrax path, `solver` is not a diffrax
            solver, or `learning_rate` is neither a number nor a function; when traced, if `args` is
            not a `loss.LossVector`.
        ValueError: if `solver` cannot solve this SDE, the steps of the law depend on each other, or
            a number is out of its range; when traced, if the law is for another number of examples.
    """
    try:
        import diffrax

        from msgd_jax.sde import _diffrax_terms
    except ImportError as error:
        raise ImportError(
            "diffrax_terms needs diffrax: pip install 'msgd-jax[solvers]'."
        ) from error
    _dynamics.check_independent(law)
    _dynamics.check_order(order)
    if not isinstance(control, diffrax.AbstractPath):
        raise TypeError(
            "control must be a diffrax path of N increments, such as a "
            f"diffrax.VirtualBrownianTree, got {_validate.shown(control)}."
        )
    _check_rate(learning_rate, control)
    interpretation = _interpretation(diffrax, solver, control)
    schedule = learning_rate if callable(learning_rate) else None
    constant = None if callable(learning_rate) else jnp.asarray(learning_rate)
    model = _diffrax_terms.SDE(law, constant, schedule, order, interpretation)
    return _diffrax_terms.terms(model, control)


def _check_rate(learning_rate: Any, control: Any) -> None:
    """Raises unless a learning rate is above 0, or a schedule is at least 0 along `control`."""
    ends = (control.t0, control.t1)
    known = not any(isinstance(end, Tracer) or not math.isfinite(end) for end in ends)
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if known else (0, 0)
    _schedules.check(learning_rate, max(first, 0), last)


def _interpretation(diffrax: Any, solver: Any, control: Any) -> str:
    """The interpretation that the solver converges to, "ito" or "stratonovich".

    Raises TypeError or ValueError if the solver cannot solve this SDE.
    """
    if not isinstance(solver, diffrax.AbstractSolver):
        got = f"the class {solver.__name__}" if inspect.isclass(solver) else _validate.shown(solver)
        raise TypeError(f"solver must be a diffrax solver, such as diffrax.Euler(), got {got}.")
    while isinstance(solver, diffrax.AbstractWrappedSolver):
        solver = solver.solver
    name = type(solver).__name__
    instead = "Use diffrax.Euler() (Itô) or diffrax.Heun() (Stratonovich), for example."
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
