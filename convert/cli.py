"""`entmtp convert`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from entmtp.common.errors import ConvertError, ModelError, UsageError
from entmtp.common.files import check_output
from entmtp.convert.cheap import cheapen
from entmtp.convert.draft_vocab import DraftVocab, make_vocab
from entmtp.convert.inspect import inspect_heads, print_heads
from entmtp.convert.layout import plan_heads
from entmtp.convert.writer import OUTTYPES, Origin, Value, other_types, write_heads
from entmtp.models import hub
from entmtp.models.base import BaseModel, read_base
from entmtp.models.checkpoint import open_checkpoint
from entmtp.models.names import resolve

EPILOG = """examples:
  # heads from the Hugging Face Hub, for a base model on disk
  entmtp convert hf:FasterDecoding/medusa-vicuna-7b-v1.3 --base vicuna-7b-v1.3-q4_k_m.gguf
  # a folder with config.json and hydra_lm_head.pt, heads in 4 bits
  entmtp convert ./hydra-vicuna-7b --base vicuna-7b.gguf --outfile hydra-q4_0.gguf --outtype q4_0
  # smaller and faster: 4 bits, and only the frequent tokens of a text (or of what the model itself writes)
  entmtp convert ./hydra-vicuna-7b --base vicuna-7b.gguf --outtype q4_k --draft-vocab auto --draft-text my.txt
  # what is in a heads file?
  entmtp convert --inspect hydra-q4_0.gguf

