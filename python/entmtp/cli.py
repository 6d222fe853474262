"""`entmtp <command>`, also `python -m entmtp <command>`: one door to all commands."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module
from typing import NamedTuple

from .common.streams import run_command


class Command(NamedTuple):
    module: str
    does: str
    example: str


# imported when they are asked for: --help needs none of them
COMMANDS = {
    "chat": Command("chat", "talk with a model in the terminal", "entmtp chat -m model.gguf"),
    "generate": Command("generate", "answer prompts from the command line, stdin or a JSONL file",
                        'entmtp generate -m model.gguf "def fibonacci(n):"'),
    "serve": Command("serve", "an OpenAI-compatible server", "entmtp serve -m model.gguf --port 8000"),
    "rpc-server": Command("rpc_server", "compute layers of a model that another machine runs",
                          "entmtp rpc-server --host 192.168.1.7"),
    "convert": Command("convert", "turn published Medusa or Hydra heads into a heads file",
                       "entmtp convert hf:owner/heads --base model.gguf"),
    "train": Command("train", "train heads for your own model",
                     "entmtp train --model model.gguf --preset quick -o heads.gguf"),
    "tune": Command("tune", "find trees for your task, model and machine",
                    "entmtp tune --model model.gguf --heads heads.gguf --prompts my.jsonl"),
    "bench": Command("bench", "measure plain decoding, static trees and EntMTP side by side",
                     "entmtp bench run --model model.gguf --heads heads.gguf --prompts my.jsonl"),
    "demo": Command("demo", "all of it on a small bundled model", "entmtp demo"),
    "doctor": Command("doctor", "check this installation, a model and its heads; say what to mend",
                      "entmtp doctor -m model.gguf"),
}  # fmt: skip


def usage() -> str:
    """The text of --help."""
    rows = "".join(f"  {name:<12}{c.does}\n  {'':<12}  {c.example}\n" for name, c in COMMANDS.items())
    return f"""usage: entmtp COMMAND [OPTION...]

Local language models faster, with the same output: a tree of tokens is guessed, the model checks it in one pass.

commands:
{rows}
options:
  -h, --help     this text; entmtp COMMAND --help for a command's own
  --version      versions of EntMTP and llama.cpp, backends and CPU kernels

A model is a GGUF file or hf:owner/repo[/file][@revision]. Try it without one: entmtp chat
"""


def no_device(backend: str) -> str:
    return "its devices are on other machines (--rpc)" if backend == "RPC" else "no device found"


def version() -> str:
    """Ours, llama.cpp's, and what the libraries can use."""
    from .common.version import __version__
    from .native.backends import backends, llama_commit

    lines = [f"entmtp {__version__}"]
    try:
        lines.append(f"llama.cpp {llama_commit()}")
        from .native import kernels

        kernels.use()
        for backend, devices in backends().items():
            names = ", ".join(f"{d.name} ({d.description})" for d in devices)
            lines.append(f"backend {backend}: {names or no_device(backend)}")
        lines.append(f"CPU kernels: {kernels.current()} (of {', '.join(kernels.available())})")
    except (ImportError, OSError, ValueError) as e:
        lines.append(str(e))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    return run_command(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    if not argv:
        print(usage(), file=sys.stderr, end="")
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name == "--version":
        print(version())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"entmtp: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        module = import_module(f".{COMMANDS[name].module}", __package__)
    except ImportError as e:
        mend = "run entmtp doctor" if name != "doctor" else "install EntMTP again: pip install ."
        print(f"entmtp {name}: {e}; {mend}", file=sys.stderr)
        return 1
    return int(module.main(rest))
