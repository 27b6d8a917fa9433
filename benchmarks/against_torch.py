"""The same full-batch M-SGD step written the natural way in PyTorch, on the same cores.

``python -m benchmarks.against_torch``. LeNet with 11,330 parameters, N = 1,000 images, weighted
cross-entropy, M-SGD-Fisher weights drawn anew at every step, plain SGD. PyTorch gets float images
in its own layout, made once; we keep uint8 and scale at every step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro

from benchmarks import machine, problems, report, timing
from msgd_jax import noise, train

TORCH = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """One full-batch step: ours against PyTorch.

    Attributes:
        examples: N.
        microbatch_sizes: of ours; the first is the experiments' own, which counts.
        learning_rate: eta.
    """

    repeats: int = 40
    examples: int = 1_000
    microbatch_sizes: tuple[int, ...] = (100, 50, 125)
    learning_rate: float = 0.01


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headlines (none without PyTorch)."""
    try:
        import torch
    except ImportError:
        print("against_torch needs PyTorch (pip install torch): left out.")
        return []
    if config.quick:
        config = dataclasses.replace(config, repeats=2, examples=60, microbatch_sizes=(20,))
    torch.set_num_threads(machine.usable_cores())
    problem = problems.lenet(config.examples)
    contestants = {TORCH: torch_step(problem, config.learning_rate)}
    ours = {f"ours, micro-batch {size}": size for size in config.microbatch_sizes}
    for name, size in ours.items():
        contestants[name] = jax_step(problem, config.learning_rate, size)
    seconds = timing.alternate(contestants, repeats=config.repeats, description="against_torch")
    flops = step_flops(config.examples)
    rate = machine.matmul_rate(sizes=(256,) if config.quick else (512, 1024, 2048))
    rows = [_row(name, seconds, flops, rate) for name in contestants]
    first = next(iter(ours))
    ratio = timing.ratio(seconds, first, TORCH)
    headline = report.Headline(
        "against_torch", f"step time over PyTorch's ({first})",
        f"{ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f})", "<= 0.4",
        ratio.median <= 0.4,
    )  # fmt: skip
    report.publish(
        "against_torch", config, rows, [headline], functools.partial(_plot, seconds),
        torch=torch.__version__, seconds={k: v.tolist() for k, v in seconds.items()},
        flops_of_a_step=flops, matmul_flops_per_second=rate,
    )  # fmt: skip
    print(
        f"A step needs {flops / 1e9:.2f} GFLOP (as plain convolutions); this machine multiplies "
        f"matrices at {rate / 1e9:.0f} GFLOP/s, so the floor is {1e3 * flops / rate:.1f} ms."
    )
    return [headline]


def jax_step(
    problem: problems.Problem, learning_rate: float, microbatch_size: int
) -> Callable[[], Any]:
    """One M-SGD-Fisher step, the state carried on; the number of the step picks the weights."""
    num_examples = problem.data[1].shape[0]
    law = noise.fisher(num_examples, problems.BATCH_SIZE)
    optimizer = optax.sgd(learning_rate)
    step = jax.jit(
        train.make_step(problem.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size),
        donate_argnums=0,
    )
    state = train.init(problem.params, optimizer, jax.random.key(1))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, problem.data)
        return metrics

    return run


def torch_step(problem: problems.Problem, learning_rate: float) -> Callable[[], Any]:
    """The same in PyTorch: modules, cross_entropy(reduction="none"), backward, optim.SGD."""
    import torch
    from torch import nn
    from torch.nn import functional

    class LeNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 10, 5)
            self.fc1, self.fc2 = nn.Linear(160, 50), nn.Linear(50, 10)

        def forward(self, images):
            hidden = functional.relu(functional.max_pool2d(self.conv1(images), 2))
            hidden = functional.relu(functional.max_pool2d(self.conv2(hidden), 2))
            return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))

    images, labels = (np.asarray(leaf) for leaf in problem.data)
    inputs = torch.tensor(images.transpose(0, 3, 1, 2)).float() / 255
    targets = torch.tensor(labels).long()
    num_examples = len(labels)
    net = LeNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    scale = (problems.BATCH_SIZE * num_examples) ** -0.5

    def run() -> None:
        weights = 1 / num_examples + scale * torch.randn(num_examples)
        optimizer.zero_grad()
        losses = functional.cross_entropy(net(inputs), targets, reduction="none")
        (losses * weights).sum().backward()
        optimizer.step()

    return run


def step_flops(num_examples: int) -> float:
    """Operations of forward and backward pass, the net's convolutions counted as they are.

    Multiply-adds: conv1 and conv2 with their gradients, the dense layers three times each. No
    gradient with respect to the images is needed.
    """
    conv1, conv2 = 24 * 24 * 25 * 10, 8 * 8 * 250 * 10
    dense = 160 * 50 + 50 * 10
    return 2.0 * num_examples * (2 * conv1 + 3 * conv2 + 3 * dense)


def _row(name: str, seconds: dict[str, np.ndarray], flops: float, rate: float) -> dict[str, Any]:
    time = timing.spread(seconds[name])
    ratio = timing.ratio(seconds, name, TORCH)
    return {
        "contestant": name,
        "ms a step": f"{1e3 * time.median:.1f}",
        "quartiles": f"{1e3 * time.low:.1f} to {1e3 * time.high:.1f}",
        "over PyTorch": f"{ratio.median:.2f}",
        "GFLOP/s": f"{flops / time.median / 1e9:.0f}",
        "times the floor": f"{time.median / (flops / rate):.1f}",
    }


def _plot(seconds: dict[str, np.ndarray], axes: Any) -> None:
    axes.boxplot([1e3 * values for values in seconds.values()], tick_labels=list(seconds))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms a step")
    axes.set_title("Full-batch M-SGD-Fisher step, LeNet, N = 1,000", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
