"""`mlx-sf`: parses, calls, prints. Each subcommand lives in `mlx_sf/commands/` and is imported only when asked for."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from . import __version__
from .device.malloc import keep_freed_memory
from .errors import MlxSfError

# name -> one-line help, shown without importing the command (imports of MLX take a while)
COMMANDS = {
    "sample": "Draw pictures from a checkpoint.",
    "classes": "List the classes of a checkpoint, or find some by a word.",
    "models": "List the public weights that --ckpt takes by a short name.",
    "train": "Train a network on pictures, or on the built-in scenes.",
    "convert": "Turn a PyTorch or diffusers checkpoint into one self-describing .npz or .safetensors file.",
    "export": "Write one weight set of a training run as a small file to share.",
    "upload": "Publish a checkpoint on the Hugging Face Hub.",
    "info": "Say what a checkpoint, a PNG or this installation is.",
    "eval": "Measure FID, Inception Score, KID, precision and recall of a checkpoint or a folder of pictures.",
    "geneval": "Draw GenEval's prompts, score pictures by its rules; DPG-Bench's scores from answers.",
    "stats": "Make the reference statistics of a data set that `eval` compares with.",
    "spectrum": "Measure a data set's spectrum, what the forcing does to it, and where a network's capacity goes.",
    "app": "Open a page to draw, watch the forcing, compare, and follow runs.",
    "bench": "Measure speed and memory on this machine.",
    "selftest": "Check this device against the published code's numbers.",
}
# commands whose numbers are compared with the reference's: true float32 products, decided before MLX starts
_EXACT = ("selftest", "eval", "stats")


class _LazyGroup(click.Group):
    """A group whose commands are imported from `mlx_sf.commands.NAME` on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in _EXACT:
            os.environ.setdefault("MLX_ENABLE_TF32", "0")
        command: click.Command = importlib.import_module(f"mlx_sf.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mlx-sf")
@click.option("--debug", is_flag=True, help="Show the full traceback of an error.")
def cli(debug: bool) -> None:
    """Pictures straight in pixels: JiT diffusion transformers with Spectral Forcing, in MLX.

    Begin with `mlx-sf sample`: it draws from a small model that comes with the program.
    """


def main(argv: list[str] | None = None) -> Any:
    """Entry point: every expected failure becomes one line on stderr and a non-zero exit status."""
    keep_freed_memory()
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        return cli.main(args=arguments, prog_name="mlx-sf", standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mlx-sf: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `mlx-sf info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MlxSfError, OSError) as e:
        if debug:
            traceback.print_exc()
        message = e.shown(spelling(arguments)) if isinstance(e, MlxSfError) else _os_error_line(e)
        click.echo(f"mlx-sf: error: {message}", err=True)
        sys.exit(1)


def spelling(arguments: list[str]) -> Callable[[str], str]:
    """How the command that `arguments` name spells an option: as its flag; the plain name where it has none such."""
    flags: dict[str, str] = {}
    command: click.Command | None = cli
    for word in arguments:
        if not isinstance(command, click.Group):
            break
        if not word.startswith("-"):
            command = command.get_command(click.Context(command), word)
            for p in command.params if command is not None else []:
                if isinstance(p, click.Option):
                    flags[p.name or ""] = max(p.opts, key=len)
    return lambda name: flags.get(name, name)


def _os_error_line(e: OSError) -> str:
    where = f" {e.filename}:" if e.filename else ""
    return f"cannot use{where} {e.strerror or e}"


if __name__ == "__main__":
    main()
