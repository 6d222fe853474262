"""The text of docs/options.md, from the table that the commands' options are made of."""

from __future__ import annotations

from collections.abc import Iterator

from entmtp.options.model import TITLES
from entmtp.options.table import OPTIONS, Option
from entmtp.serve.settings import setting

INTRO = """# Options of a model

Generated from `python/entmtp/options/table.py` by `python docs/make_api.py`; do not edit.

What `entmtp.Llama` takes beyond `llama_cpp.Llama` is an option of the commands that load a model, and a setting of
`serve`: there an option too (`--typical-epsilon`, or `--typical_epsilon`), an environment variable (`TYPICAL_EPSILON`)
or a key of the config file. `tune`, `demo` and `bench` have no options for
drafting, `train` those of the model, threads and devices alone. Where llama-cpp-python's server
has the setting, as `n_ctx`, its default is the one of that server.

In Python, `draft="entmtp"` drafts and `draft=None` decodes plainly; the commands draft, with heads or without, unless
`--draft off`. `tune` and `demo` take shorter contexts than the others where none is given.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def row(option: Option) -> str:
    """A line of the table."""
    words = [f"`{_cell(flag)}`" for flag in option.spellings]
    if option.type is bool:
        words += [f"`{option.words(False)[0]}`"]
    arguments = ", ".join(f"`{name}`" for name in option.arguments)
    usual = _cell(option.usual) or "none"
    return f"| {', '.join(words)} | {arguments} | `{setting(option)}` | {_cell(option.help)} | {usual} |"


def page() -> Iterator[str]:
    """Lines of the page."""
    yield INTRO
    for group, title in TITLES.items():
        yield from (f"## {title.capitalize()}", "")
        yield "| option | argument of `Llama` | setting of `serve` | | without it |"
        yield "| --- | --- | --- | --- | --- |"
        yield from (row(option) for option in OPTIONS if option.group == group)
        yield ""
