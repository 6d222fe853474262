"""`entmtp.Engine`: one model for several texts at a time, in shared passes."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import drafting
from .common.errors import BusyError, Cancelled, EntmtpError
from .common.fork import check_threads
from .llama import Llama
from .models.base import context_length
from .models.names import resolve
from .native.group import Group, Passes
from .slot import Slot
from .stream import Stream

CLOSED = "the engine is closed"
MOST_TOKENS = 1 << 30
CLOSE_WITHIN = 60.0  # seconds


def _check(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, it must be a whole number from 1 to {most}")


class Host(Llama):
    """The model of an engine, with a context for several sequences that share one cache.

    Args:
        n_slots: so many.
    """

    one_text = False
    has_slots = False

    def __init__(self, model_path: str | Path, *, n_slots: int, **kwargs: Any):
        self._n_slots = n_slots
        if "n_batch" in kwargs:  # a token of each at least, or llama.cpp ends the process
            kwargs["n_batch"] = max(kwargs["n_batch"], n_slots)
        super().__init__(model_path, **kwargs)

    def prepare_context(self, params: Any) -> None:
        params.n_seq_max = self._n_slots
        params.kv_unified = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "the model of an engine writes in its slots: Engine.submit, or with engine.slot() as llm"
        )

    def close(self) -> None:
        """Nothing, once there are slots, which write with it until the engine is closed."""
        if not self.has_slots:
            super().close()

    def end(self) -> None:
        self.has_slots = False
        self.close()


class Engine:
    """A model that writes several texts at a time.

    Passes are shared: four tokens of four texts cost far less than four passes over one. Drafts fade as texts are
    added, for the room in a pass goes where it brings most, and return when texts end. A text is what it would be
    alone: bit for bit where the CPU kernels compute.

    Examples:
        >>> with Engine("model.gguf", slots=4) as engine:
        ...     streams = [engine.submit(p, max_tokens=64) for p in prompts]
        ...     for stream in streams:
        ...         print(stream.text)

    Args:
        model_path: as for `Llama`.
        slots: texts at a time; further ones wait for their turn, in the order in which they came.
        n_ctx: tokens that each text may have, prompt and answer; 0: as many as the model was trained for.
        kv_tokens: tokens that all texts together have room for. None: `slots * n_ctx`. With fewer, a text waits until
            there is room, and what was kept of finished ones gives way.
        stall: seconds that others may have to wait while a prompt is evaluated: long prompts come in pieces.
        draft: `"entmtp"`, or None to decode plainly.
        **kwargs: what else `Llama` takes. Flash attention is on by default.

    Raises:
        ValueError: arguments that cannot work, or a model whose memory cannot hold several texts.
        EntmtpError: as for `Llama`.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        slots: int = 4,
        n_ctx: int = 2048,
        kv_tokens: int | None = None,
        stall: float = 0.2,
        draft: str | None = "entmtp",
        **kwargs: Any,
    ):
        for name, why in {
            "logits_all": "keeps the logits of one text",
            "embedding": "gives no text",
            "draft_model": "follows one text",
            "draft_vocab": "is of a model that drafts, which follows one text",
        }.items():
            if kwargs.get(name):
                raise ValueError(f"{name} is not for an engine: it {why}")
        if n_ctx == 0:
            n_ctx = context_length(resolve(model_path, "model")) or n_ctx
        settings = {"flash_attn": True, "draft": draft, **kwargs}
        self._begin(
            lambda n_cells: Host(model_path, n_slots=slots, n_ctx=n_cells, **settings),
            slots,
            n_ctx,
            kv_tokens,
            stall,
        )

    @classmethod
    def around(
        cls, load: Callable[[int], Host], slots: int, n_ctx: int, kv_tokens: int | None = None, stall: float = 0.2,
        slot_type: type[Slot] = Slot,
    ) -> Engine:  # fmt: skip
        """An engine for a model that somebody else loads.

        Args:
            load: called with the tokens that its context must have room for.
            slot_type: what `slot` gives.
        """
        engine = cls.__new__(cls)
        engine._begin(load, slots, n_ctx, kv_tokens, stall, slot_type)
        return engine

    def _begin(
        self, load: Callable[[int], Host], slots: int, n_ctx: int, kv_tokens: int | None, stall: float,
        slot_type: type[Slot] = Slot,
    ) -> None:  # fmt: skip
        room = slots * n_ctx if kv_tokens is None else kv_tokens
        _check("slots", slots, 64)
        _check("n_ctx", n_ctx, MOST_TOKENS)
        _check("kv_tokens", room, MOST_TOKENS)
        if not 0 < stall < math.inf:
            raise ValueError(f"stall is {stall}, it must be a number of seconds above 0")
        n_ctx = min(n_ctx, room)  # no text can have more
        self.n_ctx, self.kv_tokens = n_ctx, room
        self._stack = contextlib.ExitStack()
        self._closed = self._is_free = False
        self._lent: dict[Slot, int] = {}  # to which threads
        self._free = threading.Condition()
        self._reserved: dict[Slot, range] = {}  # tokens that its text may have
        self._waiting: dict[Slot, range] = {}  # for room, who came first before the others
        self._pace = threading.Lock()
        with contextlib.ExitStack() as failed:
            failed.callback(self._stack.close)
            # Loading measures passes, and OpenMP keeps a team for every thread that ever computed: one that goes takes
            # its team along. Two teams on the same processors wait for each other asleep, at several times the cost
            with ThreadPoolExecutor(1) as loader:
                # a tree needs a few cells more than its text
                self.host = loader.submit(load, self.kv_tokens + 32 * slots).result()
            self._stack.callback(self.host.end)
            self._seed = self.host._seed
            if self.host.is_recurrent:
                raise ValueError(
                    "the memory of this model (recurrent or hybrid) cannot hold several texts in one cache; use a Llama"
                )
            solo = self.host.decoder
            heads = self.host._heads
            if heads is not None and heads.info.prefix:
                heads = None  # their layer's own cache holds one text
                if self.host.bank is not None:
                    who = [d for d in self.host.drafters if d != "heads"]
                    self.host._settings["drafters"] = drafting.who_drafts(who, False)
            stats = solo.stats_enabled
            solo.close()
            self.group = Group(self.host.ctx, heads, slots, n_ctx)
            self._stack.callback(self.group.close)
            self.group.set_stall(stall)
            self.slots: list[Any] = []
            for i, decoder in enumerate(self.group.decoders):
                decoder.set_stats(stats)
                if self.host.bank is not None:
                    self.host.install(decoder)
                    decoder.set_threads(self.host.n_threads)
                self.slots.append(slot_type(self.host, self, i, decoder))
            self.host.has_slots = True
            failed.pop_all()
        weakref.finalize(self, self._stack.close).atexit = False
        self._idle = list(self.slots)  # the one that has been idle longest comes first
        self._workers = ThreadPoolExecutor(slots, thread_name_prefix="entmtp")

    # -- slots --

    @contextlib.contextmanager
    def slot(self) -> Iterator[Any]:
        """A slot for the block, as a `Llama`; waits until there is one.

        Raises:
            BusyError: this thread has all of them already.
            EntmtpError: the engine was closed meanwhile.
        """
        with self._free:
            if len(self._lent) == len(self.slots) and set(self._lent.values()) == {threading.get_ident()}:
                raise BusyError(
                    "this thread has all slots of the engine; give one back, or make an engine of more"
                )
            self._free.wait_for(lambda: self._idle or self._closed)
            if self._closed:
                raise EntmtpError(CLOSED)
            slot = self._idle.pop(0)
            self._lent[slot] = threading.get_ident()
        slot.begin()
        try:
            yield slot
        finally:
            slot.leave()
            self._stop_reserving(slot)
            with self._free:
                del self._lent[slot]
                self._idle.append(slot)
                self._free.notify_all()

    def next_seed(self) -> int:
        """For a text that names none: slots that begin with the same would write the same texts."""
        with self._free:
            self._seed = random.Random(self._seed).randrange(1 << 32)
            return self._seed

    @contextlib.contextmanager
    def room_for(self, slot: Slot, n: int) -> Iterator[None]:
        """A text of up to n tokens in a slot: waits until they fit into the memory, and lets passes wait for it.

        Raises:
            ValueError: so many never fit.
            Cancelled: nobody wants the text any more.
            EntmtpError: the engine was closed meanwhile.
        """
        if n > self.kv_tokens:
            raise ValueError(
                f"the text may come to {n} tokens, but all texts together have room for {self.kv_tokens} (kv_tokens); "
                "ask for fewer, or create the engine with more"
            )
        own = range(n)
        self._stop_reserving(slot)  # an older text of the slot, which was left, not closed
        with self._free:
            self._waiting[slot] = own
            try:
                # who cancels holds no lock, so it is asked now and then
                while not self._free.wait_for(lambda: self._may_have(own) or self._closed, timeout=0.05):
                    if slot.left:
                        raise Cancelled("cancelled while it waited for room")
                if self._closed:
                    raise EntmtpError(CLOSED)
                self._reserved[slot] = own
            finally:
                del self._waiting[slot]
                self._free.notify_all()  # the next one may have its room, too
            self._give_way(slot)
        self.group.set_active(slot.number, True)
        try:
            yield
        finally:
            if self._reserved.get(slot) is own:  # no other text of the slot began since
                self.group.set_active(slot.number, False)
                with self._free:
                    del self._reserved[slot]
                    self._free.notify_all()

    def make_room_for(self, slot: Slot, n: int) -> None:
        """Before a slot is to hold n tokens: where no text of it has its room (`room_for`), it takes so much at once.

        Raises:
            EntmtpError: the texts of others leave no room.
        """
        with self._free:
            own = self._reserved.get(slot, range(0))
            if n <= len(own):
                return
            if self._taken() - len(own) + n > self.kv_tokens:
                raise EntmtpError(
                    f"the texts of others leave no room for {n} tokens (of {self.kv_tokens} for all, kv_tokens); "
                    "wait until one ends, or create the engine with more"
                )
            self._reserved[slot] = range(n)
            self._give_way(slot)

    def _stop_reserving(self, slot: Slot) -> None:
        with self._free:
            if self._reserved.pop(slot, None) is None:
                return
            self._free.notify_all()
        self.group.set_active(slot.number, False)

    def _may_have(self, own: range) -> bool:
        """In turn: many short texts would else keep a long one waiting."""
        return next(iter(self._waiting.values())) is own and self._taken() + len(own) <= self.kv_tokens

    def _taken(self) -> int:
        return sum(map(len, self._reserved.values()))

    def _give_way(self, slot: Slot) -> None:
        """What slots keep of earlier texts goes where there is no room for it: of idle ones first, the oldest before
        the others, then of those that wait for room themselves.
        """
        room = self.kv_tokens - self._taken()
        kept = [s for s in (*self._idle, *self._waiting) if s is not slot and s not in self._reserved]
        if len(kept) * self.n_ctx <= room:
            return  # none is asked: each would wait for the pass that runs
        held = {s: s.decoder.n_held for s in kept}
        while sum(held.values()) > room:
            oldest = next(iter(held))
            # not by a call of the slot, whose thread may be in one: it finds out with its next text
            oldest.decoder.clear()
            del held[oldest]

    # -- requests --

    def submit(self, prompt: str | Sequence[int] | list[dict[str, Any]], **settings: Any) -> Stream:
        """Have a text written, from any thread.

        Args:
            prompt: text or tokens to go on with, or the messages of a chat.
            **settings: of `Llama.create_completion`, or of `create_chat_completion` for messages.

        Returns:
            A stream of pieces of text, to iterate over with `for` or `async for`; `.text` waits for all of it.
        """
        if self._closed:
            raise EntmtpError(CLOSED)
        stream = Stream()
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        try:
            written = self._workers.submit(self._write, stream, prompt, is_chat, settings)
        except RuntimeError:  # closed just now
            raise EntmtpError(CLOSED) from None
        written.add_done_callback(lambda f: stream.fail(EntmtpError(CLOSED)) if f.cancelled() else None)
        return stream

    def _write(self, stream: Stream, prompt: Any, is_chat: bool, settings: dict[str, Any]) -> None:
        try:
            with self.slot() as llm:
                llm.unwanted = lambda: stream.cancelled
                create = llm.create_chat_completion if is_chat else llm.create_completion
                stream.follow(create(prompt, **{**settings, "stream": True}), llm.cancel)
        except BaseException as e:
            stream.fail(e)

    # -- the machine --

    def follow(self) -> None:
        """Before a pass: the number of threads that the machine has to spare now."""
        check_threads(self.host.n_threads)
        threads = self.host._threads
        if threads is None or not self._pace.acquire(blocking=False):
            return
        try:
            if (n := threads.look(id(self))) != self.host.n_threads:
                self._compute_on(n)
        finally:
            self._pace.release()

    def _compute_on(self, n: int) -> None:
        self.host.n_threads = self.host.n_threads_batch = n
        for slot in self.slots:
            slot.n_threads = slot.n_threads_batch = n
            slot.decoder.set_threads(n, drafting.costs_for(n, self.host._costs))

    def set_threads(self, n_threads: int) -> None:
        """Compute on so many CPU threads from now on."""
        if n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}, it must be at least 1")
        with self._pace:
            self.host._threads = None
            self._compute_on(n_threads)

    @property
    def passes(self) -> Passes:
        """What was evaluated so far: passes, texts that took part in them, and tokens."""
        return self.group.passes

    def close(self) -> None:
        """Stop what is being written, and free the model.

        Raises:
            BusyError: this thread has a slot, or a call in a slot does not end: nothing is freed until it has, and the
                engine is closed once more.
        """
        with self._free:
            if self._is_free:
                return
            if threading.get_ident() in self._lent.values():
                raise BusyError(
                    "this thread has a slot of the engine: give it back before the engine is closed"
                )
            self._closed = True
            self._free.notify_all()
        for slot in self.slots:
            slot.cancel()
        self._workers.shutdown(wait=False, cancel_futures=True)
        with self._free:
            if not self._free.wait_for(lambda: not self._lent, timeout=CLOSE_WITHIN):
                raise BusyError(
                    f"a call in a slot of the engine did not end within {CLOSE_WITHIN:g} s: close the engine then"
                )
            if self._is_free:
                return
            self._is_free = True
        self._workers.shutdown()
        self._stack.close()
        for slot in self.slots:
            slot.end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
