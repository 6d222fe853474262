"""A mutation check: small faults are put into a copy of the package, one at a time, and the tests must notice.

    python tests/mutation.py bank                # 300 mutants of python/entmtp/bank, drawn with seed 1
    python tests/mutation.py bank --keep bank.jsonl --minutes 7     # so long, and go on from there the next time
    python tests/mutation.py bank --only tree.py:71:38-51:compare,tree.py:55:8-22:drop

First all tests run once, to see which of them come by which lines. A mutant meets those that come by its own, the quick
ones first. docs/mutation.md has the figures. Strings, annotations, imports and assertions are not mutated.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import site
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# the fast tests that cover a package
TESTS = {
    "bank": [
        "policy/test_bank.py", "policy/test_costs.py", "policy/test_calibration.py", "policy/test_traces.py",
        "policy/test_texts.py",
        "policy/test_replay.py::test_broken_calibrations_name_the_field",
    ],
    "convert": [
        "convert/test_convert_layouts.py", "convert/test_convert_cheap.py", "convert/test_convert_inspect.py",
        "convert/test_convert_faults.py", "convert/test_convert_reference.py",
    ],
    "measure": [
        "policy/test_fitting.py", "policy/test_search.py", "policy/test_timing.py", "policy/test_timing_known.py",
        "policy/test_bench.py", "policy/test_rounding.py", "policy/test_baselines.py", "policy/test_bench_serve.py",
        "policy/test_replay.py",
        "policy/test_tune.py", "policy/test_learning.py", "policy/test_mislead.py",
        "commands/test_chat_parts.py",
    ],
}  # fmt: skip

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}  # fmt: skip

Change = tuple[str, Callable[[], ast.AST]]  # the mutation's name, and what stands in place of the node


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def swapped(op: ast.AST) -> ast.AST:
    return SWAPS[type(op)]()


def with_field(node: ast.AST, **fields: object) -> Callable[[], ast.AST]:
    """A copy of a node in which some fields are others."""

    def make() -> ast.AST:
        changed = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed

    return make


def one_more(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.Add(), ast.Constant(1))


def changes(node: ast.AST) -> Iterator[Change]:
    """The mutants of one node."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], swapped(op), *node.ops[i + 1 :]]
            yield f"compare{i or ''}", with_field(node, ops=ops)
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPS:
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
        if not any(map(is_text, sides)):
            yield "arithmetic", with_field(node, op=swapped(node.op))
    if isinstance(node, ast.BoolOp):
        yield "and-or", with_field(node, op=swapped(node.op))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "unary", lambda: node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        is_flag = isinstance(node.value, bool)
        yield "constant", with_field(node, value=not node.value if is_flag else node.value + 1)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        for value in (True, False):
            if not (value and isinstance(node, ast.While)):  # it would never end
                yield f"if-{value}".lower(), with_field(node, test=ast.Constant(value))
    if isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield "return-none", with_field(node, value=ast.Constant(None))
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None and not isinstance(bound, ast.Constant):
                yield f"slice-{name}", with_field(node, **{name: one_more(bound)})
    droppable = ast.Assign | ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Expr
    if isinstance(node, droppable) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        yield "drop", lambda: ast.copy_location(ast.Pass(), node)


