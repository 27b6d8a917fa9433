"""The nets of the experiments in usual PyTorch code, and full-batch steps of them.

PyTorch gets its images as floating point in [0, 1] and in its own layout, converted once before the
timing; we keep uint8 and scale in every step. Ghost batch norm of a batch with several ghost
batches is one call of PyTorch's batch norm, in which each ghost batch has its own channels.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.rows import LEARNING_RATE, Reference, Row


class LeNet(nn.Module):
    """The same net as `experiments.models.LeNet`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 10, 5)
        self.fc1, self.fc2 = nn.Linear(160, 50), nn.Linear(50, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(functional.max_pool2d(self.conv1(images), 2))
        hidden = functional.relu(functional.max_pool2d(self.conv2(hidden), 2))
        return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))


class VGG11(nn.Module):
    """The same net as `experiments.models.VGG11`."""

    def __init__(self, width: int):
        super().__init__()
        channels = [3, *(width * times for times in (1, 2, 4, 4, 8, 8, 8, 8))]
        for i in range(1, 9):
            setattr(self, f"conv{i}", nn.Conv2d(channels[i - 1], channels[i], 3, padding=1))
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = images
        for i in range(1, 9):
            hidden = functional.relu(getattr(self, f"conv{i}")(hidden))
            if i in (1, 2, 4, 6, 8):
                hidden = functional.max_pool2d(hidden, 2)
        return self.fc(hidden.flatten(1))


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm over ghost batches of `ghost_size` images."""

    def __init__(self, channels: int, ghost_size: int):
        super().__init__(channels)
        self.ghost_size = ghost_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = input.shape
        groups = batch // self.ghost_size
        if groups <= 1:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, 1e-5
            )
        grouped = input.reshape(groups, self.ghost_size, channels, height, width)
        grouped = grouped.transpose(0, 1).reshape(self.ghost_size, -1, height, width)
        # With momentum 1 these become the statistics of each ghost batch.
        mean, variance = input.new_zeros(2, groups * channels)
        normal = functional.batch_norm(
            grouped, mean, variance, self.weight.repeat(groups), self.bias.repeat(groups), True, 1.0
        )
        self._move(mean.view(groups, channels), variance.view(groups, channels))
        normal = normal.reshape(self.ghost_size, groups, channels, height, width)
        return normal.transpose(0, 1).reshape(input.shape)

    def _move(self, means: torch.Tensor, variances: torch.Tensor) -> None:
        """Moves the running statistics by a tenth of the difference per ghost batch, in order."""
        with torch.no_grad():
            ages = torch.arange(len(means) - 1, -1, -1, device=means.device)
            shares = (0.1 * 0.9**ages)[:, None]
            for running, now in ((self.running_mean, means), (self.running_var, variances)):
                assert running is not None
                running.mul_(0.9 ** len(means)).add_((shares * now).sum(0))


class ResidualBlock(nn.Module):
    """The same block as `experiments.models.resnet.ResidualBlock`."""

    def __init__(self, inputs: int, outputs: int, stride: int, ghost_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = GhostBatchNorm(outputs, ghost_size)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = GhostBatchNorm(outputs, ghost_size)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = GhostBatchNorm(outputs, ghost_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.norm1(self.conv1(images)))
        hidden = self.norm2(self.conv2(hidden))
        if self.projects:
            images = self.shortcut_norm(self.shortcut(images))
        return functional.relu(hidden + images)


class ResNet18(nn.Module):
    """The same net as `experiments.models.ResNet18`."""

    def __init__(self, width: int, ghost_size: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = GhostBatchNorm(width, ghost_size)
        channels = [width * times for times in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        for i in range(1, 9):
            stride = 2 if i in (3, 5, 7) else 1
            block = ResidualBlock(channels[i - 1], channels[i], stride, ghost_size)
            setattr(self, f"block{i}", block)
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.norm(self.conv(images)))
        for i in range(1, 9):
            hidden = getattr(self, f"block{i}")(hidden)
        return self.fc(hidden.mean((2, 3)))


def build(row: Row, params: Any) -> nn.Module:
    """The net of a row with these parameters.

    Args:
        row: the row, which determines the net.
        params: the parameters of our net, as numpy arrays under the names of flax.

    Raises:
        KeyError, RuntimeError: if the two nets do not have the same parameters.
    """
    if row.net == "lenet":
        net: nn.Module = LeNet()
    elif row.net == "vgg11":
        net = VGG11(row.width or 64)
    else:
        net = ResNet18(row.width or 64, row.microbatch_size)
    own = dict(net.named_parameters())
    for name, value in _named(params):
        with torch.no_grad():
            target = own.pop(name)
            if target.shape != value.shape:
                raise RuntimeError(f"{name} has shape {tuple(target.shape)} and {value.shape}.")
            target.copy_(torch.from_numpy(value.copy()))
    if own:
        raise RuntimeError(f"our net has no {sorted(own)}.")
    return net


def gradients(net: nn.Module) -> dict[str, np.ndarray]:
    """The gradient by name, for comparisons."""
    return {
        name: parameter.grad.detach().cpu().numpy()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


def in_torch_layout(tree: Any) -> dict[str, np.ndarray]:
    """Our parameters, or a gradient of them, under PyTorch's names and in its layout."""
    return dict(_named(tree))


