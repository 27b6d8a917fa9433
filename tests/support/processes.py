"""Starts other Python processes, and ends them."""

import contextlib
import os
import socket
import subprocess
import sys

PATIENCE = 300  # Seconds after which a process is taken to hang, on a busy machine too.


def free_address() -> str:
    """An address of this machine whose port is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def processes(*commands: list[str], devices: int = 4):
    """Starts ``python -m COMMAND`` for each command, with this number of devices per process.

    All of the processes are dead when the block is left, by an error too.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for command in commands
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()
