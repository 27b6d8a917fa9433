"""The command line: ``python -m experiments --help``."""

import os
import signal
import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; what the user can mend is reported in one line, without a traceback.

    Exits with 1 for that, 2 where the arguments make no command, and as a shell expects with 130
    after Ctrl-C and 143 after SIGTERM.
    """
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Who read the output has gone. Python would say so once more on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run(arguments: list[str] | None) -> None:
    # In here, so that Ctrl-C while Python is loading all this is no traceback either.
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
            config = tyro.extras.subcommand_cli_from_dict(
                commands.CONFIGS,
                prog="python -m experiments",
                description="Multiplicative-noise SGD on real images. --version: the versions.",
                args=arguments,
            )
        commands.run(config)
        sys.stdout.flush()  # in here, where a reader who has gone is no traceback
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except BrokenPipeError:
        raise
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # Those of this package are sentences; the system's have a file and a reason.
        file = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror}{file}" if error.strerror else f"error: {error}")


if __name__ == "__main__":
    main()
