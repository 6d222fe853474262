"""`entmtp serve`: a server with OpenAI's, Ollama's and Anthropic's API."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ..common.errors import EntmtpError
from ..common.streams import printable

NEEDED = ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client")
STOP_WITHIN = (
    10.0  # seconds; what takes longer, a pass of the model or a client who does not read, is not waited for
)

EXAMPLE = """\
example:
  entmtp serve --model model.gguf --heads heads.gguf --api-key SECRET
  curl http://127.0.0.1:8000/v1/completions -H 'Authorization: Bearer SECRET' \\
    -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time", "max_tokens": 32}'

Options may be written with - or _; --ctx, --threads and --rpc stand for --n_ctx, --n_threads and --rpc_servers,
--policy for --draft, --no-adapt, --no-calibrate and --no-page for --adapt false and so on."""


def setup_arg_parser() -> argparse.ArgumentParser:
    from llama_cpp.server.cli import add_args_from_model

    from .settings import ModelSettings, ServerSettings

    parser = argparse.ArgumentParser(
        prog="entmtp serve",
        usage="entmtp serve [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve a model with OpenAI's, Ollama's and Anthropic's API, drafting, with heads or without. "
        "Without options: SmolLM2-135M-Instruct, fetched once.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--config_file", metavar="FILE", help="JSON or YAML file with settings, several models too"
    )
    add_args_from_model(parser.add_argument_group("server"), ServerSettings)  # type: ignore[arg-type]
    add_args_from_model(parser.add_argument_group("model"), ModelSettings)  # type: ignore[arg-type]
    return parser


def spelled(argv: Sequence[str]) -> list[str]:
    """Options as llama-cpp-python spells them: `--n-ctx` is `--n_ctx`."""
    from .settings import spellings

    known = spellings()
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            name = known.get(name.replace("_", "-")) or name[:2] + name[2:].replace("-", "_")
        words.append(name + equals + value)
    return words


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before a model is loaded for nothing.

    Raises:
        EntmtpError: the address is taken, or not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family = next((f for f, *_ in found if f == socket.AF_INET), found[0][0])  # localhost: IPv4 first
        address = next(a for f, *_, a in found if f == family)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise EntmtpError(
            f"cannot listen on {host} port {port}: {why.lower()}; choose another --port or --host"
        ) from e


def run(argv: Sequence[str] | None) -> None:
    from ..options.demo import AUTO, first_model
    from ..options.model import note
    from .settings import config_path, from_options, read_config

    args = setup_arg_parser().parse_args(spelled(sys.argv[1:] if argv is None else argv))
    config = config_path(args.config_file)
    server, settings = read_config(config) if config else from_options(vars(args))
    for model in settings:
        if model.model == AUTO:
            model.model = first_model(note)
    with listen(server.host, server.port) as listener:
        host, port = listener.getsockname()[:2]

        import uvicorn

        from .app import create_app
        from .connections import protocol, room

        # what was imported stays: to look through it for garbage takes 50 ms, in which nobody gets a token
        gc.collect()
        gc.freeze()
        requests, models = create_app(server, settings)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                _end_after(2 * STOP_WITHIN)
                requests.stop_all()
                await super().shutdown(sockets)

        scheme = "https" if server.ssl_certfile else "http"
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {settings[0].model} at {scheme}://{shown}:{port}/v1, "
            f"{'a page to chat with at /, ' if server.page else ''}metrics at /metrics, API at /docs; Ctrl-C stops",
            flush=True,
        )
        uvicorn_settings: dict[str, Any] = {
            "ssl_keyfile": server.ssl_keyfile,
            "ssl_certfile": server.ssl_certfile,
            "access_log": False,  # ours says what a request is called
            "log_level": "info" if settings[0].verbose else "warning",
            "timeout_graceful_shutdown": STOP_WITHIN,
            "http": protocol(server.max_receive, room()),
            "ws": "none",
        }
        try:
            Server(uvicorn.Config(requests, **uvicorn_settings)).run(sockets=[listener])
        finally:
            models.free()


def _end_after(seconds: float) -> None:
    """End the process then, whatever its threads are busy with: nothing of theirs would be kept."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _stop(*_: Any) -> None:
    raise SystemExit(0)  # asked to end, and ended


def main(argv: Sequence[str] | None = None) -> int:
    try:
        for name in NEEDED:
            __import__(name)
    except ImportError as e:
        print(f"entmtp.serve: the server needs packages that are not installed ({e.name}); "
              "install them with: pip install 'entmtp[serve]'", file=sys.stderr)  # fmt: skip
        return 1
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(argv)
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.serve: {printable(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
