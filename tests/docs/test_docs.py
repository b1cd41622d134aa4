"""The documents tell the truth: their commands exist as written, their files are there, their examples run.

A code block is ```bash (each command is parsed by the command it names), ```bash run (it is also run, beside the
checkout's tests and weights), ```python (executed) or ```python no-run (compiled).
"""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from mlx_sf.cli import COMMANDS, cli
from tests.commands.test_options import FLAG, FLAGS
from tests.helpers import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "weights" / "README.md",
    ROOT / "scripts" / "regimes" / "README.md",
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.S | re.M)
BLOCKS = [(page, kind.strip(), block) for page in PAGES for kind, block in FENCE.findall(page.read_text())]
# flags of other programs that the pages name
FOREIGN = {
    "--over", "--hosts", "--auto-setup", "--output-hostfile", "--hostfile", "--backend",  # MLX's launchers
    "--preset", "--report-only", "--seeds",  # scripts/synthetic_regimes.py
}  # fmt: skip


def calls(block: str) -> list[list[str]]:
    """Arguments of every mlx-sf call of a block, also of those inside an `mlx.launch` line."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        line = line.split(" #")[0].replace("$(which mlx-sf)", "mlx-sf")
        line = line.replace("python convert/from_torch.py", "mlx-sf convert").replace(
            "scripts/eval_fid.py", "mlx-sf eval"
        )
        if match := re.search(r"(?:^|\s|/)mlx-sf(?: (.*))?$", line):
            found.append(shlex.split((match[1] or "").replace("~", "/home/me")))
    return found


COMMANDS_ON_PAGES = [
    (page.name, arguments)
    for page, kind, block in BLOCKS
    if kind in ("bash", "bash run", "")
    for arguments in calls(block)
]


@pytest.mark.parametrize("page, arguments", COMMANDS_ON_PAGES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_and_flags_exist(page, arguments):
    context, command = click.Context(cli), cli
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        command = command.get_command(context, name)
        assert command is not None, name
    if not isinstance(command, click.Group):
        command.make_context("mlx-sf", list(arguments))  # parses: an unknown flag or a wrong value raises


def test_there_are_commands_for_everything():
    assert {a[0] for _, a in COMMANDS_ON_PAGES if a} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_in_the_text_exists(page):
    text = FENCE.sub("", page.read_text())
    named = {f for code in re.findall(r"`([^`\n]+)`", text) for f in FLAG.findall(code)}
    assert named <= FLAGS | FOREIGN, named - FLAGS - FOREIGN


@pytest.mark.parametrize(
    "page, block", [(p, b) for p, kind, b in BLOCKS if kind == "bash run"], ids=lambda v: getattr(v, "name", "")
)
def test_commands_run(page, block, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for name in ("tests", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    for arguments in calls(block):
        status, _, err = cli(*arguments)
        assert status == 0, f"{page.name}: {' '.join(arguments)}: {err}"


@pytest.mark.parametrize(
    "page, kind, block",
    [(p, kind, b) for p, kind, b in BLOCKS if kind.startswith("python")],
    ids=lambda v: getattr(v, "name", ""),
)
def test_python_examples_run(page, kind, block, tmp_path, monkeypatch):
    code = compile(block, str(page), "exec")
    if kind == "python no-run":
        return
    monkeypatch.chdir(tmp_path)
    for name in ("tests", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    exec(code, {})


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_front_page_is_a_front_page():
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_nothing_names_a_machine():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert not re.search(r"(?<![\w.])/(root|work|tmp|Users|home)/", page.read_text()), page


def test_scripts_that_the_pages_start_exist():
    started = {s for _, kind, b in BLOCKS if kind.startswith("bash") for s in re.findall(r"(?:^|\s)(scripts/\S+)", b)}
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= started
    for script in started:
        assert shutil.which(str(ROOT / script)), script
