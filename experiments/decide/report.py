"""The table and the figure of a setting, made from its records."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures, styles, tables
from experiments.decide import _records, statistics, study
from experiments.decide.settings import BASELINES, CONTESTANTS, Setting, label

# The colours of the declared family, of the others, and of the floor. The markers differ too.
_DECLARED, _OTHER, _FLOOR = styles.style(3), styles.style(5), styles.COLOURS[4]
AT_EQUAL_LOSS = "GD, once at SGD's training loss"
"""The row for GD at its first evaluation with at most the training loss that SGD ends with."""

_HEADER = [
    "algorithm",
    "seeds",
    "test accuracy",
    "minus SGD",
    "p (Holm)",
    "minus GD",
    "p (Holm)",
    "share of the gap closed",
    "p of equivalence with SGD",
    "training loss",
    "training accuracy",
    "test loss",
]

Values = Float[np.ndarray, " seeds"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The row of one contestant in the table; accuracies and differences are in points.

    Attributes:
        label: the name of the contestant.
        in_family: whether it belongs to the declared family.
        accuracy: the mean test accuracy at the endpoint.
        train_loss: the mean training loss at the endpoint.
        train_accuracy: the mean training accuracy, on the labels that were given.
        test_loss: the mean test loss.
        to_sgd, to_gd: paired differences; None for the baseline itself.
        adjusted_to_sgd, adjusted_to_gd: their p-values by Holm's method over the family; NaN for
            contestants outside it.
        equivalent: the p-value of equivalence with SGD within the margin, by Holm's method over the
            family; not adjusted outside it. NaN for SGD itself.
        share: the share of the gap between GD and SGD that it closes; None for GD and SGD.
    """

    label: str
    in_family: bool
    accuracy: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    to_sgd: statistics.Difference | None
    to_gd: statistics.Difference | None
    adjusted_to_sgd: float = math.nan
    adjusted_to_gd: float = math.nan
    equivalent: float = math.nan
    share: statistics.Share | None = None


def rows(setting: Setting, runs: dict[_records.Run, _records.Curve]) -> list[Row]:
    """The table of a setting, the baselines first.

    Pairs are over the setting's main seeds that both runs have.

    Raises:
        ValueError: if GD or SGD has fewer than two of the main seeds.
    """
    found = {name: _of(setting, runs, name) for name in setting.contestants}
    for name in BASELINES:
        if len(found[name]) < 2:
            raise ValueError(
                f"records of {setting.name} must have at least two main seeds of {name}, got "
                f"{len(found[name])}."
            )
    named = [
        (label(name, setting), name in setting.family, of_seed)
        for name, of_seed in found.items()
        if len(of_seed) >= 2
    ]
    gd, sgd = found["gd"], found["sgd"]
    named.append((AT_EQUAL_LOSS, False, _at_equal_loss(gd, found.get("gd-longer", {}), sgd)))
    return _adjusted(setting, [_row(setting, *entry, gd, sgd) for entry in named])


def _of(
    setting: Setting, runs: dict[_records.Run, _records.Curve], name: str
) -> dict[int, _records.Curve]:
    """The main runs of a contestant by seed."""
    factor = study.best_factor(setting, runs) if CONTESTANTS[name].tuned else 1.0
    if factor is None:
        return {}
    wanted = {seed: _records.Run(name, factor, seed) for seed in study.main_seeds(setting)}
    return {seed: runs[run] for seed, run in wanted.items() if run in runs}


def _at_equal_loss(
    gd: dict[int, _records.Curve],
    longer: dict[int, _records.Curve],
    sgd: dict[int, _records.Curve],
) -> dict[int, _records.Curve]:
    """GD at its first evaluation with at most the final training loss of SGD.

    If a seed's GD never has such a loss, its longer run is taken; if that has none either, or there
    is none, the last evaluation of all.
    """
    stopped = {}
    for seed in gd.keys() & sgd.keys():
        curves = [gd[seed], longer[seed]] if seed in longer else [gd[seed]]
        reached = [np.flatnonzero(c.train_loss <= sgd[seed].train_loss[-1]) for c in curves]
        curve, at = next(
            ((curve, at[0]) for curve, at in zip(curves, reached, strict=True) if at.size),
            (curves[-1], len(curves[-1].train_loss) - 1),
        )
        stopped[seed] = _records.Curve(*(values[at : at + 1] for values in curve))
    return stopped


