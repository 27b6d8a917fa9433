"""How every picture is drawn: for any colour vision, on light and dark pages, on narrow screens.

Each line has a colour, a line style and a marker of its own, so that it can be told apart without
colour too. The colours were searched for: every pair is at least 20 apart in CIE Lab, for normal
sight and under simulated protanopia and deuteranopia (Okabe and Ito's eight: 17, matplotlib's usual
ones: 5), and each has a contrast of 3 or more both on white and on the site's dark background.
`tests/experiments/test_styles.py` holds these numbers.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

NEUTRAL = "#787878"
"""The colour of text and axes: its contrast is above 4 on white and on a dark page."""
FONT, WIDTH = 10.0, 6.4
"""The font size (points) and the width (inches) of a picture: 9 pixels on a 420-pixel screen."""

COLOURS = (
    NEUTRAL,
    "#9000fc",  # violet
    "#b49000",  # gold
    "#009ce4",  # sky blue
    "#486c3c",  # dark green
    "#fc00cc",  # pink
    "#90600c",  # brown
    "#789c54",  # light green
    "#0c6c9c",  # dark blue
)
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^DvPX*<"

RC: dict[Any, Any] = {
    "axes.prop_cycle": f"cycler(color={[COLOURS[place] for place in (3, 2, 1, 5, 4, 6, 7, 8)]})",
    "axes.edgecolor": NEUTRAL,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": NEUTRAL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": FONT,
    "figure.facecolor": "none",
    "figure.titlesize": FONT,
    "font.size": FONT,
    "grid.alpha": 0.3,
    "grid.color": NEUTRAL,
    "legend.fontsize": FONT,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "text.color": NEUTRAL,
    "xtick.color": NEUTRAL,
    "xtick.labelsize": FONT,
    "ytick.color": NEUTRAL,
    "ytick.labelsize": FONT,
}
"""Settings of matplotlib that all pictures share; the background is transparent."""

# The place of each algorithm in COLOURS and MARKERS, the same in all pictures.
_PLACES = {
    "GD": 0,
    "SGD": 1,
    "M-SGD-Fisher": 2,
    "M-SGD-Cov": 3,
    "M-SGD-Bernoulli": 4,
    "GD-Rademacher": 5,
    "Langevin, diagonal Fisher": 6,
    "M-SGD-[Fisher-b]": 7,
    "M-SGD-[Cov-b]": 8,
}


class Style(NamedTuple):
    """How one line looks: its colour, its line style and its marker, as matplotlib takes them."""

    colour: str
    line: Any
    marker: str

    def options(self, points: int, first: int = 0) -> dict[str, Any]:
        """Keyword arguments of ``axes.plot`` for a line through so many points.

        Args:
            points: the number of points; about eight of them get a marker.
            first: moves the markers, so that those of several lines do not cover each other.
        """
        every = max(1, points // 8)
        return {
            "color": self.colour,
            "linestyle": self.line,
            "marker": self.marker,
            "markevery": (first % every, every),
        }


def style(place: int) -> Style:
    """The style in a place: 0, 1, ...; from nine on, colours come again with other lines.

    Colours and markers repeat together, and line styles by themselves, so that 45 styles differ.
    """
    return Style(
        COLOURS[place % len(COLOURS)], LINES[place % len(LINES)], MARKERS[place % len(MARKERS)]
    )


def assigned(labels: Iterable[str]) -> dict[str, Style]:
    """The styles of the lines of one picture, no two of them alike.

    An algorithm has the same style in all pictures; the first SGD is SGD, whatever its batch size.
    Other labels get the places that are left, in order.
    """
    labels = list(dict.fromkeys(labels))
    places: dict[str, int] = {}
    for label in labels:
        place = _PLACES.get(re.sub(r"^SGD-\d+$", "SGD", label))
        if place is not None and place not in places.values():
            places[label] = place
    taken = set(places.values())
    free = (place for place in itertools.count() if place not in taken)
    for label in labels:
        if label not in places:
            places[label] = next(free)
    return {label: style(places[label]) for label in labels}
