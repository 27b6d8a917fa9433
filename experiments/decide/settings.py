"""The settings, contestants, families and margins of the study, declared before it is run.

A `Setting` fixes everything that a result depends on except the seed. Its fingerprint is in every
record, so that results of two settings are never mixed in one file.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from msgd_jax import noise

DRAWS = 1
"""Increased when a change makes the same setting and seed draw something else."""

Perturbation = Literal["none", "isotropic", "diagonal"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One data set, one net and one training procedure, and the comparisons to make.

    Attributes:
        name: the name of the setting, and of the file of its records.
        data: "digits", which come with scikit-learn, or "npz" for a file of images.
        net: "digits_net" or "vgg11".
        width: channels of the first layer of VGG-11; 0 for the digits net, which has one size.
        train_part: the part of the `.npz` file for training; the other one is for testing. The
            paper uses "test" for SVHN.
        num_train: N, the number of training images of a seed.
        pool: the number of images, from the first on, of the training part from which every seed
            draws its N images.
        num_test: the number of images, from the first on, of the other part on which all seeds are
            tested; fewer if the file has fewer.
        label_noise: the fraction of the N labels that is replaced by another class, drawn per seed.
        batch_size: b, the batch size of SGD and the scale of all other noises.
        learning_rate: the learning rate eta.
        steps: the number of iterations.
        decay_at: the fraction of the steps after which the learning rate is multiplied by
            `decay_factor`.
        decay_factor: see `decay_at`.
        evaluations: the number of evenly spaced evaluations; the last one, after all steps, is the
            endpoint.
        seeds: the first seed and the number of seeds of the main runs.
        tuning_seeds: the first seed and the number of seeds that choose GD's own learning rate.
        tuning_factors: the learning rates that are tried, as factors of `learning_rate`.
        longer: the factor of the number of steps in `gd-longer`.
        supports: the two support sizes of the sparse laws.
        refresh_every: the number of steps for which isotropic and diagonal noise keep their
            variances.
        margin: the margin of equivalence, a difference of test accuracies as a fraction: half of
            the gap that pilot runs on other seeds found.
        family: the contestants that are compared with SGD and with GD: one family for Holm's
            method, with two comparisons per contestant.
        others: further contestants that can be run, outside the family.
        note: a text about the images, for the page.
    """

    name: str
    data: Literal["digits", "npz"]
    net: Literal["digits_net", "vgg11"]
    width: int
    train_part: Literal["train", "test"]
    num_train: int
    pool: int
    num_test: int
    label_noise: float
    batch_size: int
    learning_rate: float
    steps: int
    decay_at: float
    decay_factor: float
    evaluations: int
    seeds: tuple[int, int]
    tuning_seeds: tuple[int, int]
    tuning_factors: tuple[float, ...]
    longer: int
    supports: tuple[int, int]
    refresh_every: int
    margin: float
    family: tuple[str, ...]
    others: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self):
        if not 1 <= self.num_train <= self.pool:
            raise ValueError(
                f"num_train must be between 1 and the pool of {self.pool}, got {self.num_train}."
            )
        for name in ("num_test", "steps", "evaluations", "longer", "refresh_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("label_noise", "decay_at", "decay_factor"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")
        for name in ("learning_rate", "margin"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}.")
        if self.evaluations > self.steps:
            raise ValueError(
                f"evaluations must be at most the {self.steps} steps, got {self.evaluations}."
            )
        unknown = [name for name in (*self.family, *self.others) if name not in CONTESTANTS]
        if unknown:
            raise ValueError(
                f"family and others must name contestants, got {', '.join(unknown)}; there are "
                f"{', '.join(CONTESTANTS)}."
            )

    @property
    def contestants(self) -> tuple[str, ...]:
        """All that can be run, the most important first."""
        names = {*BASELINES, *self.family, *self.others}
        return tuple(name for name in CONTESTANTS if name in names)

    @property
    def fingerprint(self) -> str:
        """A checksum of everything that determines the result of a seed, 16 hexadecimal digits.

        The seeds, the margin and the family are left out, since they only affect the analysis.
        """
        left_out = ("seeds", "tuning_seeds", "tuning_factors", "margin", "family", "others", "note")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        text = json.dumps({"draws": DRAWS, **values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An algorithm of the study.

    Attributes:
        label: its name in tables and figures.
        law: a function from a setting to the law of its weights.
        key: the name of its noise key. Only the variants of GD, which draw nothing, share one, so
            different laws share initial weights and data but not noise.
        perturbation: Gaussian noise that is added to the gradient, with the trace of S/b
            ("isotropic") or the diagonal of S/b ("diagonal").
        longer: whether it makes `Setting.longer` times the steps.
        refinement: l of SVAG, for l times as many steps at a learning rate divided by l.
        tuned: whether it runs at the learning rate chosen for GD on the tuning seeds.
    """

    label: str
    law: Callable[[Setting], noise.MNoise]
    key: str
    perturbation: Perturbation = "none"
    longer: bool = False
    refinement: int = 1
    tuned: bool = False

    def steps(self, setting: Setting) -> int:
        """The number of its iterations."""
        return setting.steps * self.refinement * (setting.longer if self.longer else 1)

    def learning_rate(self, setting: Setting, factor: float = 1.0) -> float:
        """Its learning rate before the decay; `factor` is GD's own rate over the setting's."""
        return setting.learning_rate * factor / self.refinement

    def evaluation_steps(self, setting: Setting) -> list[int]:
        """The evenly spaced iterations after which it is evaluated; the last is its last one."""
        places = np.linspace(0, self.steps(setting), setting.evaluations + 1)[1:]
        return [round(place) for place in places.tolist()]


def _gd(s: Setting) -> noise.MNoise:
    return noise.gd(s.num_train)


def _sgd(s: Setting) -> noise.MNoise:
    return noise.sgd(s.num_train, s.batch_size)


def _sparse(make: Callable[..., noise.MNoise], which: int) -> Callable[[Setting], noise.MNoise]:
    return lambda s: make(s.num_train, s.batch_size, support_size=s.supports[which])


def _estimated(make: Callable[..., noise.MNoise]) -> Callable[[Setting], noise.MNoise]:
    # As in the paper, the matrices are estimated from as many examples as SGD's batch has.
    return lambda s: make(s.num_train, s.batch_size, estimate_size=s.batch_size)


def _rademacher(s: Setting) -> noise.MNoise:
    scale = noise.matching_scale(noise.fisher(s.num_train, s.batch_size))
    return noise.rademacher(s.num_train, scale)


CONTESTANTS: dict[str, Contestant] = {
    "gd": Contestant("GD", _gd, "gd"),
    "sgd": Contestant("SGD", _sgd, "sgd"),
    "sgd-other-key": Contestant("SGD, another key", _sgd, "sgd-other-key"),
    "cov": Contestant("M-SGD-Cov", lambda s: noise.cov(s.num_train, s.batch_size), "cov"),
    "fisher": Contestant(
        "M-SGD-Fisher", lambda s: noise.fisher(s.num_train, s.batch_size), "fisher"
    ),
    "bernoulli": Contestant(
        "M-SGD-Bernoulli", lambda s: noise.bernoulli(s.num_train, s.batch_size), "bernoulli"
    ),
    "sparse-cov-1": Contestant("[M-SGD-Cov]-{0}", _sparse(noise.sparse_cov, 0), "sparse-cov-1"),
    "sparse-fisher-1": Contestant(
        "[M-SGD-Fisher]-{0}", _sparse(noise.sparse_fisher, 0), "sparse-fisher-1"
    ),
    "sparse-cov-2": Contestant("[M-SGD-Cov]-{1}", _sparse(noise.sparse_cov, 1), "sparse-cov-2"),
    "sparse-fisher-2": Contestant(
        "[M-SGD-Fisher]-{1}", _sparse(noise.sparse_fisher, 1), "sparse-fisher-2"
    ),
    "isotropic": Contestant("GD + isotropic noise", _gd, "isotropic", perturbation="isotropic"),
    "diagonal": Contestant("GD + diagonal noise", _gd, "diagonal", perturbation="diagonal"),
    "gd-best": Contestant("GD at its best rate", _gd, "gd", tuned=True),
    "gd-longer": Contestant("GD, {longer} x the steps", _gd, "gd", longer=True),
    "student-t": Contestant(
        "Student's t, 4 d.f.",
        lambda s: noise.student_t(s.num_train, s.batch_size, degrees_of_freedom=4),
        "student-t",
    ),
    "svag": Contestant(
        "SVAG of SGD, l = 2", lambda s: noise.svag(_sgd(s), 2), "svag", refinement=2
    ),
    "estimated-cov": Contestant(
        "M-SGD-[Cov-{b}]", _estimated(noise.estimated_cov), "estimated-cov"
    ),
    "estimated-fisher": Contestant(
        "M-SGD-[Fisher-{b}]", _estimated(noise.estimated_fisher), "estimated-fisher"
    ),
    "rademacher": Contestant("GD-Rademacher", _rademacher, "rademacher"),
}
"""The contestants by name, in the order in which they are run: the most important first."""

BASELINES = ("gd", "sgd")
"""The contestants that every contestant of a family is compared with."""


def noise_number(name: str) -> int:
    """The number of a noise key's name, the same on every machine."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def label(name: str, setting: Setting) -> str:
    """The name of a contestant in tables and figures, with the setting's numbers in it."""
    return CONTESTANTS[name].label.format(
        *setting.supports, b=setting.batch_size, longer=setting.longer
    )


_ALL = tuple(name for name in CONTESTANTS if name not in BASELINES)

DIGITS = Setting(
    name="digits",
    data="digits",
    net="digits_net",
    width=0,
    train_part="train",
    num_train=200,
    pool=800,
    num_test=997,
    label_noise=0.2,
    batch_size=5,
    learning_rate=0.1,
    steps=8_000,
    decay_at=0.7,
    decay_factor=0.1,
    evaluations=12,
    seeds=(100, 100),
    tuning_seeds=(40, 25),
    tuning_factors=(1.0, 2.0, 4.0, 8.0),
    longer=4,
    supports=(10, 40),
    refresh_every=10,
    margin=0.0095,
    family=_ALL,
    note="The digits of scikit-learn: a fixed pool of 800, tested on the other 997.",
)
"""The setting of the pilot, which found a gap of 1.9 points on 20 seeds that did not choose it."""

SVHN = Setting(
    name="svhn",
    data="npz",
    net="vgg11",
    width=8,
    train_part="test",
    num_train=1_000,
    pool=1_952,
    num_test=4_434,
    label_noise=0.0,
    batch_size=50,
    learning_rate=0.05,
    steps=1_500,
    decay_at=0.7,
    decay_factor=0.1,
    evaluations=12,
    seeds=(100, 20),
    tuning_seeds=(40, 10),
    tuning_factors=(0.4, 1.0, 2.0, 4.0),
    longer=2,
    supports=(100, 200),
    refresh_every=10,
    margin=0.0125,
    family=(
        "sgd-other-key",
        "cov",
        "fisher",
        "bernoulli",
        "sparse-cov-1",
        "sparse-fisher-1",
        "sparse-cov-2",
        "sparse-fisher-2",
        "isotropic",
        "diagonal",
        "gd-best",
        "gd-longer",
    ),
    note="A part of SVHN (Netzer et al. 2011): 1,952 and 4,434 images. As in the paper, the "
    "published test images are trained on, and the training images are tested on.",
    others=("student-t", "svag", "estimated-cov", "estimated-fisher", "rademacher"),
)
"""Panel 1(d) of the paper on a part of SVHN; the pilot's gap of 2.5 points is of one seed."""

CIFAR10 = dataclasses.replace(
    SVHN,
    name="cifar10",
    train_part="train",
    pool=7_000,
    num_test=3_000,
    family=("sgd-other-key", "cov", "fisher", "isotropic", "diagonal"),
    others=("gd-best",),
    note="CIFAR-10 (Krizhevsky 2009): the first 7,000 training and 3,000 test images, from a "
    "copy in which 98 of 60,000 images are re-encoded. No pilot was run: the margin is SVHN's.",
)
"""The same recipe on CIFAR-10: a try without a pilot, with SVHN's margin for want of another."""

DEMO = dataclasses.replace(
    DIGITS,
    name="demo",
    steps=1_000,
    seeds=(300, 8),
    refresh_every=50,
    family=("sgd-other-key", "cov", "sparse-fisher-1", "isotropic"),
    note="The digits of scikit-learn, as in the study, with fewer steps, seeds and algorithms.",
)
"""The digits reduced to what two cores compute in less than a minute."""

SETTINGS: dict[str, Setting] = {s.name: s for s in (DIGITS, SVHN, CIFAR10)}
"""The declared settings by name."""


def summary(setting: Setting) -> dict[str, Any]:
    """The setting as JSON values, for the records."""
    return json.loads(json.dumps(dataclasses.asdict(setting)))
