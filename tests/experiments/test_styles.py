"""Lines can be told apart by any eye, with and without colours, and text can be read.

Distances of colours are those in CIE Lab, computed here from the published matrices.
"""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib import colors

from experiments import figures, styles
from experiments.decide.settings import CONTESTANTS
from experiments.noise_study import _edge_report as edge
from experiments.noise_study import _memory_report as memory
from experiments.noise_study import _tails_report as tails
from experiments.paper.panels import PANELS

# How each eye sees linear RGB, by Machado, Oliveira and Fernandes (2009), at severity 1.
EYES = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
# The least distance of two colours: about nine times the difference that an eye just notices, 2.3.
LEAST = 20.0
WHITE, DARK = "#ffffff", "#131416"  # The backgrounds of the site. GitHub's dark one is darker.


def linear(colour):
    """Linear RGB of a colour, by the inverse of sRGB's transfer function."""
    c = np.array(colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


# Maps linear RGB to CIE XYZ, for the primaries of sRGB and the white D65.
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(colour, eye="normal"):
    """A colour in CIE Lab, as an eye sees it."""
    xyz = XYZ @ np.clip(EYES[eye] @ linear(colour), 0, 1) / XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one, other):
    """The distance of two colours for the eye to which they are most alike."""
    return min(np.linalg.norm(lab(one, eye) - lab(other, eye)) for eye in EYES)


def contrast(one, other):
    """The contrast of two colours by WCAG 2, from 1 for the same to 21 for black on white."""
    low, high = sorted(XYZ[1] @ linear(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_distances_and_contrasts_are_the_published_ones():
    """Red in Lab is in every table of colours.

    The colours that matplotlib would give to Fisher and Cov are far apart for most eyes, and about
    7 apart with deuteranopia, which this file must find too close.
    """
    np.testing.assert_allclose(lab("#ff0000"), [53.24, 80.09, 67.20], atol=0.02)
    np.testing.assert_allclose(contrast("#000000", WHITE), 21)
    assert np.linalg.norm(lab("C2") - lab("C3")) > 100
    assert 6 < np.linalg.norm(lab("C2", "deuteranopia") - lab("C3", "deuteranopia")) < 9


@pytest.mark.parametrize("pair", list(itertools.combinations(styles.COLOURS, 2)), ids="-".join)
def test_colours_are_apart(pair):
    assert distance(*pair) > LEAST


@pytest.mark.parametrize("colour", styles.COLOURS)
def test_colours_are_seen_on_light_and_dark(colour):
    # WCAG 1.4.11 asks for a contrast of 3 for lines. The neutral colour is that of text too.
    least = 4 if colour == styles.NEUTRAL else 3
    assert min(contrast(colour, WHITE), contrast(colour, DARK)) >= least


PICTURES = {name: [run.label for run in panel.runs] for name, panel in PANELS.items()} | {
    "edge": list(edge.LABELS.values()),
    "tails": list(tails.LABELS.values()),
    "memory": list(memory.LABELS.values()),
    "all of decide": [contestant.label for contestant in CONTESTANTS.values()],
}


@pytest.mark.parametrize("labels", PICTURES.values(), ids=PICTURES)
def test_lines_of_a_picture(labels):
    """Every pair of lines differs in its marker or dashes, and in its colour for all eyes.

    A picture with more lines than there are colours must repeat some of them.
    """
    looks = styles.assigned(labels)
    assert list(looks) == list(dict.fromkeys(labels))
    for one, other in itertools.combinations(looks.values(), 2):
        assert (one.line, one.marker) != (other.line, other.marker)
        assert len(looks) > len(styles.COLOURS) or distance(one.colour, other.colour) > LEAST


def test_an_algorithm_looks_the_same_everywhere():
    one = styles.assigned(["SGD-50", "M-SGD-Cov", "SGD-500"])
    other = styles.assigned(["GD", "M-SGD-Cov", "mine", "SGD"])
    assert one["M-SGD-Cov"] == other["M-SGD-Cov"]
    assert one["SGD-50"] == other["SGD"] == styles.style(1) != one["SGD-500"]
    assert other["mine"] == styles.style(2)


def test_a_picture_is_transparent_and_can_be_read_when_it_is_small(tmp_path, monkeypatch):
    """At a width of 420 pixels, text has 8 pixels or more; the corners are transparent.

    No text is cut off at the sides: its box ends within the picture, up to one pixel.
    """
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append((figure, path)))
    rng = np.random.default_rng(0)
    labels = PICTURES["1a"]
    curves = [figures.Curve(name, np.arange(20), rng.random((20, 3))) for name in labels]
    figures.plot_curves(curves, tmp_path / "a.png", "title\n" + "words " * 30)
    monkeypatch.undo()
    figure, path = kept[0]
    figure.canvas.draw()
    box = figure.bbox
    for text in figure.findobj(matplotlib.text.Text):
        size = text.get_fontsize() / 72 * 420 / figure.get_figwidth()
        assert size >= 8, text
    for text in [*figure.texts, *figure.legends[0].texts]:
        extent = text.get_window_extent()
        assert min(extent.x0 - box.x0, box.x1 - extent.x1) >= -1, text
    assert not any(axes.get_legend() for axes in figure.axes)
    figures.save(figure, path)
    from matplotlib import image

    assert image.imread(path)[0, 0, 3] == 0
