"""Every optimizer of optax trains, or is refused with a message that says what to do.

The optimizers are found in optax itself: a new one whose arguments are not in the table fails here.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from msgd_jax import loss, noise, train

# The optimizers ----------------------------------------------------------------------------------

SGD = optax.sgd(0.1)
# The arguments for functions of optax, by the names of their parameters.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 0.05, "inner": SGD, "optimizer": SGD, "base_optimizer": SGD, "tx": SGD,
    "fast_optimizer": optax.sgd(0.05), "sync_period": 2, "slow_step_size": 0.5,
    "adv_optimizer": optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    "transforms": {"all": SGD}, "param_labels": "all", "mask": True, "freeze_mask": False,
    "should_transform_fn": lambda step: step >= 0, "max_consecutive_errors": 3,
    "max_delta": 1.0, "max_norm": 1.0, "clipping": 1.0, "threshold": 1.0, "decay": 0.9,
    "eta": 0.01, "gamma": 0.5, "step_size": 1.0, "step_size_fn": lambda step: 1.0,
    "max_backtracking_steps": 10, "max_linesearch_steps": 10, "seed": 0,
    "l2_norm_clip": 1.0, "noise_multiplier": 0.1, "measure_name": "norm",
    "measure": lambda updates, *_, **__: optax.tree.norm(updates), "measures": {},
}  # fmt: skip
MATRIX = {"w": optax.contrib.MuonDimensionNumbers(), "b": optax.MaskedNode()}
# Optimizers for which it is not enough to give the arguments that have no default.
BUILT: dict[str, Callable[[], Any]] = {
    "adadelta": lambda: optax.adadelta(1.0),
    "chain": lambda: optax.chain(optax.clip(1.0), SGD),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sgd", SGD)),
    "freeze": lambda: optax.chain(optax.freeze(False), SGD),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.05, 0.01, 10)
    ),
    "MultiSteps": lambda: optax.MultiSteps(SGD, 2).gradient_transformation(),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "scale_by_backtracking_linesearch": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)
    ),
    "scale_by_zoom_linesearch": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)
    ),
    "scale_by_rprop": lambda: optax.chain(optax.scale_by_rprop(0.05), optax.scale(-1.0)),
    "sam in one call": lambda: optax.contrib.sam(SGD, ARGUMENTS["adv_optimizer"], opaque_mode=True),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.05),
    "scale_by_muon": lambda: optax.chain(
        optax.masked(
            optax.contrib.scale_by_muon(weight_dimension_numbers=MATRIX), {"w": True, "b": False}
        ),
        SGD,
    ),
    "stateless": lambda: optax.chain(optax.stateless(lambda g, _: g), SGD),
    "stateless_with_tree_map": lambda: optax.chain(
        optax.stateless_with_tree_map(lambda g, _: g), SGD
    ),
}
# Functions without an annotation that return no transformation, and one that is made for
# `optax.monitor`.
OTHERS = {
    "bias_correction",
    "measure_with_ema",
    "matrix_inverse_pth_root",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}
# These descend, though they have no learning rate or inner optimizer.
DESCEND = {"cocob", "dog", "dowg", "scale_by_cocob", "lbfgs"}
# The updates of these are 0, or no direction of descent.
NO_DESCENT = {"set_to_zero", "keep_params_nonnegative", "hutchinson_estimator_diag_hessian"}
REFUSED = {"dpsgd", "differentially_private_aggregate"}
# These have states, arguments or wrappings unlike the others'. The rest is marked slow.
QUICK = {
    "MultiSteps", "adafactor", "adam", "apply_if_finite", "cocob", "dadapt_adamw", "dog", "galore",
    "inject_hyperparams", "lbfgs", "lookahead", "mechanize", "momo", "muon", "noisy_sgd",
    "polyak_sgd", "prodigy", "reduce_on_plateau", "sam", "sam in one call",
    "scale_by_backtracking_linesearch", "schedule_free_sgd", "sgd", "sophia",
}  # fmt: skip
# The states of these keep parameters. For them, the loop is compared with single steps, which
# takes one more program.
COMPARED = {
    "dog",
    "lookahead",
    "prodigy",
    "sam",
    "sam in one call",
    "schedule_free_sgd",
    "scale_by_backtracking_linesearch",
}


def found() -> dict[str, Callable[..., Any]]:
    """The functions of optax and optax.contrib that may return a transformation, by name."""
    functions = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if name.startswith("_") or name in OTHERS or not inspect.isfunction(function):
                continue
            made = inspect.signature(function).return_annotation
            if made is inspect.Parameter.empty or (
                inspect.isclass(made) and issubclass(made, optax.GradientTransformation)
            ):
                functions[name] = function
    return functions


FOUND = found()


def unknown_arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in needed(function) if name not in ARGUMENTS]


def needed(function: Callable[..., Any]) -> list[str]:
    starred = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in starred]


def build(name: str) -> Any:
    if name in BUILT:
        return BUILT[name]()
    function = FOUND[name]
    optimizer = function(**{argument: ARGUMENTS[argument] for argument in needed(function)})
    inner = {"inner", "optimizer", "base_optimizer", "fast_optimizer", "transforms", "tx"}
    has_rate = "learning_rate" in inspect.signature(function).parameters
    if name in DESCEND | REFUSED or inner & set(needed(function)) or has_rate:
        return optimizer
    return optax.chain(optimizer, optax.scale(-0.05))


def names() -> list[Any]:
    """The optimizers of the installed optax.

    Other versions have others, so that the slow ones cannot be listed in `slow_cases.txt`.
    """
    chosen = sorted((FOUND.keys() | BUILT.keys()) - REFUSED)
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in chosen
        if name in BUILT or not unknown_arguments(FOUND[name])
    ]


# The problem -------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
DATA = {"x": X, "y": (X @ np.ones((4, 2))).astype(np.float32)}
PARAMS = {"w": np.full((4, 2), 0.1, np.float32), "b": np.full(2, 0.1, np.float32)}
LAW = noise.rademacher(8, 0.02)  # so little noise that the loss falls within a few steps
KEY = jax.random.key(0)


def residuals(params, example):
    return example["x"] @ params["w"] + params["b"] - example["y"]


LOSSES = loss.per_example(lambda params, example: jnp.sum(residuals(params, example) ** 2))


def losses_at(params) -> np.ndarray:
    """The losses by numpy, in float64: [N]."""
    w, b, x, y = (np.asarray(a, np.float64) for a in (*map(params.get, "wb"), *map(DATA.get, "xy")))
    return ((x @ w + b - y) ** 2).sum(1)


def start(name: str, optimizer: Any) -> train.TrainState:
    params: Any = PARAMS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(PARAMS)
    return train.init(params, optimizer, KEY)


@pytest.fixture
def rank_promotion():
    """Allows the promotion of ranks, on which some optimizers of optax rely."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning", "ignore::DeprecationWarning")
