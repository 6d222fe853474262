"""Answers of llama.cpp's own programs, to compare with ours in turn."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.errors import EntmtpError
from ..native import kernels
from ..native.library import library_folder, library_path
from .baselines import DRIVER, SERVER, Baseline, find
from .child import ChildServer
from .subject import Subject
from .turns import Answer, Answering, Prompt

SAMPLING = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}  # as `Llama.generate`


def options_of(llm: Subject, n_gpu_layers: int = 0) -> list[str]:
    """llama.cpp's options for the file and the threads of one of our models."""
    words = {"--model": llm.model_path, "--threads": llm.n_threads, "--threads-batch": llm.n_threads_batch}
    return [str(word) for option in words.items() for word in option] + ["--n-gpu-layers", str(n_gpu_layers)]


def warmed(program: Driver | Server) -> Answering:
    """A program that answers in turn; its first answer is preceded by eight tokens, as with ours."""
    warm = False

    def answer(prompt: Prompt) -> Answer:
        nonlocal warm
        if not warm:
            program.answer(prompt._replace(n_tokens=8))
            warm = True
        return program.answer(prompt)

    return answer


class Driver:
    """llama.cpp's drafting on our libraries, with the context of one of our models and the kernels that are on now."""

    def __init__(self, method: Baseline, llm: Subject, flash_attn: bool = False, draft_model: str | None = None,
                 n_gpu_layers: int = 0):  # fmt: skip
        n_batch = str(llm.n_batch)
        command = [str(find(DRIVER)), *options_of(llm, n_gpu_layers), *method.options(draft_model)]
        command += ["--ctx-size", str(llm.n_ctx()), "--batch-size", n_batch, "--ubatch-size", n_batch]
        command += ["--flash-attn", "on" if flash_attn else "off"]
        environment = dict(os.environ)
        environment.pop("ENTMTP_LIBRARY", None)
        if (name := kernels.current()) != kernels.OFF:
            environment |= {
                "ENTMTP_LIBRARY": str(library_path("entmtp", library_folder())), "ENTMTP_KERNELS": name
            }  # fmt: skip
        self.label = method.label
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        try:
            self.kernels = self._read()["kernels"]
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EntmtpError(f"{self.label}: {DRIVER} ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise EntmtpError(f"{self.label}: {found['error']}")
        return found

    def answer(self, prompt: Prompt) -> Answer:
        assert self.process.stdin is not None
        asked = {
            "tokens": list(prompt.tokens),
            "n": prompt.n_tokens,
            "temp": prompt.temp,
            "seed": prompt.seed,
        }
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        told = self._read()
        return Answer(told["tokens"], told["decode_ms"] / 1e3, None, told["times"], told["passes"])

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Server:
    """llama.cpp's server without our patches, for one user, as it runs by itself.

    Times are what it says itself: from the first token to the last, without what HTTP costs. Those of single tokens are
    not told; they are taken to be spread evenly.
    """

    def __init__(self, method: Baseline, llm: Subject, draft_model: str | None = None, n_gpu_layers: int = 0):
        words = [*options_of(llm, n_gpu_layers), *method.options(draft_model)]
        self.child = ChildServer(lambda port: server_command(port, words, llm.n_ctx()))

    def answer(self, prompt: Prompt) -> Answer:
        asked = {"prompt": list(prompt.tokens), "n_predict": prompt.n_tokens, "temperature": prompt.temp,
                 "seed": prompt.seed, "return_tokens": True, "cache_prompt": False, **SAMPLING}  # fmt: skip
        told = self.child.ask("/completion", asked)
        tokens, timings = told["tokens"], told["timings"]
        seconds = timings["predicted_ms"] / 1e3
        passes = len(tokens) - 1 - timings.get("draft_n_accepted", 0)
        return Answer(tokens, seconds, None, np.linspace(0.0, seconds, len(tokens)).tolist(), passes)

    def close(self) -> None:
        self.child.close()


def server_command(port: int, words: Sequence[str], ctx: int, users: int = 1) -> list[str]:
    """How llama.cpp's server is started for so many users with so much context each."""
    own = {"--host": "127.0.0.1", "--port": port, "--ctx-size": users * ctx, "--parallel": users}
    return [str(find(SERVER)), *words, "--offline", *(str(word) for option in own.items() for word in option)]
