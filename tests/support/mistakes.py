"""Tables of mistakes: what a call is told, in how many words."""

from collections.abc import Callable

import pytest


def assert_told(
    call: Callable[[], object], name: str, wrong: str, *, hides_frames: bool = False
) -> None:
    """The call raises an error that names the argument and what is wrong, in 400 characters.

    With `hides_frames`, jax may add below where it left frames out of the traceback.
    """
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    if hides_frames:
        message = message.split("\n-----")[0]
    assert name in message
    assert wrong in message
    assert len(message) <= 400
