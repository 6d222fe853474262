"""The options of `python -m entmtp.train`, and from Python."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.names import resolve

EPILOG = """examples:
  # Hydra heads, from text that the model writes by itself
  python -m entmtp.train --model model.gguf --arch hydra -o heads.gguf
  # from your documents and prompts, and cheap to draft with: the frequent tokens alone
  python -m entmtp.train --model model.gguf --arch hydra --data notes/ prompts.jsonl --draft-vocab auto -o heads.gguf
  # go on after Ctrl-C, a crash or a power cut
  python -m entmtp.train --model model.gguf --arch hydra -o heads.gguf --resume

Disk and memory are said before it starts. Some of the text is held out: the tokens per step in the progress line, of a
chain and of a tree of 16 nodes, are measured on it. Prompts that you benchmark with should not be among the data."""


@dataclass(frozen=True)
class Options:
    """A training.

    Attributes:
        model: the base model.
        outfile: heads file to write.
        torch_folder: where the published layout goes; None: the heads file's name without .gguf.
        arch: `"medusa"`, `"hydra"` or `"hydra++"`.
        data: files and folders of text, .jsonl of documents or prompts; none: the model writes all text.
        n_tokens: of training text.
        own: share of the documents that the model goes on from by itself.
        temps: at which it writes.
        k: tokens of the base model's distribution that are kept, besides the mass of the rest.
        draft_vocab: how many tokens heads can propose, `"auto"`, or None for all.
        share_lm_head: heads are their residual blocks alone, the base model's projection serves.
        epochs: passes over the text.
        cache_gb: most that hidden states may take on disk.
        work: folder of the cache and the checkpoints; None: beside the heads file.
        settings: further ones of `train_loop.Settings`.
    """

    model: Path
    outfile: Path
    torch_folder: Path | None = None
    arch: str = "hydra"
    n_heads: int = 4
    n_layers: int = 1
    data: tuple[str, ...] = ()
    n_tokens: int = 2_000_000
    seq_len: int = 512
    own: float = 0.4
    temps: tuple[float, ...] = (0.0, 0.8)
    n_held_out: int = 48
    k: int = 32
    draft_vocab: int | str | None = None
    share_lm_head: bool = False
    epochs: float = 3.0
    outtype: str = "auto"
    cache_gb: float = 4.0
    work: Path | None = None
    resume: bool = False
    restart: bool = False
    keep_work: bool = False
    n_threads: int | None = None
    n_gpu_layers: int = 0
    bf16: bool | None = None
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.train",
        description="Train Medusa or Hydra draft heads for a GGUF model, on this machine. Needs PyTorch: "
        "pip install entmtp[train]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="base model: a GGUF file or hf:owner/repo[/file][@revision]")
    add("-o", "--outfile", required=True, metavar="heads.gguf", help="heads file to write")
    add(
        "--torch-dir",
        metavar="DIR",
        help="folder for the published PyTorch layout (default: heads.gguf without .gguf)",
    )
    add(
        "--outtype",
        default="auto",
        help="type of the heads file's matrices, as for entmtp.convert (default: auto)",
    )

    group = parser.add_argument_group("heads")
    group.add_argument(
        "--arch", choices=("medusa", "hydra", "hydra++"), default="hydra",
        help="medusa: heads see the hidden state; hydra: and the tokens drafted before; hydra++: and, through a "
        "layer of attention, the text so far (default: hydra)",
    )  # fmt: skip
    group.add_argument(
        "--heads", type=_positive, default=4, metavar="N", help="tokens guessed ahead (default: 4)"
    )
    group.add_argument(
        "--layers", type=_positive, default=1, metavar="N", help="residual blocks per head (default: 1)"
    )
    group.add_argument(
        "--draft-vocab", type=_vocab, metavar="N|auto",
        help="propose the N most frequent tokens only; auto: as many as make up 99%% of the text (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--share-lm-head", action="store_true",
        help="train the residual blocks alone; the base model's own projection serves all heads",
    )  # fmt: skip

    group = parser.add_argument_group("text")
    group.add_argument(
        "--data", nargs="+", default=[], metavar="PATH",
        help="text files, folders, .jsonl with a field text (documents) or prompt (the model answers them); "
        "default: the model writes all text by itself",
    )  # fmt: skip
    group.add_argument(
        "--tokens",
        type=_count,
        default=2_000_000,
        metavar="N",
        help="of training text, as 500k or 2M (default: 2M)",
    )
    group.add_argument(
        "--seq-len", type=_positive, default=512, metavar="N", help="tokens per sequence (default: 512)"
    )
    group.add_argument(
        "--own", type=_share, default=0.4, metavar="SHARE",
        help="share of the documents of which only the beginning is read, and the model writes the rest (default: 0.4)",
    )  # fmt: skip
    group.add_argument(
        "--temps",
        type=_numbers,
        default=(0.0, 0.8),
        metavar="T,T",
        help="temperatures it writes at (default: 0,0.8)",
    )
    group.add_argument(
        "--held-out", type=_positive, default=48, metavar="N", help="sequences to measure on (default: 48)"
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=float, default=3.0, metavar="N", help="passes over the text (default: 3)"
    )
    group.add_argument(
        "--batch-tokens", type=_positive, default=4096, metavar="N", help="tokens per step (default: 4096)"
    )
    group.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate (default: 0.0015)")
    group.add_argument(
        "--schedule", choices=("cosine", "linear"), default="cosine", help="how it falls (default: cosine)"
    )
    group.add_argument("--weight-decay", type=float, default=0.01, help="of matrices (default: 0.01)")
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm, 0: not clipped (default: 1)")
    group.add_argument(
        "--head-decay", type=float, default=0.8, help="head i weighs this to the power of i (default: 0.8)"
    )
    group.add_argument(
        "--noise", type=float, default=0.0, help="noise on hidden states, as in Hydra's appendix (default: 0)"
    )
    group.add_argument(
        "--loss", choices=("teacher", "text"), default="teacher",
        help="learn the base model's distribution, or the text's tokens (default: teacher)",
    )  # fmt: skip
    group.add_argument(
        "--top-k", type=_positive, default=32, metavar="K", help="tokens of it that are kept (default: 32)"
    )
    group.add_argument(
        "--bf16",
        choices=("auto", "on", "off"),
        default="auto",
        help="products in bfloat16 (default: auto, where the CPU has them)",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    group.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: as llama.cpp)")
    group.add_argument(
        "--n-gpu-layers", type=int, default=0, metavar="N", help="of the base model, on the GPU (default: 0)"
    )
    group.add_argument("--eval-every", type=_positive, default=200, metavar="N", help="steps (default: 200)")
    group.add_argument("--save-every", type=_positive, default=100, metavar="N", help="steps (default: 100)")

    group = parser.add_argument_group("files")
    group.add_argument(
        "--cache-gb",
        type=float,
        default=4.0,
        metavar="GB",
        help="most that hidden states may take on disk (default: 4)",
    )
    group.add_argument(
        "--work", metavar="DIR", help="folder of cache and checkpoints (default: heads.gguf.train)"
    )
    group.add_argument(
        "--keep-work", action="store_true", help="keep that folder: heads of other kinds can use its cache"
    )
    group.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    group.add_argument(
        "--restart", action="store_true", help="forget an interrupted training, and begin anew"
    )
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _count(text: str) -> int:
    unit = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        value = int(float(text[:-1] if unit > 1 else text) * unit)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, as 500k or 2M")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def _vocab(text: str) -> int | str:
    return "auto" if text == "auto" else _positive(text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of temperatures, as 0,0.8")
    return values


#


def options_of(args: argparse.Namespace) -> Options:
    names = (
        "batch_tokens",
        "lr",
        "schedule",
        "weight_decay",
        "clip",
        "head_decay",
        "noise",
        "loss",
        "eval_every",
        "save_every",
    )
    return Options(
        model=resolve(args.model, "model"), outfile=Path(args.outfile),
        torch_folder=Path(args.torch_dir) if args.torch_dir else None, arch=args.arch, n_heads=args.heads,
        n_layers=args.layers, data=tuple(args.data), n_tokens=args.tokens, seq_len=args.seq_len, own=args.own,
        temps=args.temps, n_held_out=args.held_out, k=args.top_k, draft_vocab=args.draft_vocab,
        share_lm_head=args.share_lm_head, epochs=args.epochs, outtype=args.outtype, cache_gb=args.cache_gb,
        work=Path(args.work) if args.work else None, resume=args.resume, restart=args.restart,
        keep_work=args.keep_work, n_threads=args.threads, n_gpu_layers=args.n_gpu_layers,
        bf16={"auto": None, "on": True, "off": False}[args.bf16], seed=args.seed,
        settings={name: getattr(args, name) for name in names},
    )  # fmt: skip
