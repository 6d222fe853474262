"""Write the pages that are made from the code: `python docs/make_api.py [--check]`.

docs/python-api.md comes from the docstrings of the public names, docs/options.md from the table of options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import make_options

DOCS = Path(__file__).parent

INTRO = """# Python API

Generated from the docstrings by `python docs/make_api.py`; do not edit.

`entmtp.Llama` is a `llama_cpp.Llama`: what is not listed here is
[llama-cpp-python's own API](https://llama-cpp-python.readthedocs.io/en/latest/api-reference/).
Import `entmtp` before `llama_cpp`: a process can hold one llama.cpp only, and this package brings its own.
"""

# module: names in the order of the page
PUBLIC = {
    "entmtp": (
        "Llama",
        "Engine",
        "Stream",
        "DraftStats",
        "Bank",
        "Tree",
        "EntmtpError",
        "ModelError",
        "BankError",
        "Cancelled",
        "BusyError",
        "ServerError",
    ),
    "entmtp.models": ("resolve", "find_heads", "demo_files"),
    "entmtp.kernels": ("available", "current", "use", "using"),
    "entmtp.convert": ("convert", "inspect_heads", "ConvertError"),
    "entmtp.tune": ("tune",),
    "entmtp.cache": ("cache_folder",),
}


# members of a class that are its bases'
INHERITED = {
    "Llama": (
        "create_completion",
        "create_chat_completion",
        "set_trees",
        "draft_stats",
        "reset_draft_stats",
        "set_threads",
    ),
}


def markdown(docstring: str) -> Iterator[str]:
    """A docstring's sections ("Args:", "Raises:", ...) as lists; indented code and examples as code."""
    section, code = "", False
    for line in [*docstring.splitlines(), ""]:
        is_code = (
            line.startswith(("    ", ">>>")) if not section else section == "Examples" and bool(line.strip())
        )
        if code and not is_code:
            yield "```"
            yield ""
        if is_code and not code:
            yield ""
            yield "```python"
        code = is_code
        if is_code:
            yield re.sub(r"^(    )?(>>> |\.\.\. )?", "", line)
        elif m := re.fullmatch(r"(Args|Attributes|Raises|Returns|Examples):", line):
            section = m[1]
            yield "" if section == "Examples" else f"**{section}**"
            yield ""
        elif section and (m := re.match(r"    ([\w*][\w*, ]*): (.*)", line)):
            names = ", ".join(f"`{name.strip()}`" for name in m[1].split(","))
            yield f"- {names}: {m[2]}"
        elif section and line.startswith("    "):
            yield "  " + line.strip()
        else:
            section = section if line else ""
            yield line


def signature(name: str, thing: Any) -> str:
    """The call as one would write it, without self and annotations' quotes."""
    try:
        s = inspect.signature(thing)
    except (ValueError, TypeError):
        return name
    parameters = [p for p in s.parameters.values() if p.name != "self"]
    shown = []
    starred = False
    for p in parameters:
        if p.kind == p.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        starred = starred or p.kind == p.VAR_POSITIONAL
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.default is p.empty:
            shown.append(mark + p.name)
        else:  # a function's repr holds its address, which is another one each time
            default = (
                json.dumps(p.default)
                if isinstance(p.default, str)
                else getattr(p.default, "__name__", repr(p.default))
            )
            shown.append(
                f"{p.name}=" + ("..." if "factory" in default or default.startswith("_") else default)
            )
    text = f"{name}({', '.join(shown)})"
    return text if len(text) < 110 else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def entry(name: str, thing: Any, level: int) -> Iterator[str]:
    """Heading, signature and docstring of a class, function or property, then a class's own members."""
    yield f"{'#' * level} `{name.rpartition('.')[2] if level == 3 else name}`"
    yield ""
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not is_error and not isinstance(thing, property):
        yield "```python"
        yield signature(name, thing)
        yield "```"
        yield ""
    yield from markdown(inspect.getdoc(thing) or "")
    if inspect.isclass(thing) and not is_error:
        inherited = {member: inspect.getattr_static(thing, member) for member in INHERITED.get(name, ())}
        for member, value in {**vars(thing), **inherited}.items():
            value = value.__func__ if isinstance(value, staticmethod) else value
            documented = isinstance(value, property) or inspect.isfunction(value)
            if documented and not member.startswith("_") and value.__doc__:
                yield from entry(f"{name}.{member}", value, level + 1)


def page() -> str:
    """The page of the Python API."""
    lines = [INTRO]
    for module, names in PUBLIC.items():
        loaded = import_module(module)
        lines += [f"## {module}", ""]
        if module != "entmtp":
            lines += [(inspect.getdoc(loaded) or "").partition("\n\n")[0], ""]
        for name in names:
            lines += entry(name, getattr(loaded, name), 3)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/make_api.py", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a page is not current"
    )
    args = parser.parse_args(argv)
    stale = 0
    for name, text in {"python-api.md": page(), "options.md": "\n".join(make_options.page())}.items():
        path = DOCS / name
        if not args.check:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            print(f"{path} is not current; run python docs/make_api.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
