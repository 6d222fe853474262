"""The arguments of `Llama` that commands have as options: the one list of them.

From it come the options of a command line (model.py), the settings of the server (serve/settings.py), the options that
doctor hands on to the process that loads the model, and docs/options.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..common.kv_types import CACHE_TYPES
from ..common.numbers import INFINITE, MOST_THREADS, number
from .demo import AUTO

CONTEXT = 4096  # tokens

# The library has these names, too, but this table is needed where the library does not load (entmtp doctor); a test
# compares them.
POLICIES = ("off", "static", "entropy", "confidence", "ladder", "hysteresis", "best-depth", "auto")
NEED_HEADS = ("entropy", "confidence", "ladder", "hysteresis", "best-depth")
DRAFTERS = ("text", "recycling", "heads", "model")
SCORES = ("entropy", "top1", "path")
ACCEPT = ("lossless", "typical")
OUTPUTS = ("auto", "host", "rows", "device")


@dataclass(frozen=True)
class Option:
    """An option, and the arguments of `Llama` that get its value.

    Attributes:
        name: of the parsed value; on the command line `--name`, with - for _.
        also: other spellings.
        group: `"files"`, `"machine"` (how the model is run) or `"drafting"` (of use with heads only).
        type: what makes a value of a word; bool: `--name` and `--no-name`.
        least, most: of a number.
        default: None: the argument is left out, and `Llama` does what `usual` says.
        usual: what happens without the option, in words; empty where the help says it.
    """

    name: str
    arguments: tuple[str, ...]
    group: str
    help: str
    usual: str
    also: tuple[str, ...] = ()
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    least: int | None = None
    most: int | None = None
    metavar: str | None = None
    default: Any = None

    @property
    def flag(self) -> str:
        """As it is written on a command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All ways to write it, short ones first."""
        return tuple(sorted((self.flag, *self.also), key=lambda flag: flag.startswith("--")))

    @property
    def description(self) -> str:
        """What it does, and what happens without it."""
        return f"{self.help} (default: {self.usual})" if self.usual else self.help

    def parse(self, word: str) -> Any:
        """A word of the command line as a value.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        if self.least is None:
            return self.type(word)
        most = INFINITE if self.most is None else self.most
        return number(int if self.type is int else float, self.least, most)(word)

    def words(self, value: Any) -> list[str]:
        """The option with a value as words of a command line."""
        if value is None:
            return []
        if self.type is bool:
            return [self.flag if value else self.flag.replace("--", "--no-", 1)]
        return [f"{self.flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _servers(word: str) -> list[str]:
    from ..native.rpc import parse

    try:
        return parse(word)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def _draft_vocab(word: str) -> int | str:
    from ..drafting import draft_vocab_of

    value = int(word) if word.isdecimal() else word
    try:
        draft_vocab_of(value)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return value


def _drafters(word: str) -> str:
    if unknown := [name for name in word.split(",") if name not in ("auto", *DRAFTERS)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of auto, {', '.join(DRAFTERS)}")
    return word


def _paths(word: str) -> list[str]:
    return [path for path in word.split(",") if path]


def _shares(word: str) -> list[float]:
    try:
        shares = [float(part) for part in word.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is no list of shares, such as 3,1")
    return shares


OPTIONS = (
    Option(
        "model", ("model_path",), "files",
        "base model: a GGUF file, hf:owner/repo[/file][@revision], or a small one by name: smollm2, gemma3-270m, demo",
        "ENTMTP_MODEL, else smollm2, fetched once", also=("-m",), default=AUTO,
    ),
    Option(
        "heads", ("heads",), "files", "its draft heads, named alike", "those beside the model, if any",
    ),
    Option(
        "draft_model", ("draft_model",), "files",
        "a smaller model of the same family that drafts, an EAGLE-3 layer or Gemma 4's assistant: a GGUF file, or "
        "hf:owner/repo[/file]",
        "the model's own prediction layers (MTP), if its file has any", metavar="FILE",
    ),
    Option(
        "draft_vocab", ("draft_vocab",), "files",
        "tokens that a model that drafts can propose, those that the text brought last and the first of its "
        "vocabulary: a number, or all", "an eighth of a large vocabulary", type=_draft_vocab, metavar="N|all",
    ),
    Option(
        "ctx", ("n_ctx",), "machine", "context length in tokens, 0 for the model's own",
        f"{CONTEXT}, or the model's if that is less", type=int, least=0, metavar="N",
    ),
    Option(
        "threads", ("n_threads", "n_threads_batch"), "machine", "CPU threads",
        "as many as the machine has to spare, looked at again while running", type=int, least=1, most=MOST_THREADS,
        metavar="N",
    ),
    Option(
        "n_gpu_layers", ("n_gpu_layers",), "machine", "layers on the GPU or on --rpc servers, -1 for all",
        "0, with --rpc all", type=int, least=-1, metavar="N",
    ),
    Option(
        "rpc", ("rpc_servers",), "machine", "put layers on other machines that run entmtp rpc-server", "",
        type=_servers, metavar="HOST:PORT[,…]",
    ),
    Option(
        "tensor_split", ("tensor_split",), "machine",
        "shares of the layers: of each --rpc server, then of each GPU", "by free memory", type=_shares,
        metavar="N[,N…]",
    ),
    Option("flash_attn", ("flash_attn",), "machine", "use flash attention", "no", type=bool),
    Option(
        "cache_type", ("type_k", "type_v"), "machine",
        "type of the keys and values that are kept of the text; quantised they take less memory, and flash attention",
        "f16", choices=CACHE_TYPES, metavar="TYPE",
    ),
    Option("kernels", ("kernels",), "machine", "CPU kernels: auto, off, or a name", "auto"),
    Option(
        "outputs", ("outputs",), "machine",
        "where logits are reduced: device (on a GPU they stay there), rows (those that are visited are copied to the "
        "host), host (all are), or auto", "auto", choices=OUTPUTS, metavar="WHERE",
    ),
    Option(
        "draft", ("policy",), "drafting",
        "how to draft: auto (a tree for every step from all drafters), static (one of --trees), off (plain decoding); "
        "with heads also entropy (a tree of the bank by the running entropy), confidence (grown from the heads' own "
        "probabilities), or a published policy, ladder, hysteresis or best-depth",
        "auto, with --trees entropy", also=("--policy",), choices=POLICIES, metavar="POLICY",
    ),
    Option(
        "drafters", ("drafters",), "drafting",
        "who drafts under auto: text (what followed when the last tokens came before), recycling (what the model held "
        "probable after a token when it last saw it), heads, model (--draft-model, or the model's own layers for "
        "multi-token prediction), or auto: all there are",
        "auto", type=_drafters, metavar="NAME[,…]",
    ),
    Option(
        "lookup", ("lookup",), "drafting",
        "draft from your own texts or code, too: files and folders, with commas between them", "", type=_paths,
        metavar="PATH[,…]",
    ),
    Option(
        "trees", ("trees",), "drafting", "a bank of trees: a path or a name, bank:tree for --draft static",
        "the bank tuned here, else a generic one",
    ),
    Option(
        "score", ("score",), "drafting",
        "what a published policy follows: entropy (the running one), top1 (the base model's probability of its best "
        "token) or path (the heads' of their best guesses)",
        "entropy", choices=SCORES, metavar="SCORE",
    ),
    Option(
        "calibrate", ("calibrate",), "drafting",
        "measure what passes cost on this machine: under two seconds, once per model", "yes", type=bool,
    ),
    Option(
        "adapt", ("adapt",), "drafting",
        "follow costs and acceptance while running, and stop drafting where it loses", "yes", type=bool,
    ),
    Option(
        "accept", ("accept",), "drafting",
        "lossless: the text of plain decoding; typical: Medusa's threshold, faster at high temperature, and lossy",
        "lossless", choices=ACCEPT, metavar="HOW",
    ),
    Option(
        "typical_epsilon", ("typical_epsilon",), "drafting",
        "most that typical acceptance asks of a token's probability", "0.09", type=float, least=0, metavar="P",
    ),
    Option(
        "typical_alpha", ("typical_alpha",), "drafting",
        "it asks for alpha × exp(−entropy in nats) where that is less", "0.3", type=float, least=0, metavar="X",
    ),
)  # fmt: skip
