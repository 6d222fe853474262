"""A model that drafts and a plain twin, under random calls for long: equal tokens, steady memory, no file left open.

    python tests/soak.py --tokens 1000000      (make soak)
    python tests/soak.py --model lfm2          (a memory of states; random weights that draft whatever it costs)

Every call is made to both; half of the time the plain one forgets all it had before. What must not differ: the tokens.
What must not grow: memory of the process and open files, from the first fifth of the run (after a warm-up) to the last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from entmtp import Llama
from helpers.adapter import write_adapter
from helpers.growth import Growth
from helpers.twins import HYBRIDS, Twins, prompts, subject

WARM = 0.2  # of the run: allocators and graphs settle,
FILLED = 80_000  # tokens until the logs of the last 65,536 steps are full
LOOK = 2000  # tokens between two looks at the memory, at least: both texts begin anew then


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
    asked = subject(name)
    how: dict[str, Any] = {"n_ctx": 768, "verbose": False, "n_threads": 1, "n_threads_batch": 1, **asked.both}
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Llama(asked.model, draft="entmtp", calibrate=False, **how, **asked.drafting)) as drafting,
        closing(Llama(asked.model, **how)) as plain,
    ):
        adapter = write_adapter(asked.model, Path(folder) / "adapter.gguf")
        twins, growth = Twins(drafting, plain, prompts(), adapter, seed, asked.forced), Growth()
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
        "name, with the heads that are found for it (default: demo)",
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
