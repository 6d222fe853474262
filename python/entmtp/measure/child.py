"""Servers as child processes on 127.0.0.1, and how they are asked."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..common.errors import EntmtpError

HOST = "127.0.0.1"
STARTS_WITHIN = 600.0  # seconds: a large model is read from a slow disk
STOPS_WITHIN = 20.0
PATIENCE = 600.0  # seconds that an answer may be silent


class RequestFailed(EntmtpError):
    """A server answered with an error, or not to the end."""


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


class ChildServer:
    """A server in a process of its own, from when `/health` says that it is ready to when it is closed.

    Args:
        command: the program and its options, by the port that it shall listen on.
        environment: of the process; None: as here.

    Raises:
        EntmtpError: it ended, or was not ready in time; with the last line that it wrote.
    """

    def __init__(self, command: Callable[[int], Sequence[str]], environment: Mapping[str, str] | None = None):
        self.port = free_port()
        self.command = list(command(self.port))
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=environment
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise EntmtpError(
                    f"{self.command[0]} ended with status {self.process.returncode}: {self.last_line()}"
                )
            try:
                connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            finally:
                connection.close()
            time.sleep(0.05)
        raise EntmtpError(f"{self.command[0]} was not ready in {STARTS_WITHIN:.0f} s: {self.last_line()}")

    def last_line(self) -> str:
        """What it wrote last."""
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else "it wrote nothing"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOPS_WITHIN)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.log.close()

    def _post(
        self, path: str, body: Mapping[str, Any]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode("utf-8", "replace")
            connection.close()
            raise RequestFailed(f"{path}: status {response.status}: {text[:200]}")
        return connection, response

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer in one piece.

        Raises:
            RequestFailed, OSError, http.client.HTTPException: there was none.
        """
        connection, response = self._post(path, body)
        try:
            found: dict[str, Any] = json.loads(response.read())
            return found
        finally:
            connection.close()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """The events of a streamed answer, each with when it came (`time.perf_counter`).

        Raises:
            RequestFailed, OSError, http.client.HTTPException: it is an error, or ends before its end.
        """
        connection, response = self._post(path, body)
        try:
            for line in response:
                came = time.perf_counter()
                kind, _, data = line.strip().partition(b": ")
                if kind == b"error" or (kind == b"data" and data.startswith(b'{"error"')):
                    raise RequestFailed(f"{path}: {data[:200].decode('utf-8', 'replace')}")
                if kind != b"data":
                    continue
                if data == b"[DONE]":
                    return
                yield came, json.loads(data)
            raise RequestFailed(f"{path}: the answer ended before its end")
        finally:
            connection.close()
