"""A drafting model and a plain twin, to which the same calls are made: whatever they are, the tokens are the same."""

from __future__ import annotations

import ctypes
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llama_cpp import (
    LlamaGrammar,
    LlamaRAMCache,
    llama_adapter_lora_init,
    llama_adapter_lora_p_ctypes,
    llama_set_adapters_lora,
)

from entmtp import Llama
from entmtp.models.assets import assets
from entmtp.models.names import resolve
from entmtp.options.demo import demo_files

from .forced import draft_a_lot
from .hybrids import hybrid_path
from .models import model_path

GRAMMARS = (
    'root ::= ("yes" | "no") " because " [a-z ]+ "."',
    r'root ::= "{\"name\": \"" [A-Za-z ]+ "\", \"age\": " [0-9]+ "}"',
)
HYBRIDS = ("lfm2", "qwen35", "nemotron_h")  # models whose memory is cells and states


@dataclass(frozen=True)
class Subject:
    """A model and how it is loaded: both twins, and the one that drafts."""

    model: Path
    both: dict[str, Any] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)
    forced: bool = False  # it drafts whatever it costs


def subject(name: str) -> Subject:
    """`demo`, a random model by the kind of its memory, or any that `--model` of the commands takes."""
    if name == "demo":
        model, heads = demo_files()
        return Subject(model, drafting={"heads": heads})
    if name in HYBRIDS:
        return Subject(hybrid_path(name), forced=True)
    if name == "window":  # one that forgets
        both = {"swa_full": False, "n_ctx": 1536, "n_batch": 64, "n_ubatch": 64}
        return Subject(model_path("olmo2"), both, forced=True)
    return Subject(Path(resolve(name)))


def prompts() -> list[str]:
    """Of the benchmark's tasks."""
    return [
        json.loads(line)["prompt"]
        for path in sorted((assets() / "prompts").glob("*.jsonl")) if path.stem in ("humaneval", "gsm8k", "literature")
        for line in path.read_text("utf-8").splitlines()
    ]  # fmt: skip


