"""`python -m entmtp.convert`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from entmtp import hub
from entmtp.errors import ModelError
from entmtp.models import resolve

from .base import read_base
from .checkpoint import open_checkpoint
from .errors import ConvertError
from .inspect import inspect_heads, print_heads
from .layout import Heads, plan_heads
from .writer import OUTTYPES, Origin, write_heads

EPILOG = """examples:
  # heads from the Hugging Face Hub, for a base model on disk
  python -m entmtp.convert hf:FasterDecoding/medusa-vicuna-7b-v1.3 --base vicuna-7b-v1.3-q4_k_m.gguf
  # a folder with config.json and hydra_lm_head.pt, heads in 4 bits
  python -m entmtp.convert ./hydra-vicuna-7b --base vicuna-7b.gguf --outfile hydra-q4_0.gguf --outtype q4_0
  # what is in a heads file?
  python -m entmtp.convert --inspect hydra-q4_0.gguf

The base model is only read for its vocabulary and shapes: any quantisation of it will do.
HF_TOKEN in the environment gives access to private and gated repositories."""


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    outfile: Path
    arch: str  # "medusa" or "hydra"
    n_heads: int
    outtype: str
    notes: tuple[str, ...]  # what the user should know, one sentence each


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.convert",
        description="Convert published Medusa or Hydra draft heads to a GGUF heads file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="folder, .pt or .safetensors file beside its config.json, or hf:owner/repo[/file][@revision]",
    )
    parser.add_argument(
        "--base",
        metavar="BASE.gguf",
        help="GGUF of the model that the heads were trained for, or hf:owner/repo[/file][@revision]",
    )
    parser.add_argument(
        "--outfile", metavar="heads.gguf", help="file to write (default: <checkpoint's name>-heads.gguf here)"
    )
    parser.add_argument(
        "--outtype",
        choices=[*OUTTYPES, "auto"],
        default="auto",
        help="type of the matrices; auto (the default): as the base model's, q8_0 if that is quantised",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of an hf: checkpoint")
    parser.add_argument(
        "--inspect", metavar="heads.gguf", help="check and print a heads file, and convert nothing"
    )
    return parser


@contextmanager
def _progress(heads: Heads, show: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not (show and console.is_terminal), transient=True
    ) as bar:
        bar.add_task("converting", total=sum(source.size for _, source in heads.tensors))
        yield bar


def _base_file(base: str | os.PathLike[str]) -> Path:
    if not os.fspath(base).startswith(hub.PREFIX):
        return Path(base)
    try:
        return resolve(base, say=lambda sentence: print(f"note: {sentence}", file=sys.stderr))
    except ModelError as e:
        raise ConvertError(str(e)) from e


def convert(
    checkpoint: str | os.PathLike[str],
    base: str | os.PathLike[str],
    outfile: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    revision: str | None = None,
    progress: bool = True,
) -> Converted:
    """Convert a checkpoint's heads to a heads file for `base`.

    `checkpoint` is a folder, a weight file beside its config.json, or `hf:owner/repo[/file]`; `base` is a GGUF file or
    an `hf:` name too; `outtype` is "f32",
    "f16", "bf16", "q8_0", "q4_0" or "auto" (as the base model). Notes go to stderr. Raises ConvertError, whose text is
    one sentence, when it cannot be done, and OSError when a file cannot be read or written; no output is left then.
    """
    if outtype != "auto" and outtype not in OUTTYPES:
        raise ConvertError(f"outtype {outtype!r} is not known; use one of {', '.join(OUTTYPES)} or auto")
    source = os.fspath(checkpoint)
    base = _base_file(base)
    model = read_base(base)
    opened = open_checkpoint(source, revision, progress)
    out = Path(outfile) if outfile else Path(f"{opened.name.rpartition('/')[2] or 'draft'}-heads.gguf")
    if not out.parent.is_dir() or out.is_dir():
        raise ConvertError(
            f"{out}: cannot be written, for its folder is missing or it is a folder; change --outfile"
        )
    read = [base, *{tensor.storage.path for tensor in opened.tensors.values()}]
    if out.exists() and any(out.samefile(path) for path in read):
        raise ConvertError(f"{out}: this is one of the files to read; give --outfile another name")
    heads = plan_heads(opened.tensors, opened.config, model, opened.label)
    for note in heads.notes:
        print(f"note: {note}", file=sys.stderr)
    chosen = model.outtype if outtype == "auto" else outtype
    with _progress(heads, progress) as bar:
        task = bar.task_ids[0]
        write_heads(
            out,
            heads,
            Origin(opened.name, opened.license, opened.url),
            model,
            chosen,
            lambda name, n: bar.update(task, advance=n, description=name),
        )
    return Converted(out, heads.arch, heads.n_heads, chosen, tuple(heads.notes))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.inspect is not None:
        if args.checkpoint or args.base or args.outfile or args.revision or args.outtype != "auto":
            parser.error("--inspect takes no checkpoint and no other option")
    elif not args.checkpoint or not args.base:
        parser.error("CHECKPOINT and --base are needed (or --inspect heads.gguf); --help shows examples")
    elif args.revision and not args.checkpoint.startswith("hf:"):
        parser.error("--revision goes with an hf: checkpoint only")
    try:
        if args.inspect is not None:
            print_heads(inspect_heads(args.inspect))
            return 0
        done = convert(args.checkpoint, args.base, args.outfile, args.outtype, args.revision)
        size = done.outfile.stat().st_size / 1e6
        print(f"{done.outfile}: {done.n_heads} {done.arch} heads, {done.outtype}, {size:.1f} MB")
        return 0
    except ConvertError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(
            f"error: {where}{(e.strerror or str(e)).lower()}; check the path, rights and free space",
            file=sys.stderr,
        )
    except MemoryError:
        print("error: not enough memory; close other programs and try again", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 1
