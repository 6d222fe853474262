"""Tokens to text, where the same list comes again and again with one more token at its end.

llama-cpp-python's completion loop asks for the whole text after every token, and its tokenizer calls llama.cpp once per
token of it: a text of n tokens costs n² / 2 calls. Here a token's bytes are asked for once, and the text
so far is kept.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llama_cpp
from llama_cpp.llama_tokenizer import LlamaTokenizer

# llama.cpp splits a text by regular expressions of the C++ library, which goes one call deeper for every character of a
# match: some 300 bytes of stack
RUNS = re.compile(rb"\S+\s*|\s+")
SAFE_RUN, LONGEST_RUN = 8 << 10, 2 << 20  # bytes
STACK_OF_BYTE, STACK_FOR_ALL = 1 << 10, 16 << 20
SHORT = 64  # tokens that are joined anew in every call


def check_tokens(tokens: Iterable[int], n_vocab: int) -> None:
    """Raise ValueError unless all are tokens of a vocabulary of so many."""
    for token in tokens:
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is none of this model's, which go from 0 to {n_vocab - 1}")


_sizes = threading.Lock()  # the size of a stack is the process's, for threads that begin


def with_stack(n_bytes: int, call: Callable[[], Any]) -> Any:
    """What a call returns, or raises, in a thread of its own with so large a stack."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((call(), None))
        except BaseException as e:
            done.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    with _sizes:
        before = threading.stack_size(n_bytes)
        try:
            thread.start()
        except RuntimeError:
            raise ValueError("there is no memory to read a word of this length; put spaces into it") from None
        finally:
            threading.stack_size(before)
    thread.join()
    result, error = done[0]
    if error is not None:
        raise error
    return result


class Tokenizer(LlamaTokenizer):
    """The model's own tokenizer, with llama-cpp-python's results."""

    def __init__(self, llama: llama_cpp.Llama):
        super().__init__(llama)
        self._bos = self._model.token_bos()
        self._n_vocab = self._model.n_vocab()
        self._pieces: dict[int, bytes] = {}
        # replaced as a whole, never changed: another thread may be reading it
        self._memo: tuple[list[int], bytes] = ([], b"")

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """As llama-cpp-python's; a text with a long run without a space may take more stack than a thread has.

        Raises:
            ValueError: there is a run that no stack is large enough for.
        """
        longest = max((len(run) for run in RUNS.findall(text)), default=0) if len(text) > SAFE_RUN else 0
        if longest <= SAFE_RUN:
            return list(super().tokenize(text, add_bos, special))
        if longest > LONGEST_RUN:
            raise ValueError(
                f"the text has a word of {longest} bytes, which is too long to read; put spaces into it"
            )
        read = super().tokenize
        return list(with_stack(STACK_FOR_ALL + STACK_OF_BYTE * longest, lambda: read(text, add_bos, special)))

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            check_tokens([token], self._n_vocab)
            size = 32
            buffer = (ctypes.c_char * size)()
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, False)
            if n < 0:  # longer than the buffer
                buffer = (ctypes.c_char * -n)()
                n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, -n, 0, False)
            piece = self._pieces[token] = buffer.raw[:n]
        return piece

    def _join(self, tokens: Sequence[int]) -> bytes:
        try:
            return b"".join([self._pieces[token] for token in tokens])
        except KeyError:
            return b"".join([self._piece(token) for token in tokens])

    def detokenize(self, tokens: Sequence[int], prev_tokens: Any = None, special: bool = False) -> bytes:
        """Text of `tokens`, as `llama_cpp.Llama.detokenize`.

        Raises:
            ValueError: one of them is no token, for which llama.cpp would end the process.
        """
        if special:
            check_tokens(tokens, self._n_vocab)
            return super().detokenize(list(tokens), special=True)
        if len(tokens) <= SHORT:
            text = self._join(tokens)
        else:
            tokens = list(tokens)
            known, text = self._memo
            if tokens[: len(known)] != known:
                known, text = [], b""
            text += self._join(tokens[len(known) :])
            if len(tokens) - len(known) > SHORT:
                self._memo = tokens, text
        # as llama-cpp-python: some models put a space before the first word
        return text[1:] if text[:1] == b" " and tokens[0] == self._bos else text
