"""A running `python -m entmtp.serve`, asked over its socket."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

KEY = "sk-test"
PATIENCE = 120.0  # seconds; only a test that has failed waits so long


class Server:
    """`with Server("--model", path) as server:`; listens on a free port of 127.0.0.1."""

    def __init__(self, *options: object, key: str | None = KEY):
        command = [sys.executable, "-m", "entmtp.serve", "--port", "0", *map(str, options)]
        command += ["--api-key", key] if key else []
        self.key = key
        # never full, as a pipe is
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            # a run in the background ignores Ctrl-C, and would pass that on
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,
        )  # fmt: skip

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if (found := re.search(r"http://\S+:\d+", line)) is None:
            raise AssertionError(f"the server did not start: {self._end()}")
        self.url = found[0]
        self._reader = self.http()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.close()
        if self.process.poll() is None:
            self.stop(signal.SIGTERM)
        self.stderr.close()

    def _end(self) -> str:
        """What it said on stderr, once it has ended."""
        self.process.communicate(timeout=PATIENCE)
        self.stderr.seek(0)
        return self.stderr.read()

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The answer to a request that must be right."""
        with self.http() as http:
            answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer

    def stop(self, number: int) -> tuple[int, str]:
        """Send a signal; exit code and what the server said on stderr."""
        self.process.send_signal(number)
        stderr = self._end()
        return self.process.returncode, stderr

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key or "none", max_retries=0, timeout=PATIENCE
        )

    def http(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=PATIENCE
        )

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels as Prometheus writes them; a sample that is not there is 0."""
        answer = self._reader.get("/metrics", headers={"Authorization": f"Bearer {self.key}"})
        assert answer.status_code == 200
        samples = Samples()
        for family in text_string_to_metric_families(answer.text):
            for s in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(s.labels.items()))
                samples[s.name + (f"{{{labels}}}" if labels else "")] = s.value
        return samples

    def until(self, true: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Read the metrics until something is true of them."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if true(metrics := self.metrics()):
                return metrics
            time.sleep(0.02)
        raise AssertionError(f"it did not become true of {metrics}")


class Samples(dict[str, float]):
    def __missing__(self, name: str) -> float:
        return 0.0


def run(*options: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command to its end; or Python code in its place."""
    what = ["-c", code] if code else ["-m", "entmtp.serve"]
    return subprocess.run(
        [sys.executable, *what, *map(str, options)], capture_output=True, text=True, timeout=PATIENCE
    )


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said: one line."""
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]
