"""Per-example gradients in PyTorch, in the three usual ways, and gradient noise made of them.

`torch.func` maps a gradient over examples; Opacus and BackPACK collect the gradients of the
examples during one backward pass. All three hold N gradients at once.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import machine, problems

NAMES = {"torch.func": "torch", "Opacus": "opacus", "BackPACK": "backpack"}
"""The ways, and the package that each needs besides PyTorch."""


def missing(name: str) -> str:
    """The reason why a way cannot be tried here, as two words for a table; "" if it can."""
    for package in ("torch", NAMES[name]):
        if importlib.util.find_spec(package) is None:
            return f"no {package}"
    return ""


def per_example(name: str, problem: problems.Problem) -> Callable[[], list[Any]]:
    """The gradients of all examples, for a problem of `problems.two_layer_net`.

    Args:
        name: one of NAMES.
        problem: parameters and data, which are copied.

    Returns:
        A function of no arguments that computes the gradients anew: [N, *shape] per parameter, in
        the order first weight, first bias, second weight, second bias.
    """
    import torch
    from torch import nn

    # The hooks of Opacus and BackPACK warn at every pass that the data need no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(machine.usable_cores())
    features, labels = (torch.from_numpy(np.array(leaf)) for leaf in problem.data)
    labels = labels.long()
    inputs, hidden = problem.params["w1"].shape
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    with torch.no_grad():
        for parameter, key in zip(net.parameters(), ("w1", "b1", "w2", "b2"), strict=True):
            parameter.copy_(torch.from_numpy(np.array(problem.params[key].T)))
    make = {"torch.func": _by_func, "Opacus": _by_opacus, "BackPACK": _by_backpack}[name]
    return make(net, features, labels)


def draw_function(name: str, problem: problems.Problem) -> Callable[[], list[Any]]:
    """One draw of noise with covariance S/b: the gradients, weighted by centred normal numbers."""
    import torch

    gradients = per_example(name, problem)
    num_examples = problem.data[1].shape[0]
    scale = (num_examples * problems.BATCH_SIZE) ** -0.5

    def draw() -> list[Any]:
        normal = torch.randn(num_examples)
        weights = scale * (normal - normal.mean())
        return [torch.tensordot(weights, gradient, 1) for gradient in gradients()]

    return draw


def _by_func(net: Any, features: Any, labels: Any) -> Callable[[], list[Any]]:
    import torch
    from torch.nn import functional

    params = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = torch.func.functional_call(net, params, (x[None],))
        return functional.cross_entropy(logits, y[None])

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: list(mapped(params, features, labels).values())


def _by_opacus(net: Any, features: Any, labels: Any) -> Callable[[], list[Any]]:
    from opacus.grad_sample import GradSampleModule
    from torch.nn import functional

    module = GradSampleModule(net, loss_reduction="sum")

    def gradients() -> list[Any]:
        module.zero_grad()
        functional.cross_entropy(module(features), labels, reduction="sum").backward()
        return [parameter.grad_sample for parameter in module.parameters()]

    return gradients


def _by_backpack(net: Any, features: Any, labels: Any) -> Callable[[], list[Any]]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad
    from torch import nn

    net, loss = extend(net), extend(nn.CrossEntropyLoss(reduction="sum"))

    def gradients() -> list[Any]:
        net.zero_grad()
        with backpack(BatchGrad()):
            loss(net(features), labels).backward()
        return [parameter.grad_batch for parameter in net.parameters()]

    return gradients
