"""Compiles the nets' convolutions for this machine: ``python -m experiments.models``."""

import subprocess
import sys

from experiments.models import _native


def main() -> int:
    """Says where the library is, or why there is none; without a compiler that is no failure."""
    try:
        print(f"Convolutions for this processor: {_native.build()}")
    except OSError as error:
        print(f"Without a C++ compiler, convolutions will be slower: {error}.")
    except subprocess.CalledProcessError as error:
        print(
            f"The C++ compiler failed, convolutions will be slower:\n{error.stderr}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