class Twins:
    """The same calls to a drafting model and a plain one, drawn by a seed.

    Args:
        adapter: file of a LoRA adapter of the model.
        forced: the first drafts whatever it costs.
    """

    def __init__(
        self, drafting: Llama, plain: Llama, texts: list[str], adapter: Path, seed: int, forced: bool = False
    ):
        self.models, self.texts, self.rng = (drafting, plain), texts, random.Random(seed)
        self.n_tokens = self.n_accepted = 0
        self.calls: Counter[str] = Counter()
        self.grammars = [LlamaGrammar.from_string(g, verbose=False) for g in GRAMMARS]
        self.longest = plain.tokenize("".join(texts).encode())[: plain.n_ctx() - 1]
        self.forced = forced
        self.other_policy()
        # they are freed with the models
        self.adapters = [llama_adapter_lora_init(llm.model, str(adapter).encode()) for llm in self.models]
        if not all(self.adapters):
            raise AssertionError("the adapter was not loaded")

    def prompt(self) -> str:
        text = self.rng.choice(self.texts)
        begin = self.rng.randrange(len(text))
        return text[begin : begin + self.rng.randrange(1, 600)]

    def settings(self) -> dict[str, Any]:
        draw = self.rng.random
        found = {
            "temperature": self.rng.choice((0.0, 0.0, 0.4, 0.8, 1.2)), "seed": self.rng.randrange(1 << 30),
            "max_tokens": self.rng.randrange(1, 160), "top_k": self.rng.choice((0, 1, 20, 40)),
            "repeat_penalty": 1.0 if draw() < 0.7 else 1.1, "frequency_penalty": 0.0 if draw() < 0.8 else 0.4,
            "presence_penalty": 0.0 if draw() < 0.9 else 0.3, "min_p": self.rng.choice((0.05, 0.05, 0.0, 0.3)),
            "top_p": self.rng.choice((0.95, 0.95, 1.0, 0.5)), "typical_p": 1.0 if draw() < 0.9 else 0.6,
            "mirostat_mode": 0 if draw() < 0.9 else self.rng.choice((1, 2)),
            "stop": [] if draw() < 0.7 else [self.rng.choice((".", "\n", " the"))],
        }  # fmt: skip
        if draw() < 0.1:
            few = self.rng.sample(self.longest, 4)
            found["logit_bias"] = {token: self.rng.uniform(-5.0, 5.0) for token in few}
        if draw() < 0.1:
            found["logprobs"] = self.rng.randrange(4)
        return found

    def answered(self, what: str, prompt: str | list[int], **settings: Any) -> None:
        """The same answer, its usage and its log probabilities."""
        answers = [llm.create_completion(prompt, **settings) for llm in self.models]
        self.same(what, [(a["choices"], a["usage"]) for a in answers])
        self.n_tokens += answers[0]["usage"]["completion_tokens"]

    def same(self, what: str, answers: list[Any]) -> None:
        if answers[0] != answers[1]:
            raise AssertionError(
                f"{what}, call {sum(self.calls.values())}: {answers[0]!r} is not {answers[1]!r}"
            )

    def complete(self) -> None:
        self.answered("complete", self.prompt(), **self.settings())

    def gone_back(self) -> None:
        """The last text without its end, which a pass may or may not be gone back over, and another end."""
        llm, draw = self.models[0], self.rng.randrange
        text = llm.input_ids[: llm.n_tokens].tolist() or self.longest[:40]
        kept = text[: max(len(text) - self.rng.choice((1, 2, 3, 4, 5, 8, draw(1, len(text) + 1))), 1)]
        at = draw(len(self.longest))
        prompt = kept + self.longest[at : at + self.rng.choice((0, 0, 1, 3, 9))]
        self.answered("gone back", prompt[: llm.n_ctx() - 1], **self.settings())

    def with_grammar(self) -> None:
        grammar = self.rng.choice(self.grammars)
        self.answered("grammar", self.prompt(), **(self.settings() | {"grammar": grammar}))

    def stopped(self) -> None:
        """By texts of the answer itself: a stream is the whole answer, which ends before the first of them."""
        prompt, settings = self.prompt(), self.settings() | {"stop": [], "echo": self.rng.random() < 0.3}
        settings.pop("logprobs", None)
        text = self.models[1].create_completion(prompt, **settings)["choices"][0]["text"]
        behind = text[len(prompt) :] if settings["echo"] else text
        llm = self.models[1]
        written = llm.detokenize(llm.input_ids[: llm.n_tokens].tolist())
        is_text = (
            written.decode("utf-8", "ignore").encode() == written
        )  # else what is left out parts a stop string
        stops = []
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            at = self.rng.randrange(len(behind) + 1)
            stops.append(behind[at : at + self.rng.randrange(1, 9)] + self.rng.choice(("", "", "", "~")))
        found = []
        for llm in self.models:
            whole = llm.create_completion(prompt, **settings | {"stop": stops})["choices"][0]
            chunks = [
                c["choices"][0]
                for c in llm.create_completion(prompt, stream=True, **settings | {"stop": stops})
            ]
            pieces = "".join(c["text"] for c in chunks)
            self.same(
                "streamed", [(pieces, chunks[-1]["finish_reason"]), (whole["text"], whole["finish_reason"])]
            )
            found.append(pieces)
        self.same("stopped", found)
        if len(stops) == 1 and stops[0] and is_text:
            self.same("before the stop", [found[0][len(text) - len(behind) :], behind.partition(stops[0])[0]])
        self.n_tokens += len(self.models[0].tokenize(found[0].encode()))

    def stream_left_early(self) -> None:
        prompt, settings, n = self.prompt(), self.settings(), self.rng.randrange(1, 40)
        found = []
        for llm in self.models:
            stream = llm.create_completion(prompt, stream=True, **settings)
            found.append([chunk["choices"][0]["text"] for chunk, _ in zip(stream, range(n), strict=False)])
            stream.close()
        self.same("stream", found)
        self.n_tokens += len(found[0])

    def cancelled(self) -> None:
        prompt, n = self.prompt(), self.rng.randrange(1, 60)
        found = []
        for llm in self.models:
            tokens: list[int] = []
            for token in llm.generate(llm.tokenize(prompt.encode()), temp=0.0):
                tokens.append(token)
                if len(tokens) == n:
                    llm.cancel()
                if len(tokens) > n:  # it was drafted already, or the pass had begun
                    break
            found.append(tokens[:n])
        self.same("cancel", found)
        self.n_tokens += len(found[0])

    def states(self) -> None:
        prompt, found = self.prompt(), []
        after = self.models[0].tokenize(b" and then", add_bos=False)
        for llm in self.models:
            llm.reset()
            llm.eval(llm.tokenize(prompt.encode()))
            state = llm.save_state()
            tokens = []
            for _ in range(2):
                llm.load_state(state)
                llm.eval(after)  # a state holds no logits to sample from
                for _ in range(12):
                    tokens.append(llm.sample(temp=0.0))
                    llm.eval(tokens[-1:])
            found.append(tokens)
        self.same("states", found)
        self.n_tokens += len(found[0])

    def states_exchanged(self) -> None:
        """Each goes on from what the other has kept."""
        prompt, found = self.models[0].tokenize(self.prompt().encode()), []
        n_drawn = self.rng.randrange(2, 9)
        for llm in self.models:
            list(islice(llm.generate(prompt, temp=0.0), n_drawn))
        states = [llm.save_state() for llm in self.models]
        n = min(state.n_tokens for state in states)  # what is drafted beyond it may be there, or not
        for llm, state in zip(self.models, reversed(states), strict=True):
            llm.load_state(state)
            go_on = [*state.input_ids[:n].tolist(), self.longest[1]]
            found.append(list(islice(llm.generate(go_on, temp=0.0), 9)))
        self.same("states exchanged", found)
        self.n_tokens += len(found[0])

    def cache(self) -> None:
        """llama-cpp-python's cache of states, put on or off, and emptied."""
        on = self.rng.random() < 0.5
        for llm in self.models:
            llm.set_cache(LlamaRAMCache(8 << 20) if on else None)

    def long_prompt(self) -> None:
        """As long as the context has room for, or longer, which is refused."""
        text = "".join(self.rng.choice(self.texts) for _ in range(8))
        prompt, settings = self.models[0].tokenize(text.encode()), self.settings()
        n_ctx = self.models[0].n_ctx()
        prompt = prompt[: self.rng.randrange(n_ctx * 2 // 5, n_ctx * 6 // 5)]
        found: list[Any] = []
        for llm in self.models:
            try:
                answer = llm.create_completion(prompt, **settings)
            except ValueError as e:
                found.append(str(e))
            else:
                found.append((answer["choices"], answer["usage"]))
                self.n_tokens += answer["usage"]["completion_tokens"] if llm is self.models[0] else 0
        self.same("long prompt", found)

    def adapter(self) -> None:
        """Another model from now on, or the first again."""
        scale = self.rng.choice((0.0, 0.0, 0.5, 1.0))
        for llm, adapter in zip(self.models, self.adapters, strict=True):
            llm.reset()  # what is in the memory was evaluated by another one,
            llm.set_cache(None)  # and what was kept of it
            few = (llama_adapter_lora_p_ctypes * 1)(adapter)
            if llama_set_adapters_lora(llm.ctx, few, int(scale > 0), (ctypes.c_float * 1)(scale)):
                raise AssertionError("the adapter was not set")

    def to_the_end_of_the_context(self) -> None:
        self.answered("context", self.prompt(), max_tokens=None, temperature=0.0)

    def reset(self) -> None:
        for llm in self.models:
            llm.reset()

    def other_policy(self) -> None:
        self.n_accepted += self.models[0].draft_stats.n_accepted  # they are counted anew then
        if self.forced:
            draft_a_lot(self.models[0], bias=self.rng.choice((None, 0.0, 3.0)))
            return
        from_heads = ("entropy", "confidence") if self.models[0].heads_path else ()
        self.models[0].set_trees(policy=self.rng.choice(("auto", "auto", *from_heads, "off")))

    def threads(self) -> None:
        for llm in self.models:
            llm.set_threads(self.rng.choice((1, 1, 2)))

    def largest_passes(self) -> None:
        """Nothing is cached, and buffers that were made anew, in memory as far as passes have touched them, are so
        equally far.
        """
        for llm in self.models:
            llm.set_cache(None)
            llm.reset()
            llm.eval(self.longest[: -llm.n_batch])
            llm.eval(self.longest[-llm.n_batch :])

    def step(self) -> None:
        """One call, of a kind that is drawn; half of the time the plain twin begins with an empty memory."""
        if self.rng.random() < 0.5:
            self.models[1].reset()
        kinds: list[tuple[int, Callable[[], None]]] = [
            (10, self.complete), (4, self.stream_left_early), (3, self.cancelled), (2, self.with_grammar),
            (4, self.gone_back), (3, self.stopped), (2, self.states), (1, self.to_the_end_of_the_context),
            (2, self.reset),
            (1, self.other_policy), (1, self.threads), (1, self.long_prompt), (1, self.adapter),
            (1, self.states_exchanged), (1, self.cache),
        ]  # fmt: skip
        kind = self.rng.choices([k for _, k in kinds], [w for w, _ in kinds])[0]
        kind()
        self.calls[kind.__name__] += 1
