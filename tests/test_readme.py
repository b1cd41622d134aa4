"""The README tells the truth: its commands exist as written, its files are there, its examples run."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_sf.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
LINES = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if language in ("bash", "")
    for line in block.replace("\\\n", " ").splitlines()
    if not line.startswith("#")
]


def commands() -> list[list[str]]:
    """Arguments of every mlx-sf call, also of those inside an `mlx.launch` line."""
    found = []
    for line in LINES:
        line = line.replace("$(which mlx-sf)", "mlx-sf").replace("python convert/from_torch.py", "mlx-sf convert")
        line = line.replace("python scripts/eval_fid.py", "mlx-sf eval")
        if match := re.search(r"(?:^|\s|/)mlx-sf (.*)", line):
            found.append(shlex.split(match[1].replace("~", "/home/me")))
    return found


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_and_flags_exist(arguments):
    context = click.Context(cli)
    command = cli
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        if "|" in name:
            assert set(name.split("|")) <= set(command.list_commands(context))
            return
        command = command.get_command(context, name)
        assert command is not None, name
    if not isinstance(command, click.Group):
        command.make_context("mlx-sf", list(arguments))  # parses: an unknown flag or a wrong value raises


def test_there_are_commands_for_everything():
    assert {a[0] for a in commands()} >= set(COMMANDS) - {"bench", "export"}


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert anchor in headings, anchor


def test_python_examples_run():
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    for block in examples:
        exec(compile(block, "README.md", "exec"), {})


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(?:SECTION|TIME|SHARE|N)\b", TEXT)


def test_file_tree_is_the_tree():
    """Every module has its line, and every line its module."""
    tree = next(block for _, block in BLOCKS if "mlx_sf/" in block and "config.py" in block)
    named = set(re.findall(r"(\w+)\.py", tree))
    modules = {p.stem for p in (ROOT / "mlx_sf").glob("*.py")} - {"__init__"}
    assert modules <= named, modules - named
    for folder in re.findall(r"^  (\w+)/", tree, re.M):
        assert (ROOT / "mlx_sf" / folder).is_dir(), folder


def test_imports_go_up_the_list():
    """A module imports only what stands above it in the file tree, or on its own line."""
    tree = next(block for _, block in BLOCKS if "mlx_sf/" in block and "config.py" in block)
    lines = tree[tree.index("mlx_sf/") :].splitlines()[1:]
    rank = {}
    for i, line in enumerate(lines):
        for name in re.findall(r"(\w+)(?:\.py|/)", line.strip().split("   ")[0]):
            rank.setdefault(name, i)
    back = []
    for path in (ROOT / "mlx_sf").rglob("*.py"):
        own = path.relative_to(ROOT / "mlx_sf").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level or own == "__init__":
                continue
            base = list(path.relative_to(ROOT / "mlx_sf").parts[: -node.level]) + (node.module or "").split(".")
            base = [b for b in base if b]
            for name in [base[0]] if base else [a.name for a in node.names]:
                if name in rank and rank[name] > rank[own]:
                    back.append(f"{own} imports {name}")
    assert not back
