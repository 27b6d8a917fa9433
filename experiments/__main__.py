"""The command line: ``python -m experiments --help``."""

import sys

import tyro

from experiments import commands, data
from experiments.config import ComplexityConfig, DemoConfig, SDEConfig, TrainConfig


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; what the user can mend is reported in one line, without a traceback."""
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "demo": DemoConfig,
            "train": TrainConfig,
            "sde": SDEConfig,
            "complexity": ComplexityConfig,
        },
        prog="python -m experiments",
        description="Multiplicative-noise SGD on real images.",
        args=arguments,
    )
    try:
        commands.run(config)
    except (
        data.DatasetNotFoundError,
        data.DamagedDatasetError,
        FileExistsError,
        ValueError,
    ) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
