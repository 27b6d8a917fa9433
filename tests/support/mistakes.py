"""Bad input: what the error says, and that it is short."""

from collections.abc import Callable

import pytest


def assert_told(
    call: Callable[[], object], name: str, wrong: str, *, hides_frames: bool = False
) -> None:
    """Asserts that the call raises an error which names the argument, in 400 characters at most.

    Args:
        call: what raises a TypeError or a ValueError.
        name: the name of the argument, as the message has it.
        wrong: what the message says is wrong with it.
        hides_frames: whether jax may append a note on the frames that it left out.
    """
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    if hides_frames:
        message = message.split("\n-----")[0]
    assert name in message
    assert wrong in message
    assert len(message) <= 400
