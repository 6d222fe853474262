"""Models, settings and drafters drawn at random, and random calls to each: a text alone, and several in company.

    python tests/soak_settings.py --minutes 10      (make soak-settings)
    python tests/soak_settings.py --seed 268 --draws 1

Small models with random weights of all kinds of memory, and the demo. Every text must be what a plain model of the same
settings writes alone; settings that cannot work must be refused in a sentence when the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entmtp import Engine, EntmtpError, Llama
from entmtp.options.demo import demo_files
from helpers.adapter import write_adapter
from helpers.hybrids import hybrid_path
from helpers.models import EXPERTS, SPECS, experts_path, model_path
from helpers.twins import HYBRIDS, Twins, prompts

QUANTISED = {f"experts-{name}": name for name in EXPERTS}
DRAFTING_MODELS = [name for name in SPECS if name != "mamba"]  # of attention alone
SECONDS = 20.0  # for one draw, at most


class Refused(Exception):
    """Settings that cannot work, as they say themselves."""


@dataclass(frozen=True)
class Draw:
    """What a seed stands for.

    Attributes:
        both: settings of the model that drafts and of the plain one.
        drafting: of the one that drafts.
        forced: it drafts whatever it costs.
        engine: of an `Engine`, None for a text alone.
    """

    name: str
    both: dict[str, Any]
    drafting: dict[str, Any]
    forced: bool
    engine: dict[str, Any] | None


def path_of(name: str) -> Path:
    if name == "demo":
        return demo_files()[0]
    if name in QUANTISED:
        return experts_path(QUANTISED[name])
    return hybrid_path(name) if name in HYBRIDS else model_path(name)


def draw(seed: int) -> Draw:
    """A model and how it is loaded."""
    rng = random.Random(seed)
    one_of, rarely = rng.choice, lambda p: rng.random() < p
    in_company = rarely(0.3)
    names = [*SPECS, *QUANTISED, "demo", "demo"]
    name = one_of([n for n in names if n != "mamba"] if in_company else [*names, *HYBRIDS, *HYBRIDS])
    drafting: dict[str, Any] = {"draft": "entmtp", "calibrate": False}
    if name == "demo" and rarely(0.6):
        drafting["heads"] = demo_files()[1]
    elif name != "demo" and not in_company and rarely(0.3):
        drafting["draft_model"] = model_path(one_of(DRAFTING_MODELS))
        if rarely(0.3):
            drafting["draft_vocab"] = one_of((16, 64, 200))
    least = 2 if "heads" in drafting else 1
    both: dict[str, Any] = {
        "n_ctx": one_of((256, 512, 768, 1024)), "n_batch": one_of((512, 512, 2, 3, 5, 8, 17, 64, least)),
        "swa_full": one_of((True, True, False)), "n_threads": 1, "n_threads_batch": one_of((1, 2)),
        "flash_attn": in_company or rarely(0.4), "verbose": False,
    }  # fmt: skip
    if rarely(0.4):
        both["n_ubatch"] = one_of((2, 3, 4, 5, 8, 33, 64, 512, least))
    if rarely(0.15):
        both["type_k"] = one_of(("f32", "bf16", "q8_0") if name == "demo" else ("f32", "bf16"))
    if not in_company and rarely(0.1):
        both |= {"logits_all": True, "n_ctx": 256}
    engine = None
    if in_company:
        n_ctx = both.pop("n_ctx")
        room = one_of((None, None, n_ctx, n_ctx + 50, 2 * n_ctx))
        engine = {
            "slots": rng.randrange(1, 5),
            "n_ctx": n_ctx,
            "kv_tokens": room,
            "stall": one_of((0.01, 0.2)),
        }
    return Draw(name, both, drafting, rarely(0.3 if name == "demo" else 0.9), engine)


class Drawn(Twins):
    """Twins whose first model may not draft, or not from trees."""

    def other_policy(self) -> None:
        llm = self.models[0]
        if llm.bank is not None and (self.forced or llm.heads_path is not None):
            super().other_policy()


def loaded(kind: type[Any], path: Path, **settings: Any) -> Any:
    """A `Llama` or an `Engine`."""
    try:
        return kind(path, **settings)
    except (EntmtpError, ValueError) as e:
        raise Refused(str(e)) from e


def alone(what: Draw, texts: list[str], rng: random.Random, folder: Path) -> tuple[int, int]:
    """Tokens, and how many of them were drafted."""
    path = path_of(what.name)
    adapter = folder / f"{what.name}.gguf"
    if not adapter.exists():
        write_adapter(path, adapter)
    with (
        closing(loaded(Llama, path, **what.both)) as plain,
        closing(loaded(Llama, path, **what.both, **what.drafting)) as drafting,
    ):
        short = [text[: plain.n_ctx() // 2] for text in texts]
        twins = Drawn(drafting, plain, short, adapter, rng.randrange(1 << 30), what.forced)
        end, n = time.monotonic() + SECONDS, rng.choice((300, 600))
        while twins.n_tokens < n and time.monotonic() < end:
            twins.step()
        return twins.n_tokens, twins.n_accepted + drafting.draft_stats.n_accepted


def requests(plain: Llama, texts: list[str], rng: random.Random) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts that begin alike, or not, and how they are to be answered."""
    n_ctx = plain.n_ctx()
    begins = [plain.tokenize(text[:n_ctx].encode())[: n_ctx - 8] for text in rng.sample(texts, 4)]
    found = []
    for _ in range(8):
        prompt = rng.choice(begins)
        prompt = prompt[: rng.randrange(1, len(prompt) + 1)]
        if len(prompt) > 8 and rng.random() < 0.3:
            prompt = prompt[: -rng.randrange(1, 6)] + rng.choice(begins)[:3]
        settings = {
            "temperature": rng.choice((0.0, 0.0, 0.8, 1.2)), "seed": rng.randrange(1 << 30),
            "max_tokens": rng.choice((1, 5, 30, 80, None)), "top_k": rng.choice((0, 1, 40)),
            "repeat_penalty": rng.choice((1.0, 1.0, 1.1)), "logprobs": rng.choice((None,) * 5 + (2,)),
            "stop": rng.choice(([], [], [], ["."], ["e"], [" the"])),
        }  # fmt: skip
        found.append((prompt, settings))
    return found


