"""What is drawn on which terminal, and how the expected durations are announced."""

import dataclasses
import fcntl
import io
import math
import os
import pathlib
import pty
import select
import struct
import termios

import pytest

import experiments
from experiments import records, terminal
from experiments.paper import _cost, panels
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig


@pytest.fixture
def screen(monkeypatch):
    """The two ends of a terminal that has no size yet."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        yield ours, stream
    os.close(ours)


def size(stream, rows=40, columns=100):
    """Gives a terminal a size, in letters."""
    fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_bars_are_for_terminals_that_have_a_size(screen, monkeypatch):
    _, stream = screen
    assert not terminal.draws(stream)
    size(stream)
    assert terminal.draws(stream)
    assert terminal.has_colours(stream)
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.draws(stream)
    assert not terminal.has_colours(stream)
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.draws(stream)
    assert not terminal.draws(io.StringIO())


@pytest.mark.parametrize(
    ("no_color", "force_color", "expected_colours"),
    [(None, None, False), (None, "1", True), ("1", "1", False), ("", "1", True), ("", "", False)],
)
def test_colours_in_a_pipe(no_color, force_color, expected_colours, monkeypatch):
    """A variable that is empty counts as one that is not set (https://no-color.org)."""
    for name, value in (("NO_COLOR", no_color), ("FORCE_COLOR", force_color)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert terminal.has_colours(io.StringIO()) == expected_colours


def test_a_log_has_a_line_now_and_then(monkeypatch, capsys):
    """A stream that is no terminal gets a line per 30 seconds, per compilation, and at the end."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.Progress(100) as progress:
        progress.compiling("A")
        progress.compiling("A")  # It is still compiling, which is no news.
        for _ in range(90):
            clock[0] += 1.0
            progress.update()
        progress.compiling("B")
        progress.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "A: compiling ...",
        "A: 30/100 steps, 30 s",
        "A: 60/100 steps, 60 s",
        "A: 90/100 steps, 90 s",
        "B: compiling ...",
        "B: 100/100 steps, 90 s",
    ]


def test_nothing_is_drawn_before_there_is_news(screen, monkeypatch):
    ours, stream = screen
    size(stream)
    monkeypatch.setattr(terminal.sys, "stderr", stream)
    with terminal.Progress(100) as progress:
        pass
    with terminal.Progress(100) as progress:
        progress.compiling("A")
        progress.update(40)
        progress.compiling("B")
    stream.flush()
    shown = ""  # A terminal may hand out in several parts what was written at once.
    while "B: compiling" not in shown and select.select([ours], [], [], 10)[0]:
        shown += os.read(ours, 10_000).decode()
    assert shown.index("A: compiling ...") < shown.index("40/100") < shown.index("B: compiling ...")
    assert "0/100" not in shown[: shown.index("40/100")]


def test_text_that_an_encoding_does_not_have_is_replaced():
    """Letters with a usual replacement get it, and all others are escaped."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.write_anything(stream)
    stream.write("1 ± 2 ─ ╭ … ü \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == rb"1 +- 2 - + ... \xfc \udcff"


# Expected durations -------------------------------------------------------------------------------


# Seconds per 1,000 steps of five seeds of LeNet that were measured on two cores, N = 1,000 in
# micro-batches of 100; sparse laws and SGD-b have 500 examples in a step.
MEASURED = {
    "gd": (171.3, 188.2),
    "gd-rademacher": (170.8, 165.3),
    "langevin-diagonal-fisher": (214.3, 211.2),
    "m-sgd-bernoulli": (174.4, 171.7),
    "m-sgd-cov": (167.5, 235.6),
    "m-sgd-estimated-cov": (167.4, 195.2),
    "m-sgd-estimated-fisher": (171.9, 173.5),
    "m-sgd-fisher": (170.4, 223.9),
    "m-sgd-sparse-cov": (116.3,),
    "m-sgd-sparse-fisher": (115.2,),
    "sgd": (10.3, 10.0),
    "sgd-b": (110.7, 111.2),
}


def expected_per_1000_steps(plan):
    """The announced seconds of 1,000 steps, without evaluations and compilation."""
    fewer, more = (
        _cost.seconds(dataclasses.replace(plan, steps=steps, eval_every=steps, decay_at=()))
        for steps in (1_000, 2_000)
    )
    return more - fewer


@pytest.mark.parametrize("algorithm", MEASURED)
def test_expected_seconds_of_lenet_are_those_that_were_measured(algorithm):
    """They are off by a factor of 1.5 at most.

    Announced times need no more: two measurements of one algorithm differ by a factor of 1.4.
    """
    noise = NoiseSettings(batch_size=50, support_size=500)
    expected = expected_per_1000_steps(TrainConfig(algorithm=algorithm, noise=noise, seeds=5))
    for found in MEASURED[algorithm]:
        assert 1 / 1.5 < expected / found < 1.5, (expected, found)


def test_expected_seconds_are_not_above_those_that_were_recorded():
    """Records took one to six times what is announced, for 1,000 steps without evaluations.

    Announced are two cores with nothing else to do. The records are from one, beside other work.
    """
    folders = (pathlib.Path(experiments.__file__).parent / "results" / "runs").iterdir()
    configs = {path: records.read_object(path / "config.json") for path in sorted(folders)}
    on_a_cpu = {path: config for path, config in configs.items() if config["device"] == "cpu"}
    assert len(on_a_cpu) > 20
    for path, config in on_a_cpu.items():
        expected = expected_per_1000_steps(TrainConfig.of_record(config))
        found = records.read_object(path / "summary.json")["seconds_per_1000_steps"]
        assert 1 < found / expected < 6, (path.name, expected, found)


@pytest.mark.parametrize("name", panels.PANELS)
@pytest.mark.parametrize("scale", ["paper", "medium", "small"])
def test_every_panel_has_an_expected_time(name, scale):
    """The smaller scales take at most six and two hours."""
    plans = list(panels.PANELS[name].at_scale(scale))
    sentence = _cost.sentence(plans, len(plans))
    assert f"{len(plans)} of {len(plans)} runs" in sentence
    assert "on two cores" in sentence
    hours = sum(map(_cost.seconds, plans)) / 3600
    assert hours < {"paper": math.inf, "medium": 6, "small": 2}[scale]
    assert hours > {"paper": 0.1, "medium": 0.25, "small": 0}[scale]
    assert ("for a GPU" in sentence) == (scale == "paper" and plans[0].model != "lenet")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 seconds"),
        (59, "59 seconds"),
        (119, "119 seconds"),
        (121, "2 minutes"),
        (7_199, "120 minutes"),
        (7_200, "2 hours"),
        (86_400 * 30, "30 days"),
        (1e9, "32 years"),
    ],
)
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words
