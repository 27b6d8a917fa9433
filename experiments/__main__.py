"""The command line: ``python -m experiments --help``."""

import sys

import tyro

from experiments import commands, data
from experiments.config import DemoConfig, FigureConfig, ListConfig, ReportConfig, TrainConfig
from experiments.distributed import DistributedConfig
from experiments.theory_config import ComplexityConfig, SDEConfig


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; what the user can mend is reported in one line, without a traceback."""
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {
                "demo": DemoConfig,
                "train": TrainConfig,
                "distributed": DistributedConfig,
                "sde": SDEConfig,
                "complexity": ComplexityConfig,
                "figure": FigureConfig,
                "list": ListConfig,
                "report": ReportConfig,
            },
            prog="python -m experiments",
            description="Multiplicative-noise SGD on real images.",
            args=arguments,
        )
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
