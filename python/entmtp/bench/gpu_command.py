"""The options and files of `python -m entmtp.bench --gpu-study`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.atomic import atomic_path
from ..common.progress import stages
from ..llama import OUTPUTS
from ..models.shapes import QUANTS, SHAPES
from ..report.files import write_json

CONTEXTS = [512, 4096, 32768]


def context_lengths(text: str) -> list[int]:
    """Tokens of context from `512,4k,32k`."""
    found = []
    for part in text.split(","):
        number, factor = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if not number.isdecimal() or not 0 < int(number) * factor <= 1 << 24:
            raise argparse.ArgumentTypeError(f"{part!r} is no number of tokens, like 512 or 4k")
        found.append(int(number) * factor)
    return found


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of `names`."""

    def parse(text: str) -> list[str]:
        found = [part.strip().lower() for part in text.split(",")]
        for part in found:
            if part not in names:
                raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(names)}")
        return found

    return parse


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--gpu-study` and what belongs to it alone."""
    parser.add_argument(
        "--gpu-study", action="store_true",
        help="measure passes, drafts, the rest of a step and what is copied on one device, for random weights in the "
        "shapes of real models and for the demo, and replay what plain decoding, the 63-node tree and EntMTP would "
        "give; -o FILE.json also writes FILE.md and FILE.png",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", type=some_of(tuple(SHAPES)), default=["1b", "7b", "32b", "demo"],
        help="models of --gpu-study (default: 1b,7b,32b,demo)",
    )  # fmt: skip
    parser.add_argument(
        "--types", type=some_of(tuple(QUANTS)), default=["f16", "q4_k"],
        help="types of their weights (default: f16,q4_k)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="device of --gpu-study (default: a GPU, if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--outputs", choices=OUTPUTS,
        help="where --gpu-study reduces logits (default: on a GPU there, else on the host)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measure, print the report, and write it where `-o` says.

    Raises:
        EntmtpError, ValueError, OSError: with one sentence for the user.
    """
    from ..bank.traces import Traces
    from . import gpu_report, gpu_study

    device = gpu_study.find_device(args.device)
    with stages() as advance:
        if args.traces:
            traces = Traces.load(args.traces)
        else:
            traces = gpu_study.demo_traces(args.limit, args.tokens, args.threads)
        report = gpu_study.run(
            args.shapes, args.types, args.contexts, device, args.threads, traces=traces, outputs=args.outputs,
            sizes=args.sizes or gpu_study.SIZES, n_rounds=args.rounds or 6, n_tokens=min(args.tokens, 48),
            advance=advance, say=lambda text: print(f"entmtp.bench: {text}", file=sys.stderr),
        )  # fmt: skip
    if not report["gpu_study"]:
        raise ValueError("no model could be measured, for the reasons above")
    text = gpu_report.markdown(report)
    print(text, flush=True)
    if args.outfile:
        write_json(report, args.outfile)
        with atomic_path(Path(args.outfile).with_suffix(".md")) as temporary:
            temporary.write_text(text, "utf-8")
        gpu_report.plot(report, Path(args.outfile).with_suffix(".png"))