def _named(tree: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
            continue
        array = np.asarray(value)
        if name == "kernel":
            # HWIO is OIHW in PyTorch, and matrices are transposed.
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        if f"{prefix}{name}" == "fc1.kernel":
            # In LeNet, our layers flatten an image pixel by pixel, and PyTorch channel by channel.
            array = array.reshape(50, 4, 4, 10).transpose(0, 3, 1, 2).reshape(50, 160)
        yield prefix + {"kernel": "weight", "scale": "weight"}.get(name, name), array


class Step:
    """A full-batch M-SGD step under plain SGD.

    Attributes:
        net: the module.
    """

    def __init__(
        self,
        row: Row,
        reference: Reference,
        *,
        device: str,
        microbatched: bool,
        channels_last: bool,
        compiled: str | None,
    ):
        """Builds net, optimizer and images on the device.

        Args:
            row: the row, which determines the net and the number of examples.
            reference: parameters and images.
            device: cpu or cuda.
            microbatched: whether gradients are added up over micro-batches.
            channels_last: whether images and kernels have their channels last in memory.
            compiled: mode of `torch.compile`; None to run eagerly.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = build(row, reference.params).to(device).to(memory_format=layout)
        self._order = reference.order
        images = reference.images[self._order].transpose(0, 3, 1, 2)
        images = torch.from_numpy(images.copy()).float() / 255
        images = images.to(device).contiguous(memory_format=layout)
        labels = torch.from_numpy(reference.labels[self._order]).long().to(device)
        size = row.microbatch_size if microbatched else row.num_examples
        self._batches = list(zip(images.split(size), labels.split(size), strict=True))
        self._size, self._num_examples, self._device = size, row.num_examples, device
        self._scale = (min(50, row.num_examples) * row.num_examples) ** -0.5
        self._optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE)
        self._graphs = compiled == "reduce-overhead"
        self._loss: Callable[..., torch.Tensor] = self._weighted_loss
        if compiled is not None:
            self._loss = torch.compile(self._weighted_loss, mode=compiled)

    def _weighted_loss(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        losses = functional.cross_entropy(self.net(images), labels, reduction="none")
        return (losses * weights).sum()

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """The weighted loss; its gradient is left in the parameters."""
        self._optimizer.zero_grad()
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        total = weights.new_zeros(())
        for (images, labels), part in zip(self._batches, weights.split(self._size), strict=True):
            loss = self._loss(images, labels, part)
            loss.backward()
            total = total + loss.detach()
        return total

    def __call__(self) -> None:
        """One step, with weights drawn anew from the law of `noise.cov`."""
        normal = torch.randn(self._num_examples, device=self._device)
        self.gradient(1 / self._num_examples + self._scale * (normal - normal.mean()))
        self._optimizer.step()

    def check(self, weights: np.ndarray) -> tuple[float, float]:
        """The loss and the gradient norm at the current parameters with these weights."""
        loss = self.gradient(torch.from_numpy(weights[self._order]).to(self._device))
        squares = sum(
            (parameter.grad.double() ** 2).sum().item()
            for parameter in self.net.parameters()
            if parameter.grad is not None
        )
        return loss.item(), squares**0.5


def settle(device: str, threads: int) -> None:
    """Sets PyTorch's threads, and on a GPU lets it search for the fastest convolutions."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = device == "cuda"


def allow_tf32(allow: bool) -> None:
    """Allows or forbids TF32, in products and in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def synchronize(device: str) -> None:
    """Waits until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