SKIPPED = {  # fields that hold no code that runs, or only text
    "annotation", "returns", "decorator_list", "type_params",
}  # fmt: skip


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where a child hangs: parent, field and index in a list; parents before children."""
    for name, value in ast.iter_fields(node):
        if name in SKIPPED:
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Assert):
                continue
            yield node, name, i
            yield from places(child)


class Mutant(NamedTuple):
    id: str  # file:line:columns:mutation
    lines: tuple[int, int]  # first and last of those by which a test comes that may notice
    source: str  # the whole module's


def spans(tree: ast.Module) -> dict[ast.AST, tuple[int, int]]:
    """The lines of Mutant of every node: its statement's, without what that holds; where it is run on import all of the
    function whose default it is, or of the module."""
    found: dict[ast.AST, tuple[int, int]] = {}

    def visit(node: ast.AST, lines: tuple[int, int], is_in_function: bool) -> None:
        is_function = isinstance(node, ast.FunctionDef)
        if isinstance(node, ast.stmt) and (is_in_function or is_function):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body and is_in_function else node.end_lineno or node.lineno
            lines = node.lineno, max(node.lineno, last)
        found[node] = lines
        for child in ast.iter_child_nodes(node):
            visit(child, lines, is_in_function or is_function)

    visit(tree, (1, sys.maxsize), False)
    return found


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module."""
    tree = ast.parse(path.read_text("utf-8"))
    lines = spans(tree)
    for parent, name, i in places(tree):
        field = getattr(parent, name)
        node = field if i is None else field[i]
        for what, make in changes(node):
            for put in (make(), node):
                if i is None:
                    setattr(parent, name, put)
                else:
                    field[i] = put
                if put is not node:
                    source = ast.unparse(ast.fix_missing_locations(tree))
            id = f"{path.name}:{node.lineno}:{node.col_offset}-{node.end_col_offset}:{what}"
            yield Mutant(id, lines[node], source)


class Watch:
    """A pytest plugin: which tests come by which lines of a package, themselves or by a fixture that they share with
    others, and how long they take."""

    def __init__(self, package: Path):
        self.prefix = str(package) + os.sep
        self.now = ""  # a test's or a shared fixture's name
        self.users: dict[str, set[str]] = {}  # tests by the fixtures that they use
        self.seen: set[tuple[str, int, str]] = set()  # file, line, test or fixture
        self.seconds: dict[str, float] = {}

    def lines(self) -> dict[str, dict[str, list[str]]]:
        """Names of tests, by file and line."""
        found: dict[str, dict[str, list[str]]] = {}
        for file, line, name in self.seen:
            by_line = found.setdefault(Path(file).name, {})
            by_line.setdefault(str(line), []).extend(self.users.get(name, (name,)))
        return found

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.prefix):
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno, self.now))
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Any:
        before = self.now
        if fixturedef.scope != "function":
            self.now = fixturedef.argname
        try:
            return (yield)
        finally:
            self.now = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Any:
        self.now, start = item.nodeid, time.monotonic()
        for fixture in item.fixturenames:
            self.users.setdefault(fixture, set()).add(item.nodeid)
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - start


def lay_out(folder: Path) -> Path:
    """Copy the package and its tests as an installation has them; returns the Python that finds them there."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "python" / "entmtp", folder / "entmtp", ignore=ignore)
    for name in ("convert", "trees"):
        shutil.copytree(ROOT / name, folder / "entmtp" / name, ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    # an environment of its own: that of the editable install would find the sources first
    venv.create(folder / "venv", symlinks=os.name != "nt")
    packages = next((folder / "venv").glob("**/site-packages"))
    (packages / "copy.pth").write_text("\n".join([str(folder), *site.getsitepackages()]))
    os.environ.setdefault("ENTMTP_LIB_PATH", str(Path(site.getsitepackages()[0]) / "entmtp" / "lib"))
    return next((folder / "venv").glob("*/python"))


def passed(
    folder: Path, tests: list[str], seconds: float, plugin: object = None, then: Callable[[], None] | None = None
) -> str:  # fmt: skip
    """Run the tests in a child process: passed, failed or timeout. `then` is called in it, when they passed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2) if plugin is None else ():  # without a mutant, what fails is to be seen
            os.dup2(null, fd)
        os.chdir(folder)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={folder / 'tmp'}"]
        code = int(pytest.main([*options, *tests], [plugin] if plugin else None))
        if then and code == 0:
            then()
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "passed" if status == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


