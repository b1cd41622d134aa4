"""Results as lines for the console. (`tables.py` has them as tables for pages.)"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..device.defaults import describe
from .tables import Table

Result = Mapping[str, Any]


def machine_line() -> str:
    """The device and the version of MLX, with which every report begins."""
    return f"{describe()['device']}, mlx {describe()['mlx']}"


def figure_lines(result: Result) -> list[str]:
    """A line per figure, in the unit that its name says."""
    return [f"  {name.replace('_', ' '):<26} {_figure(name, value)}" for name, value in result.items()]


def _figure(name: str, value: Any) -> str:
    if name.endswith("bytes") or name == "peak_over_interpreter":
        return f"{value / 1e6:,.0f} MB"
    if name.endswith("rate") and "share" not in name:
        return f"{value / 1e9:,.0f} GFLOP/s"
    if name == "flops":
        return f"{value / 1e9:,.1f} GFLOP"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table_lines(tables: Sequence[Table]) -> list[str]:
    """Tables in Markdown, each under its caption."""
    return [line for table in tables for line in ("", table.caption, "", *table.markdown())]


def forcing_lines(result: Result) -> list[str]:
    """Times in milliseconds and shares in percent."""
    shown = {k: v for k, v in result.items() if k != "fastest_and_slowest"}
    shown |= {k: f"{v:.2%}" for k, v in shown.items() if k.startswith("share")}
    shown |= {k: f"{1000 * v:,.2f} ms" for k, v in shown.items() if k.endswith("seconds")}
    return figure_lines(shown)


def profile_lines(result: Result) -> list[str]:
    """Seconds and shares of the whole, a line per part."""
    total = result["seconds"]
    lines = [f"{result['what']}: {total:.3f} s ({result['spread'][0]:.3f} to {result['spread'][1]:.3f})"]
    return lines + [f"  {name:<26} {s:8.4f} s {s / total:6.1%}" for name, s in result["parts"].items()]


def solver_lines(result: Mapping[str, Sequence[Result]]) -> list[str]:
    """Distance for each solver and number of evaluations, case by case."""
    lines = []
    for case, measured in result.items():
        lines.append(case)
        lines += [
            f"  {r['method']:<10} {r['steps']:4d} steps {r['evaluations']:4d} evaluations  {r['distance']:.4f}"
            for r in measured
        ]
    return lines


def quantization_lines(result: Result) -> list[str]:
    """Sizes of files, a line of errors per choice of layers and, where it was measured, the speed."""
    sizes = {f"file, {k}": f"{v / 1e6:,.1f} MB" for k, v in result["file_bytes"].items()}
    lines = figure_lines({"what": result["what"], **sizes})
    lines.append(f"  {'relative error with quantised':<30} {'weights':>8} {'output':>17} {'velocity':>19}")
    lines.append(f"  {'':<30} {'':>8} {'8 bits':>8} {'4 bits':>8}   {'8 bits':>8} {'4 bits':>8}")
    for row in result["rows"]:
        errors = [row[f"{what}_error_{bits}"] for what in ("output", "velocity") for bits in (8, 4)]
        cells = f"{errors[0]:8.2%} {errors[1]:8.2%}   {errors[2]:8.2%} {errors[3]:8.2%}"
        lines.append(f"  {row['layers'].replace('_', ' '):<30} {row['share']:8.1%} {cells}")
    return lines + figure_lines(result["speed"])


def memory_lines(result: Result) -> list[str]:
    """Gigabytes, a line per process."""
    lines = [f"  {'GB':<66} {'weights':>8} {'peak':>8} {'process':>8}"]
    for r in result["cells"]:
        figures = [f"{r[k] / 1e9:8.2f}" for k in ("weights", "mlx_peak", "process_peak")] if "error" not in r else []
        lines.append(f"  {r['what']:<66} {' '.join(figures) or r['error']}")
    return lines
