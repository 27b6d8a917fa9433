"""The command line as a process: exit codes, signals, terminals, pipes and bad input.

Python takes seconds to start. Commands that need no process of their own are therefore run by one
process, each with its own environment: see `COMMANDS`.
"""

import json
import os
import pathlib
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest

import experiments
from experiments.training import runs

PATIENCE = 120  # Seconds after which a process is taken to hang.
ROOT = pathlib.Path(experiments.__file__).parents[1]
COMMAND = [sys.executable, "-m", "experiments"]
TRAIN = shlex.split(
    "train --dataset digits --learning-rate 0.1 --eval-every 200 --microbatch-size None"
)
SHORT = [*TRAIN, "--steps", "2", "--num-test", "50", "--out", "short"]
COMMANDS = """
import json, os, sys
from experiments import data
from experiments.__main__ import main

def refused(*_, **__):
    raise ValueError("LOADED")

data.load = refused
for number, (arguments, environment) in enumerate(json.loads(sys.argv[1])):
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {number}", file=stream, flush=True)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    code = 0
    try:
        main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
        if isinstance(code, str):  # as Python does on its way out
            print(code, file=sys.stderr)
            code = 1
    print(f"code {code}", file=sys.stderr, flush=True)
"""


def environment(**changes):
    """The environment variables of a process, without wishes for colours unless they are given."""
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    paths = {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return plain | paths | {"XLA_FLAGS": one_device} | changes


# A locale in which only ASCII can be printed.
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def several(cwd, *commands, **changes):
    """Runs several commands in one process.

    Args:
        cwd: the folder in which they run.
        *commands: the arguments of each, or a pair of them and of environment variables.
        **changes: environment variables for all of them.

    Returns:
        The exit code, the text on stdout and the text on stderr of each command.
    """
    wanted = [c if isinstance(c, tuple) else (c, {}) for c in commands]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(wanted)],
        cwd=cwd,
        text=True,
        timeout=PATIENCE,
        capture_output=True,
        env=environment(**changes),
    )
    assert done.returncode == 0, done.stderr
    outs, errs = (re.split(r"=== \d+\n", text)[1:] for text in (done.stdout, done.stderr))
    codes = [int(re.findall(r"code (\d+)$", err.rstrip())[0]) for err in errs]
    return list(zip(codes, outs, errs, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a short run, and what its process wrote into pipes, in an ASCII locale."""
    path = tmp_path_factory.mktemp("runs")
    first = subprocess.run(
        [*COMMAND, *SHORT],
        cwd=path,
        capture_output=True,
        timeout=PATIENCE,
        env=environment(**ASCII),
    )
    assert first.returncode == 0, first.stderr
    return path, first.stdout.decode("ascii"), first.stderr.decode("ascii")


@pytest.mark.slow
def test_a_log_has_plain_lines_and_no_bars(folder):
    """A pipe gets no control characters, and ASCII in the place of letters such as ±."""
    _, out, err = folder
    lines = err.splitlines()
    assert lines[0] == "SGD-50: compiling ..."
    assert re.fullmatch(r"SGD-50: 2/2 steps, \d+ s", lines[-1])
    for text in (out, err):
        assert "\r" not in text
        assert "\x1b" not in text
        assert "%|" not in text
    assert "+- 0.00" in out


def test_a_finished_command_repeated_shows_its_result(folder):
    path, first, _ = folder
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    ((code, out, err),) = several(path, SHORT, **ASCII)
    assert code == 0
    assert out.startswith(first)  # It is the same table, without loading images.
    assert "short has finished before: this is its result." in out
    assert "compiling" not in err
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_bad_input_is_one_line_before_anything_is_loaded(folder):
    """Each message names the argument, its value and what is allowed, in 400 characters at most.

    Images cannot be loaded here: an attempt would say LOADED.
    """
    path, _, _ = folder
    (path / "file").touch()
    (path / "loop").symlink_to("loop")
    deep = "d" * 200 + "/" + "e" * 200
    size = "--noise.batch-size"
    wrong = [
        ([*TRAIN, "--out", "file"], "out must be a folder, got file, no folder."),
        ([*TRAIN, "--out", "file/x/y"], "got file/x/y, below file, which is no folder."),
        ([*TRAIN, "--out", "/proc/x"], "out must be a folder that can be written to, got /proc/x"),
        ([*TRAIN, "--out", "loop"], "out must be a folder"),
        ([*TRAIN, "--out", "n" * 300], "File name too long"),
        ([*TRAIN, "--out", f"file/{deep}"], " ... "),
        (["demo", "--out", "file"], "out must be a folder, got file"),
        (["decide", "--out", "file"], "out must be a folder, got file"),
        (["distributed", "--dataset", "digits", "--out", "file"], "out must be a folder, got file"),
        (["sde", "--parts", "weak", "--out", "file"], "out must be a folder, got file"),
        (["complexity", "--out", "file"], "out must be a folder, got file"),
        (["figure", "1a", "--out", "file"], "out must be a folder, got file"),
        (["figure", "1a", "--runs", "/proc/x"], "runs must be a folder that can be written to"),
        (["report", "--runs", "short", "--out", "file"], "out must be a folder, got file"),
        (["list", "--runs", "file"], "runs must be a folder, got file, which is no folder."),
        (["list", "--runs", "no"], "runs must be a folder, got no, which does not exist."),
        (["report"], "runs must hold finished runs of `train` or `figure`, found none"),
        ([*TRAIN, size, "1001"], "batch_size must be between 1 and 1000, got 1001"),
        (["train", size, "1001"], "batch_size must be between 1 and 1000, got 1001"),
        (["train", "--dataset", "svhn", size, "25001"], "between 1 and 25000, got 25001"),
        ([*TRAIN, "--num-train", "20"], "batch_size must be between 1 and 20, got 50"),
        ([*TRAIN, "--num-train", "1001"], "num_train must be between 1 and 1000, or None"),
        ([*TRAIN, "--algorithm", "sgd-b", "--noise.support-size", "0"], "got 0"),
        ([*TRAIN, "--model", "lenet"], "model must be digits_net or resnet18"),
        (
            ["train", "--dataset", "cifar10", "--microbatch-size", "3", "--model", "resnet18"],
            "microbatch_size must divide the 50 examples",
        ),
        (["demo", "--seeds", "1"], "seeds must be at least 2, got 1"),
        (["distributed", "--dataset", "digits", size, "1001", "--out", "x"], "got 1001"),
        (["sde", "--strong-paths", "1"], "strong_paths must be at least 32, got 1"),
        (["complexity", "--theorem1-draws", "1"], "theorem1_draws must be at least 2, got 1"),
        (
            ["theory-study", "regularizer", "--batch-size", "1001"],
            "at most num_train = 1000, got 1001",
        ),
        ([*TRAIN, "--seed", str(2**32)], "seed must be between 0 and 2^31 - 1, got 4294967296."),
        ([*TRAIN, "--decay-at", *["1"] * 400], "decay_at must be positive and ascending"),
        ([*SHORT, "--steps", "3"], "holds a run that differs in steps"),
        (["demo", "--out", "."], "exists already, and results are never overwritten"),
    ]
    for (code, _, err), (arguments, words) in zip(
        several(path, *(arguments for arguments, _ in wrong)), wrong, strict=True
    ):
        message = err.rstrip().removesuffix(f"code {code}").rstrip()
        # tyro draws a frame around the messages of configurations.
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", message).split())
        assert code in (1, 2), (arguments, err)
        assert words in text, (arguments, text)
        for not_yet in ("Traceback", "LOADED", "compiling", "%|"):
            assert not_yet not in err, (arguments, err)
        assert len(text) < 400 or "--help" in text, (arguments, text)
    assert not (path / "x").exists()
    (path / "file").unlink()
    (path / "loop").unlink()


def test_list_versions_help_and_the_time_of_a_figure(folder, tmp_path):
    """Commands that only print do so, and help has colours where they are asked for."""
    path, _, _ = folder
    fresh, listed, version, figure, plain, forced, neither = several(
        path,
        ["list"],
        ["list", "--runs", "."],
        ["--version"],
        ["figure", "1a", "--scale", "small", "--runs", str(tmp_path / "new")],
        ["train", "--help"],
        (["train", "--help"], {"FORCE_COLOR": "1"}),
        (["train", "--help"], {"FORCE_COLOR": "1", "NO_COLOR": "1"}),
    )
    assert fresh[0] == 0
    assert "There are no runs in runs yet" in fresh[1]
    assert "python -m experiments train --dataset digits" in fresh[1]
    assert listed[1].splitlines()[0].split()[:3] == ["run", "what", "state"]
    assert listed[1].splitlines()[2].split()[:4] == ["short", "sgd", "finished", "2/2"]
    assert re.match(r"msgd_jax \S+ jax \S+ optax \S+ flax \S+ python 3\.\d+\.\d+\n$", version[1])
    # The time of a figure is announced before its images are looked for.
    assert re.search(r"7 of 7 runs .* 4,200 steps in all: about \d+ minutes on two", figure[1])
    assert "LOADED" in figure[2]
    for shown, coloured in ((plain, False), (forced, True), (neither, False)):
        assert shown[0] == 0
        assert ("\x1b[" in shown[1]) == coloured
        assert "--learning-rate" in re.sub(r"\x1b\[[0-9;]*m", "", shown[1])


def test_help_and_errors_in_ascii(folder):
    """In an ASCII locale, help and errors have only its letters, and nothing fails to print."""
    path, _, _ = folder
    commands = ["train", "complexity", "sde", "figure", "demo", "list", "report", "distributed"]
    shown = several(
        path,
        ["--help"],
        *([name, "--help"] for name in commands),
        ["train", "--steps", "x"],
        [*TRAIN, "--out", "short/config.json/ü"],
        **ASCII,
    )
    assert [code for code, _, _ in shown] == [0] * 9 + [2, 1]
    assert "--version" in shown[0][1]
    for _, out, err in shown:
        assert (out + err).isascii()
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(folder):
    """A command whose reader is gone ends silently with the code of SIGPIPE, as `head` expects."""
    path, _, _ = folder
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, "list", "--runs", "."],
        cwd=path,
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(writing)
    os.close(reading)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGPIPE
    assert err == b""


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, command, cwd, **changes):
        self.shown, (self._ours, theirs) = "", pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            close_fds=True,
            start_new_session=True,
            preexec_fn=lambda: _controls(0),
            env=environment(**changes),
        )
        os.close(theirs)

    def read_until(self, pattern):
        """Reads until all that was shown has the pattern, and fails when it never does."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, self.shown
            if not self._read(1.0):
                raise AssertionError(self.shown)

    def type(self, text):
        """Sends keys to the process."""
        os.write(self._ours, text.encode())

    def end(self):
        """Reads the rest, and returns the exit code."""
        while self._read(PATIENCE):
            pass
        code = self.process.wait(timeout=PATIENCE)
        os.close(self._ours)
        return code

    def _read(self, timeout):
        if not select.select([self._ours], [], [], timeout)[0]:
            return True
        try:
            read = os.read(self._ours, 4096)
        except OSError:  # The process has closed its side.
            return False
        self.shown += read.decode(errors="replace")
        return bool(read)


def _controls(terminal):
    """Makes a terminal the controlling one of the process, so that Ctrl-C signals to it."""
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))