class Tests:
    """The tests of a package, and which of them come by which of its lines."""

    def __init__(self, folder: Path, package: str, kept: Path):
        """Raises SystemExit where a test fails without a mutant. What was seen is kept in a file."""
        self.folder = folder
        files = [folder / "entmtp" / package, folder / "tests"]
        content = [p.read_bytes() for f in files for p in sorted(f.rglob("*.py"))]
        self.key = hashlib.sha256(b"".join(content)).hexdigest()
        if not kept.exists() or json.loads(kept.read_text("utf-8"))["key"] != self.key:
            watch = Watch(folder / "entmtp" / package)

            def write() -> None:
                seen = {"key": self.key, "lines": watch.lines(), "seconds": watch.seconds}
                kept.write_text(json.dumps(seen), "utf-8")

            names = [str(Path("tests") / name) for name in TESTS[package]]
            if passed(folder, names, 1800, watch, then=write) != "passed":
                raise SystemExit("the tests do not pass without a mutant")
        seen = json.loads(kept.read_text("utf-8"))
        self.lines, self.seconds = seen["lines"], seen["seconds"]

    def notice(self, mutant: Mutant) -> str:
        """What became of a mutant that has been written: passed (it lives), failed or timeout."""
        by_line = self.lines.get(mutant.id.partition(":")[0], {})
        first, last = mutant.lines
        names = {name for line, names in by_line.items() if first <= int(line) <= last for name in names}
        if not names:
            return "passed"
        chosen = sorted(names, key=self.seconds.__getitem__)
        return passed(self.folder, chosen, 15 + 3 * sum(self.seconds[n] for n in chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", choices=TESTS)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="ids of mutants, with commas between them")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE.jsonl",
        help="what became of each; what is in it is not tried again, but for survivors of other tests",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if args.folder is None:
        with tempfile.TemporaryDirectory(prefix="entmtp-mutants-") as folder:
            python = lay_out(Path(folder))
            environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
            return os.spawnve(os.P_WAIT, python, [str(python), *sys.argv, "--in", folder], environment)

    import_what_stays()
    keep = args.keep or args.folder / "kept.jsonl"
    tests = Tests(args.folder, args.package, keep.with_suffix(".lines.json"))
    files = {p.name: p for p in sorted((args.folder / "entmtp" / args.package).glob("*.py"))}
    found = [mutant for path in files.values() for mutant in mutants(path)]
    if args.only:
        chosen = [m for m in found if m.id in args.only.split(",")]
    else:
        chosen = random.Random(args.seed).sample(found, min(args.sample, len(found)))
    lines = keep.read_text("utf-8").splitlines() if keep.exists() else []
    known = {(k["id"], k["source"]): k for k in map(json.loads, lines)}
    told = {"passed": "SURVIVED", "failed": "killed", "timeout": "killed by time"}
    results: dict[str, str] = {}
    for n, mutant in enumerate(chosen, 1):
        source = hashlib.sha256(mutant.source.encode()).hexdigest()
        before = known.get((mutant.id, source))
        if before and (before["result"] != "passed" or before["tests"] == tests.key):
            results[mutant.id] = before["result"]
            continue
        if time.monotonic() > end:
            break
        path = files[mutant.id.partition(":")[0]]
        original = path.read_text("utf-8")
        path.write_text(mutant.source, "utf-8")
        results[mutant.id] = result = tests.notice(mutant)
        path.write_text(original, "utf-8")
        with keep.open("a", encoding="utf-8") as file:
            print(
                json.dumps({"id": mutant.id, "source": source, "result": result, "tests": tests.key}),
                file=file,
            )
        print(f"{n}/{len(chosen)} {mutant.id} {told[result]}", flush=True)
    survivors = [id for id, result in results.items() if result == "passed"]
    n_tried, n_killed = len(results), len(results) - len(survivors)
    print(f"{args.package}: {len(found)} mutants, {n_tried} of {len(chosen)} tried, {n_killed} killed")
    print("survivors:", *survivors, sep="\n  ")
    return 0


def import_what_stays() -> None:
    """Import what no mutant changes once, before children are made: numpy, llama-cpp-python and the native library."""
    import gguf  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401

    import entmtp  # noqa: F401

    for name in [n for n in sys.modules if n.partition(".")[0] == "entmtp"]:
        del sys.modules[name]


if __name__ == "__main__":
    sys.exit(main())
