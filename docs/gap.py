"""The first picture of the README: `python -m docs.gap` draws it from the records of the study."""

import pathlib

from experiments import figures, styles
from experiments.decide import report
from experiments.decide.settings import SETTINGS

ROOT = pathlib.Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "gap.png"
RESULTS = ROOT / "experiments" / "results" / "decide"

# The rows of the picture: a contestant of the study, and what it is in words.
SHAPED = {
    "SGD, another key": "mini-batches, with another key",
    "M-SGD-Cov": "Gaussian, SGD's covariance",
    "M-SGD-Fisher": "Gaussian, the Fisher matrix",
    "M-SGD-Bernoulli": "Bernoulli weights",
    "[M-SGD-Cov]-100": "sparse, SGD's covariance, 100 examples",
    "[M-SGD-Cov]-200": "sparse, SGD's covariance, 200 examples",
    "[M-SGD-Fisher]-100": "sparse, the Fisher matrix, 100 examples",
    "[M-SGD-Fisher]-200": "sparse, the Fisher matrix, 200 examples",
}
OTHERS = {
    "GD + isotropic noise": "isotropic, of the same size",
    "GD + diagonal noise": "diagonal, of the same size",
    "GD at its best rate": "none, at the best rate",
    "GD, 2 x the steps": "none, for twice the steps",
}


def draw(path: pathlib.Path = PICTURE) -> None:
    """Draws the share of SGD's gain over GD that each noise has, with 95 % intervals."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = {row.label: row.share for row in report.recorded(SETTINGS["svhn"], RESULTS)}
    with matplotlib.rc_context(styles.RC):
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, name in enumerate([*SHAPED, *OTHERS]):
            share = shares[name]
            assert share is not None
            colour, _, marker = styles.style(3 if name in SHAPED else 5)
            axes.plot([100 * share.low, 100 * share.high], [place, place], color=colour, lw=2)
            axes.plot(100 * share.estimate, place, marker, color=colour, markersize=7)
        for place, name in ((0, "gradient descent"), (100, "SGD")):
            axes.axvline(place, color=styles.NEUTRAL, linewidth=1, zorder=0)
            axes.annotate(name, (place, 1.02), xycoords=("data", "axes fraction"), ha="center")
        axes.set_yticks(range(len(SHAPED) + len(OTHERS)), [*SHAPED.values(), *OTHERS.values()])
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="share of SGD's gain, %", ylabel="noise")
        axes.invert_yaxis()
    figures.save(figure, path)


if __name__ == "__main__":
    draw()
