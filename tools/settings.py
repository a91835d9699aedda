"""A user's own defaults of options, in ``slotmoe.toml``: keys before any section are for every
command that has the option, those of a section for its command."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import click

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.jsonfile import Json, read_file

HELP_ALL = "--help-all"  # the group notes it in ``meta``, a command's help looks for it


def defaults(ctx: click.Context) -> Json:
    """What the file says for the options of the command that the group of ``ctx`` calls, by
    parameter, as click's ``default_map`` has it.  Raises ``ConfigError``."""
    path, name = Path(click.get_app_dir("slotmoe")) / "slotmoe.toml", ctx.invoked_subcommand
    if name is None or not path.is_file():
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: Json = tomllib.loads(read_file(path, 1 << 20).decode())
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{path}: is no TOML ({problem})") from None
    group, found = ctx.command, Json()
    assert isinstance(group, click.Group)
    commands, options = group.list_commands(ctx), _options(group, ctx, name)
    items = [("", *item) for item in values.items()]
    if isinstance(section := values.get(name), dict):
        items += [(f"[{name}] ", *item) for item in section.items()]
    for place, key, value in items:
        if not place and isinstance(value, dict):
            _check(path, f"[{key}]", key, commands)
        elif key in options:
            try:
                found[str(options[key].name)] = _value(ctx, options[key], value)
            except (click.BadParameter, SlotmoeError) as problem:
                text = getattr(problem, "message", str(problem))
                raise ConfigError(f"{path}: {key} for {name}: {text}") from None
        elif place or not any(key in _options(group, ctx, other) for other in commands):
            _check(path, place + key, key, options)
    return found


def _options(group: click.Group, ctx: click.Context, name: str) -> dict[str, click.Option]:
    """The options of a command by their long names."""
    command = group.get_command(ctx, name)
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option)]
    return {max(option.opts, key=len).lstrip("-"): option for option in options}


def _check(path: Path, place: str, key: str, known: Iterable[str]) -> None:
    if key not in known:
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise ConfigError(f"{path}: {place} is unknown; {hint}")


def _value(ctx: click.Context, option: click.Option, value: object) -> object:
    """``value`` as if it was typed.  Raises ``BadParameter``."""
    texts = value if option.multiple and isinstance(value, list) else [value]
    kinds = (bool,) if option.is_flag else (str, int, float)
    if not all(type(text) in kinds for text in texts):
        expected = "true or false" if option.is_flag else "text or a number"
        raise click.BadParameter(f"is {value!r:.40}, expected {expected}")
    typed = [str(text) for text in texts] if option.multiple else str(value)
    option.process_value(ctx, typed)
    return typed
