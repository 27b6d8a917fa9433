"""The handwritten digits that come with scikit-learn: they need neither files nor a network."""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.data import _draws
from experiments.data._originals import Dataset, Original, Split, Splits, as_examples


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bundled(Original):
    """The digits: one original split, from which the training and the test images are drawn."""

    def read(self, data_dir: Path | None, download: bool) -> tuple[Splits, str]:
        """Returns all digits as "train"; no files are read."""
        del data_dir, download
        import sklearn
        import sklearn.datasets

        pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
        images = pixels.reshape(-1, *self.image_shape).astype(np.uint8)
        source = f"load_digits of scikit-learn {sklearn.__version__}"
        return {"train": Split(images, labels)}, source

    def whole(self) -> "Bundled":
        """The same: the digits that are not drawn for training are those to test on."""
        return self

    def load(self, seed: int = 0, data_dir: Path | None = None, download: bool = True) -> Dataset:
        """Draws the training digits; the others, in the order drawn, are the test digits."""
        _draws.check_seed(seed)
        splits, source = self.read(data_dir, download)
        digits = as_examples(splits["train"])
        order = _draws.permutation(len(digits.label), seed, _draws.SPLIT)
        drawn, others = order[: self.num_train], order[self.num_train :]
        return Dataset(
            name=self.name,
            train=digits.take(drawn),
            test=digits.take(others),
            num_classes=self.num_classes,
            max_value=self.max_value,
            train_indices=drawn,
            source=source,
        )


DIGITS = Bundled(
    name="digits",
    image_shape=(8, 8, 1),
    num_examples={"train": 1_000, "test": 797},
    num_train=1_000,
    max_value=16,
    net="digits_net",
)
"""The 1,797 digits: 1,000 training digits are drawn, and the others are the test digits."""
