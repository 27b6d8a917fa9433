"""The configuration of one run, as a dataclass that is also the command line."""

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro

from experiments import data, models
from experiments._typing import Record
from experiments.data import MAX_SEED
from experiments.training.algorithms import ALGORITHMS, NoiseSettings
from msgd_jax._validate import shown

if TYPE_CHECKING:  # The choices are the names in two tables, so that a new entry is one at once.
    AlgorithmName = str
    ModelName = str
else:
    AlgorithmName = Literal[tuple(ALGORITHMS)]
    ModelName = Literal[tuple(models.MODELS)]
Scaling = Literal["none", "sqrt", "linear"]

_NAMES: dict[str, tuple[str | None, ...]] = {
    "algorithm": tuple(ALGORITHMS),
    "model": (None, *models.MODELS),
    "learning_rate_scaling": get_args(Scaling),
    "train_part": get_args(data.Part),
}
# Marks fields that were added later: at its default, such a field is not part of the settings that
# distinguish runs, so that the folders of earlier runs stay valid.
LATER = {"later": True}


def check_seeds(name: str, first: int, count: int = 1) -> None:
    """Raises ValueError unless all seeds from `first` on are below 2^31.

    Of larger ones, jax drops bits, so that two seeds could be the same.
    """
    last = MAX_SEED - count + 1
    if not 0 <= first <= last:
        upper = "2^31 - 1" if count == 1 else f"2^31 - {count}, for {count} seeds"
        raise ValueError(f"{name} must be between 0 and {upper}, got {first}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains with one algorithm.

    The defaults are the paper's appendix B.1: FashionMNIST, 1,000 images drawn from the original
    test set to train on, the 60,000 original training images to test on, the LeNet-like net,
    learning rate 0.01, batch size 50. Where the paper is silent, the choice is ours: the number of
    steps, and PyTorch's default initialisation.

    Attributes:
        algorithm: The algorithm, by the noise it trains with.
        dataset: The images: the name of a data set, or a file of your own, FILE.npz, with the
            arrays x_train, y_train, x_test and y_test. Its images may be of any size, grey or in
            colour, with integers from 0 to 255; its labels are integers from 0.
        model: The net; None stands for the one that fits the images.
        width: The number of channels of the net's first layer, with the other layers in proportion;
            None stands for the net's own.
        steps: The number of iterations.
        learning_rate: The learning rate eta, before decay and scaling.
        momentum: The decay rate of heavy-ball momentum; 0 stands for none.
        weight_decay: The factor with which the parameters are added to the noisy gradient.
        decay_at: The iterations at which the learning rate is multiplied by `decay_factor`.
        decay_factor: The factor of the learning rate at each iteration of `decay_at`.
        learning_rate_scaling: How the learning rate of SGD-b grows with its batch size M over b: as
            its root (Hoffer et al. 2017), linearly, or not at all.
        regime_adaptation: Whether SGD-b makes as many iterations as SGD with b (Hoffer et al.
            2017). If not, it makes as many epochs: `steps` and `decay_at` are then divided by M/b.
        augment: Whether images are padded with 4 pixels of zeros, cropped at random, and flipped.
        noise: The numbers that the noise is built from.
        seeds: The number of runs side by side, each with its own initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        noise_draw: Which of many independent draws of the noise is made; runs that differ in it
            alone have the same images and initial weights.
        data_seed: The seed of the draw of the images to train on, and of wrong labels.
        subset_per_seed: Whether each seed draws images and wrong labels of its own, as data_seed =
            seed would: num_train of all images of the part that is trained on. If not, all seeds
            share those of data_seed.
        label_noise: The fraction of the training labels that is replaced by other classes.
        train_part: The part of FILE.npz that is trained on, train or test; the other one is tested
            on. Data sets with a name have a part of their own (the paper trains on the published
            test images of FashionMNIST and SVHN).
        num_train: The number of training images that are used; None stands for all of them.
        num_test: The number of test images that are used; None stands for all of them.
        eval_every: The number of iterations between two evaluations on all training and test
            images.
        checkpoint_every: The number of iterations after which the next evaluation writes a
            checkpoint; the last evaluation always does.
        microbatch_size: The number of examples in one pass; None stands for all of them at once.
        ghost_batch_size: The number of examples in one ghost batch of a net with batch norm, of
            which a pass may hold several; None stands for those of one pass.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        out: The folder of the run, which must be new or that of the same run, which is then
            continued; None stands for one named after the run.
        dataset_sha256: The checksum of the file that `dataset` names, found when the run begins;
            None for a data set with a name.
    """

    algorithm: AlgorithmName = "sgd"
    dataset: Annotated[
        str, tyro.conf.arg(metavar="{" + ",".join([*data.DATASETS, "FILE.npz"]) + "}")
    ] = "fashion_mnist"
    model: ModelName | None = None
    width: int | None = None
    steps: int = 10_000
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_at: tuple[int, ...] = ()
    decay_factor: float = 0.1
    learning_rate_scaling: Scaling = "none"
    regime_adaptation: bool = True
    augment: bool = False
    noise: NoiseSettings = dataclasses.field(default_factory=NoiseSettings)
    seeds: int = 1
    seed: int = 0
    data_seed: int = 0
    num_train: int | None = None
    num_test: int | None = None
    eval_every: int = 250
    checkpoint_every: int = 1_000
    microbatch_size: int | None = 100
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None
    subset_per_seed: bool = dataclasses.field(default=False, metadata=LATER)
    label_noise: float = dataclasses.field(default=0.0, metadata=LATER)
    train_part: data.Part = dataclasses.field(default="train", metadata=LATER)
    noise_draw: int = dataclasses.field(default=0, metadata=LATER)
    ghost_batch_size: int | None = dataclasses.field(default=None, metadata=LATER)
    dataset_sha256: Annotated[str | None, tyro.conf.Suppress] = dataclasses.field(
        default=None, metadata=LATER
    )

    def __post_init__(self):
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(filter(None, allowed))}, got "
                    f"{shown(getattr(self, name))}."
                )
        for name in ("steps", "seeds", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("width", "num_train", "num_test", "microbatch_size", "ghost_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}.")
        if not data.is_file(self.dataset):
            self._check_model(data.find(self.dataset))
            if self.train_part != "train":
                raise ValueError(
                    f"train_part is for FILE.npz, got {self.train_part!r} with {self.dataset}."
                )
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise must be between 0 and 1, got {self.label_noise}.")
        check_seeds("seed", self.seed, self.seeds)
        check_seeds("data_seed", self.data_seed)
        check_seeds("noise_draw", self.noise_draw)
        for name in ("learning_rate", "weight_decay", "decay_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}.")
        if list(self.decay_at) != sorted(set(self.decay_at)) or min(self.decay_at, default=1) < 1:
            raise ValueError(
                f"decay_at must be positive and ascending, got {shown(self.decay_at)}."
            )
        if self.algorithm != "sgd-b" and self.learning_rate_scaling != "none":
            raise ValueError(
                "learning_rate_scaling is for sgd-b: every other algorithm has the noise of SGD "
                f"with batch_size, got {self.learning_rate_scaling!r} with {self.algorithm!r}."
            )

    def _check_model(self, original: data.Original) -> None:
        """Raises ValueError unless the net takes the images, and can have the given width."""
        name = self.model or original.net
        fitting = models.fitting(original.image_shape)
        if name not in fitting:
            raise ValueError(
                f"model must be {' or '.join(fitting)} for the images of {original.name}, got "
                f"{self.model!r}."
            )
        if self.width is not None and models.MODELS[name].full_width is None:
            wide = [name for name, net in models.MODELS.items() if net.full_width is not None]
            raise ValueError(f"width is for {' and '.join(wide)}, got {self.width} with {name}.")

    @classmethod
    def of_record(cls, record: Record) -> "TrainConfig":
        """The configuration that a run's config.json was written from."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {k: v for k, v in record.items() if k in known}
        values |= {
            "noise": NoiseSettings(**record["noise"]),
            "decay_at": tuple(record["decay_at"]),
            **{k: record[k] and pathlib.Path(record[k]) for k in ("data_dir", "out")},
        }
        return cls(**values)

    @property
    def dataset_name(self) -> str:
        """The data set in titles and in the names of folders; for a file, its name alone."""
        return pathlib.Path(self.dataset).stem if data.is_file(self.dataset) else self.dataset

    @property
    def model_name(self) -> ModelName:
        """The given net, or the one that fits the images; for a file, known once `resolved`."""
        name = self.model or data.DATASETS[self.dataset].net
        assert name is not None
        return name

    def resolved(self) -> "TrainConfig":
        """The same with the net named and a file's checksum, so that equal runs compare equal.

        Raises:
            ValueError: if the data set is a file that is not as `data.npz` says, or the given net
                does not take its images.
        """
        if not data.is_file(self.dataset):
            return dataclasses.replace(self, model=self.model_name)
        if self.model and self.dataset_sha256:
            return self
        original = data.find(self.dataset)
        named = dataclasses.replace(
            self,
            model=self.model or models.fitting(original.image_shape)[0],
            dataset_sha256=original.sha256,
        )
        named._check_model(original)
        return named

    @property
    def recipe(self) -> str:
        """How a run is trained, whatever its algorithm, in words."""
        width = f" of width {self.width}" if self.width else ""
        steps = " and ".join(f"{step:,}" for step in self.decay_at)
        falls = f" (times {self.decay_factor:g} after {steps})" if steps else ""
        words = [
            f"{self.model_name}{width}",
            f"b = {self.noise.batch_size}",
            f"{self.steps:,} iterations at learning rate {self.learning_rate:g}{falls}",
        ]
        if self.momentum:
            words.append(f"momentum {self.momentum:g}")
        if self.weight_decay:
            words.append(f"weight decay {self.weight_decay:g}")
        if self.label_noise:
            words.append(f"{100 * self.label_noise:g} % wrong labels")
        if self.augment:
            words.append("augmented images")
        return ", ".join(words)

    @property
    def label(self) -> str:
        """The algorithm's name in figures, with its numbers."""
        name = ALGORITHMS[self.algorithm].name(self.noise)
        drawn = ", another key" if self.noise_draw else ""
        scaled = {"none": "", "sqrt": ", rate x root", "linear": ", rate x batch"}
        return name + scaled[self.learning_rate_scaling] + drawn

    @property
    def batch_ratio(self) -> float:
        """M/b, the batch size of SGD-b divided by the b of its settings; 1 for other algorithms."""
        if self.algorithm != "sgd-b":
            return 1.0
        return self.noise.support_size / self.noise.batch_size

    @property
    def total_steps(self) -> int:
        """The number of iterations: `steps`, or fewer without regime adaptation."""
        return self.in_regime(self.steps)

    def in_regime(self, iteration: int) -> int:
        """The iteration of this run that corresponds to `iteration` of SGD with b."""
        return iteration if self.regime_adaptation else max(round(iteration / self.batch_ratio), 1)
