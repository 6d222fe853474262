"""Which tokens heads should be able to draft: the frequent ones of a text, or of what the base model itself writes.

A token that heads cannot draft is never guessed right, and nothing else: the text stays the base model's. So what
counts is how many of a text's tokens a draft vocabulary covers. It is measured on text that the choice has not seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from entmtp.common.errors import ConvertError
from entmtp.models.base import BaseModel

if TYPE_CHECKING:
    from entmtp.llama import Llama

COVERAGE = 0.99  # of token occurrences, that `auto` asks for
STEP = 256  # sizes that `auto` chooses from: whole panels of the CPU kernels, whole blocks of GPUs'
PIECE = 256  # tokens in a row that count as seen, or as not seen, together
N_SAMPLE = 8192  # tokens the base model writes where no text is given

# first words of what the base model is to write; it goes on by itself
OPENINGS = (
    "", "The", "In the", "It was", "I", "When", "\n\n", "Question:", "Q: How many", "Answer:", "def", "import",
    "class", "# ", "Once upon a time", "“",
)  # fmt: skip

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class DraftVocab:
    """A draft vocabulary and what it is worth."""

    tokens: npt.NDArray[np.int64]  # ascending
    coverage: float  # share of the token occurrences of text that it was not chosen by
    source: str  # the text it was chosen by, in words


def ranked(
    text: Sequence[int] | npt.NDArray[Any], n_vocab: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens by their frequency in a text, and the share of unseen text that the first 1, 2, ... of them make up.

    Tokens that the text lacks follow those it has, lower ids first: merges of a byte-pair vocabulary are numbered by
    their frequency.

    Returns:
        Tokens [n_vocab] and shares [n_vocab].

    Raises:
        ConvertError: a text too short to measure anything by.
    """
    tokens = np.asarray(text, dtype=np.int64)
    if len(tokens) < 2 * PIECE:
        raise ConvertError(
            f"the draft vocabulary's text has {len(tokens)} tokens, and at least {2 * PIECE} are needed; give more text"
        )
    # each half of the pieces is foretold by the other
    half = np.arange(len(tokens)) // PIECE % 2
    counts = [np.bincount(tokens[half == h], minlength=n_vocab) for h in (0, 1)]
    curves = [np.cumsum(counts[1 - h][_by_frequency(counts[h])]) / counts[1 - h].sum() for h in (0, 1)]
    return _by_frequency(counts[0] + counts[1]), (curves[0] + curves[1]) / 2


def choose_vocab(
    text: Sequence[int] | npt.NDArray[Any], n_vocab: int, size: int | None, source: str
) -> DraftVocab:
    """The most frequent tokens of a text, as `ranked` has them.

    Args:
        text: tokens.
        size: how many to keep; None: the smallest multiple of STEP that covers COVERAGE of the tokens of unseen text.

    Raises:
        ConvertError: a text too short to measure anything by.
    """
    order, curve = ranked(text, n_vocab)
    if size is None:
        enough = int(np.searchsorted(curve, COVERAGE)) + 1
        size = -(-enough // STEP) * STEP
    size = min(size, n_vocab)
    return DraftVocab(np.sort(order[:size]), float(curve[size - 1]), source)


def _by_frequency(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.argsort(-counts, kind="stable")


def make_vocab(
    base: BaseModel, size: int | None, files: Sequence[str | Path] = (), progress: Progress | None = None
) -> DraftVocab:
    """A draft vocabulary of `size` tokens (None: as many as it takes) for a base model.

    Args:
        files: text, or prompts in .jsonl, that is like what the model will write. Without any, the model itself writes
            N_SAMPLE tokens first (seeds fixed), which takes as long as that takes.

    Raises:
        ConvertError: a file that cannot be used, or a base model that cannot run.
    """
    if size is not None and not 1 <= size <= base.n_vocab:
        raise ConvertError(
            f"a draft vocabulary of {size} tokens cannot be, for {base.path.name} has {base.n_vocab}; give 1 to "
            f"{base.n_vocab}, auto or none"
        )
    if not files:
        return choose_vocab(
            write_sample(base, progress), base.n_vocab, size, "text that the base model wrote"
        )
    names = ", ".join(Path(f).name for f in files)
    return choose_vocab(read_text(base, files), base.n_vocab, size, names)


def read_text(base: BaseModel, files: Sequence[str | Path]) -> list[int]:
    """The tokens of text files and of the prompts in .jsonl files, by the base model's vocabulary."""
    from entmtp.common.prompts import read_questions

    texts: list[str] = []
    for file in map(Path, files):
        try:
            texts += (
                [q.text for q in read_questions(file)]
                if file.suffix == ".jsonl"
                else [file.read_text("utf-8")]
            )
        except UnicodeDecodeError as e:
            raise ConvertError(f"{file}: this is no UTF-8 text; give plain text or .jsonl prompts") from e
        except ValueError as e:
            raise ConvertError(str(e)) from e
    return [token for tokens in tokenize(base.path, texts) for token in tokens]


def tokenize(model: Path, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int32]]:
    """The tokens of each text, by the vocabulary of a GGUF file, whose weights are not read."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
    if not loaded:
        raise ConvertError(f"{model}: its vocabulary cannot be loaded; give a GGUF that llama.cpp can read")
    try:
        vocab = llama_cpp.llama_model_get_vocab(loaded)
        for text in texts:
            data = text.encode()
            buffer = np.empty(len(data) + 8, np.int32)
            n = llama_cpp.llama_tokenize(
                vocab,
                data,
                len(data),
                buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                len(buffer),
                False,
                False,
            )
            yield buffer[: max(n, 0)]
    finally:
        llama_cpp.llama_model_free(loaded)


def write_sample(base: BaseModel, progress: Progress | None = None, n_tokens: int = N_SAMPLE) -> list[int]:
    """Tokens that the base model writes after short openings, at temperatures 0.7 and 1, the same in every run."""
    with _open(base, n_ctx=PIECE + 32) as llm:
        tokens: list[int] = []
        for i in range(-(-n_tokens // PIECE)):
            llm.reset()
            llm.set_seed(i)
            prompt = llm.tokenize(OPENINGS[i % len(OPENINGS)].encode(), add_bos=True, special=False)
            temp = (0.7, 1.0)[i // len(OPENINGS) % 2]
            for n, token in enumerate(
                llm.generate(prompt or [0], temp=temp, top_k=0, top_p=1.0, min_p=0.0), 1
            ):
                tokens.append(token)
                if n == PIECE or token == llm.token_eos():
                    break
            if progress:
                progress("the base model writes text", min((i + 1) * PIECE, n_tokens), n_tokens)
    return tokens


@contextmanager
def _open(base: BaseModel, **settings: Any) -> Iterator[Llama]:
    """The base model in our library, for a while."""
    from entmtp.llama import Llama

    try:
        llm = Llama(base.path, verbose=False, **settings)
    except (ValueError, RuntimeError, OSError) as e:
        raise ConvertError(
            f"{base.path}: the model cannot be loaded to choose a draft vocabulary ({e}); give a base model that runs "
            "here, or leave --draft-vocab out"
        ) from e
    with closing(llm):
        yield llm
