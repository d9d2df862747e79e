# SPDX-License-Identifier: Apache-2.0
"""The import levels of WORKSPACE.md hold, and `import nad_jax` stays light."""

import ast
import fnmatch
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "nad_jax").rglob("*.py"))


def _levels() -> list[tuple[int, list[str], set[str]]]:
    """(level, file patterns, packages allowed at that level and below)."""
    text = (ROOT / "WORKSPACE.md").read_text("utf-8")
    table = text.split("<!-- levels")[1].split("<!-- /levels")[0]
    levels, allowed = [], set(sys.stdlib_module_names) | {"nad_jax"}
    for row in re.findall(r"^\| (\d) \|.*?\| (.*?) \| (.*?) \|$", table, re.M):
        allowed = allowed | set(row[2].split())
        levels.append((int(row[0]), re.findall(r"`(.+?)`", row[1]), allowed))
    return levels


LEVELS = _levels()
ONE_ROOM = (0, 4)  # levels whose folders may import each other


def _level(file: str) -> tuple[int, set[str]]:
    found = [
        (level, allowed)
        for level, patterns, allowed in LEVELS
        if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]
    assert len(found) == 1, f"{file} stands in {len(found)} rows of the level table"
    return found[0]


def _imports(file: str) -> list[str]:
    """Dotted names of everything a file imports, inside functions too.

    Imports for the type checker alone do not count.
    """
    names = []
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _file_of(name: str) -> str | None:
    """The file of ours that holds a dotted name; None for nad_jax itself."""
    parts = name.split(".")
    while len(parts) > 1:
        for candidate in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if (ROOT / candidate).is_file():
                return candidate
        parts.pop()
    return None


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downwards(file):
    """Lower levels, or one's own room; packages only where the table allows them."""
    level, allowed = _level(file)
    room = pathlib.Path(file).parent
    for name in _imports(file):
        assert name.split(".")[0] in allowed, f"{file} (level {level}) imports {name}"
        other = _file_of(name) if name.startswith("nad_jax.") else None
        if other is None:
            continue
        other_level = _level(other)[0]
        same_room = pathlib.Path(other).parent == room or level in ONE_ROOM
        assert other_level < level or (other_level == level and same_room), (
            f"{file} (level {level}) imports {other} (level {other_level})"
        )


@pytest.mark.slow
def test_importing_the_library_loads_jax_and_nothing_heavier():
    heavy = ["flax", "optax", "orbax", "absl", "tensorflow_datasets", "sklearn", "PIL"]
    code = (
        "import sys, nad_jax\n"
        "nad_jax.nad_loss, nad_jax.quantize\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists():
    import nad_jax

    assert set(nad_jax.__all__) == set(nad_jax._MODULE_OF)
    for name in nad_jax.__all__:
        assert getattr(nad_jax, name) is not None


def test_no_file_is_called_utils():
    assert not [file for file in FILES if "util" in pathlib.Path(file).name]
