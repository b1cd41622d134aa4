"""Imports point one way through the house, and no file imports itself in a circle."""

import ast
from pathlib import Path

from tests.helpers import ROOT

# each line may import from the lines above it, and rooms of one line from each other only where listed below
ORDER = [
    ["errors"],
    ["common", "device", "dct"],
    ["spectral", "flow", "formats", "data"],
    ["models"],
    ["sampling"],
    ["checkpoints"],
    ["training", "spectrum", "parity"],
    ["metrics"],
    ["bench", "web"],
    ["commands"],
    ["cli"],
]
FLOOR = {room: i for i, rooms in enumerate(ORDER) for room in rooms}


def imports() -> dict[str, set[str]]:
    """Module -> modules of mlx_sf that it imports anywhere, also inside functions; the package's face left out."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "mlx_sf").rglob("*.py")):
        name = module(path)
        if name == "":
            continue
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                target = ".".join([*base, alias.name]) if is_module([*base, alias.name]) else ".".join(base)
                if target:
                    found.setdefault(name, set()).add(target)
        found.setdefault(name, set())
    return found


def module(path: Path) -> str:
    parts = path.relative_to(ROOT / "mlx_sf").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(parts: list[str]) -> bool:
    where = ROOT.joinpath("mlx_sf", *parts)
    return where.with_suffix(".py").exists() or (where / "__init__.py").exists()


def test_every_room_has_its_floor():
    rooms = {name.split(".")[0] for name in imports()}
    assert rooms <= set(FLOOR), rooms - set(FLOOR)


def test_imports_point_one_way():
    back = [
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets
        if (a := name.split(".")[0]) != (b := target.split(".")[0]) and FLOOR[b] >= FLOOR[a]
    ]
    assert not back


def test_there_is_no_circle():
    graph, state, path = imports(), {}, []

    def visit(name: str) -> None:
        state[name] = "open"
        path.append(name)
        for target in sorted(graph.get(name, ())):
            if name.startswith(target + "."):  # a package's own face
                continue
            assert state.get(target) != "open", " -> ".join([*path[path.index(target) :], target])
            if target not in state:
                visit(target)
        path.pop()
        state[name] = "done"

    for name in graph:
        if name not in state:
            visit(name)


def test_torch_is_imported_by_the_twins_alone():
    for path in (ROOT / "mlx_sf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            used = {n.split(".")[0] for n in names} & {"torch", "torch_fidelity", "torchvision"}
            assert not used or module(path).split(".")[0] in ("parity", "bench"), path
