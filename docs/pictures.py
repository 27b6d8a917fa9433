"""How the pictures of the site look; and the digits, which most pages train on."""

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse

from experiments import styles, tables


def setup() -> None:
    """Sharp lines, nothing cut off, and the colours and line styles of all our pictures."""
    from cycler import cycler
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")
    looks = [styles.style(place) for place in (3, 2, 1, 5, 4, 6, 7, 8)]
    plt.rcParams.update(styles.RC)
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(
                color=[look.colour for look in looks], linestyle=[look.line for look in looks]
            ),
            "figure.constrained_layout.use": True,
        }
    )


def digits(num_train: int = 1000) -> tuple[dict[str, Any], dict[str, Any]]:
    """scikit-learn's 1,797 digits, pixels in [0, 1]: the first to train, the others to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # by writer, as they come
    x = jnp.asarray(images[order] / 16, jnp.float32)
    y = jnp.asarray(labels[order], jnp.int32)
    return {"x": x[:num_train], "y": y[:num_train]}, {"x": x[num_train:], "y": y[num_train:]}


def ellipse(axes: Any, centre: Any, covariance: Any, **options: Any) -> None:
    """Two standard deviations of a Gaussian on the plane."""
    values, vectors = np.linalg.eigh(np.asarray(covariance))
    width, height = 4 * np.sqrt(np.maximum(values[::-1], 0))
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    axes.add_patch(Ellipse(centre, width, height, angle=angle, fill=False, **options))


def band(axes: Any, x: Any, runs: Any, label: str, **options: Any) -> None:
    """The mean over the last axis, and one standard error around it."""
    mean, error = runs.mean(-1), runs.std(-1, ddof=1) / np.sqrt(runs.shape[-1])
    (line,) = axes.plot(x, mean, label=label, **options)
    axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)


def log_rates(axes: Any, rates: Any) -> None:
    """Both axes logarithmic, ticks at the learning rates and nowhere else."""
    axes.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel="distance at T = 2")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def table(header: list[str], rows: list[list[Any]]) -> Any:
    """A Markdown table as a cell's output."""
    from IPython.display import Markdown

    return Markdown(tables.markdown_table(header, [[str(cell) for cell in row] for row in rows]))
