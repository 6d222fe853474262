"""The sampling settings of llama-cpp-python as options of a command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import UsageError
from .numbers import SHARE, TEMPERATURE, number

# option: (type, argument of create_completion, default there, help)
TABLE: dict[str, tuple[Any, str, Any, str]] = {
    "--temp": (TEMPERATURE, "temperature", 0.8, "temperature; 0: always the most probable token"),
    "--top-k": (number(int, 0), "top_k", 40, "draw from the k most probable tokens"),
    "--top-p": (SHARE, "top_p", 0.95, "draw from the most probable tokens that sum up to p"),
    "--min-p": (SHARE, "min_p", 0.05, "no tokens below this share of the most probable one's probability"),
    "--typical-p": (SHARE, "typical_p", 1.0, "locally typical sampling"),
    "--repeat-penalty": (
        number(float, 0, 1e6, above=True),
        "repeat_penalty",
        1.0,
        "divides the logits of late tokens",
    ),
    "--frequency-penalty": (
        number(float, -1e6, 1e6),
        "frequency_penalty",
        0.0,
        "per earlier occurrence of a token",
    ),
    "--presence-penalty": (
        number(float, -1e6, 1e6),
        "presence_penalty",
        0.0,
        "once for a token that occurred",
    ),
    "--mirostat": (int, "mirostat_mode", 0, "Mirostat version, 1 or 2; 0: off"),
    "--mirostat-tau": (number(float, 0), "mirostat_tau", 5.0, "its target surprise"),
    "--mirostat-eta": (number(float, 0), "mirostat_eta", 0.1, "its learning rate"),
}

ALIASES = {"--temp": ("--temperature",)}


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """`--temp`, `--top-k` and their kin; `sampling` takes the result.

    Args:
        defaults: other defaults than llama-cpp-python's, by argument of `create_completion`.
    """
    group = parser.add_argument_group("sampling")
    for option, (kind, name, default, text) in TABLE.items():
        value = defaults.get(name, default)
        group.add_argument(
            option,
            *ALIASES.get(option, ()),
            dest=name,
            type=kind,
            default=value,
            metavar="X",
            help=f"{text} (default: {value})",
        )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text"
    )
    group.add_argument(
        "--grammar", type=Path, metavar="FILE", help="file with a GBNF grammar that answers follow"
    )
    group.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="file with a JSON schema that answers follow"
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `create_completion` from the options.

    Raises:
        UsageError: a grammar or schema that cannot be used.
    """
    settings = {name: getattr(args, name) for _, name, _, _ in TABLE.values()}
    if settings["mirostat_mode"] not in (0, 1, 2):
        raise UsageError(f"--mirostat is {settings['mirostat_mode']}, it must be 0, 1 or 2")
    return settings | {"stop": list(args.stop)}
