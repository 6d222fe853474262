"""A mutation check: small faults are put into a copy of the package, one at a time, and the tests must notice.

    python tests/mutation.py bank                # 300 mutants of python/entmtp/bank, drawn with seed 1
    python tests/mutation.py bank --only tree.py:71:38-51:compare,tree.py:55:8-22:drop

docs/mutation.md has the figures. Strings, annotations, imports and assertions are not mutated.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import site
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# the fast tests that cover a package, likely killers first
TESTS = {
    "bank": [
        "policy/test_bank.py", "policy/test_costs.py", "policy/test_calibration.py", "policy/test_traces.py",
        "policy/test_replay.py::test_broken_calibrations_name_the_field",
    ],
    "convert": [
        "convert/test_convert_layouts.py", "convert/test_convert_cheap.py", "convert/test_convert_inspect.py",
        "convert/test_convert_faults.py", "convert/test_convert_reference.py",
    ],
    "measure": [
        "policy/test_bench.py", "policy/test_search.py", "policy/test_timing.py", "policy/test_replay.py",
        "policy/test_tune.py",
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
    if isinstance(node, droppable) and not (isinstance(node, ast.Expr) and is_text(node.value)):
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


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """Every mutant of a module: an id, `file:line:columns:mutation`, and its source."""
    tree = ast.parse(path.read_text("utf-8"))
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
            yield f"{path.name}:{node.lineno}:{node.col_offset}-{node.end_col_offset}:{what}", source


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


def passed(folder: Path, tests: list[str], seconds: float) -> str:
    """Run the tests in a child process: passed, failed or timeout."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            os.dup2(null, fd)
        import pytest

        os.chdir(folder)
        base = folder / "tmp"
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={base}", *tests])
        os._exit(int(code))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "passed" if status == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", choices=TESTS)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="ids of mutants, with commas between them")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory(prefix="entmtp-mutants-") as folder:
            python = lay_out(Path(folder))
            environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
            return os.spawnve(os.P_WAIT, python, [str(python), *sys.argv, "--in", folder], environment)

    # what no mutant changes is imported once
    import gguf  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401

    tests = [str(args.folder / "tests" / name) for name in TESTS[args.package]]
    begun = time.monotonic()
    if passed(args.folder, tests, 600) != "passed":
        raise SystemExit("the tests do not pass without a mutant")
    patience = 5 * (time.monotonic() - begun) + 20

    files = {p.name: p for p in sorted((args.folder / "entmtp" / args.package).glob("*.py"))}
    found = [(id, source) for path in files.values() for id, source in mutants(path)]
    if args.only:
        chosen = [m for m in found if m[0] in args.only.split(",")]
    else:
        chosen = random.Random(args.seed).sample(found, min(args.sample, len(found)))
    survivors = []
    for n, (id, source) in enumerate(chosen, 1):
        path = files[id.partition(":")[0]]
        original = path.read_text("utf-8")
        path.write_text(source, "utf-8")
        result = passed(args.folder, tests, patience)
        path.write_text(original, "utf-8")
        if result == "passed":
            survivors.append(id)
        told = {"passed": "SURVIVED", "failed": "killed", "timeout": "killed by time"}[result]
        print(f"{n}/{len(chosen)} {id} {told}", flush=True)
    print(f"{args.package}: {len(found)} mutants, {len(chosen)} tried, {len(chosen) - len(survivors)} killed")
    print("survivors:", *survivors, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
