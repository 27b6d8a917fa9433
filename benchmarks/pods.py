"""Steps compiled for pods of TPUs and H100s: what their compilers say that spreading costs.

``make benchmark-pods``, or ``python -m benchmarks.pods`` where `libtpu` and `jax-cuda12-plugin` are
installed. No chip is needed, and nothing is run: every figure is the compiler's account of the
program of one chip. Each of our steps is compared with one on the mean loss that is written by hand
with `jax.grad` and walks through the same micro-batches; for a sparse law that is a step on a
mini-batch of as many examples, of which each chip gathers its share from its own.

The account counts the body of a loop once, so of a step in micro-batches it says what is outside of
the loop and one micro-batch; bytes of collectives in a loop are times its iterations.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# The program runs on the CPU; the compilers are asked for by name.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import compilers, pods_nets, report
from msgd_jax import noise

MIB = 2**20
SAID_BY = "The compiler's account of one chip's program, not a run"
SVHN = 73_257
BATCH_SIZE = 64
MOST_OPERATIONS, MOST_BYTES, MOST_MEMORY = 1.001, 1.02, 1.05

LAWS: dict[str, Callable[..., noise.MNoise]] = {
    "gd": lambda n, size, **kw: noise.gd(n, **kw),
    "fisher": lambda n, size, **kw: noise.fisher(n, BATCH_SIZE, **kw),
    "cov": lambda n, size, **kw: noise.cov(n, BATCH_SIZE, **kw),
    "bernoulli": lambda n, size, **kw: noise.bernoulli(n, BATCH_SIZE, **kw),
    "rademacher": lambda n, size, **kw: noise.rademacher(n, BATCH_SIZE**-0.5 / n, **kw),
    "student_t": lambda n, size, **kw: noise.student_t(n, BATCH_SIZE, degrees_of_freedom=4, **kw),
    "estimated_fisher": lambda n, size, **kw: noise.estimated_fisher(
        n, BATCH_SIZE, estimate_size=size, **kw
    ),
    "estimated_cov": lambda n, size, **kw: noise.estimated_cov(
        n, BATCH_SIZE, estimate_size=size, **kw
    ),
    "coloured": lambda n, size, **kw: noise.coloured(noise.cov(n, BATCH_SIZE, **kw), (1.0, 0.5)),
    "scaled": lambda n, size, **kw: noise.scaled(noise.cov(n, BATCH_SIZE, **kw), 0.7),
    "sum_of": lambda n, size, **kw: noise.sum_of(
        noise.sgd(n, size, **kw), noise.fisher(n, BATCH_SIZE, **kw)
    ),
    "sgd": noise.sgd,
    "sgd_replace": lambda n, size, **kw: noise.sgd(n, size, replace=True, **kw),
    "sparse_fisher": lambda n, size, **kw: noise.sparse_fisher(
        n, BATCH_SIZE, support_size=size, **kw
    ),
    "sparse_cov": lambda n, size, **kw: noise.sparse_cov(n, BATCH_SIZE, support_size=size, **kw),
    "random_reshuffling": lambda n, size, **kw: noise.random_reshuffling(
        n, size, drop_remainder=True, **kw
    ),
    "mixture": lambda n, size, **kw: noise.mixture(
        [noise.sgd(n, size, **kw), noise.sgd(n, size // 2, **kw)], [0.6, 0.4]
    ),
    "svag": lambda n, size, **kw: noise.svag(noise.sgd(n, size, **kw), refinement=3),
}
"""Every law, for N examples and, if it is sparse, so many in a step."""


class Case(NamedTuple):
    """What is compiled for one kind and number of chips.

    Attributes:
        net: a function that makes the net.
        chip: the kind of the chips, "v5e" or "H100".
        chips: the number of chips.
        num_examples: N.
        microbatch_size: the number of examples in one pass on each chip; None for all of them.
        batch_size: the number of examples in a step of the sparse laws.
        laws: the names of the laws.
        fsdp: whether parameters are spread over the chips.
        wide: whether weights are float64.
    """

    net: Callable[[], pods_nets.Net]
    chip: str
    chips: int
    num_examples: int
    microbatch_size: int | None
    batch_size: int
    laws: tuple[str, ...]
    fsdp: bool = False
    wide: bool = False


class Compared(NamedTuple):
    """The compiler's accounts of our step with one law and of the plain step.

    Attributes:
        law: the name of the law.
        sparse: whether the law is sparse.
        ours: the account of our step.
        plain: the account of the plain step.
        gradient: the bytes of a gradient in float32.
    """

    law: str
    sparse: bool
    ours: compilers.Account
    plain: compilers.Account
    gradient: int

    @property
    def besides(self) -> float:
        """The bytes of our collectives beyond those of the plain step.

        The plain step counts as sending a gradient in float32 at least. For TPUs, a sum of bfloat16
        that is written by hand is sent in bfloat16, which ours never is.
        """
        return self.ours.sent - max(self.plain.sent, self.gradient)

    def ratio(self, name: str) -> float | None:
        """Ours over the plain step's: "flops", "bytes", "temporaries", "peak"."""
        ours, plain = getattr(self.ours, name), getattr(self.plain, name)
        return ours / plain if ours and plain else None


