"""`python -m entmtp.train`: draft heads for your own model, trained on your own machine.

1. text: yours, and what the base model itself writes (`train_text`),
2. hidden states and distributions of the very GGUF that will verify, in files (`train_states`),
3. training: each head learns the base model's distribution a few tokens ahead (`train_loop`, `train_loss`),
4. a heads file, and the published PyTorch layout (`train_export`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .errors import EntmtpError, ModelError
from .models import resolve

if TYPE_CHECKING:
    from .train_eval import Acceptance

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
# progress
#


class Screen:
    """A progress bar per phase on a terminal; elsewhere a line now and then."""

    def __init__(self, show: bool):
        self.console = Console(stderr=True, quiet=not show)
        self.live = self.console.is_terminal

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields what is called with the work done so far and a text beside it."""
        begin = time.monotonic()
        said = begin
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.live) as bar:
            task = bar.add_task(name, total=total, text="")

            def advance(done: int, text: str = "") -> None:
                nonlocal said
                bar.update(task, completed=done, text=text)
                now = time.monotonic()
                if not self.live and (now - said > 20 or done >= total):
                    said = now
                    left = (now - begin) * (total - done) / max(done, 1)
                    self.say(f"{name}: {100 * done // max(total, 1)}% {text} ({left / 60:.1f} min left)")

            yield advance


#
# the command
#


