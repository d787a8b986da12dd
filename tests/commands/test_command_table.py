"""The table of commands: consistent with itself, with the parser, and with the functions that it names."""

from __future__ import annotations

import inspect
import shlex
from importlib import import_module

import pytest

import ensemble_orchestrator
from utils import commands
from utils.core.config import Config


def attribute(option: str, settings: dict) -> str:
    return settings.get("dest", option.removeprefix("--").replace("-", "_"))


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_example_of_a_command_is_a_valid_command_line(name):
    example = shlex.split(commands.COMMANDS[name].example)
    assert example[0] == name
    assert vars(ensemble_orchestrator.build_parser().parse_args(example))["command"] == name


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_function_of_a_command_takes_its_options(name):
    command = commands.COMMANDS[name]
    module, function = command.target.split(":")
    signature = inspect.signature(getattr(import_module(module), function))
    keywords = {attribute(option, settings): None for option, settings in command.arguments.items()}
    common = command.pass_through if command.is_standalone else ("--force", *command.pass_through)
    keywords |= {option.removeprefix("--"): None for option in common}
    for option, _ in command.standalone:
        keywords.pop(attribute(option, command.arguments[option]))
    positional = () if command.is_standalone else (None, None)
    bound = signature.bind(*positional, **keywords)
    assert bound.arguments.keys() | bound.kwargs.keys() >= keywords.keys()


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_reference_to_an_option_names_one_of_the_command(name):
    command = commands.COMMANDS[name]
    options = {attribute(option, settings) for option, settings in command.arguments.items()}
    assert set(command.one_of) | {option for option, _ in command.standalone} <= command.arguments.keys()
    assert set(command.pass_through) <= commands.COMMON_OPTIONS.keys()
    common = {option.removeprefix("--") for option in command.pass_through}
    assert isinstance(command.writes, bool) or set(command.writes) <= options | common
    assert not command.arguments.keys() & commands.COMMON_OPTIONS.keys()


def test_the_stages_of_the_pipeline_are_commands_and_their_sections_keys_of_the_configuration():
    config = Config()
    for name, options, sections in commands.PIPELINE_STAGES:
        arguments = commands.COMMANDS[name].arguments
        assert options.keys() <= {attribute(option, settings) for option, settings in arguments.items()}
        assert all(isinstance(config.at(f"{section}.enable"), bool) for section in sections)


def test_options_that_the_next_command_repeats_are_common_ones():
    assert set(commands.REPEATED_OPTIONS) <= commands.COMMON_OPTIONS.keys()
