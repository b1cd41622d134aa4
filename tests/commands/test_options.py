"""Messages name options: the library by their names, the commands by flags that exist."""

import ast
import re

import click
import pytest

from mlx_sf.cli import COMMANDS, cli, spelling
from mlx_sf.errors import FieldError, MlxSfError, option
from tests.helpers import ROOT

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def commands() -> dict[str, click.Command]:
    """Every command and subcommand by name ("bench train")."""
    found: dict[str, click.Command] = {}

    def add(name: str, command: click.Command) -> None:
        found[name] = command
        if isinstance(command, click.Group):
            for sub in command.list_commands(click.Context(command)):
                add(f"{name} {sub}", command.get_command(click.Context(command), sub))

    for name in COMMANDS:
        add(name, cli.get_command(click.Context(cli), name))
    return found


PARAMETERS = {p.name for c in commands().values() for p in c.params}
FLAGS = {o for c in [*commands().values(), cli] for p in c.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}


def strings(path):
    """Constant strings of a file with their lines, docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        and n.body and isinstance(n.body[0], ast.Expr) and isinstance(n.body[0].value, ast.Constant)
    }  # fmt: skip
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs:
            yield n.lineno, n.value


def library():
    return [p for p in (ROOT / "mlx_sf").rglob("*.py") if p.parent.name not in ("commands",) and p.name != "cli.py"]


def test_the_library_names_no_flags():
    """Ways to start a program, as `mlx-sf bench memory` does with its own processes, are not meant for people."""
    named = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in library()
        for line, text in strings(path)
        if FLAG.search(text) and not text.startswith("--") and "bench" not in path.parts
    ]
    assert not named, "\n".join(named)


def test_every_flag_that_a_command_names_exists():
    for path in [*(ROOT / "mlx_sf" / "commands").glob("*.py"), ROOT / "mlx_sf" / "cli.py"]:
        for line, text in strings(path):
            for flag in FLAG.findall(text):
                if "{" not in text and not flag.endswith("-"):
                    assert flag in FLAGS, f"{path.name}:{line}: {flag}"


def test_every_option_that_the_library_names_is_one_of_a_command():
    found = 0
    for path in library():
        for n in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(n, ast.Call)
                and getattr(n.func, "id", "") == "option"
                and isinstance(n.args[0], ast.Constant)
            ):
                found += 1
                assert n.args[0].value in PARAMETERS, f"{path.name}:{n.lineno}: {n.args[0].value}"
    assert found > 30


@pytest.mark.parametrize("name, command", commands().items())
def test_every_command_and_option_explains_itself(name, command):
    assert command.help
    assert command.get_short_help_str(300).endswith("."), name
    for p in command.params:
        if isinstance(p, click.Option):
            assert p.help, f"{name} {p.opts}"
            assert len(p.help.split("[default")[0]) > 10, f"{name} {p.opts}: {p.help}"


def test_a_message_is_spelt_by_whoever_shows_it():
    e = MlxSfError(f"try a smaller {option('batch_size')}\nor another {option('ref')}")
    assert str(e) == "try a smaller batch_size or another ref"
    assert e.shown(spelling(["--debug", "eval", "--cfg", "2"])) == "try a smaller --batch-size or another --ref"
    assert e.shown(spelling(["sample"])) == "try a smaller --batch-size or another ref"  # sample has no --ref
    assert e.shown(spelling([])) == str(e)


def test_a_field_error_carries_its_parts():
    e = FieldError("steps", 0, "at least 1").within("model.npz")
    assert (e.field, e.got, e.want, e.where) == ("steps", 0, "at least 1", "model.npz")
    assert str(e) == "model.npz: steps is 0, want at least 1"
    assert e.shown(spelling(["sample"])) == "model.npz: --steps is 0, want at least 1"
