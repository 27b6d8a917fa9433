"""The texts of ``--help`` are sentences: each option says what it is, in words of its own."""

import dataclasses
import re

import docstring_parser
import pytest

from experiments.commands import CONFIGS


def texts(config):
    """The text of every option of a command, nested ones included, by name."""
    found = {}
    described = {p.arg_name: p.description for p in docstring_parser.parse(config.__doc__).params}
    for field in dataclasses.fields(config):
        found[field.name] = described[field.name]
        if dataclasses.is_dataclass(field.default_factory):
            found |= texts(field.default_factory)
    return found


def commands(configs=CONFIGS):
    """All commands with their options, those with a further choice once per choice."""
    for name, config in configs.items():
        if isinstance(config, dict):
            yield from ((f"{name} {choice}", own) for choice, own in commands(config))
        else:
            yield name, config


COMMANDS = dict(commands())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_has_the_name_of_what_a_record_says_besides(command):
    """Such an option would hide it, and the run could not go on."""
    own = {"command", "draws", "versions", "device"}
    assert not own & {field.name for field in dataclasses.fields(COMMANDS[command])}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_sentences(command):
    for name, text in texts(COMMANDS[command]).items():
        words = text.split()
        assert re.match(r"[A-Z\"]", text), f"{name}: {text}"
        assert text.endswith("."), f"{name}: {text}"
        assert len(words) >= 4, f"{name}: {text}"
