"""`docs/vllm-coupling.md` and the code agree, and imports point in one direction."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from vllm import __version_tuple__

from adaptive_head.vllm import moved as moved_names
from adaptive_head.vllm.compat import SUPPORTED_MINORS
from tests.programs import HANG_S

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "vllm-coupling.md"
PACKAGES = ("adaptive_head", "server")
MINOR = __version_tuple__[:2]


@dataclass(frozen=True)
class Row:
    """What the document says of a symbol.

    Attributes:
        used: the parts of it that are used.
        minors: those that have it.
    """

    used: list[str]
    kind: str
    minors: set[tuple[int, int]]
    tests: list[str]


def read_rows() -> dict[str, Row]:
    """The rows of the document's tables, by symbol."""
    rows: dict[str, Row] = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `") or len(cells) < 5:
            continue
        assert len(cells) == 6, f"a row of {len(cells)} cells: {line}"
        symbol, *used = re.findall(r"`([^`]+)`", cells[0])
        assert symbol not in rows, f"{symbol} has two rows"
        only = re.match(r"(\d+)\.(\d+) only", cells[3])
        minors = {(int(only[1]), int(only[2]))} if only else SUPPORTED_MINORS
        rows[symbol] = Row(used, cells[2], minors, re.findall(r"`(test_\w+)`", cells[5]))
    return rows


ROWS = read_rows()


def resolve(dotted: str) -> object:
    """Import as much of a dotted name as is a module, and take the rest from there."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        name = ".".join(parts[:split])
        try:
            thing: object = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
            continue
        for part in parts[split:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{dotted} is not there")


def has(thing: object, name: str) -> bool:
    """Is it an attribute, a declared field, or set in a method?"""
    if hasattr(thing, name):
        return True
    if not isinstance(thing, type):
        return False
    parents = [parent for parent in thing.__mro__ if parent.__module__ != "builtins"]
    return any(
        name in vars(parent).get("__annotations__", ())
        or re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", source_of(parent))
        for parent in parents
    )


@cache
def source_of(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


@pytest.mark.parametrize("symbol", [name for name, row in ROWS.items() if MINOR in row.minors])
def test_every_symbol_of_the_document_exists(symbol):
    thing = resolve(symbol)
    for name in ROWS[symbol].used:
        if name.startswith("state."):
            assert f"{name} = " in inspect.getsource(thing), name
        else:
            assert name.startswith("."), f"{symbol}: {name}"
            assert has(thing, name[1:]), f"{symbol}{name} is gone"


@pytest.mark.parametrize("symbol", [name for name, row in ROWS.items() if MINOR not in row.minors])
def test_symbols_of_other_minors_do_not_exist(symbol):
    with pytest.raises((AttributeError, AssertionError)):
        resolve(symbol)


def test_rows_name_supported_minors_and_known_kinds():
    for symbol, row in ROWS.items():
        assert row.minors <= SUPPORTED_MINORS, symbol
        assert re.match(r"(seam|documented|internal)\b", row.kind), f"{symbol}: {row.kind}"


def test_a_symbol_that_is_gone_would_be_found():
    assert len(ROWS) > 60 and 0 < sum(MINOR not in row.minors for row in ROWS.values()) < 10
    with pytest.raises(AttributeError):
        resolve("vllm.v1.outputs.SamplingMaskList")
    scheduler = resolve("vllm.v1.core.sched.scheduler.Scheduler")
    assert has(scheduler, "return_sampling_mask") and not has(scheduler, "return_sampling")


def names_of_tests(folder: Path) -> set[str]:
    return {
        node.name
        for path in folder.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_test_that_the_document_names_exists():
    folders = ("contract", "engine", "lpo")
    known = set().union(*(names_of_tests(ROOT / "tests" / folder) for folder in folders))
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text()))
    assert named <= known, named - known


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(*packages: str) -> list[Path]:
    return sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))


def is_of(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", files_of(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_of_vllm_is_in_the_document(path):
    imported = {name for name in imports_of(path) if is_of(name, "vllm")}
    assert imported <= ROWS.keys(), imported - ROWS.keys()


def test_moved_names_are_imported_in_one_place():
    """Elsewhere they would be right on one minor only. Code in strings counts too."""
    moved = ROOT / "adaptive_head" / "vllm" / "moved.py"
    names = {name.rpartition(".")[::2] for name in imports_of(moved)} - {
        ("vllm", "__version_tuple__")
    }
    assert len(names) == 2 * len(set(moved_names.__all__))
    for path in files_of(*PACKAGES, "tests", "benchmarks", "loadtests", "experiments"):
        text = path.read_text()
        for module, name in names if path != moved else ():
            found = re.findall(rf"from {re.escape(module)} import (\([^)]*\)|.*)", text)
            assert not any(re.search(rf"\b{name}\b", line) for line in found), f"{path}: {name}"


def test_private_names_of_other_packages_are_in_the_document():
    text = DOCUMENT.read_text()
    for name in ("_sum", "_buckets", "_upper_bounds"):
        assert any(name in path.read_text() for path in files_of("server")), "no longer used"
        assert f"`.{name}`" in text, name


def test_imports_point_from_the_server_to_the_plugin_to_the_layer():
    """The layer runs without vLLM, the plugin without an API server, both without training."""
    for path in files_of(*PACKAGES):
        where = path.relative_to(ROOT).as_posix()
        for name in imports_of(path):
            if where.startswith("adaptive_head/"):
                assert not is_of(name, "server"), f"{where} imports {name}"
            if where.startswith("adaptive_head/vllm/"):
                assert not is_of(name, "adaptive_head.lpo", "adaptive_head.cli"), f"{where}: {name}"
            elif where.startswith("adaptive_head/") and not where.startswith("adaptive_head/lpo/"):
                assert not is_of(name, "vllm", "adaptive_head.vllm"), f"{where} imports {name}"
                is_command = where == "adaptive_head/cli.py"
                assert is_command or not is_of(name, "adaptive_head.lpo"), f"{where}: {name}"
            assert not is_of(name, "tests", "benchmarks"), f"{where} imports {name}"


def test_importing_the_layer_does_not_import_vllm():
    code = "import sys, adaptive_head; print(*{name.split('.')[0] for name in sys.modules})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S
    )
    assert process.returncode == 0, process.stderr
    loaded = set(process.stdout.split())
    assert "adaptive_head" in loaded and "torch" in loaded
    assert not loaded & {"vllm", "server", "fastapi"}