def company(what: Draw, texts: list[str], rng: random.Random) -> tuple[int, int]:
    """Several requests at a time, twice, some of them cancelled."""
    assert what.engine is not None
    path, n_ctx = path_of(what.name), what.engine["n_ctx"]
    with closing(loaded(Llama, path, n_ctx=n_ctx, **what.both)) as plain:
        asked, expected = requests(plain, texts, rng), []
        for prompt, settings in asked:
            plain.reset()
            pieces = list(plain.create_completion(prompt, stream=True, **settings))
            expected.append("".join(p["choices"][0]["text"] for p in pieces))
    n = 0
    with closing(loaded(Engine, path, **what.engine, **what.both, **what.drafting)) as engine:
        for _ in range(2):
            order = rng.sample(range(len(asked)), len(asked))
            streams = [(i, engine.submit(asked[i][0], **asked[i][1])) for i in order]
            left = {i for i in order if rng.random() < 0.2}
            for i, stream in streams:
                if i in left:
                    time.sleep(0.01 * rng.random())
                    stream.cancel()
            for i, stream in streams:
                text = stream.text
                if text != expected[i] and not (i in left and expected[i].startswith(text)):
                    raise AssertionError(f"{asked[i]}: {text!r} is not {expected[i]!r}")
                n += len(stream.text)
        return n, sum(s.draft_stats.n_accepted for s in engine.slots if engine.host.bank is not None)


def run(seed: int, texts: list[str], folder: Path) -> tuple[int, int]:
    """One draw; tokens (in company characters) and accepted drafts.

    Raises:
        Refused: the settings cannot work.
        AssertionError: a text is not the plain one.
    """
    what, rng = draw(seed), random.Random(~seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return alone(what, texts, rng, folder) if what.engine is None else company(what, texts, rng)


def soak(n_draws: float, seconds: float, seed: int = 1) -> dict[str, Any]:
    """Figures of a run; `wrong` has the draws that failed."""
    texts = prompts()
    counts, refused, wrong = Counter[str](), Counter[str](), list[str]()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while counts["draws"] < n_draws and time.monotonic() < end:
            counts["draws"] += 1
            try:
                n, accepted = run(seed, texts, Path(folder))
                counts["alone" if draw(seed).engine is None else "in company"] += 1
                counts["tokens"] += n
                counts["accepted drafts"] += accepted
            except Refused as e:
                refused[str(e)] += 1
            except Exception as e:
                wrong.append(f"seed {seed}, {draw(seed)}: {type(e).__name__}: {e}")
                print(wrong[-1], traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
            seed += 1
    return {**counts, "refused": dict(refused), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="at most (default: until all were drawn)"
    )
    parser.add_argument(
        "--draws", type=float, default=math.inf, help="at most (default: until the time is over)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first draw (default: 1)")
    args = parser.parse_args()
    if math.isinf(args.minutes) and math.isinf(args.draws):
        parser.error("say how long: --minutes or --draws")
    found = soak(args.draws, 60 * args.minutes, args.seed)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