def _row(
    setting: Setting,
    name: str,
    in_family: bool,
    of_seed: dict[int, _records.Curve],
    gd: dict[int, _records.Curve],
    sgd: dict[int, _records.Curve],
) -> Row:
    def ends(of: dict[int, _records.Curve], seeds: list[int], what: str) -> Values:
        return np.asarray([getattr(of[seed], what)[-1] for seed in seeds])

    def compared(reference: dict[int, _records.Curve]) -> tuple[Values, Values]:
        seeds = sorted(of_seed.keys() & reference.keys())
        values, others = (100 * ends(of, seeds, "test_accuracy") for of in (of_seed, reference))
        return values, others

    own = sorted(of_seed)
    shared = sorted(of_seed.keys() & gd.keys() & sgd.keys())
    is_gd, is_sgd = of_seed is gd, of_seed is sgd
    closed, base, goal = (ends(of, shared, "test_accuracy") for of in (of_seed, gd, sgd))
    return Row(
        label=name,
        in_family=in_family,
        accuracy=100 * float(ends(of_seed, own, "test_accuracy").mean()),
        train_loss=float(ends(of_seed, own, "train_loss").mean()),
        train_accuracy=100 * float(ends(of_seed, own, "train_accuracy").mean()),
        test_loss=float(ends(of_seed, own, "test_loss").mean()),
        to_sgd=None if is_sgd else statistics.difference(*compared(sgd)),
        to_gd=None if is_gd else statistics.difference(*compared(gd)),
        equivalent=math.nan
        if is_sgd
        else statistics.equivalence(*compared(sgd), 100 * setting.margin),
        share=None if is_gd or is_sgd else statistics.share_of_gap(closed, base, goal),
    )


def _adjusted(setting: Setting, table: list[Row]) -> list[Row]:
    """Applies Holm's method over the declared family, separately to differences and equivalence."""
    inside = [row for row in table if row.in_family]
    both = [row.to_sgd.p_value for row in inside] + [row.to_gd.p_value for row in inside]  # pyright: ignore[reportOptionalMemberAccess]
    differences = statistics.holm(both, 2 * len(setting.family))
    equivalences = statistics.holm([row.equivalent for row in inside], len(setting.family))
    adjusted = {
        row.label: dataclasses.replace(
            row,
            adjusted_to_sgd=differences[i],
            adjusted_to_gd=differences[len(inside) + i],
            equivalent=equivalences[i],
        )
        for i, row in enumerate(inside)
    }
    return [adjusted.get(row.label, row) for row in table]


def markdown(setting: Setting, table: list[Row], found: list[dict[str, Any]]) -> str:
    """The table as Markdown, with notes that explain it."""
    gap = next(row.to_gd for row in table if row.to_sgd is None)
    assert gap is not None
    lines = [
        f"## {setting.name}",
        "",
        described(setting),
        setting.note,
        "",
        f"SGD - GD: {shown(gap)} points of test accuracy ({gap.num_seeds} seeds, p = "
        f"{gap.p_value:.2g}). Margin of equivalence: {100 * setting.margin:.2f} points.",
        "",
        tables.markdown_table(_HEADER, [_line(row) for row in table]),
        "",
        _notes(setting, table, found),
        "",
    ]
    return "\n".join(lines)


def described(setting: Setting) -> str:
    """The setting in words."""
    noise = (
        f"{100 * setting.label_noise:g} % of the labels replaced, " if setting.label_noise else ""
    )
    width = f" of width {setting.width}" if setting.width else ""
    return (
        f"{setting.net}{width}, N = {setting.num_train:,} of {setting.pool:,} images per seed, "
        f"{noise}b = {setting.batch_size}, learning rate {setting.learning_rate:g} x "
        f"{setting.decay_factor:g} at {100 * setting.decay_at:g} % of {setting.steps:,} steps; one "
        "evaluation after the last step decides. Subset, labels, initial weights and noise are "
        "drawn anew per seed; intervals are 95 %, paired by seed, each by itself."
    )


def _line(row: Row) -> list[str]:
    compared = row.to_sgd or row.to_gd
    assert compared is not None
    outside = not row.in_family and row.to_sgd is not None and row.to_gd is not None
    return [
        f"{row.label} *" if outside else row.label,
        str(compared.num_seeds),
        f"{row.accuracy:.2f}",
        shown(row.to_sgd),
        _p_value(row.adjusted_to_sgd),
        shown(row.to_gd),
        _p_value(row.adjusted_to_gd),
        share(row.share),
        _p_value(row.equivalent),
        f"{row.train_loss:.2g}",
        f"{row.train_accuracy:.1f}",
        f"{row.test_loss:.2f}",
    ]


def _notes(setting: Setting, table: list[Row], found: list[dict[str, Any]]) -> str:
    made, declared = {row.label for row in table if row.in_family}, len(setting.family)
    missing = [label(name, setting) for name in setting.family]
    missing = [name for name in missing if name not in made]
    not_run = f" Not run: {', '.join(missing)}." if missing else ""
    devices = sorted({f"{line['device']}, {line['precision']}" for line in found})
    versions = sorted({f"jax {line['versions'].get('jax', 'unknown')}" for line in found})
    seconds = sum(line["seconds"] + line["compile_seconds"] for line in found)
    notes = [
        f"Holm over the {2 * declared} declared differences and, apart from them, the {declared} "
        f"equivalences; {len(made)} of {declared} contestants of the family were run.{not_run}",
        "\\* outside the declared family: p of equivalence not adjusted.",
        f"{AT_EQUAL_LOSS}: each seed's first evaluation with at most the loss that its SGD ends "
        "with; it is not interpolated, so its loss may be lower.",
        _tuning(setting, _records.curves(found)),
        f"Isotropic and diagonal noise: variances of S/b, refreshed every {setting.refresh_every} "
        "steps.",
        "A share without bounds: the gap itself is not clearly different from 0.",
        f"Computed on {'; '.join(devices)} with {', '.join(versions)}, {seconds:,.0f} s in all.",
    ]
    gap = next(row.to_gd for row in table if row.to_sgd is None)
    assert gap is not None
    if 200 * setting.margin > gap.mean:
        notes.append(
            "The margin is more than half of the gap, so that GD may be equivalent to SGD too: "
            "equivalence within it says little here."
        )
    return "\n".join(f"- {note}" for note in notes)


