"""Data flows one way: optim -> protection -> {directions, nullspace} -> rows -> kernels. So do imports."""

import ast
from pathlib import Path

import pytest

import gradproj

PACKAGE = Path(gradproj.__file__).parent
# The floor of every room and of every module beside them; imports go to lower floors, or stay in a room.
FLOORS = {
    "reference": 0, "kernels": 0, "triton_kernels": 1, "rows": 1, "capture": 2, "protection": 3, "directions": 4,
    "nullspace": 4, "hooks": 5, "optim": 6, "projected_adamw": 7, "integrations": 7, "hf": 8,
    "__init__": 9, "__main__": 10,
}  # fmt: skip
GROUND = 9  # what a user or a new reader meets first


def place(parts) -> str:
    return parts[0] if parts else "__init__"


def imports():
    """(file, room it is in, room that it imports), of all imports, those inside of functions included. Backends are
    imported by name when they are asked for, which is how they register their ops."""
    folders = [PACKAGE, Path(__file__).parent.parent / "triton_kernels"]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            room = "triton_kernels" if folder != PACKAGE else inside[0]
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module == "gradproj":
                    names = [f"gradproj.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    if name.split(".")[0] == "gradproj":
                        yield path.name, room, place(name.split(".")[1:])


def test_no_import_runs_back_up():
    found = {(a, b) for _, a, b in imports() if a != b}
    assert len(found) > 15
    wrong = [(name, a, b) for name, a, b in imports() if a != b and b in FLOORS and FLOORS[a] <= FLOORS[b]]
    assert not wrong, wrong
    assert all(a in FLOORS for a, _ in found)


def test_the_ground_floor_has_what_a_reader_meets_first():
    modules = [p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")]
    assert len(modules) <= GROUND - 1, modules


@pytest.mark.parametrize("room", ["kernels", "rows", "directions", "nullspace", "integrations"])
def test_a_room_says_what_it_is_and_what_it_imports(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert "mport" in text, text
    said = {name for name in FLOORS if f"gradproj.{name}" in text}
    used = {b for _, a, b in imports() if a == room and b in FLOORS and b != room}
    assert used <= said | {"reference"}, (room, used - said)