def train(options: Options, progress: bool = True) -> Acceptance:
    """Train heads; returns how many tokens per step they give on held-out text.

    Raises:
        ModelError, ConvertError: it cannot be done; the text is one sentence.
        OSError: the disk is full. KeyboardInterrupt: after what there is was saved.
    """
    try:
        import torch
    except ImportError as e:
        raise ModelError("training needs PyTorch; install it with pip install 'entmtp[train]'") from e
    from . import train_plan as plan
    from .convert.base import read_base
    from .train_base import Base, read_matrices
    from .train_eval import Teacher, evaluate
    from .train_export import export, rounded, writable
    from .train_heads import Shape
    from .train_loop import Report, Settings, Trainer
    from .train_states import Layout, record
    from .train_text import gather, plan_jobs, read_data

    o, screen = options, Screen(progress)
    begin = time.monotonic()
    if o.outfile.is_dir() or not o.outfile.absolute().parent.is_dir():
        raise ModelError(
            f"{o.outfile}: cannot be written, for its folder is missing or it is a folder; change -o"
        )
    writable(o.outfile)
    facts = read_base(o.model)
    prefix: dict[str, Any] = {}
    if o.arch == "hydra++":
        n_head = int(facts.get("attention.head_count"))
        prefix = {
            "n_head": n_head,
            "n_head_kv": int(facts.keys.get("attention.head_count_kv") or n_head),
            "n_ff": int(facts.get("feed_forward_length")),
            "rms_eps": float(facts.get("attention.layer_norm_rms_epsilon")),
            "rope_base": float(facts.keys.get("rope.freq_base") or 10000.0),
        }
    shape = Shape(o.arch, o.n_heads, o.n_layers, facts.n_embd, o.share_lm_head, **prefix)
    data = read_data(o.data)

    work = o.work or o.outfile.with_name(o.outfile.name + ".train")
    if o.restart and work.is_dir():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    if o.n_threads:
        torch.set_num_threads(o.n_threads)

    # how much text there is room for
    k = min(o.k, facts.n_vocab if not isinstance(o.draft_vocab, int) else o.draft_vocab)
    per_token = Layout(1, facts.n_embd, k).bytes_per_token
    n_tokens = min(o.n_tokens, int(o.cache_gb * 1e9 / per_token) - o.seq_len)
    if n_tokens < 8 * o.seq_len:
        raise ModelError(f"--cache-gb {o.cache_gb:g} holds too few hidden states; give more")
    n_draft = o.draft_vocab if isinstance(o.draft_vocab, int) else facts.n_vocab
    settings = Settings(
        n_steps=max(1, round(o.epochs * n_tokens / o.settings.get("batch_tokens", 4096))),
        bf16=_has_bf16() if o.bf16 is None else o.bf16,
        seed=o.seed,
        **o.settings,
    )
    size = plan.needs(shape, settings, Layout(n_tokens, facts.n_embd, k), facts.n_vocab, n_draft)

    mend = "give another --work, or --restart to begin anew"
    text_digest = plan.digest(
        facts.fingerprint,
        o.model.stat().st_size,
        data,
        n_tokens,
        o.seq_len,
        o.own,
        o.temps,
        o.n_held_out,
        o.seed,
    )
    plan.claim(work, "texts", text_digest, mend)

    matrices = read_matrices(o.model)
    embedding, output = (torch.from_numpy(m) for m in matrices)
    without_base = plan.resident()
    base = Base(o.model, o.seq_len, o.n_threads, o.n_gpu_layers)
    try:
        screen.say(
            f"{o.arch}: {o.n_heads} heads, {plan.n_parameters(shape, n_draft) / 1e6:.1f}M parameters, "
            f"{settings.n_steps} steps of {settings.batch_tokens} tokens\n"
            f"text: {n_tokens / 1e6:.2f}M tokens, "
            + (f"from {data}" if o.data else "written by the model itself")
            + f"\ndisk: {size.disk / 1e6:.0f} MB in {work}, of which {size.cache / 1e6:.0f} MB hidden states"
            f"\nmemory: {(size.text + max(plan.resident(), without_base + size.training)) / 1e6:.0f} MB"
        )
        if n_tokens < o.n_tokens:
            screen.say(
                f"note: --cache-gb {o.cache_gb:g} holds {n_tokens} of the {o.n_tokens} tokens asked for"
            )
        plan.check_disk(size.disk - plan.folder_bytes(work), work)

        with screen.phase("text  ", n_tokens) as advance:
            jobs = plan_jobs(data, base, n_tokens, o.n_held_out, o.temps, o.own, o.seed)
            texts = gather(base, jobs, n_tokens, work, o.seed, _with_speed(advance))

        draft_vocab = None
        if o.draft_vocab is not None:
            from .convert.draft_vocab import choose_vocab

            vocab = choose_vocab(
                texts.tokens,
                base.n_vocab,
                None if o.draft_vocab == "auto" else int(o.draft_vocab),
                "training text",
            )
            draft_vocab = vocab.tokens
            screen.say(f"draft vocabulary: {len(draft_vocab)} tokens, {vocab.coverage:.1%} of the text")
        layout = Layout(len(texts.tokens), facts.n_embd, k)
        plan.claim(
            work,
            "states",
            plan.digest(text_digest, layout, None if draft_vocab is None else draft_vocab.tolist()),
            mend,
        )
        with screen.phase("states", layout.n_tokens) as advance:
            states = record(
                base,
                texts,
                layout,
                work,
                None if draft_vocab is None else draft_vocab.tolist(),
                _with_speed(advance),
            )
    finally:
        base.close()

    teacher = Teacher(
        embedding, output if draft_vocab is None else output[torch.from_numpy(draft_vocab)], draft_vocab
    )
    digest = plan.digest(
        text_digest,
        layout,
        shape,
        replace(settings, eval_every=0, save_every=0),
        o.draft_vocab,
        str(facts.name),
    )
    folder = work / f"{o.arch}-{digest}"
    folder.mkdir(exist_ok=True)
    trainer = Trainer(shape, settings, teacher, texts, states, folder, digest)
    if trainer.path.exists() and not o.resume:
        raise ModelError(
            f"{trainer.path}: this training was interrupted; go on with --resume, or begin anew with --restart"
        )
    if o.resume:
        trainer.resume()
    measured: Acceptance | None = None
    first, seen, started = trainer.step, 0, time.monotonic()

    with screen.phase("train ", settings.n_steps) as advance:

        def show(report: Report) -> None:
            nonlocal measured, seen
            measured = report.acceptance or measured
            seen += report.n_tokens
            speed = seen / max(time.monotonic() - started, 1e-9)
            text = f"loss {report.loss:.3f}, {speed:.0f} tokens/s"
            if measured:
                text += f", {measured.chain:.2f} / {measured.tree:.2f} tokens per step"
            advance(report.step, text)

        trainer.run(show)

    state = rounded(trainer.state)
    final = evaluate(shape, {name: t.float() for name, t in state.items()}, teacher, texts, states)
    torch_folder = o.torch_folder or o.outfile.with_suffix("")
    about = {
        "arch": o.arch,
        "base": facts.name or o.model.name,
        "data": str(data) if o.data else "text of the base model itself",
        "tokens": len(texts.tokens),
        "steps": settings.n_steps,
        "seed": o.seed,
        "chain": round(final.chain, 4),
        "tree16": round(final.tree, 4),
    }
    export(
        torch_folder,
        o.outfile,
        shape,
        state,
        o.model,
        facts.name or o.model.name,
        output,
        draft_vocab,
        o.outtype,
        about,
    )
    screen.say(f"held-out tokens per step: {final}")
    minutes = (time.monotonic() - begin) / 60
    steps = f"{trainer.step - first} steps" + (f" (after {first})" if first else "")
    screen.say(
        f"{o.outfile} ({o.outfile.stat().st_size / 1e6:.1f} MB) and {torch_folder}, {steps}, {minutes:.1f} min"
    )
    if not o.keep_work:
        shutil.rmtree(work)
    return final


def _with_speed(advance: Callable[[int, str], None]) -> Callable[[int], None]:
    begin, first = time.monotonic(), -1

    def call(done: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        advance(done, f"{(done - first) / max(time.monotonic() - begin, 1e-9):.0f} tokens/s")

    return call


def _has_bf16() -> bool:
    """The CPU multiplies in bfloat16, so that it gains."""
    import torch

    ops = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(ops and ops())


def _options(args: argparse.Namespace) -> Options:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    from .convert.errors import ConvertError
    from .convert.writer import OUTTYPES

    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.outtype not in (*OUTTYPES, "auto"):
        parser.error(f"--outtype {args.outtype!r} is not known; use one of {', '.join(OUTTYPES)} or auto")
    if args.resume and args.restart:
        parser.error("--resume and --restart exclude each other")
    try:
        train(_options(args))
        return 0
    except (EntmtpError, ConvertError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(
            f"error: {where}{(e.strerror or str(e)).lower()}; what was done is kept, go on with --resume",
            file=sys.stderr,
        )
    except MemoryError:
        print(
            "error: not enough memory; lower --batch-tokens, or train with --draft-vocab or --share-lm-head",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped; what was done is kept, go on with --resume", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
