"""One of several users of a model: a `Llama` whose passes are shared with the others'."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

from .common.errors import BusyError, Cancelled
from .common.use import Use
from .completion import Ending
from .llama import Llama
from .native.decoder import Decoder
from .request import LONGEST_REST

# A text is begun from another slot's cells where that saves so many tokens more than the slot's own
WORTH_SHARING = 8


class Owner(Protocol):
    """What a slot asks of its engine."""

    n_ctx: int
    slots: list[Any]

    def room_for(self, slot: Slot, n: int) -> contextlib.AbstractContextManager[None]: ...
    def make_room_for(self, slot: Slot, n: int) -> None: ...
    def next_seed(self) -> int: ...
    def follow(self) -> None: ...


class Slot(Llama):
    """As `Llama`, for one text at a time; made by an `Engine`.

    What changes the model or its context as a whole (other trees, states, embeddings) is not for a slot.
    """

    one_text = False

    def __init__(self, host: Llama, engine: Owner, number: int, decoder: Decoder):
        self.begin_as(host, engine.n_ctx)
        self._engine, self.number = engine, number
        self._decoder = decoder
        self._use = Use()
        self.on_token = None
        self._begins = self._stopped = False
        self.left = False  # whoever asked for the text does not want it any more

    def follow(self) -> None:
        self._engine.follow()

    def compute_on(self, n_threads: int) -> None:
        raise ValueError("threads are the engine's: Engine.set_threads")

    def set_threads(self, n_threads: int | None = None) -> None:
        self.compute_on(0)

    def set_trees(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("trees are chosen when the engine is made")

    def save_state(self) -> Any:
        raise ValueError("a slot of an engine has no state of its own to save; use a Llama")

    def load_state(self, state: Any) -> None:
        raise ValueError("a slot of an engine has no state of its own to load; use a Llama")

    def __getstate__(self) -> Any:
        raise TypeError("a slot of an engine cannot be copied; make an engine of its own there")

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("an engine gives no embeddings; use a Llama with embedding=True")

    def create_completion(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        with self._own_limit():
            answer = super().create_completion(prompt, *args, **kwargs)
        return self._stream(answer) if isinstance(answer, Iterator) else answer

    def _stream(self, chunks: Iterator[Any]) -> Iterator[Any]:
        with self._own_limit():
            yield from chunks

    @contextlib.contextmanager
    def _own_limit(self) -> Iterator[None]:
        """llama-cpp-python names the context's whole size where a prompt is too long."""
        try:
            yield
        except ValueError as e:
            text, found, _ = str(e).partition("exceed context window of ")
            raise ValueError(f"{text}{found}{self.n_ctx()}") if found else e from None

    def leave(self) -> None:
        """Whoever had the slot is done with it: a text that was not written to its end is over."""
        self.unwanted = None
        try:
            with self._use:
                self._use.begin()
                self.n_tokens = 0  # its cells stay, for texts that begin alike
                self._requires_eval = True
        except BusyError:  # in another thread
            self.cancel()

    def end(self) -> None:
        """The engine is closed."""
        self._use.end()
        self._decoder = None
        self.forget_model()

    def next_seed(self) -> int:
        return self._engine.next_seed()

    def cancel(self) -> None:
        self.left = True
        super().cancel()

    def begin(self) -> None:
        """Somebody else has it from now on: what was cancelled is over."""
        self.left, self.unwanted = False, None
        self._resume()

    def eval(self, tokens: Sequence[int]) -> None:
        self._engine.make_room_for(self, min(self.n_tokens + len(tokens), self.n_ctx()))
        super().eval(tokens)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `Llama.generate`; waits where the texts of others leave no room in the memory."""
        tokens = list(tokens)
        self.left = self.is_unwanted()
        asked = kwargs.get("stopping_criteria")
        most = asked.most if isinstance(asked, Ending) else None
        n = self.n_ctx() if most is None else min(len(tokens) + most + LONGEST_REST, self.n_ctx())
        try:
            with self._engine.room_for(self, n):
                return (yield from super().generate(tokens, *args, **kwargs))
        except Cancelled:  # while it waited
            return None

    def _look_at_prompt(self, prompt: list[int], reset: bool) -> None:
        if reset and prompt:
            self._begin_as_others(prompt)
        super()._look_at_prompt(prompt, reset)

    def _begin_as_others(self, prompt: list[int]) -> None:
        """What the slot, or another, has evaluated of the prompt need not be evaluated again."""
        own = self.decoder.in_common(prompt)
        if own > self.n_tokens:  # of the slot's last text
            self.n_tokens = own
            self.input_ids[:own] = prompt[:own]
        common = {other: other.decoder.in_common(prompt) for other in self._engine.slots if other is not self}
        best = max(common, key=lambda other: common[other], default=None)
        if best is None or common[best] < own + WORTH_SHARING:
            return
        if n := self.decoder.share(best.decoder, prompt):
            self.n_tokens = n
            self.input_ids[:n] = prompt[:n]

    def close(self) -> None:
        """Nothing: the engine holds what there is to free."""

    def __hash__(self) -> int:
        return id(self)
