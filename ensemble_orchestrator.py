"""Command line of the ensemble system: one parser, one error handler; the commands are the table in `utils.commands`.

    python ensemble_orchestrator.py discover
    python ensemble_orchestrator.py build-ensemble --config configs/quick_ensemble.yaml
    python ensemble_orchestrator.py evaluate

Nothing heavy is imported before a command is typed, and then only what that command needs.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils.commands import COMMANDS, COMMON_OPTIONS, PIPELINE_STAGES, REMEMBERED_OPTIONS, REPEATED_OPTIONS
from utils.core import display_text, errors, program_names, stop_signals, subprocesses, terminal

if TYPE_CHECKING:
    from utils.core.config import Config
    from utils.core.remembered import Choice
    from utils.core.results import Result
    from utils.core.workspace import Workspace

PROJECT = Path(__file__).resolve().parent
logger = logging.getLogger("disease_pipeline")

EXIT_CODES: dict[type[BaseException], int] = {
    errors.UserError: 1,
    OSError: 1,
    errors.ConfigError: 2,
    errors.LeakageError: 3,
    errors.PartialFailure: 4,
    KeyboardInterrupt: 130,
}
PARTIAL = EXIT_CODES[errors.PartialFailure]
BUG = 70


class _Parser(argparse.ArgumentParser):
    """Says first what was wrong and what may have been meant, in one line without control characters."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            options = [option for command in COMMANDS.values() for option in (*command.arguments, *COMMON_OPTIONS)]
            first = (unknown.split() or [""])[0].partition("=")[0]  # spaces alone have no first word
            message += errors.did_you_mean(first, dict.fromkeys(options))
        if message.startswith("one of the arguments --model-name"):
            message += ", such as --model-name recommended"
        self.exit(2, f"{self.prog}: {display_text.printable_lines(message)}\nAll options: {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if choices and value not in choices:
            hint = errors.nearest_first(value, choices, "Choose from")
            raise argparse.ArgumentError(action, f"invalid choice {value!r}{hint}")

    def format_help(self) -> str:
        return program_names.as_typed(super().format_help())

    def format_usage(self) -> str:
        return program_names.as_typed(super().format_usage())


class _Version(argparse.Action):
    """Prints the version of the package; it is looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from ensemble_system import __version__

        parser._print_message(f"ensemble-system {__version__}\n", sys.stdout)  # as argparse's own action does
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser for the commands and options of `utils.commands`."""
    return _parser_for(program_names.as_typed("ensemble_orchestrator.py"))


@cache  # `debug` parses a line for each of its steps
def _parser_for(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Combine trained image classifiers into ensembles, and measure the gain on images that no part of "
        "an ensemble was fitted on.",
        epilog='Start: python ensemble_orchestrator.py demo --data "my leaves" (photographs, one folder per class), or '
        "python ensemble_orchestrator.py discover (networks that are trained already)",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        example = f"Example: python ensemble_orchestrator.py {command.example}"
        description = f"{command.help[0].upper()}{command.help[1:]}."
        sub = commands.add_parser(name, help=command.help, description=description, epilog=example)
        choice = sub.add_mutually_exclusive_group(required=True) if command.one_of else sub
        for option, settings in command.arguments.items():
            (choice if option in command.one_of else sub).add_argument(option, **settings)
        common = sub.add_argument_group("options of every command")
        for option, settings in COMMON_OPTIONS.items():
            common.add_argument(option, **settings)
    return parser


def exit_code(error: BaseException) -> int:
    """Exit code of the nearest base class in `EXIT_CODES`, so that a subclass of UserError needs no entry."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), BUG)


def run_pipeline(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Run all enabled stages in the specification's order; a stage keeps results that are up to date."""
    from utils.core.results import Result

    texts, documents, failures = [], {}, []
    for number, (name, options, sections) in enumerate(PIPELINE_STAGES, start=1):
        if sections and not any(config.at(f"{section}.enable") for section in sections):
            logger.info("stage %d of %d: %s is disabled in the configuration", number, len(PIPELINE_STAGES), name)
            continue
        logger.info("stage %d of %d: %s", number, len(PIPELINE_STAGES), name)
        result = call(name, config, workspace, options | {"force": force})
        times = 1 + sum(earlier == name for earlier, _, _ in PIPELINE_STAGES[: number - 1])
        stage = name if times == 1 else f"{name}-{times}"
        texts.append(f"== {stage}\n{result.text}")
        documents[stage] = result.document
        failures += [f"{stage}: {failure}" for failure in result.failures]
    page = workspace.report("test")
    return Result(
        "\n\n".join([*texts, str(page if page.is_file() else workspace.ranking("test"))]), documents, failures
    )


def call(name: str, config: Config, workspace: Workspace, options: dict[str, Any]) -> Result:
    """Import the function of a command and run it."""
    return _function(COMMANDS[name].target)(config, workspace, **options)


def _function(target: str) -> Callable[..., Result]:
    module, name = target.split(":")
    function: Callable[..., Result] = getattr(import_module(module), name)
    return function


def run_debug(
    config: Config, workspace: Workspace, *, inside: bool, section: str, verbose: bool, **options: Any
) -> Result:
    """`debug`, or with `inside` one of its sections, whose steps are commands of this command line."""
    from utils import debug_utils

    def run(line: Sequence[str], config: Config, workspace: Workspace, force: bool) -> Result:
        typed = vars(build_parser().parse_args(line))
        common = {_attribute(option) for option in COMMON_OPTIONS} | {"command"}
        specific = {name: value for name, value in typed.items() if name not in common}
        return call(line[0], config, workspace, specific | {"force": force})

    if inside:
        return debug_utils.run_section(config, workspace, section, run=run, verbose=verbose)
    return debug_utils.debug(config, workspace, commands=COMMANDS, section=section, verbose=verbose, **options)


def print_completion(shell: str) -> Result:
    """The script by which a shell completes the words of `ensemble-system`; UserError where shtab is not installed."""
    from utils.core.results import Result

    try:
        import shtab
    except ImportError as error:
        raise errors.UserError("completion needs the package shtab. Install it: pip install shtab") from error
    script = shtab.complete(_parser_for("ensemble-system"), shell)
    return Result(script, {"shell": shell, "script": script})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        options = vars(build_parser().parse_args(argv))  # usage errors end here with 2, before anything is imported
    except SystemExit:
        terminal.flush_output()  # of --help
        raise
    name = options.pop("command")
    common = {option: options.pop(_attribute(option)) for option in COMMON_OPTIONS if option != "--force"}
    try:
        with stop_signals.raised():
            result = _prepared_call(name, common, options)
            _show(name, result, common)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error)
    return PARTIAL if result.failures else 0


def _show(name: str, result: Result, common: dict[str, Any]) -> None:
    left_out = REMEMBERED_OPTIONS if COMMANDS[name].builds else ()
    following = {"next": _line(result.next, common, left_out)} if result.next else {}
    if common["--json"]:
        terminal.write_output(json.dumps(result.document | {"failures": result.failures} | following, sort_keys=True))
    else:
        terminal.write_output("\n".join([result.text, *(f"next: {line}" for line in following.values())]))
    for failure in result.failures:
        terminal.write_error(f"left out: {failure}")


def _attribute(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _line(command: str, common: dict[str, Any], left_out: Sequence[str]) -> str:
    """The command line of a command with the common options of the current one, but for those to leave out."""
    words = ["python", "ensemble_orchestrator.py", *command.split()]
    for option in REPEATED_OPTIONS:
        if option not in left_out and common[option] != COMMON_OPTIONS[option].get("default"):
            values = common[option] if isinstance(common[option], list) else [common[option]]
            words += [word for value in values for word in (option, value)]
    return shlex.join(words)


def _prepared_call(name: str, common: dict[str, Any], options: dict[str, Any]) -> Result:
    from utils import base_back
    from utils.core import messages, workspace_hints

    level = logging.DEBUG if common["--verbose"] else logging.WARNING if common["--quiet"] else logging.INFO
    messages.set_up_logging(level=level, log_file=None, stream=sys.stderr)
    command = COMMANDS[name]
    for option in command.one_of:
        if options[_attribute(option)] is None:
            del options[_attribute(option)]
    for option, target in command.standalone:
        if options.get(_attribute(option)):
            return _function(target)(**options)
    if command.is_standalone:
        del options["force"]
        return _function(command.target)(
            **options, **{_attribute(option): common[option] for option in command.pass_through}
        )
    folder = common["--workspace"]
    if folder is not None:
        folder = str(Path(folder).expanduser().absolute())
        if not Path(folder).is_dir():
            raise errors.UserError(
                f"--workspace {folder}: no such folder{workspace_hints.near(Path(folder))} `make demo DATA=...` prints "
                "the folder that it makes"
            )
    if common["--output"] is not None:  # for BASE-BACK's settings and for processes that are started from here
        os.environ["DBT_ENSEMBLE_DIR"] = str(Path(common["--output"]).expanduser().absolute())
    if command.sandboxed:
        base_back.leave_workspace_unchanged()
    base_back.bind(common["--base-back"], folder)
    chosen = _choose_config(common, builds=command.builds, logs_differences="--set" not in command.pass_through)
    config = chosen.config
    base_back.load_bundled("threads").prepare_environment(config.dataset.num_threads)  # before torch is imported
    if config.dataset.group_regex is not None:
        os.environ.setdefault("DBT_GROUP_REGEX", config.dataset.group_regex)
    from utils.core import caches, engines, locks, remembered

    workspace = base_back.open_workspace(common["--output"])
    if folder is not None and not workspace.exists:
        workspace_hints.refuse(workspace.base)
    options |= {_attribute(option): common[option] for option in command.pass_through}
    writes = command.writes
    if not isinstance(writes, bool):
        writes = any(options[option] for option in writes)
    has_place = workspace.exists or command.makes_workspace
    with (
        locks.writer_lock(workspace.lock, name) if writes and has_place else nullcontext(),
        remembered.kept_by_build(workspace, chosen) if command.builds and has_place else nullcontext(),
    ):
        # After the lock, whose error explains a workspace that cannot be written.
        if not command.sandboxed and has_place:
            messages.set_up_logging(level=level, log_file=workspace.log_file, stream=sys.stderr)
        try:
            if command.decodes:
                caches.enforce_quota(workspace.image_cache, config.cache.quota_gb)
            with engines.using(common["--engine"], common["--address"]):
                return call(name, config, workspace, options)
        except OSError as error:
            raise errors.UserError(errors.describe_os_error(error, workspace.root)) from error


def _choose_config(common: dict[str, Any], *, builds: bool, logs_differences: bool) -> Choice:
    """The configuration of a command: the file that is named, what the workspace remembers, or the default."""
    from utils.core import remembered
    from utils.core.workspace import remembered_config
    from utils.ensemble_methods import COMBINERS

    return remembered.choose(
        remembered_config(Path(os.environ["DBT_BASE_DIR"]), common["--output"]),
        file=common["--config"],
        overrides=common["--set"],
        device=common["--device"],
        project=PROJECT,
        names={"runs.score_ensemble.methods": tuple(COMBINERS)},
        builds=builds,
        logs_differences=logs_differences,
    )


def _report(error: BaseException) -> int:
    """Log one line; the traceback of a bug goes to the log file only."""
    code = exit_code(error)
    if code == 130:
        logger.error("interrupted; no file is incomplete, and the same command continues the work")
    elif code == BUG:
        logger.error("bug: %s: %s; traceback in %s", type(error).__name__, error, _log_file())
        logger.debug("%s", "".join(traceback.format_exception(error)))
    else:
        logger.error("%s", error)
    return code


def _log_file() -> str:
    files = [handler.baseFilename for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    return files[0] if files else "no log file (--verbose shows it)"


if __name__ == "__main__":
    gc.set_threshold(*subprocesses.GC_THRESHOLDS)
    terminal.prepare_streams()
    subprocesses.end_with_caller()
    exit_status = main()
    gc.freeze()  # otherwise collections at exit take a second
    sys.exit(exit_status)
