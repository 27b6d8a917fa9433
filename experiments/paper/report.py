"""Figures of the paper's panels, the list of runs, and the report of many runs on one page."""

import base64
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments import data, records, terminal
from experiments.paper import _cost, _section, accuracies, listing
from experiments.paper.config import FigureConfig, ListConfig, ReportConfig
from experiments.paper.panels import PANELS
from experiments.training import TrainConfig, loop, runs


def run_folder(root: pathlib.Path, config: TrainConfig) -> pathlib.Path:
    """The folder of a run, named after the settings of its configuration and not after a panel."""
    settings = json.dumps(runs.settings(config.resolved()), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    last = config.seed + config.seeds - 1
    seeds = f"seed{config.seed}" if config.seeds == 1 else f"seeds{config.seed}-{last}"
    return (
        root / f"{config.dataset_name}-{config.model_name}-{config.algorithm}-{seeds}-{digest[:8]}"
    )


def figure(config: FigureConfig) -> pathlib.Path:
    """Makes the missing runs of a panel and draws it; returns the folder with the results."""
    panel = PANELS[config.panel]
    plans = [
        dataclasses.replace(plan, data_dir=config.data_dir, seeds=config.seeds or plan.seeds)
        for plan in panel.at_scale(config.scale)
    ]
    reduced = config.scale != "paper"
    scale = f" ({config.scale} scale)" if reduced else ""
    title = f"Figure {config.panel}{scale}. {panel.title}"
    suffix = f"-{config.scale}" if reduced else ""
    folder = config.out or config.runs / f"figure-{config.panel}{suffix}"
    runs.check_writable(config.runs, "runs")
    runs.check_writable(folder)
    if config.dataset is not None:
        plans = _of_file(plans, config.dataset, config.runs)
    results = _results(plans, config)
    folder.mkdir(parents=True, exist_ok=True)
    name, until = f"figure-{config.panel}", panel.constant_until(config.scale)
    text = _section.write(folder, name, title, plans[0], results, constant_until=until)
    choices = "\n".join(f"* {line}" for line in panel.choices(config.scale))
    smaller = " or the scale is smaller" if reduced else ""
    text += f"\nOur choices, where the paper is silent{smaller}:\n\n{choices}\n"
    parts = [part for plan in plans for part in _groups(plan, config)]
    text += f"\nComputed on {_devices(run_folder(config.runs, part) for part in parts)}.\n"
    records.replace_text(folder / "README.md", text)
    print(text)
    return folder


def _devices(paths: Iterable[pathlib.Path]) -> str:
    """The devices that runs were made on, as jax names them, with its versions."""
    configs = [records.read_object(path / "config.json") for path in paths]
    found = (
        f"{one.get('device')} with jax {one.get('versions', {}).get('jax')}" for one in configs
    )
    return ", ".join(dict.fromkeys(found))


def _of_file(plans: list[TrainConfig], path: pathlib.Path, root: pathlib.Path) -> list[TrainConfig]:
    """The same runs with the images of a file, of which the same part is trained on.

    If there is no such file, its checksum is that of recorded runs with a file of this name.
    """
    part = data.DATASETS[plans[0].dataset].trained_on
    checksum = None if path.exists() else _recorded_checksum(path.name, root)
    return [
        dataclasses.replace(
            plan,
            dataset=str(path),
            model=plan.model_name,
            train_part=part,
            dataset_sha256=checksum,
        ).resolved()
        for plan in plans
    ]


def _recorded_checksum(name: str, root: pathlib.Path) -> str | None:
    """The checksum of the images of the runs below a folder with a file of this name, if any."""
    for path in runs.find(root) if root.is_dir() else ():
        if (path / "config.json").is_file():
            record = records.read_object(path / "config.json")
            if pathlib.Path(str(record.get("dataset"))).name == name:
                return record.get("dataset_sha256")
    return None


def _results(plans: list[TrainConfig], config: FigureConfig) -> list[accuracies.Result]:
    """Runs the plans, with the seeds in groups; runs that have finished are only read."""
    groups = [list(_groups(plan, config)) for plan in plans]
    paths = {part: run_folder(config.runs, part) for parts in groups for part in parts}
    # Found by the name, which depends on the settings, since older records may contain less.
    missing = [
        part
        for part, path in paths.items()
        if not (path.exists() and runs.state(path) == "finished")
    ]
    _check_draws(config.runs, [path for part, path in paths.items() if part not in missing])
    for part in missing:
        loop.check(part)
    if missing:
        print(_cost.sentence(missing, len(paths)), flush=True)
    # The same for the whole panel, or, if each seed has its own images, for a group of seeds.
    datasets = {_images_of(part): loop.load(part) for part in _first_of_each(missing)}
    results = []
    with terminal.Progress(sum(part.total_steps for part in missing)) as progress:
        for plan, parts in zip(plans, groups, strict=True):
            evaluations = [
                loop.run(part, datasets[_images_of(part)], paths[part], progress)
                if part in missing
                else accuracies.of_finished(paths[part])
                for part in parts
            ]
            results.append(accuracies.of_evaluations(plan.label, evaluations))
    return results


def _images_of(plan: TrainConfig) -> tuple[int, ...]:
    """What distinguishes the images of the runs of one panel."""
    return (plan.seed, plan.seeds) if plan.subset_per_seed else ()


def _first_of_each(plans: list[TrainConfig]) -> Iterable[TrainConfig]:
    """Of all runs with the same images, the first."""
    return {_images_of(plan): plan for plan in reversed(plans)}.values()


def _check_draws(root: pathlib.Path, finished: list[pathlib.Path]) -> None:
    """Raises ValueError for runs of other draws, which cannot be compared seed by seed."""
    old = [path for path in finished if runs.draws(path) != runs.DRAWS]
    if old:
        raise ValueError(
            f"runs must hold runs that the code of today makes, got {records.brief(root)} with "
            f"{len(old)} runs of this figure from when a seed drew something else: choose another "
            "--runs."
        )


def _groups(plan: TrainConfig, config: FigureConfig) -> Iterator[TrainConfig]:
    """The runs of a plan, as many seeds in each as run side by side."""
    at_once = config.seeds_at_once or (plan.seeds if config.scale == "large" else 5)
    for first in range(0, plan.seeds, at_once):
        seeds = min(at_once, plan.seeds - first)
        yield dataclasses.replace(plan, seed=plan.seed + first, seeds=seeds)


def list_runs(config: ListConfig) -> None:
    """Prints one line per folder below `config.runs` with a run or the remains of one."""
    fresh = config.runs == ListConfig().runs and not config.runs.exists()
    if not fresh:
        _check_folder(config.runs)
    entries = [] if fresh else listing.read(config.runs)
    if entries:
        print(listing.table(entries, config.runs))
    else:
        print(f"There are no runs in {records.brief(config.runs)} yet. {_HOW_TO_MAKE_ONE}")


def report(config: ReportConfig) -> pathlib.Path:
    """Draws all finished runs below a folder on one page; returns the folder with the page."""
    if config.runs.exists() or config.runs != ReportConfig().runs:
        _check_folder(config.runs)
    groups: dict[str, dict[str, list[listing.Entry]]] = {}
    left_out = []
    for entry in listing.read(config.runs):
        why = _why_left_out(entry)
        if why:
            left_out.append(f"* {entry.path.relative_to(config.runs)}: {why}")
            continue
        assert entry.plan is not None
        settings = runs.settings(entry.plan)
        algorithm = json.dumps([settings.get(name) for name in _OWN])
        groups.setdefault(_problem(entry), {}).setdefault(algorithm, []).append(entry)
    if not groups:
        found = f"; {len(left_out)} other folders (see `list`)" if left_out else ""
        raise ValueError(
            "runs must hold finished runs of `train` or `figure`, found none below "
            f"{records.brief(config.runs)}{found}. {_HOW_TO_MAKE_ONE}"
        )
    folder = config.out or config.runs / "report"
    runs.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for i, (_, algorithms) in enumerate(sorted(groups.items()), start=1):
        read = [_read_runs(entries, config.runs, left_out) for entries in algorithms.values()]
        read.sort(key=lambda one: _ORDER.index(one.plan.algorithm))
        for part in _same_seeds(read):
            title = f"{i}. {part[0].plan.dataset_name}, {part[0].plan.model_name}"
            name = f"runs-{len(sections) + 1}"
            results = [one.result for one in part]
            sections.append(_section.write(folder, name, title, part[0].plan, results))
    text = "# Runs\n\n" + "\n".join(sections)
    if left_out:
        text += "\n## Left out\n\n" + "\n".join(left_out) + "\n"
    records.replace_text(folder / "report.md", text)
    records.replace_text(folder / "report.html", _as_html(text, folder))
    print(f"{folder / 'report.md'} and report.html: {len(sections)} sections.")
    if left_out:
        print("\nLeft out:\n" + "\n".join(left_out))
    return folder


_HOW_TO_MAKE_ONE = "One is made by: python -m experiments train --dataset digits"
_OWN = ("algorithm", "noise", "noise_draw", "learning_rate_scaling", "regime_adaptation")
_ORDER = (
    "gd",
    "sgd",
    "sgd-b",
    "m-sgd-fisher",
    "m-sgd-cov",
    "m-sgd-bernoulli",
    "gd-rademacher",
    "m-sgd-estimated-fisher",
    "m-sgd-estimated-cov",
    "m-sgd-sparse-fisher",
    "m-sgd-sparse-cov",
    "m-sgd-ghost-cov",
    "langevin-diagonal-fisher",
    "gd-isotropic",
)


def _why_left_out(entry: listing.Entry) -> str:
    """The reason why a report leaves out a run; "" if it draws the run."""
    if entry.problem:
        return f"{entry.state}: {entry.problem}"
    if entry.state != "finished":
        return entry.state
    return "" if entry.plan is not None else f"a run of `{entry.command}`, without curves"


def _problem(entry: listing.Entry) -> str:
    """The settings that runs drawn in one figure have in common, as text for sorting."""
    assert entry.plan is not None
    own = (*_OWN, "seeds", "seed", "eval_every", "microbatch_size")
    settings = runs.settings(entry.plan.resolved())
    common = {name: value for name, value in settings.items() if name not in own}
    common["draws"] = entry.draws
    return json.dumps({"b": settings["noise"]["batch_size"], **common}, sort_keys=True)


class _Read(NamedTuple):
    """The runs of one algorithm, with their seeds side by side."""

    plan: TrainConfig
    seeds: tuple[int, ...]
    result: accuracies.Result


def _read_runs(entries: list[listing.Entry], root: pathlib.Path, left_out: list[str]) -> _Read:
    """The runs of one algorithm by seed.

    Runs that repeat a seed, or were evaluated at other steps, are left out.
    """
    plans = [entry.plan for entry in entries if entry.plan is not None]
    order = sorted(range(len(plans)), key=lambda i: (plans[i].seed, str(entries[i].path)))
    seeds: tuple[int, ...] = ()
    parts = []
    for i in order:
        own = tuple(range(plans[i].seed, plans[i].seed + plans[i].seeds))
        part = accuracies.of_folder(entries[i].path)
        if set(own) & set(seeds):
            why = "seeds that another run has as well"
        elif parts and [e.step for e in part] != [e.step for e in parts[0]]:
            why = "evaluated at other steps"
        else:
            seeds += own
            parts.append(part)
            continue
        left_out.append(f"* {entries[i].path.relative_to(root)}: {why}")
    plan = plans[order[0]]
    return _Read(plan, seeds, accuracies.of_evaluations(plan.label, parts))


def _same_seeds(read: list[_Read]) -> list[list[_Read]]:
    """Groups of runs that can be compared seed by seed."""
    parts: dict[tuple[int, ...], list[_Read]] = {}
    for one in read:
        parts.setdefault(one.seeds, []).append(one)
    return list(parts.values())


def _as_html(text: str, folder: pathlib.Path) -> str:
    """The page as HTML in one file, which contains the pictures."""
    import markdown_it

    body = markdown_it.MarkdownIt().enable("table").render(text)
    for picture in folder.glob("*.png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    style = (
        "body{font-family:sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )


def _check_folder(path: pathlib.Path) -> None:
    if not path.is_dir():
        what = "which is no folder" if path.exists() else "which does not exist"
        raise ValueError(f"runs must be a folder, got {records.brief(path)}, {what}.")