The base model is only read for its vocabulary and shapes: any quantisation of it will do. With --draft-vocab and no
--draft-text it also writes a text of 8192 tokens, so it must run here.
HF_TOKEN in the environment gives access to private and gated repositories."""


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    outfile: Path
    arch: str  # "medusa" or "hydra"
    n_heads: int
    outtype: str
    notes: tuple[str, ...]  # what the user should know, one sentence each
    draft_vocab: DraftVocab | None = None  # the draft vocabulary, if it was chosen here


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="entmtp convert",
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
    parser.add_argument(
        "--draft-vocab",
        type=_vocab_size,
        metavar="N|auto|none",
        help="let heads draft only the N most frequent tokens, which makes them smaller and faster and leaves the text "
        "as it is; auto: as many as 99 %% of a text's tokens are, in steps of 256; none (the default): all",
    )
    parser.add_argument(
        "--draft-text",
        nargs="+",
        metavar="FILE",
        help="text, or prompts in .jsonl, to count tokens in (default: the base model writes some)",
    )
    parser.add_argument(
        "--share-lm-head",
        action="store_true",
        help="store no projections: the base model's serves; for heads that were trained so",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of an hf: checkpoint")
    parser.add_argument(
        "--inspect", metavar="heads.gguf", help="check and print a heads file, and convert nothing"
    )
    return parser


def _vocab_size(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, auto or none")
    return int(text)


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not (show and console.is_terminal), transient=True
    ) as bar:
        bar.add_task("converting", total=total)
        yield bar


def _draft_vocab(
    wanted: Sequence[int] | int | str | None,
    files: Sequence[str | os.PathLike[str]],
    model: BaseModel,
    progress: bool,
) -> tuple[Sequence[int] | None, DraftVocab | None]:
    """The tokens of a draft vocabulary, and how they were chosen if they were chosen here."""
    if wanted is None or not isinstance(wanted, (int, str)):
        return wanted, None
    if isinstance(wanted, str) and wanted != "auto":
        raise ConvertError(f"draft_vocab {wanted!r} is not known; give tokens, a number of tokens, or 'auto'")
    with _progress(1, progress) as bar:
        task = bar.task_ids[0]
        chosen = make_vocab(
            model,
            None if isinstance(wanted, str) else wanted,
            [Path(file) for file in files],
            lambda what, done, total: bar.update(task, completed=done, total=total, description=what),
        )
    print(
        f"draft vocabulary: {len(chosen.tokens):,} of {model.n_vocab:,} tokens, by {chosen.source}; they are "
        f"{chosen.coverage:.1%} of the tokens of text not used to choose them",
        file=sys.stderr,
    )
    return chosen.tokens.tolist(), chosen


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
    *,
    draft_vocab: Sequence[int] | int | str | None = None,
    draft_text: Sequence[str | os.PathLike[str]] = (),
    share_lm_head: bool = False,
    provenance: Mapping[str, Value] | None = None,
) -> Converted:
    """Convert a checkpoint's heads to a heads file for `base`. Notes go to stderr.

    Args:
        checkpoint: a folder, a weight file beside its config.json, or `hf:owner/repo[/file]`.
        base: a GGUF file, or an `hf:` name too.
        outtype: a key of `entmtp.convert.writer.OUTTYPES`, or "auto" (as the base model).
        draft_vocab: the base tokens that can be drafted; or how many, the most frequent ones of `draft_text`; or
            "auto", as many as cover 99 % of it. None: all tokens.
        draft_text: files of text, or of prompts (.jsonl). Without any, the base model writes text of its own.
        share_lm_head: store no projections; the base model's serves. For heads that were trained so, which may lack
            projections in their checkpoint.
        provenance: becomes the keys `entmtp.train.<name>`: how the heads were trained.

    Raises:
        ConvertError: it cannot be done; the text is one sentence.
        OSError: a file cannot be read or written.
        No output is left then.
    """
    if outtype != "auto" and outtype not in OUTTYPES:
        raise ConvertError(f"outtype {outtype!r} is not known; use one of {', '.join(OUTTYPES)} or auto")
    source = os.fspath(checkpoint)
    base = _base_file(base)
    model = read_base(base)
    opened = open_checkpoint(source, revision, progress)
    out = Path(outfile) if outfile else Path(f"{opened.name.rpartition('/')[2] or 'draft'}-heads.gguf")
    tensors = {Path(tensor.storage.path) for tensor in opened.tensors.values()}
    configs = {path.parent / "config.json" for path in tensors}
    try:
        check_output(out, [base, *tensors, *configs, *draft_text], "--outfile")
    except UsageError as e:
        raise ConvertError(str(e)) from None
    heads = plan_heads(opened.tensors, opened.config, model, opened.label, share_lm_head)
    tokens, vocab = _draft_vocab(draft_vocab, draft_text, model, progress)
    heads = cheapen(heads, model, tokens, share_lm_head)
    chosen = model.outtype if outtype == "auto" else outtype
    if other := other_types(heads, chosen):
        heads.notes.append(other)
    for note in heads.notes:
        print(f"note: {note}", file=sys.stderr)
    with _progress(sum(source.size for _, source in heads.tensors), progress) as bar:
        task = bar.task_ids[0]
        write_heads(
            out,
            heads,
            Origin(opened.name, opened.license, opened.url),
            model,
            chosen,
            lambda name, n: bar.update(task, advance=n, description=name),
            provenance,
        )
    return Converted(out, heads.arch, heads.n_heads, chosen, tuple(heads.notes), vocab)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.inspect is not None:
        cheap = args.draft_vocab or args.draft_text or args.share_lm_head
        if args.checkpoint or args.base or args.outfile or args.revision or args.outtype != "auto" or cheap:
            parser.error("--inspect takes no checkpoint and no other option")
    elif not args.checkpoint or not args.base:
        parser.error("CHECKPOINT and --base are needed (or --inspect heads.gguf); --help shows examples")
    elif args.revision and not args.checkpoint.startswith("hf:"):
        parser.error("--revision goes with an hf: checkpoint only")
    elif args.draft_text and args.draft_vocab is None:
        parser.error("--draft-text goes with --draft-vocab N or --draft-vocab auto")
    try:
        if args.inspect is not None:
            print_heads(inspect_heads(args.inspect))
            return 0
        done = convert(
            args.checkpoint,
            args.base,
            args.outfile,
            args.outtype,
            args.revision,
            draft_vocab=args.draft_vocab,
            draft_text=args.draft_text or (),
            share_lm_head=args.share_lm_head,
        )
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
