"""The options of `entmtp train`, and from Python: fields of a class, from which the command line is made."""

# ruff: noqa: RUF009  (`option` makes a field)

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.numbers import COUNT, INFINITE, SHARE, THREADS, number

# What --preset sets; what it takes here is said before it starts. Other options given beside it are preferred.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"n_tokens": 350_000, "epochs": 2.0},
    "good": {"n_tokens": 1_300_000, "epochs": 3.0},
    "best": {"n_tokens": 6_000_000, "epochs": 3.0, "arch": "hydra++", "cache_gb": 12.0},
}

EPILOG = """examples:
  # heads from text that the model writes by itself, in a quarter of an hour for a model of 135M on two cores
  entmtp train --model model.gguf --preset quick -o heads.gguf
  # from your documents and prompts
  entmtp train --model model.gguf --preset good --data notes/ prompts.jsonl -o heads.gguf
  # an EAGLE-3 layer, three guesses in a row
  entmtp train --model model.gguf --arch eagle3 --heads 3 -o eagle3.gguf
  # go on after Ctrl-C, a crash or a power cut
  entmtp train --model model.gguf --preset good -o heads.gguf --resume
  # how good are they, and is it worth while to go on?
  entmtp train --model model.gguf -o heads.gguf --report

presets, and about how long they take for a model of 135M on two cores:
  quick  350k tokens of text, 2 epochs                  15 minutes
  good   1.3M tokens of text, 3 epochs                  an hour
  best   6M tokens of text, 3 epochs, --arch hydra++    a night; 12 GB of disk

Disk and memory are said before it starts. Some of the text is held out: the tokens per step in the progress line, of a
chain and of a tree of 16 nodes, are measured on it. Prompts that you benchmark with should not be among the data."""


#
# what a word of the command line means
#