@pytest.mark.slow
def test_signals_on_a_terminal_save_the_state(tmp_path):
    """Ctrl-C while a run compiles, and SIGTERM after it has gone on, both save the state.

    The bar appears only when there are steps to show, the finished ones included.
    """
    command = [*COMMAND, *TRAIN, "--steps", "100000", "--num-test", "50", "--out", "run"]
    first = Terminal(command, tmp_path)
    first.read_until(r"compiling \.\.\.")
    first.type("\x03")
    assert first.end() == 130
    assert "Traceback" not in first.shown
    assert re.search(r"stopped after \d+ steps; the same command goes on from there", first.shown)
    assert "0/100000" not in first.shown
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    reached = int(checkpoint.name)
    assert runs.state(tmp_path / "run") == "stopped"

    second = Terminal(command, tmp_path, NO_COLOR="1")
    second.read_until(r"[1-9]\d*/100000 ")
    assert second.shown.index("compiling ...") < second.shown.index("/100000")
    assert not re.search(r"\D0/100000", second.shown)
    second.process.send_signal(signal.SIGTERM)
    assert second.end() == 143
    assert "\x1b[3" not in second.shown
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert saved > reached
    assert f"stopped after {saved} steps" in second.shown


@pytest.mark.slow
def test_colours_on_a_terminal(tmp_path):
    """Help has colours on a terminal, unless NO_COLOR is set."""
    commands = [[["train", "--help"], {}], [["train", "--help"], {"NO_COLOR": "1"}]]
    shown = Terminal([sys.executable, "-c", COMMANDS, json.dumps(commands)], tmp_path)
    assert shown.end() == 0
    coloured, plain = shown.shown.split("code 0")[:2]
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain
    assert "--learning-rate" in plain
