"""The command line: ``python -m experiments --help``."""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Union

from experiments import huge_pages


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; errors that the user can fix are reported in one line, not a traceback.

    The exit code is 1 after such an error, 2 if the arguments are not a command, and, as shells
    expect, 130 after Ctrl-C and 143 after SIGTERM.
    """
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of the output has closed it. This keeps Python from reporting it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run(arguments: list[str] | None) -> None:
    # Imported here, so that Ctrl-C during these imports gives no traceback either.
    import contextlib

    import tyro

    from experiments import commands, terminal
    from experiments.training import loop

    arguments = sys.argv[1:] if arguments is None else arguments
    terminal.write_anything(sys.stdout, sys.stderr)
    if arguments[:1] == ["--version"]:
        print(commands.version())
        return
    try:
        with (
            contextlib.redirect_stdout(terminal.WithoutColours(sys.stdout)),
            contextlib.redirect_stderr(terminal.WithoutColours(sys.stderr)),
        ):
            config = tyro.cli(
                _choice(commands.CONFIGS),
                prog="python -m experiments",
                description="Multiplicative-noise SGD on real images. --version shows versions.",
                args=arguments,
            )
        commands.run(config)
        sys.stdout.flush()  # A closed output gives no traceback here, but would at exit.
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except BrokenPipeError:
        raise
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # The errors of this package are sentences; those of the system have a file and a reason.
        file = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror}{file}" if error.strerror else f"error: {error}")


def _choice(configs: Mapping[str, Any]) -> Any:
    """The type of which tyro makes one subcommand per name, with further ones for dictionaries."""
    import tyro

    def subcommand(name: str, config: Any) -> Any:
        if isinstance(config, Mapping):
            about = f"Further choices: {', '.join(config)}."
            return Annotated[
                Any, tyro.conf.subcommand(name, constructor=_choice(config), description=about)
            ]
        return Annotated[Any, tyro.conf.subcommand(name, constructor=config)]

    # A union of one type would be that type, and give no subcommand.
    nothing = Annotated[None, tyro.conf.Suppress]
    return Union[(*(subcommand(*item) for item in configs.items()), nothing)]


if __name__ == "__main__":
    huge_pages.restart()
    main()