def _count(text: str) -> int:
    unit = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        value = int(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, as 500k or 2M")
    return value


def _vocab(text: str) -> int | str | None:
    return {"auto": "auto", "all": None}[text] if text in ("auto", "all") else COUNT(text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < INFINITE for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of temperatures, as 0,0.8")
    return values


def _switch(text: str) -> bool | None:
    values = {"auto": None, "on": True, "off": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(values)}")
    return values[text]


#
# the options
#

NEEDED: Any = object()  # the default of what has none


def option(
    flag: str,
    group: str,
    help: str,
    default: Any = NEEDED,
    usual: str | None = None,
    type: Callable[[str], Any] | None = None,
    **how: Any,
) -> Any:
    """A field of a dataclass, and its option.

    Args:
        flag: the option, after a short form if it has one: `"-m --model"`.
        group: its heading in --help; empty: none.
        usual: the default in words, if it is not said by its value.
        type: what makes a value of a word; None: a switch.
        how: further arguments of `add_argument`.
    """
    if usual is None and isinstance(default, int | float | str) and default is not False:
        usual = default if isinstance(default, str) else f"{default:g}"
    how |= {"help": help + (f" (default: {usual})" if usual else "")}
    how |= {"type": type} if type else {"action": "store_true"}
    if default is NEEDED:
        return field(metadata={"flags": flag.split(), "group": group, "how": how | {"required": True}})
    return field(default=default, metadata={"flags": flag.split(), "group": group, "how": how})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How heads are trained once there is text: what the loop follows."""

    epochs: float = option("--epochs", "training", "passes over the text", 3.0, type=number(float, 0, 1e6, above=True),
        metavar="N")  # fmt: skip
    batch_tokens: int = option("--batch-tokens", "training", "tokens per step", 4096, type=COUNT, metavar="N")
    lr: float = option("--lr", "training", "highest learning rate", 1.5e-3, type=number(float, 0, above=True))
    schedule: str = option(
        "--schedule", "training", "how it falls", "cosine", type=str, choices=("cosine", "linear")
    )
    warmup: float = 0.03  # share of the steps
    weight_decay: float = option("--weight-decay", "training", "of matrices", 0.01, type=number(float, 0))
    clip: float = option("--clip", "training", "gradient norm, 0: not clipped", 1.0, type=number(float, 0))
    head_decay: float = option(
        "--head-decay", "training", "head i weighs this to the power of i", 0.8, type=number(float, 0)
    )
    noise: float = option(
        "--noise", "training", "noise on hidden states, as in Hydra's appendix", 0.0, type=number(float, 0)
    )
    loss: str = option(
        "--loss", "training", "learn the base model's distribution, or the text's tokens", "teacher", type=str,
        choices=("teacher", "text"),
    )  # fmt: skip
    bf16: bool | None = option(
        "--bf16", "training", "products in bfloat16", None, "auto, where the CPU has them", type=_switch,
        metavar="{auto,on,off}",
    )  # fmt: skip
    seed: int = option("--seed", "training", "of everything that is drawn", 0, type=int)
    eval_every: int | None = option(
        "--eval-every", "training", "steps between two measurements", None, "a tenth of all", type=COUNT,
        metavar="N",
    )  # fmt: skip
    save_every: int = option(
        "--save-every",
        "training",
        "steps between two checkpoints, at most 20 seconds apart",
        100,
        type=COUNT,
        metavar="N",
    )

    def n_steps(self, n_tokens: int) -> int:
        """Steps that `epochs` over so much text take."""
        return max(1, round(self.epochs * n_tokens / self.batch_tokens))

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate of a step."""
        n_warm = max(1, round(self.warmup * n_steps))
        if step < n_warm:
            return self.lr * (step + 1) / n_warm
        part = (step - n_warm) / max(1, n_steps - n_warm)
        return self.lr * (0.5 * (1 + math.cos(math.pi * part)) if self.schedule == "cosine" else 1 - part)


@dataclass(frozen=True)
class Options(Settings):
    """A training, from the model to the heads file.

    Every field is an option of the command, whose --help says what it does; those of `Settings` are keywords. None: as
    the command without the option.
    """

    model: Path = option(
        "-m --model", "", "base model: a GGUF file or hf:owner/repo[/file][@revision]", type=str
    )
    outfile: Path = option("-o --outfile", "", "heads file to write", type=Path, metavar="heads.gguf")
    torch_folder: Path | None = option(
        "--torch-dir", "", "folder for the published PyTorch layout", None, "heads.gguf without .gguf",
        type=Path, metavar="DIR",
    )  # fmt: skip
    arch: str = option(
        "--arch", "heads",
        "medusa: heads see the hidden state; hydra: and the tokens drafted before; hydra++: and, through a layer of "
        "attention, the text so far; eagle3: no heads but a layer that sees inside the model, and goes on by itself",
        "hydra", type=str, choices=("medusa", "hydra", "hydra++", "eagle3"),
    )  # fmt: skip
    n_heads: int = option("--heads", "heads", "tokens guessed ahead", 4, type=COUNT, metavar="N")
    n_layers: int = option("--layers", "heads", "residual blocks per head", 1, type=COUNT, metavar="N")
    data: tuple[str, ...] = option(
        "--data", "text",
        "text files, folders, .jsonl with a field text (documents), or prompt, messages or turns (the model answers)",
        (), "none, the model writes all text by itself", type=str, nargs="+", metavar="PATH",
    )  # fmt: skip
    raw: bool = option(
        "--raw", "text", "prompts are text to go on with, also where the model has a chat template", False
    )
    n_tokens: int = option(
        "--tokens", "text", "of training text, as 500k or 2M", 2_000_000, "2M", type=_count, metavar="N"
    )
    seq_len: int = option("--seq-len", "text", "tokens per sequence", 512, type=COUNT, metavar="N")
    own: float = option(
        "--own", "text",
        "share of the documents of which only the beginning is read, and the model writes the rest", 0.4,
        type=SHARE, metavar="SHARE",
    )  # fmt: skip
    made_up: float = option(
        "--made-up", "text", "share of the sequences that the model makes up besides those of --data", 0.0,
        type=SHARE, metavar="SHARE",
    )  # fmt: skip
    temps: tuple[float, ...] = option(
        "--temps", "text", "temperatures it writes at", (0.0, 0.8), "0,0.8", type=_numbers, metavar="T,T"
    )
    n_held_out: int = option("--held-out", "text", "sequences to measure on", 48, type=COUNT, metavar="N")
    k: int = option(
        "--top-k", "training", "tokens of the base model's distribution that are kept", 32, type=COUNT,
        metavar="K",
    )  # fmt: skip
    draft_vocab: int | str | None = option(
        "--draft-vocab", "heads",
        "propose the N most frequent tokens only; auto: by what a token costs a draft here and brings; all", "auto",
        type=_vocab, metavar="N|auto|all",
    )  # fmt: skip
    lm_head: str = option(
        "--lm-head", "heads",
        "projections to the vocabulary: each head's own, one shared by all heads, or the base model's, which is not "
        "trained; auto: what is forecast to be fastest here", "auto", type=str,
        choices=("auto", "own", "shared", "base"),
    )  # fmt: skip
    outtype: str = option(
        "--outtype", "", "type of the heads file's matrices, as for entmtp.convert", "auto", type=str
    )
    cache_gb: float = option(
        "--cache-gb",
        "files",
        "most that hidden states may take on disk",
        4.0,
        type=number(float, 0, 1e9, above=True),
        metavar="GB",
    )
    work: Path | None = option(
        "--work",
        "files",
        "folder of cache and checkpoints",
        None,
        "heads.gguf.train",
        type=Path,
        metavar="DIR",
    )
    resume: bool = option("--resume", "files", "go on with an interrupted training", False)
    restart: bool = option("--restart", "files", "forget an interrupted training, and begin anew", False)
    keep_work: bool = option(
        "--keep-work", "files", "keep the work folder: heads of other kinds can use its cache", False
    )
    n_threads: int | None = option(
        "--threads", "training", "CPU threads", None, "as llama.cpp", type=THREADS, metavar="N"
    )
    n_gpu_layers: int = option(
        "--n-gpu-layers", "training", "of the base model, on the GPU", 0, type=int, metavar="N"
    )

    @property
    def settings(self) -> Settings:
        """The part that the loop follows."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(Settings)})


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="entmtp train",
        description="Train Medusa or Hydra draft heads, or an EAGLE-3 layer, for a GGUF model, on this machine. "
        "Needs PyTorch: pip install entmtp[train]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="how long to train: sets the amount of text and epochs, see below"
    )
    parser.add_argument(
        "--report", action="store_true",
        help="train nothing: how good are the heads of a training, finished or interrupted; should it go on?",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="with --report: as JSON, on stdout")
    groups = {name: parser.add_argument_group(name) for name in ("heads", "text", "training", "files")}
    inherited = {f.name for f in fields(Settings)}
    for f in sorted(fields(Options), key=lambda f: f.name in inherited):  # the model comes first
        if f.metadata:
            group = groups.get(f.metadata["group"], parser)
            default = None if f.metadata["how"].get("required") else f.default
            group.add_argument(*f.metadata["flags"], dest=f.name, default=default, **f.metadata["how"])
    groups["heads"].add_argument(  # its name of before
        "--share-lm-head", dest="lm_head", action="store_const", const="base", default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """A command line; what it does not give is the preset's, if it names one."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    if args.resume and args.restart:
        parser.error("--resume and --restart exclude each other")
    if args.json and not args.report:
        parser.error("--json is for --report")
    return args


def options_of(args: argparse.Namespace) -> Options:
    """The options that a command line gives.

    Raises:
        ModelError: there is no such model.
    """
    from ..models.names import resolve

    given = {f.name: getattr(args, f.name) for f in fields(Options) if f.metadata}
    return Options(**given | {"model": resolve(args.model, "model"), "data": tuple(args.data)})