_FLAT = functools.partial(pods_nets.flat, 2048, 128)
_FLAT_NARROW = functools.partial(pods_nets.flat, 2048, 128, jnp.bfloat16)
_VGG = functools.partial(pods_nets.images, "vgg11", (32, 32, 3))
_SOME = ("cov", "sgd", "sparse_cov")

CASES: dict[str, Case] = {
    "flat": Case(_FLAT, "v5e", 16, 2**18, None, 2**14, tuple(LAWS)),
    "flat-float64": Case(_FLAT, "v5e", 16, 2**18, None, 2**14, tuple(LAWS), wide=True),
    "flat-microbatches": Case(_FLAT, "v5e", 16, 2**18, 4096, 2**14, _SOME),
    "flat-bfloat16": Case(_FLAT_NARROW, "v5e", 16, 2**18, None, 2**14, _SOME),
    "flat-256": Case(_FLAT, "v5e", 256, 2**22, None, 2**16, _SOME),
    "vgg11": Case(_VGG, "v5e", 16, SVHN, 256, 2**14, ("gd", "cov", "sparse_cov")),
    "vgg11-256": Case(_VGG, "v5e", 256, SVHN, 256, 2**14, ("cov", "sparse_cov")),
    "transformer": Case(pods_nets.transformer, "v5e", 16, 2**12, 4, 2**9, ("cov", "sparse_cov")),
    "transformer-fsdp": Case(
        pods_nets.transformer, "v5e", 16, 2**12, 4, 2**9, ("cov", "sparse_cov"), fsdp=True
    ),
    "transformer-256": Case(pods_nets.transformer, "v5e", 256, 2**16, 4, 2**13, ("cov",)),
    "flat-h100": Case(_FLAT, "H100", 16, 2**18, 4096, 2**14, tuple(LAWS)),
    "flat-h100-float64": Case(_FLAT, "H100", 16, 2**18, 4096, 2**14, tuple(LAWS), wide=True),
    "flat-h100-bfloat16": Case(_FLAT_NARROW, "H100", 16, 2**18, None, 2**14, _SOME),
    "vgg11-h100": Case(_VGG, "H100", 16, SVHN, 256, 2**14, ("cov", "sparse_cov")),
    "transformer-h100": Case(
        pods_nets.transformer, "H100", 16, 2**12, 4, 2**9, ("cov", "sparse_cov")
    ),
}
"""What is compiled, by the name that ``--only`` takes."""


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Compiles steps for pods and compares them with plain ones.

    Attributes:
        only: The cases to compile; all of them by default.
    """

    only: tuple[str, ...] = tuple(CASES)

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.only) - set(CASES))
        if unknown:
            raise ValueError(f"only must name cases among {tuple(CASES)}, got {unknown}.")


def main(config: Config) -> list[report.Headline]:
    """Compiles, prints, writes; returns the headlines."""
    only = config.only[:1] if config.quick else config.only
    for chip in {CASES[name].chip for name in only}:
        reason = compilers.missing(chip)
        if reason is not None:
            raise SystemExit(reason)
    found: dict[str, list[Compared]] = {}
    rows = []
    for name in only:
        start = time.perf_counter()
        case = CASES[name]
        found[name] = compare(case._replace(laws=case.laws[:2]) if config.quick else case)
        own = [_row(name, CASES[name], one) for one in found[name]]
        print(f"{report.table(own)}\n{time.perf_counter() - start:.0f} s\n", flush=True)
        rows += own
    headlines = _headlines(found)
    report.publish(
        "pods",
        config,
        rows,
        headlines,
        functools.partial(_plot, found),
        said_by=SAID_BY,
    )
    print(f"\n{SAID_BY}. The body of a loop counts once, except for collectives.")
    return headlines


def compare(case: Case) -> list[Compared]:
    """Our step with each law of a case, and the plain one."""
    mesh = compilers.mesh(case.chip, (case.chips,), ("data",))
    places = pods_nets.Places(NamedSharding(mesh, PartitionSpec("data")), case.fsdp)
    net, n = case.net(), case.num_examples

    @functools.cache
    def plain(batch_size: int | None) -> compilers.Account:
        step = pods_nets.plain(net, places, n, case.microbatch_size, batch_size)
        return compilers.account(*step)

    def of_law(name: str) -> Compared:
        law = LAWS[name](n, case.batch_size, dtype=jnp.float64 if case.wide else jnp.float32)
        sparse = law.support_size < n
        step = pods_nets.ours(net, law, places, n, case.microbatch_size)
        batch_size = -(-law.support_size // case.chips) * case.chips if sparse else None
        return Compared(
            name, sparse, compilers.account(*step), plain(batch_size), net.gradient_bytes
        )

    with jax.enable_x64(True) if case.wide else contextlib.nullcontext():
        return [of_law(name) for name in case.laws]


def _row(name: str, case: Case, one: Compared) -> dict[str, Any]:
    ratios = {n: one.ratio(n) for n in ("flops", "bytes", "temporaries", "peak")}
    return {
        "case": name,
        "chips": f"{case.chips} {case.chip}",
        "law": one.law,
        **{f"{n}, ratio": "" if r is None else f"{r:.4f}" for n, r in ratios.items()},
        "peak, MiB": f"{one.ours.peak / MIB:.1f}",
        "collectives, MiB": f"{one.ours.sent / MIB:.2f}",
        "besides, bytes": f"{one.besides:.0f}",
        "added up in": " ".join(
            sorted({t for kind, t in one.ours.collectives if "reduce" in kind})
        ),
    }


def _headlines(found: dict[str, list[Compared]]) -> list[report.Headline]:
    dense = {
        f"{name}, {one.law}": one
        for name, all_found in found.items()
        for one in all_found
        if not one.sparse and not CASES[name].wide
    }

    def worst(figure: str, attribute: str, target: float) -> list[report.Headline]:
        ratios = {k: r for k, one in dense.items() if (r := one.ratio(attribute)) is not None}
        if not ratios:
            return []
        most = max(ratios, key=lambda k: ratios[k])
        text = f"{figure} over the plain step's, dense laws, largest ({most})"
        met = ratios[most] <= target
        return [report.Headline("pods", text, f"{ratios[most]:.4f}", f"<= {target}", met)]

    rest = {
        f"{name}, {one.law}": one.besides / (8 * CASES[name].batch_size)
        for name, all_found in found.items()
        for one in all_found
    }
    most = max(rest, key=lambda k: rest[k])
    text = f"bytes sent besides the gradient, in 8 B of the subset, largest ({most})"
    return [
        *worst("operations", "flops", MOST_OPERATIONS),
        *worst("bytes", "bytes", MOST_BYTES),
        *worst("memory at its peak", "peak", MOST_MEMORY),
        report.Headline("pods", text, f"{rest[most]:.4f}", "<= 1", rest[most] <= 1),
    ]


def _plot(found: dict[str, list[Compared]], axes: Any) -> None:
    ratios = {
        f"{name}, {one.law}": one.ratio("peak") or math.nan
        for name, all_found in found.items()
        for one in all_found
    }
    names = list(ratios)[::-1]
    axes.figure.set_size_inches(7.5, 1 + 0.16 * len(names))
    axes.axvline(1, color="gray", linewidth=1)
    axes.plot([ratios[name] for name in names], range(len(names)), "o", markersize=3)
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.set_xlabel("memory at its peak over the plain step's")
    axes.set_title(SAID_BY, fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
