"""The options by which every command names and loads a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import NO_CONTEXT, ConvertError, ModelError
from ..models.names import resolve
from .demo import AUTO, DEMO, demo_files, first_model
from .table import CONTEXT, NEED_HEADS, OPTIONS

if TYPE_CHECKING:
    from ..engine import Engine
    from ..llama import Llama

MOST = 64  # times the context that a model was trained for
TITLES = {"files": "model", "machine": "how to run it", "drafting": "drafting"}


def add_model_options(parser: argparse.ArgumentParser, drafting: bool = True, **defaults: Any) -> None:
    """`--model`, `--heads`, how to run them and how to draft; `load` takes the result.

    Args:
        drafting: False: without the options of how to draft, for a command that says that itself.
        defaults: other defaults than the table's, by name; None: the option must be given, or may be left out.
    """
    for group, title in TITLES.items():
        options = [option for option in OPTIONS if option.group == group]
        if group == "drafting" and not drafting:
            parser.set_defaults(**{option.name: option.default for option in options})
            continue
        section = parser.add_argument_group(title)
        for option in options:
            default, text = option.default, option.description
            if option.name in defaults:
                default = defaults[option.name]
                text = option.help + ("" if default is None else f" (default: {default})")
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if option.type is not bool:
                how = {"type": option.parse, "choices": option.choices, "metavar": option.metavar}
            section.add_argument(*option.spellings, dest=option.name, default=default, help=text, **how)


def words(args: argparse.Namespace) -> list[str]:
    """The options as a command line that gives the same again."""
    return [word for option in OPTIONS for word in option.words(getattr(args, option.name))]


def arguments(args: argparse.Namespace, heads: Path | None) -> dict[str, Any]:
    """Arguments of `Llama`, but for the model, that the options name; those for drafting unless it is off."""
    drafts = getattr(args, "draft", None) != "off"
    found: dict[str, Any] = {"draft": "entmtp", "heads": heads} if drafts else {}
    for option in OPTIONS:
        value = getattr(args, option.name, None)
        drafting = option.group == "drafting" or option.name in ("draft_model", "draft_vocab")
        if value is not None and (option.group == "machine" or (drafting and drafts)):
            found |= dict.fromkeys(option.arguments, value)
    return found


def note(sentence: str) -> None:
    """Say something that the user should know, and go on."""
    print(f"note: {sentence}", file=sys.stderr)


def model_files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Model and heads that the options name; heads are looked for beside the model unless `--draft off`.

    Raises:
        ModelError: there is no such file, or heads are asked for and there are none.
        OSError: the disk is full or cannot be written to.
    """
    for what, given in {
        "--heads are": args.heads,
        "--draft-model is": getattr(args, "draft_model", None),
        "--draft-vocab is": getattr(args, "draft_vocab", None),
    }.items():
        if args.draft == "off" and given:
            raise ModelError(f"{what} given, but --draft is off; leave one of them out")
    from ..models.beside import find_heads

    heads: Path | None
    name = first_model(note) if args.model == AUTO and not Path(AUTO).exists() else args.model
    if name == DEMO and not Path(DEMO).exists():
        model, heads = demo_files()
    else:
        model, heads = resolve(name, "model", note), None
    if args.heads:
        heads = resolve(args.heads, "heads", note)
    elif args.draft == "off":
        heads = None
    elif heads is None:
        heads = find_heads(model, note)
    if heads is None and args.draft in NEED_HEADS:
        raise no_heads(f"--draft {args.draft}", model)
    if args.draft == "off":
        named = [o for o in OPTIONS if o.group == "drafting" and getattr(args, o.name, None) is not None]
        if drafting := [o.flag for o in named if o.name != "draft"]:
            raise ModelError(
                f"{', '.join(drafting)}: for drafting, but --draft is off; leave one of them out"
            )
    return model, heads


def no_heads(what: str, model: Path) -> ModelError:
    """The error of what needs heads that are not there."""
    return ModelError(
        f"{what} needs draft heads, and none beside {model} fit it; give --heads, or make them with "
        "entmtp train or entmtp convert"
    )


def load(args: argparse.Namespace, **more: Any) -> Llama:
    """The model that the options name, with its heads.

    Args:
        more: further arguments of `Llama`; they come before the options.

    Raises:
        EntmtpError, ValueError: with one sentence for the user. OSError: the disk is full or cannot be written to.
    """
    from ..llama import Llama  # not before: entmtp doctor runs where the libraries do not load

    return _made(Llama, args, more)


def load_engine(args: argparse.Namespace, slots: int, **more: Any) -> Engine:
    """The same for so many texts at a time, each with `--ctx` tokens."""
    from ..engine import Engine

    if getattr(args, "draft", None) == "off":
        more["draft"] = None
    return _made(Engine, args, {**more, "slots": slots})


def _made(kind: Any, args: argparse.Namespace, more: dict[str, Any]) -> Any:
    from ..models.base import context_length

    model, heads = model_files(args)
    trained = context_length(model)
    n_ctx = args.ctx if args.ctx is not None else min(CONTEXT, trained or CONTEXT)
    if trained and n_ctx > MOST * trained:  # surely a slip, and llama.cpp would take all memory to find out
        raise ModelError(
            f"--ctx {n_ctx} is more than {MOST} times the {trained} tokens that {model.name} was trained for; "
            "choose a smaller one"
        )
    settings = arguments(args, heads) | {"n_ctx": n_ctx, "verbose": False}
    try:
        return kind(model, **{**settings, **more})
    except ValueError as e:
        raise explained(e, model, n_ctx, getattr(args, "cache_type", None)) from e
    except MemoryError as e:
        raise ModelError(f"{model}: not enough memory; choose a smaller model or --ctx") from e


def explained(error: ValueError, model: Path, n_ctx: int, cache_type: str | None = None) -> ValueError:
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
    if NO_CONTEXT in text:
        tip = "choose a smaller --ctx" + (", or leave --cache-type out" if cache_type is not None else "")
        return ValueError(f"{model}: no context of {n_ctx} tokens ({text.partition(': ')[2]}); {tip}")
    return error
