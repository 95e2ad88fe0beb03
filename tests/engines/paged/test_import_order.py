"""The modules of engine `paged` import each other in the order that the package's docstring draws."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from batchgen.engines import paged

PACKAGE = "batchgen.engines.paged"


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[3] for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            yield node.module.split(".")[3]


def test_each_module_imports_only_modules_below_its_own() -> None:
    drawn = [line.split() for line in (paged.__doc__ or "").splitlines() if line.startswith("    ")]
    rows = {module: row for row, modules in enumerate(drawn) for module in modules}
    assert paged.__file__ is not None
    folder = Path(paged.__file__).parent
    files: dict[str, list[Path]] = {path.stem: [path] for path in folder.glob("*.py") if path.stem != "__init__"}
    files |= {path.parent.name: list(path.parent.glob("*.py")) for path in folder.glob("*/__init__.py")}
    assert sorted(rows) == sorted(files)
    upwards = [
        f"{module} imports {imported}"
        for module, paths in files.items()
        for path in paths
        for imported in imports(path)
        if imported != module and rows[imported] <= rows[module]
    ]
    assert not upwards
