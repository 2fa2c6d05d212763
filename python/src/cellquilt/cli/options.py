"""Options of the command line, made from the table of settings."""

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import SETTINGS, Setting, Settings


def _names(setting: Setting, own: str) -> list[str]:
    """All spellings of a setting's option, the full name first; its keyword only on its own group's command."""
    names = [setting.name, *setting.aliases]
    if setting.keyword and setting.group == own:
        names.append(setting.keyword)
    return list(dict.fromkeys(f"--{name.replace('_', '-')}" for name in names))


def _option(setting: Setting, own: str) -> Callable[[Any], Any]:
    names = _names(setting, own)
    text = setting.help
    if setting.default is not None:
        text += f"  [default: {json.dumps(setting.default)}]"
    if setting.kind == "bool":
        return click.option(
            "/".join([names[0], f"--no-{names[0][2:]}"]), *names[1:], setting.name, default=None, help=text
        )
    multiple = setting.kind == "list"
    return click.option(*names, setting.name, default=None, multiple=multiple, help=text, metavar=setting.kind.upper())


def settings_options(*groups: str, own: str = "", extra: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Give a command the options of some groups of settings; the command gets them as one `settings`.

    Parameters
    ----------
    groups
        Groups of the table.
    own
        The group whose short keywords are options too.
    extra
        Parameters of the command itself that ``--settings`` may carry as well.
    """
    members = [setting for setting in SETTINGS if setting.group in (*groups, own) or setting.name == "preset"]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**arguments: Any) -> Any:
            given: dict[str, Any] = parse_json(arguments.pop("settings_json"))
            given.pop("version", None)  # the pipeline's, which makes its tasks run again when it changes
            for name in extra:
                value = given.pop(name, None)
                if not arguments.get(name):
                    arguments[name] = value
            for setting in members:
                value = arguments.pop(setting.name)
                if value is not None and value != ():
                    # A list's option may be repeated, or hold commas, or both.
                    given[setting.name] = ",".join(value) if setting.kind == "list" else value
            return function(settings=Settings(given), **arguments)

        decorated = click.option(
            "--settings", "settings_json", default="{}", metavar="JSON", help="Settings by name; options win."
        )(command)
        for setting in reversed(members):
            decorated = _option(setting, own)(decorated)
        return decorated

    return decorate


def parse_json(text: str) -> dict[str, Any]:
    """Settings by name from JSON."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CellquiltError("settings-json", f"--settings is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CellquiltError("settings-json", "--settings is not a JSON object")
    return values
