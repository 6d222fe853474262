"""`entmtp bench SUBCOMMAND`: what each takes, and its report as text and files."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import ConvertError, EntmtpError, UsageError
from ..common.fields import parse_json
from ..common.files import check_output
from ..common.machine import cpu_name
from ..common.numbers import COUNT, TEMPERATURE, THREADS, number
from ..common.streams import printable
from ..common.version import __version__
from ..convert.writer import OUTTYPES
from ..models.shapes import QUANTS, SHAPES
from ..native.backends import llama_commit
from ..options import DEMO, add_model_options
from ..report.plots import draw, of_file
from ..report.tables import write
from . import ablate, accuracy, gpu, heads, load, memory, mislead, passes, run, serve, study, users, whatif
from .inputs import context_lengths, some_of
from .questions import SUITES

SHAPE = f"random weights by shape ({', '.join(SHAPES)}) and type ({', '.join(QUANTS)}), as 1b:q4_k"
OPTIONS: dict[str, dict[str, Any]] = {
    "--prompts": {"nargs": "+", "metavar": "JSONL", "help": "files of prompts, one task each"},
    "--suite": {"choices": SUITES, "help": "published prompts: the paper's four tasks, or Spec-Bench's thirteen"},
    "--raw": {"action": "store_true", "help": "prompts are text to go on with: no chat template"},
    "--limit": {"type": COUNT, "metavar": "N", "help": "prompts of each task, at most"},
    "--tokens": {"type": COUNT, "metavar": "N", "help": "tokens of an answer, at most"},
    "--temp --temps": {"type": TEMPERATURE, "nargs": "+", "metavar": "T", "help": "temperatures"},
    "--rounds": {"type": COUNT, "metavar": "N", "help": "how often everything is measured"},
    "--methods": {"nargs": "+", "metavar": "NAME", "help": "methods besides the plain loops (default: all "
                  "but llama.cpp's own, as 'llama.cpp ngram-mod', which `make baselines` builds)"},
    "--replay": {"action": "store_true", "help": "say how fast replay foretells EntMTP to be"},
    "--busy": {"type": number(int, 0), "nargs": "+", "metavar": "N", "help": "busy programs beside it"},
    "--users": {"type": COUNT, "nargs": "+", "metavar": "N", "help": "users at a time, 1 the first"},
    "--clients": {"type": COUNT, "nargs": "*", "metavar": "N", "help": "clients at a time, each of whom asks again "
                  "when it is answered"},
    "--rate": {"type": number(float, 0, above=True), "nargs": "+", "metavar": "R",
               "help": "requests a second on average, which come by themselves (a Poisson process)"},
    "--requests": {"type": COUNT, "metavar": "N", "help": "requests of a load"},
    "--slots": {"type": COUNT, "metavar": "N", "help": "answers at a time (default: the most clients, or 4)"},
    "--stall": {"type": number(float, 0), "metavar": "SECONDS", "help": "how long answers may wait for the prompts of "
                "others, as of entmtp serve"},
    "--servers": {"nargs": "+", "choices": tuple(serve.SERVERS), "help": "ours that drafts, ours that does not, and "
                  "llama.cpp's, which `make baselines` builds"},
    "--counts": {"type": THREADS, "nargs": "+", "metavar": "N", "help": "fixed numbers of threads (default: 1 "
                 "and all)"},
    "--published": {"type": number(int, 0), "metavar": "N", "help": "how many published trees to include"},
    "--more-models": {"nargs": "+", "metavar": "MODEL", "help": "further base models"},
    "--more-heads": {"nargs": "+", "metavar": "HEADS", "help": "further heads"},
    "--traces": {"metavar": "PATH", "help": "rank traces that study keeps and others replay: a folder of .npz files, "
                 "or one such file"},
    "--banks": {"metavar": "DIR", "help": "keep the tuned banks in this folder"},
    "--contexts": {"type": context_lengths, "nargs": "+", "metavar": "N", "help": "context depths, like 512 4k"},
    "--sizes": {"type": COUNT, "nargs": "+", "metavar": "N", "help": "numbers of tokens in a pass"},
    "--kernels": {"nargs": "+", "metavar": "NAME", "help": "CPU kernels to compare (default: off and auto); "
                  "the same again: another instance of the model"},
    "--forms": {"nargs": "+", "choices": heads.FORMS, "help": "forms of the heads"},
    "--types": {"type": some_of(tuple(OUTTYPES)), "nargs": "+", "metavar": "TYPE", "help": "of the weights"},
    "--heads-vocab": {"type": COUNT, "metavar": "N", "help": "tokens of the heads' draft vocabulary"},
    "--draft-text": {"nargs": "+", "metavar": "FILE", "help": "text to choose it by (default: the base's own)"},
    "--shapes": {"type": some_of(tuple(SHAPES)), "metavar": "NAME[,..]", "help": "models, unless --model is given"},
    "--device": {"choices": ("auto", "cpu", "gpu"), "help": "where they run; auto: on a GPU, if there is one"},
    "checkpoints": {"nargs": "+", "metavar": "[NAME[:FORM,..]=]FOLDER", "help": "checkpoint as for entmtp convert; "
                    "forms of its own in place of --forms"},
    "curves": {"nargs": "*", "metavar": "CURVE", "help": f"costs: {', '.join(whatif.CURVES)}, or of a model that is "
               f"timed here, {SHAPE} (default: --model)"},
    "curve": {"nargs": "?", "metavar": "CURVE", "help": "costs, as of what-if"},
    "report": {"metavar": "JSON", "type": Path, "help": "report of study, curve, heads, gpu or serve"},
}  # fmt: skip


class Command(NamedTuple):
    run: Callable[[argparse.Namespace, dict[str, Any]], Iterator[str]]
    does: str
    example: str
    options: dict[str, Any]  # with their defaults


def plot(args: argparse.Namespace, report: dict[str, Any]) -> Iterator[str]:
    """The picture of a report, beside it."""
    with of_file(args.report):
        try:
            report = parse_json(args.report.read_text("utf-8"))
        except ValueError as e:
            raise ValueError(f"{args.report}: {e}") from e
        drawn = draw(report, args.report.with_suffix(".png"))
    if drawn is None:
        raise ValueError(f"{args.report} holds no studies, curves, heads, GPU study or loads to draw")
    yield f"wrote {drawn}"


ANSWERS = {
    "--prompts": None,
    "--suite": None,
    "--raw": False,
    "--limit": 10,
    "--tokens": 200,
    "--temp --temps": [0.0, 0.8],
    "--rounds": 1,
}
COMMANDS = {
    "run": Command(
        run.run, "llama-cpp-python, our plain loop, static trees and EntMTP side by side",
        "entmtp bench run -m model.gguf --suite paper --temp 0 0.8 -o bench.json",
        ANSWERS | {"--methods": None, "--published": 1, "--replay": False},
    ),
    "load": Command(
        load.run, "numbers of threads beside busy programs, fixed ones and the one that follows the machine",
        "entmtp bench load -m model.gguf --suite paper --limit 1 --busy 0 1 2 -o load.json",
        ANSWERS | {"--limit": 1, "--tokens": 120, "--busy": [0, 1, 2], "--counts": None},
    ),
    "users": Command(
        users.run, "one model for several users at a time, with drafts and without",
        "entmtp bench users -m model.gguf --suite paper --limit 2 --users 1 2 4 -o users.json",
        ANSWERS | {"--limit": 2, "--tokens": 120, "--rounds": 3, "--users": [1, 2, 4]},
    ),
    "serve": Command(
        serve.run, "servers under load: ours with drafts and without, and llama.cpp's own",
        "entmtp bench serve -m model.gguf --suite paper --clients 1 4 16 --rate 2 -o serve.json",
        ANSWERS | {"--temp --temps": [0.0], "--tokens": 256, "--rounds": 3, "--clients": [1, 2, 4, 8, 16], "--rate": [],
                   "--requests": 32, "--slots": None, "--stall": 0.2, "--servers": list(serve.SERVERS)},
    ),
    "study": Command(
        study.run, "tune on half of the prompts, then compare policies on the other half, live and by replay",
        "entmtp bench study -m model.gguf --prompts code.jsonl --limit 20 --traces traces -o study.json",
        ANSWERS | {"--more-models": [], "--more-heads": [], "--traces": None, "--banks": None},
    ),
    "mislead": Command(
        mislead.run, "what drafting costs where it brings nothing: texts made to mislead, heads sure of wrong tokens",
        "entmtp bench mislead -m model.gguf --limit 6 --suite paper -o mislead.json", ANSWERS | {"--limit": 6},
    ),
    "heads": Command(
        heads.run, "heads of several forms and types: size, draft time, acceptance, tokens per second",
        "entmtp bench heads ./hydra -m model.gguf --prompts code.jsonl prose.jsonl -o heads.json",
        ANSWERS | {"checkpoints": None, "--limit": None, "--tokens": 128, "--rounds": 8, "--forms": list(heads.FORMS),
                   "--types": [list(heads.TYPES)], "--heads-vocab": 1024, "--draft-text": []},
    ),
    "gpu": Command(
        gpu.run, "what passes, drafts and the rest of a step cost on one device, for shapes of real models, and replay",
        "entmtp bench gpu --shapes 7b --types q4_k --contexts 512,4k -o gpu.json",
        {"--shapes": ["1b", "7b", "32b", DEMO], "--types": [["f16", "q4_k"]], "--device": "auto", "--traces": None,
         "--contexts": [[512, 4096, 32768]], "--sizes": None, "--rounds": 6, "--limit": 10, "--tokens": 200},
    ),
    "curve": Command(
        passes.run, f"the cost of 1 to 64 tokens in one pass; a model may also be {SHAPE}",
        "entmtp bench curve -m 1b:q4_0 --more-models 1b:q8_0 --contexts 64 2048 -o curve.json",
        {"--more-models": [], "--contexts": [[64]], "--sizes": None, "--rounds": 9, "--kernels": None},
    ),
    "memory": Command(
        memory.run, f"what processes hold of a model's weights, mapped, read and locked; a model may also be {SHAPE}",
        "entmtp bench memory -m 1b:q8_0 --more-models smollm2 gemma3-270m -o memory.json",
        {"--more-models": [], "--rounds": 3},
    ),
    "accuracy": Command(
        accuracy.run, "how far kernels are from exact weights, and passes of several tokens from passes of one; a "
        f"model may be given a type ({', '.join(accuracy.TYPES)}), as smollm2:q8_0",
        "entmtp bench accuracy -m smollm2 --more-models smollm2:q8_0 smollm2:q4_k -o accuracy.json",
        {"--more-models": [], "--prompts": None, "--suite": "paper", "--raw": False, "--limit": 2},
    ),
    "what-if": Command(
        whatif.run, "replay traces under the costs of other machines",
        "entmtp bench what-if 1b cpu-q8_0 roofline flat --traces traces", {"curves": None, "--traces": ...},
    ),
    "ablate": Command(
        ablate.run, "replay variants of the policies, to see what each part of them is worth",
        "entmtp bench ablate cpu-q8_0 --traces traces", {"curve": None, "--traces": ...},
    ),
    "plot": Command(plot, "draw a report beside it", "entmtp bench plot study.json", {"report": None}),
}  # fmt: skip
# the options of before that are subcommands now
OLD = {f"--{n}": n for n in ("study", "what-if", "ablate", "plot")}
OLD |= {"--verify-curve": "curve", "--gpu-study": "gpu"}


def modern(argv: list[str]) -> list[str]:
    """The arguments with their subcommand: without any it is `run`, or what an option of before says."""
    if not argv or not argv[0].startswith("-") or argv[0] in ("-h", "--help"):
        return argv
    for i, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name in OLD:
            rest = [value] if value else []
            n = next((n for n, word in enumerate(argv[i + 1 :]) if word.startswith("-")), len(argv))
            return [OLD[name], *rest, *argv[i + 1 :][:n], *argv[:i], *argv[i + 1 :][n:]]
    return ["run", *argv]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp bench",
        description="Measure decoding, all in turn in one process: the machine's drift hits everything alike.",
        epilog=f"examples:\n{''.join(f'  {c.example}' + chr(10) for c in COMMANDS.values())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True)
    for name, command in COMMANDS.items():
        # resolve: curve has a --kernels of its own
        sub = subparsers.add_parser(name, help=command.does, description=command.does, conflict_handler="resolve",
                                    epilog=f"example: {command.example}")  # fmt: skip
        sub.set_defaults(run=command.run)
        if command.run is not plot:
            add_model_options(sub, drafting=False, **({"model": None} if command.run is gpu.run else {}))
            sub.add_argument("-o", "--outfile", "--output", type=Path, metavar="FILE.json",
                             help="write the figures, beside them their tables as Markdown, and a picture")  # fmt: skip
        for option, default in command.options.items():
            how = dict(OPTIONS[option])
            if default not in (None, [], ..., False):
                words = re.sub(r"[\[\]',]", "", str(default))
                how["help"] += f" (default: {words})"
            if option.startswith("-"):
                how |= {"required": True} if default is ... else {"default": default}
            sub.add_argument(*option.split(), **how)
    return parser


def _check_outfile(args: argparse.Namespace) -> None:
    """Before anything is measured."""
    lists = (getattr(args, name, None) for name in ("prompts", "more_models", "more_heads", "checkpoints"))
    named = [path for names in lists for path in names or ()]
    check_output(args.outfile, [args.model, getattr(args, "heads", None), *named])
    if args.outfile and args.outfile.suffix in (".md", ".png"):
        raise UsageError(
            f"{args.outfile}: the figures are JSON; tables ({args.outfile.suffix}) come beside them"
        )


def main(argv: list[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(modern(sys.argv[1:] if argv is None else argv))
    report: dict[str, Any] = {"machine": cpu_name()}
    texts = []
    try:
        if args.run is not plot:
            _check_outfile(args)
        for text in args.run(args, report):
            print(text, flush=True)
            texts.append(text)
        if args.run is plot:
            return 0
        device = cpu_name() + (f", threads: {report['threads']}" if "threads" in report else "")
        texts.append(f"{device}, {platform.system()}; entmtp {__version__}, llama.cpp {llama_commit()[:9]}\n")
        print(texts[-1], end="")
        if args.outfile:
            write(report, "\n".join(texts), args.outfile)
    except (ConvertError, EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.bench: {printable(str(e))}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0