def _tuning(setting: Setting, runs: dict[_records.Run, _records.Curve]) -> str:
    factor = study.best_factor(setting, runs)
    if factor is None:
        return "GD's own learning rate was not chosen."
    tried = ", ".join(f"{f * setting.learning_rate:g}" for f in setting.tuning_factors)
    return (
        f"GD's own learning rate is {factor * setting.learning_rate:g}, the best of {tried} in "
        f"test accuracy on {setting.tuning_seeds[1]} other seeds (so it has seen the test images)."
    )


def shown(difference: statistics.Difference | None) -> str:
    """A difference with its interval; "" for None."""
    if difference is None:
        return ""
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _p_value(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def share(of_gap: statistics.Share | None) -> str:
    """A share of the gap with its interval, in per cent; "" for None."""
    if of_gap is None:
        return ""
    if math.isinf(of_gap.low):
        return f"{100 * of_gap.estimate:.0f} % [unbounded]"
    return f"{100 * of_gap.estimate:.0f} % [{100 * of_gap.low:.0f}, {100 * of_gap.high:.0f}]"


def draw(setting: Setting, table: list[Row], path: pathlib.Path) -> None:
    """Draws the differences with intervals, one row per contestant; replaces an earlier figure."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(styles.RC):
        figure = Figure(figsize=(styles.WIDTH, 1.9 + 0.34 * len(table)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_rows(figure, setting, table)
    figures.save(figure, path)


def _draw_rows(figure: Any, setting: Setting, table: list[Row]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    floor = next(
        (row.to_sgd for row in table if row.label == CONTESTANTS["sgd-other-key"].label), None
    )
    margin = 100 * setting.margin
    axes[0].axvspan(
        -margin, margin, color=styles.NEUTRAL, alpha=0.2, lw=0, label="margin of equivalence"
    )
    if floor is not None:
        axes[0].axvspan(
            floor.low, floor.high, color=_FLOOR, alpha=0.35, lw=0, label="SGD with another key"
        )
    for axis, reference in zip(axes, ("sgd", "gd"), strict=True):
        for place, row in enumerate(table):
            difference = row.to_sgd if reference == "sgd" else row.to_gd
            if difference is None:
                axis.plot(0, place, "|", color=styles.NEUTRAL, markersize=12)
                continue
            declared = row.in_family or row.to_sgd is None or row.to_gd is None
            colour, _, marker = _DECLARED if declared else _OTHER
            axis.plot([difference.low, difference.high], [place, place], color=colour, lw=1.8)
            axis.plot(difference.mean, place, marker, color=colour, markersize=6)
        axis.axvline(0, color=styles.NEUTRAL, lw=0.8)
        axis.set_xlabel(f"minus {reference.upper()}'s, points")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(table)), [row.label for row in table])
    axes[0].invert_yaxis()
    for (colour, _, marker), name in ((_DECLARED, "declared"), (_OTHER, "not in the family")):
        label = f"95 % interval, {name}"
        axes[0].plot([], [], color=colour, marker=marker, lw=1.8, label=label)
    figure.suptitle("Test accuracy, differences by seed")
    figures.below_axes(figure, axes[0])


def _alternative(table: list[Row]) -> str:
    """What the picture shows, for readers who do not see it."""
    differences = [f"{row.label} {row.to_sgd.mean:+.1f}" for row in table if row.to_sgd is not None]
    text = (
        "Two columns of dots with 95 % intervals, a row per algorithm: test accuracy minus SGD's "
        f"and minus GD's. Points minus SGD's: {'; '.join(differences)}."
    )
    return text.replace("[", "\\[").replace("]", "\\]")


def recorded(setting: Setting, folder: pathlib.Path) -> list[Row]:
    """The table of a setting from the records in a folder, as `rows` makes it.

    Raises:
        ValueError: if the records are of another setting, or too few.
    """
    found = _records.lines(_records.path_of(folder, setting), setting)
    return rows(setting, _records.curves(found))


def write(setting: Setting, folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Writes ``SETTING.md`` and ``SETTING.png`` from the records in a folder.

    Returns:
        The path and the text of the page.

    Raises:
        ValueError: if the records are of another setting, or too few.
    """
    path = _records.path_of(folder, setting)
    found = _records.lines(path, setting)
    table = rows(setting, _records.curves(found))
    page, picture = folder / f"{setting.name}.md", folder / f"{setting.name}.png"
    draw(setting, table, picture)
    text = markdown(setting, table, found)
    page.write_text(f"{text}\n![{_alternative(table)}]({picture.name})\n")
    return page, text
