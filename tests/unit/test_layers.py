"""
The layers of the package: which way its modules lean, and what each must not know.

Read from the source, so that an import inside a function counts as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "doorpool"

#: Bottom to top; a module imports, at run time, only from the layers before its own.  A
#: module that is not here fails the test: where it stands is to be decided, not found out.
LAYERS = [
    {"_errors"},
    {"_texts"},
    {"_log"},
    {"_descriptor"},
    {"_shuttle", "_shuttle_py"},
    {"_impl"},
    {"_credentials"},
    {"_callers"},
    {"_wire"},
    {"_sockets"},
    {"_janitor"},
    {"_doorman"},
    {"_keeper"},
    {"_manifest"},
    {"_memory"},
    {"_segments"},
    {"_shelf"},
    {"_channel"},
    {"_shares"},
    {"_unread"},
    {"_opening"},
    {"_names"},
    {"_guests"},
    {"_gate"},
    {"_door"},
    {"_handle"},
    {"door"},
    {"_info"},
    {"_objects"},
    {"_exceptions"},
    {"_passing"},
    {"_keys"},
    {"_data"},
    {"_kinds"},
    {"_marshal"},
    {"_threads"},
    {"_call"},
    {"_endpoint"},
    {"_progress"},
    {"_workers"},
    {"_proxy"},
    {"_doors"},
    {"_streams"},
    {"_server"},
    {"_aio"},
    {"_executor"},
    {"_cli"},
    {"__init__"},
    {"__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

#: What a module must not import, directly: bytes and events in, bytes and events out.
FORBIDDEN = {
    "_wire": {"socket", "time", "threading", "select"},
    "_marshal": {"socket", "threading", "select"},
    "_exceptions": {"socket", "threading", "select"},
    "_data": {"socket", "threading", "select", "pickle", "cloudpickle"},
}

MODULES = sorted(PACKAGE.glob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The full dotted names of what is imported at run time, with the line."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"doorpool.{base}".rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def own_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The modules of the package that are imported at run time."""
    for name, line in imported(tree):
        first, _, rest = name.partition(".")
        if first == "doorpool":
            module = rest.partition(".")[0]
            yield (module if module in HEIGHT else "__init__"), line


@every_module
def test_every_module_has_its_place(path):
    assert path.stem in HEIGHT


@every_module
def test_a_module_imports_only_from_the_layers_beneath_it(path):
    height = HEIGHT.get(path.stem, -1)
    upward = [
        f"{path.name}:{line} imports {module}"
        for module, line in own_modules(parse(path))
        if HEIGHT[module] >= height
    ]
    assert upward == []


@every_module
def test_what_is_bytes_only_knows_no_socket_thread_or_clock(path):
    forbidden = FORBIDDEN.get(path.stem, set())
    found = [
        f"{path.name}:{line} imports {name}"
        for name, line in imported(parse(path))
        if name.partition(".")[0] in forbidden
    ]
    assert found == []


def uses(name: str) -> list[str]:
    """Where a name is used, as an attribute, a variable or an import; not in comments or docstrings."""
    return [
        f"{path.name}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.Name) and node.id == name)
        or (isinstance(node, ast.alias) and name in (node.name, node.asname))
    ]


def test_one_place_in_the_source_unpickles():
    places = {
        place.partition(":")[0] for name in ("loads", "Unpickler", "_Unpickler") for place in uses(name)
    }
    assert places <= {"_marshal.py"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("recv_fds", id="recv_fds: ignores its flags, descriptors arrive inheritable"),
        pytest.param("send_fds", id="send_fds: ignores its flags"),
        pytest.param("umask", id="umask: of the whole process, other threads would see it"),
    ],
)
def test_is_used_nowhere(name):
    assert uses(name) == []


def test_the_scan_sees_imports_of_every_form():
    source = """
import doorpool.door
from doorpool import _wire, Proxy
from doorpool._errors import DoorError
from . import _names
from ._marshal import dump
if TYPE_CHECKING:
    from doorpool._server import Server
def late():
    from doorpool import _keeper
"""
    found = [module for module, _ in own_modules(ast.parse(source))]
    assert found == ["door", "_wire", "__init__", "_errors", "_names", "_marshal", "_keeper"]
