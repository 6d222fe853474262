"""Sixteen clients at once: no token lost, mixed up or told twice, every one counted, and memory that does not grow.

ENTMTP_SERVE_SECONDS (default 10) says how long, ENTMTP_SERVE_TOKENS (default 3000) that it goes on until so many tokens
are served; with `pytest -s` it tells memory along the way.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import pytest

from helpers.serving import Server
from helpers.settings import LEEWAY, prompts

N_CLIENTS = 16
SECONDS = float(os.environ.get("ENTMTP_SERVE_SECONDS", "10"))
TOKENS = int(os.environ.get("ENTMTP_SERVE_TOKENS", "3000"))
WARM = 60_000  # tokens after which memory has its shape; measured: the last growth was before 70,000
# MB that it may grow from then on; before, in the second half of a run (measured: 3)
GROWTH, GROWTH_COLD = 4.0 * LEEWAY, 16.0 * LEEWAY


@pytest.mark.slow
def test_sixteen_clients(models: dict[str, Path]) -> None:
    draw = random.Random(1)
    asked = []
    for i, prompt in enumerate(prompts() * 2):
        settings = {"max_tokens": draw.randint(4, 64), "temperature": draw.choice([0.0, 0.8, 1.2]), "seed": i}
        asked.append((prompt, settings))
    plain = llama_cpp.Llama(
        str(models["f32"]), n_ctx=1024, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
    )
    expected = [
        plain(prompt, repeat_penalty=1.1, min_p=0.05, top_k=40, **settings)
        for prompt, settings in asked
    ]  # fmt: skip
    plain.close()

    with Server(
        "--model", models["f32"], "--heads", models["hydra"], "--model-alias", "demo", "--ctx", 1024, "--threads", 1,
        "--n-threads-batch", 1, "--type-k", 0, "--type-v", 0,
    ) as server:  # fmt: skip
        begun = time.monotonic()
        order = itertools.count()
        served: list[int] = []  # tokens by answer
        memory: list[tuple[int, float]] = []  # tokens served, MB
        lock = threading.Lock()

        def go_on() -> bool:
            return time.monotonic() - begun < SECONDS or sum(served) < TOKENS

        def ask(client: int) -> list[str]:
            wrong = []
            openai = server.client()
            while go_on():
                i = next(order) % len(asked)
                prompt, settings = asked[i]
                answer = expected[i]["choices"][0]
                if client % 2:
                    chunks = openai.completions.create(model="demo", prompt=prompt, stream=True, **settings)
                    text = "".join(chunk.choices[0].text for chunk in chunks)
                else:
                    whole = openai.completions.create(model="demo", prompt=prompt, **settings)
                    text = whole.choices[0].text
                if text != answer["text"]:
                    wrong.append(f"{text!r}, not {answer['text']!r}, after {prompt[-40:]!r} with {settings}")
                n_drawn = expected[i]["usage"]["completion_tokens"] + (answer["finish_reason"] == "stop")
                with lock:
                    served.append(n_drawn)
            return wrong

        def watch() -> None:
            while go_on():
                metrics = server.metrics()
                now = (sum(served), metrics["process_resident_memory_bytes"] / 2**20)
                memory.append(now)
                time.sleep(SECONDS / 20)

        with ThreadPoolExecutor(N_CLIENTS + 1) as pool:
            pool.submit(watch)
            wrong = [sentence for some in pool.map(ask, range(N_CLIENTS)) for sentence in some]
        seconds = time.monotonic() - begun
        count = 'entmtp_requests_total{path="/v1/completions",status="200"}'
        server.until(lambda m: m[count] >= len(served))  # the last client may know before the metrics do
        metrics = server.metrics()

    assert wrong == []
    assert metrics[count] == len(served)
    assert metrics['entmtp_generated_tokens_total{model="demo"}'] == sum(served)
    print(f"\n{len(served)} answers, {sum(served)} tokens in {seconds:.0f} s, all of them plain decoding's")
    print("\n".join(f"{tokens:8d} tokens {mb:8.1f} MB" for tokens, mb in memory))
    warm = sum(served) > 2 * WARM
    late = [mb for tokens, mb in memory if tokens >= (WARM if warm else sum(served) / 2)]
    assert len(late) > 1 and late[-1] - late[0] < (GROWTH if warm else GROWTH_COLD)