def test_every_optimizer_is_known():
    """For a new one, add its arguments to ARGUMENTS, build it in BUILT, or list it in OTHERS."""
    unknown = {name: unknown_arguments(f) for name, f in FOUND.items() if name not in BUILT}
    assert not {name: arguments for name, arguments in unknown.items() if arguments}
    assert len(FOUND) > 100
    for name in REFUSED | NO_DESCENT | DESCEND:
        assert name in FOUND
    for name in FOUND.keys() - REFUSED:
        made = build(name)
        assert callable(made.init), name
        assert callable(made.update), name


@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("rank_promotion")
@pytest.mark.parametrize("name", names())
def test_every_optimizer_trains_in_a_compiled_loop_with_donated_states(name):
    optimizer, traces = build(name), []
    step = train.make_step(LOSSES, optimizer, LAW)

    def counting(state, data):
        traces.append(1)
        return step(state, data)

    # A second call of the loop takes the state of the first, and compiles nothing.
    loop = train.make_loop(counting, max_steps=6)
    state, _ = loop(start(name, optimizer), DATA, 6)
    compiled = len(traces)
    state, metrics = loop(state, DATA, 3)
    assert len(traces) == compiled, "the state has other types after a loop than before"
    # It trains: all numbers are finite, and the loss falls.
    params = state.params.fast if name == "lookahead" else state.params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, metrics)))
    if name not in NO_DESCENT:
        assert losses_at(params).mean() < losses_at(PARAMS).mean()
    # Single steps, whose states are donated too, end at the same parameters.
    if name in COMPARED:
        single = jax.jit(step, donate_argnums=0)
        other = start(name, optimizer)
        for _ in range(9):
            other, _ = single(other, DATA)
        other = other.params.fast if name == "lookahead" else other.params
        for leaf, expected in params.items():
            np.testing.assert_allclose(other[leaf], expected, rtol=1e-4, atol=1e-6)


def test_a_state_that_changes_its_structure_needs_one_step_before_the_loop():
    optimizer = optax.chain(optax.monitor({"norm": optax.tree.norm}), SGD)
    step = train.make_step(LOSSES, optimizer, LAW)
    loop = train.make_loop(step, max_steps=5)
    with pytest.raises(ValueError, match=r"step must return a state of the kind.*optax\.monitor"):
        loop(train.init(PARAMS, optimizer, KEY), DATA, 5)
    state, _ = jax.jit(step)(train.init(PARAMS, optimizer, KEY), DATA)
    state, metrics = loop(state, DATA, 5)
    norm = state.opt_state[0].measurements["norm"]
    assert float(norm) == pytest.approx(float(metrics.gradient_norm[-1]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_optimizers_that_take_gradients_per_example_are_refused_with_advice(name):
    optimizer = build(name)
    step = train.make_step(LOSSES, optimizer, LAW)
    with pytest.raises(ValueError, match="batch dimension in the 0th axis") as caught:
        step(train.init(PARAMS, optimizer, KEY), DATA)
    assert "aggregate_per_example" in caught.value.__notes__[0]
