"""The options by which every command names and loads a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import ConvertError, ModelError
from ..models.names import resolve
from .demo import DEMO, demo_files

if TYPE_CHECKING:
    from ..llama import Llama

DRAFTS = ("off", "static", "entropy", "confidence")
CONTEXT = 4096
MOST = 64  # times the context that a model was trained for


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--heads` and how to run them; `load` takes the result."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default=DEMO,
        help="base model: a GGUF file or hf:owner/repo[/file][@revision] (default: a small bundled demo)",
    )  # fmt: skip
    group.add_argument(
        "--heads", help="its draft heads, named alike (default: those beside the model, if any)"
    )
    group.add_argument(
        "--draft", choices=DRAFTS,
        help="how to choose the tree of guesses; off: plain decoding (default: entropy, off without heads)",
    )  # fmt: skip
    group.add_argument(
        "--trees", help="a bank of trees: a path or a name, bank:tree for --draft static (default: as Llama)"
    )
    group.add_argument(
        "--ctx", type=_not_negative, metavar="N",
        help=f"context length in tokens, 0 for the model's own (default: {CONTEXT}, or the model's if that is less)",
    )  # fmt: skip
    group.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: as llama.cpp)")
    group.add_argument(
        "--n-gpu-layers", type=int, metavar="N",
        help="layers on the GPU or on --rpc servers, -1 for all (default: 0, with --rpc all)",
    )  # fmt: skip
    group.add_argument(
        "--rpc", type=_servers, metavar="HOST:PORT[,…]",
        help="put layers on other machines that run entmtp rpc-server",
    )  # fmt: skip
    group.add_argument(
        "--tensor-split", type=_shares, metavar="N[,N…]",
        help="shares of the layers: of each --rpc server, then of each GPU (default: by free memory)",
    )  # fmt: skip
    group.add_argument("--flash-attn", action="store_true", help="use flash attention")
    group.add_argument("--kernels", help="CPU kernels: auto, off, or a name (default: auto)")


def _positive(text: str) -> int:
    if (value := _not_negative(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _not_negative(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens or threads")
    return value


def _servers(text: str) -> list[str]:
    from ..native.rpc import parse

    try:
        return parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares, such as 3,1")
    return shares


def note(sentence: str) -> None:
    """Say something that the user should know, and go on."""
    print(f"note: {sentence}", file=sys.stderr)


def model_files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Model and heads that the options name; heads are looked for beside the model unless `--draft off`.

    Raises:
        ModelError: there is no such file, or heads are asked for and there are none.
        OSError: the disk is full or cannot be written to.
    """
    if args.draft == "off" and args.heads:
        raise ModelError("--heads are given, but --draft is off; leave one of them out")
    from ..models.beside import find_heads

    heads: Path | None
    if args.model == DEMO and not Path(DEMO).exists():
        model, heads = demo_files()
    else:
        model, heads = resolve(args.model, "model", note), None
    if args.heads:
        heads = resolve(args.heads, "heads", note)
    elif args.draft == "off":
        heads = None
    elif heads is None:
        heads = find_heads(model, note)
    if heads is None:
        if args.draft not in (None, "off"):
            raise ModelError(
                f"--draft {args.draft} needs draft heads, and none beside {model} fit it; give --heads, "
                "or make them with python -m entmtp.convert"
            )
        if args.trees:
            raise ModelError("--trees are for drafting, which needs --heads and no --draft off")
    return model, heads


def load(args: argparse.Namespace, **more: Any) -> Llama:
    """The model that the options name, with its heads.

    Args:
        more: further arguments of `Llama`; they come before the options.

    Raises:
        EntmtpError, ValueError: with one sentence for the user. OSError: the disk is full or cannot be written to.
    """
    from ..models.base import context_length

    model, heads = model_files(args)
    trained = context_length(model)
    n_ctx = args.ctx if args.ctx is not None else min(CONTEXT, trained or CONTEXT)
    if trained and n_ctx > MOST * trained:  # surely a slip, and llama.cpp would take all memory to find out
        raise ModelError(
            f"--ctx {n_ctx} is more than {MOST} times the {trained} tokens that {model.name} was trained for; "
            "choose a smaller one"
        )
    settings: dict[str, Any] = {
        "n_ctx": n_ctx, "n_gpu_layers": args.n_gpu_layers or 0, "flash_attn": args.flash_attn, "kernels": args.kernels,
        "verbose": False,
    }  # fmt: skip
    if args.threads:
        settings |= {"n_threads": args.threads, "n_threads_batch": args.threads}
    if args.rpc:
        settings["rpc_servers"] = args.rpc
        if args.n_gpu_layers is None:
            settings["n_gpu_layers"] = -1
    if args.tensor_split:
        settings["tensor_split"] = args.tensor_split
    if heads is not None:
        settings |= {
            "draft": "entmtp", "heads": heads, "trees": args.trees, "policy": args.draft or "entropy",
        }  # fmt: skip

    from ..llama import Llama  # not before: entmtp doctor runs where the libraries do not load

    try:
        return Llama(model, **{**settings, **more})
    except ValueError as e:
        raise explained(e, model, n_ctx) from e
    except MemoryError as e:
        raise ModelError(f"{model}: not enough memory; choose a smaller model or --ctx") from e


def explained(error: ValueError, model: Path, n_ctx: int) -> ValueError:
    """llama-cpp-python's errors, with their reason and what to do about it."""

    from ..models.base import read_base

    text = str(error)
    if "Failed to load model" in text:
        try:
            architecture = read_base(model).architecture
        except ConvertError as e:  # not a GGUF file, damaged, a heads file
            return ValueError(str(e))
        return ValueError(
            f"{model}: llama.cpp cannot load it: it does not know the architecture {architecture}, or memory is too "
            "small; give another model, or a smaller quantisation"
        )
    if "Failed to create llama_context" in text:
        return ValueError(f"{model}: no room for a context of {n_ctx} tokens; choose a smaller --ctx")
    return error
