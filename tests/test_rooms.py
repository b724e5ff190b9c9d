"""Who may import whom: the rules of docs/architecture.md, read off the imports and includes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "cvfast").rglob("*.py"))
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(node.module, node.lineno)] + [(f"{node.module}.{a.name}", node.lineno) for a in node.names]
    return found


def top_level_imports(path: Path) -> set[str]:
    """Modules imported when `path` itself is imported."""
    body = ast.parse(path.read_text()).body
    return {
        name
        for node in body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def room(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_read():
    assert len(PACKAGE) > 20
    assert len(SOURCES) > 5
    assert any(imports(p) for p in PACKAGE)
    assert any(includes(p) for p in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=room)
def test_includes(path):
    where = room(path)
    for header in includes(path):
        if where.startswith("csrc/include/"):
            assert header in {"cstdint", "cstddef"} or (path.parent / header).exists(), f"{where} includes {header}"
        if not where.startswith("csrc/bindings/"):
            assert not re.match(r"(torch|ATen|c10|pybind11|Python)", header), f"{where} includes {header}"
        if where.startswith("csrc/cpu/kernels/"):
            assert header not in {"vector", "string", "algorithm", "functional", "map"}, (
                f"{where} includes <{header}>, whose inline functions the linker merges across instruction sets"
            )


# Folder or file -> prefixes of cvfast modules that it may import.
MAY_IMPORT = {
    "cvfast/_env.py": (),
    "cvfast/_library.py": ("cvfast._env",),
    "cvfast/_peak.py": ("cvfast._library",),
    "cvfast/ops/": ("cvfast.ops", "cvfast._library"),
    "cvfast/_packed.py": (),
    "cvfast/backends/ext/": ("cvfast._library", "cvfast._packed", "cvfast.ops", "cvfast.backends.ext"),
    "cvfast/backends/native/": ("cvfast.backends.native", "cvfast.ops"),
    "cvfast/backends/triton/": ("cvfast._env", "cvfast._library", "cvfast.ops", "cvfast.backends.triton"),
    "cvfast/_choices.py": ("cvfast._env", "cvfast._library"),
    "cvfast/backend.py": ("cvfast._choices", "cvfast._env", "cvfast._library", "cvfast._packed", "cvfast.backends"),
    "cvfast/functional.py": ("cvfast.backend", "cvfast._functional"),
    "cvfast/_functional/": ("cvfast.backend", "cvfast._functional"),
    "cvfast/nn/": ("cvfast.functional", "cvfast.nn"),
    "cvfast/models/": ("cvfast.nn", "cvfast.models"),
    "cvfast/_accelerate/": (
        "cvfast._accelerate",
        "cvfast._choices",
        "cvfast._library",
        "cvfast._packed",
        "cvfast.backend",
        "cvfast.functional",
        "cvfast.nn",
    ),
    "cvfast/accelerate.py": ("cvfast._accelerate", "cvfast._packed"),
    "cvfast/integrations/": ("cvfast.functional",),
    "cvfast/data/": ("cvfast.data", "cvfast._env"),
    "cvfast/reference/": ("cvfast.reference",),
}


@pytest.mark.parametrize("path", PACKAGE, ids=room)
def test_imports(path):
    where = room(path)
    allowed = next((v for k, v in MAY_IMPORT.items() if where.startswith(k)), None)
    for module, line in imports(path):
        if allowed is not None and module.startswith("cvfast.") and module != "cvfast":
            assert module.startswith(allowed), f"{where}:{line} imports {module}"
        if module.split(".")[0] == "triton":
            assert where.startswith("cvfast/backends/triton/"), f"{where}:{line} imports triton"
        if module.startswith(("cvfast.reference", "cvfast.testing")):
            assert where.startswith(("cvfast/reference/", "cvfast/testing/")), f"{where}:{line} imports {module}"


def test_importing_cvfast_imports_no_triton():
    """Kernel files import triton at their top; the launchers import those only when they are called."""
    for path in PACKAGE:
        if room(path).startswith("cvfast/backends/triton/kernels/"):
            continue
        tops = top_level_imports(path)
        assert not any(t.split(".")[0] == "triton" or t.startswith("cvfast.backends.triton.kernels") for t in tops)


@pytest.mark.parametrize("path", [p for p in PACKAGE if room(p) != "cvfast/_env.py"], ids=room)
def test_environment_is_read_in_one_place(path):
    assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text())


@pytest.mark.parametrize("path", [p for p in PACKAGE if not room(p).startswith("cvfast/ops/")], ids=room)
def test_fakes_and_derivatives_are_registered_in_ops(path):
    assert not re.search(r"\bregister_(fake|autograd|vmap|autocast)\b", path.read_text())


@pytest.mark.parametrize("path", [p for p in PACKAGE if room(p).startswith(("cvfast/nn/", "cvfast/models/"))], ids=room)
def test_layers_and_models_name_no_backend(path):
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert not strings & {"ext", "triton", "native"}


def test_the_tables_of_variables_are_the_codes():
    from cvfast import _env

    assert _env.table() in (ROOT / "docs" / "environment.md").read_text()
