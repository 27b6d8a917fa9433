"""The texts of ``--help`` are full sentences."""

import dataclasses
import re

import docstring_parser
import pytest

from experiments.commands import CONFIGS


def texts(config):
    """The texts of all options of a command by their names, nested options included."""
    found = {}
    described = {p.arg_name: p.description for p in docstring_parser.parse(config.__doc__).params}
    for field in dataclasses.fields(config):
        found[field.name] = described[field.name]
        if dataclasses.is_dataclass(field.default_factory):
            found |= texts(field.default_factory)
    return found


def commands(configs=CONFIGS):
    """Each command and its configuration; a command with a choice comes once per choice."""
    for name, config in configs.items():
        if isinstance(config, dict):
            yield from ((f"{name} {choice}", own) for choice, own in commands(config))
        else:
            yield name, config


COMMANDS = dict(commands())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_has_the_name_of_another_entry_of_a_record(command):
    """Such an option would replace the entry, and the run could not go on."""
    own = {"command", "draws", "versions", "device"}
    assert not own & {field.name for field in dataclasses.fields(COMMANDS[command])}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_sentences(command):
    for name, text in texts(COMMANDS[command]).items():
        words = text.split()
        assert re.match(r"[A-Z\"]", text), f"{name}: {text}"
        assert text.endswith("."), f"{name}: {text}"
        assert len(words) >= 4, f"{name}: {text}"
