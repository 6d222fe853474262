"""A model that drafts and a plain twin, under random calls for long: equal tokens, steady memory, no file left open.

    python tests/soak.py --tokens 1000000      (make soak)
    python tests/soak.py --model lfm2          (a memory of states; random weights that draft whatever it costs)

Every call is made to both; half of the time the plain one forgets all it had before. What must not differ: the tokens.
What must not grow: memory of the process and open files, from the first fifth of the run (after a warm-up) to the last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entmtp import Llama
from entmtp.models.assets import assets
from entmtp.models.names import resolve
from entmtp.options.demo import demo_files
from helpers.adapter import write_adapter
from helpers.forced import draft_a_lot
from helpers.growth import Growth
from helpers.hybrids import hybrid_path
from helpers.models import model_path

GRAMMARS = (
    'root ::= ("yes" | "no") " because " [a-z ]+ "."',
    r'root ::= "{\"name\": \"" [A-Za-z ]+ "\", \"age\": " [0-9]+ "}"',
)
HYBRIDS = ("lfm2", "qwen35", "nemotron_h")  # models whose memory is cells and states
WARM = 0.2  # of the run: allocators and graphs settle,
FILLED = 80_000  # tokens until the logs of the last 65,536 steps are full
LOOK = 2000  # tokens between two looks at the memory, at least: both texts begin anew then


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


class Twins:
    """The same calls to a drafting model and a plain one, drawn by a seed.

    Args:
        adapter: file of a LoRA adapter of the model.
        forced: the first drafts whatever it costs.
    """

    def __init__(
        self, drafting: Llama, plain: Llama, texts: list[str], adapter: Path, seed: int, forced: bool = False
    ):
        from llama_cpp import (
            LlamaGrammar,
            llama_adapter_lora_init,
        )  # after entmtp, which says where the library is

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
        return {
            "temperature": self.rng.choice((0.0, 0.0, 0.4, 0.8, 1.2)), "seed": self.rng.randrange(1 << 30),
            "max_tokens": self.rng.randrange(1, 160), "top_k": self.rng.choice((1, 20, 40)),
            "repeat_penalty": 1.0 if draw() < 0.7 else 1.1, "frequency_penalty": 0.0 if draw() < 0.8 else 0.4,
            "stop": [] if draw() < 0.7 else [self.rng.choice((".", "\n", " the"))],
        }  # fmt: skip

    def same(self, what: str, answers: list[Any]) -> None:
        if answers[0] != answers[1]:
            raise AssertionError(
                f"{what}, call {sum(self.calls.values())}: {answers[0]!r} is not {answers[1]!r}"
            )

    def complete(self) -> None:
        prompt, settings = self.prompt(), self.settings()
        answers = [llm.create_completion(prompt, **settings) for llm in self.models]
        self.same("complete", [(a["choices"], a["usage"]) for a in answers])
        self.n_tokens += answers[0]["usage"]["completion_tokens"]

    def gone_back(self) -> None:
        """The last text without its end, which a pass may or may not be gone back over, and another end."""
        llm, draw = self.models[0], self.rng.randrange
        text = llm.input_ids[: llm.n_tokens].tolist() or self.longest[:40]
        kept = text[: max(len(text) - self.rng.choice((1, 2, 3, 4, 5, 8, draw(1, len(text) + 1))), 1)]
        at = draw(len(self.longest))
        prompt = kept + self.longest[at : at + self.rng.choice((0, 0, 1, 3, 9))]
        settings = self.settings()
        answers = [llm.create_completion(prompt[: llm.n_ctx() - 1], **settings) for llm in self.models]
        self.same("gone back", [(a["choices"], a["usage"]) for a in answers])
        self.n_tokens += answers[0]["usage"]["completion_tokens"]

    def with_grammar(self) -> None:
        prompt, settings, grammar = self.prompt(), self.settings(), self.rng.choice(self.grammars)
        answers = [llm.create_completion(prompt, **(settings | {"grammar": grammar})) for llm in self.models]
        self.same("grammar", [(a["choices"], a["usage"]) for a in answers])
        self.n_tokens += answers[0]["usage"]["completion_tokens"]

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
        from llama_cpp import llama_adapter_lora_p_ctypes, llama_set_adapters_lora

        scale = self.rng.choice((0.0, 0.0, 0.5, 1.0))
        for llm, adapter in zip(self.models, self.adapters, strict=True):
            llm.reset()  # what is in the memory was evaluated by another one
            few = (llama_adapter_lora_p_ctypes * 1)(adapter)
            if llama_set_adapters_lora(llm.ctx, few, int(scale > 0), (ctypes.c_float * 1)(scale)):
                raise AssertionError("the adapter was not set")

    def to_the_end_of_the_context(self) -> None:
        prompt = self.prompt()
        answers = [llm.create_completion(prompt, max_tokens=None, temperature=0.0) for llm in self.models]
        self.same("context", [(a["choices"], a["usage"]) for a in answers])
        self.n_tokens += answers[0]["usage"]["completion_tokens"]

    def reset(self) -> None:
        for llm in self.models:
            llm.reset()

    def other_policy(self) -> None:
        self.n_accepted += self.models[0].draft_stats.n_accepted  # they are counted anew then
        if self.forced:
            draft_a_lot(self.models[0], bias=self.rng.choice((None, 0.0, 3.0)))
        else:
            self.models[0].set_trees(policy=self.rng.choice(("auto", "auto", "entropy", "confidence", "off")))

    def threads(self) -> None:
        for llm in self.models:
            llm.set_threads(self.rng.choice((1, 1, 2)))

    def largest_passes(self) -> None:
        """Buffers that were made anew are in memory as far as passes have touched them: equally far after these."""
        for llm in self.models:
            llm.reset()
            llm.eval(self.longest[: -llm.n_batch])
            llm.eval(self.longest[-llm.n_batch :])

    def step(self) -> None:
        """One call, of a kind that is drawn; half of the time the plain twin begins with an empty memory."""
        if self.rng.random() < 0.5:
            self.models[1].reset()
        kinds: list[tuple[int, Callable[[], None]]] = [
            (10, self.complete), (4, self.stream_left_early), (3, self.cancelled), (2, self.with_grammar),
            (4, self.gone_back), (2, self.states), (1, self.to_the_end_of_the_context), (2, self.reset),
            (1, self.other_policy), (1, self.threads), (1, self.long_prompt), (1, self.adapter),
        ]  # fmt: skip
        kind = self.rng.choices([k for _, k in kinds], [w for w, _ in kinds])[0]
        kind()
        self.calls[kind.__name__] += 1


def soak(
    n_tokens: int, seed: int = 1, say: Callable[[str], None] = lambda text: None, seconds: float = math.inf,
    name: str = "demo",
) -> dict[str, Any]:  # fmt: skip
    """Run until so many tokens came, or the time is over; figures of the run.

    Args:
        name: of the model (`subject`).

    Raises:
        AssertionError: the twins' tokens differ; the text says in which call.
    """
    texts = [
        json.loads(line)["prompt"]
        for path in sorted((assets() / "prompts").glob("*.jsonl")) if path.stem in ("humaneval", "gsm8k", "literature")
        for line in path.read_text("utf-8").splitlines()
    ]  # fmt: skip
    asked = subject(name)
    how: dict[str, Any] = {"n_ctx": 768, "verbose": False, "n_threads": 1, "n_threads_batch": 1, **asked.both}
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Llama(asked.model, draft="entmtp", calibrate=False, **how, **asked.drafting)) as drafting,
        closing(Llama(asked.model, **how)) as plain,
    ):
        adapter = write_adapter(asked.model, Path(folder) / "adapter.gguf")
        twins, growth = Twins(drafting, plain, texts, adapter, seed, asked.forced), Growth()
        begin = said = time.monotonic()
        while twins.n_tokens < n_tokens and time.monotonic() - begin < seconds:
            twins.step()
            if twins.n_tokens // LOOK > len(growth.samples):
                twins.largest_passes()
                growth.look(twins.n_tokens)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{twins.n_tokens} of {n_tokens} tokens, {growth.megabytes:.0f} MB")
        accepted = twins.n_accepted + drafting.draft_stats.n_accepted
    return {
        "tokens": twins.n_tokens, "calls": dict(twins.calls), "seconds": round(time.monotonic() - begin, 1),
        "accepted_drafts": accepted,
        **growth.figures(since=max(WARM * twins.n_tokens, min(FILLED, 0.5 * twins.n_tokens))),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to generate (default: 1000000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most (default: until they came)")
    parser.add_argument("--seed", type=int, default=1, help="of the calls (default: 1)")
    parser.add_argument(
        "--model", default="demo",
        help=f"demo; random weights by the kind of their memory: window, {', '.join(HYBRIDS)}; or a model's path or "
        "name, without heads (default: demo)",
    )  # fmt: skip
    args = parser.parse_args()
    found = soak(
        args.tokens, args.seed, lambda text: print(text, file=sys.stderr, flush=True), 60 * args.minutes,
        args.model,
    )  # fmt: skip
    print(json.dumps(found, indent=1))
    if found["growth"] > 0.01 or found["files"][1] > found["files"][0]:
        print("soak: memory or open files grew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
