"""`entmtp rpc-server`: lends this machine's memory and processors to a model on another one (docs/rpc.md)."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from ctypes import c_char_p, c_int, c_size_t, c_void_p

from .common.cache import cache_folder
from .common.errors import EntmtpError, ServerError
from .common.numbers import THREADS
from .common.streams import printable, run_command
from .native import kernels, rpc
from .native.backends import ggml

PORT = 50052  # llama.cpp's own


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp rpc-server",
        description="Compute layers of a model that another machine runs with --rpc. llama.cpp's RPC server, with the "
        "GPUs of this machine, or its CPU if it has none.",
        epilog="example: entmtp rpc-server --host 192.168.1.7; then, on the other machine: "
        "entmtp chat -m model.gguf --rpc 192.168.1.7:50052. There is neither a password nor encryption: "
        "whoever reaches the port can take over this process. Keep it in a network that you trust, or use a tunnel "
        "(docs/rpc.md).",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        metavar="N",
        help=f"port, 0 for a free one (default: {PORT})",
    )
    parser.add_argument("--threads", type=THREADS, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--cpu", action="store_true", help="lend the CPU, even if there is a GPU")
    parser.add_argument(
        "--cache", action="store_true",
        help="keep weights of more than 10 MB in the cache folder, so that they are sent once only",
    )  # fmt: skip
    return parser


def address(host: str, port: int) -> tuple[str, int]:
    """Numeric IPv4 address that can be listened at.

    Raises:
        ServerError: it is taken, or not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][:2]
        with socket.create_server((str(found[0]), int(found[1]))) as free:
            return free.getsockname()
    except (OSError, OverflowError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ServerError(
            f"cannot listen on {host} port {port}: {why.lower()}; choose another --port or --host"
        ) from e


def devices(cpu: bool) -> list[int]:
    """What is lent: `ggml_backend_dev_t`s."""
    lib = ggml()
    lib.ggml_backend_dev_by_type.restype = c_void_p
    lib.ggml_backend_dev_by_type.argtypes = [c_int]
    return (not cpu and rpc.local_gpus()) or [lib.ggml_backend_dev_by_type(0)]


def announce(host: str, port: int, what: str) -> None:
    """Say it as soon as the server listens."""
    for _ in range(600):
        try:
            socket.create_connection((host, port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            print(what, flush=True)
            return


def serve(args: argparse.Namespace) -> None:
    """Returns only if the server cannot go on."""
    host, port = address(args.host, args.port)
    start = rpc.function(
        "ggml_backend_rpc_start_server", None, c_char_p, c_char_p, c_size_t, c_size_t, c_void_p
    )
    lent = devices(args.cpu)
    cache = None
    if args.cache:
        folder = cache_folder() / "rpc"
        folder.mkdir(parents=True, exist_ok=True)
        cache = str(folder).encode()
    if not host.startswith("127."):
        print(
            f"entmtp.rpc_server: warning: whoever reaches {host} port {port} can take over this process; keep it "
            "in a network that you trust",
            file=sys.stderr,
        )
    what = f"lending {len(lent)} device{'s'[: len(lent) > 1]} at {host}:{port}; Ctrl-C stops"
    threading.Thread(target=announce, args=(host, port, what), daemon=True).start()
    kernels.use()
    # a native call that never returns and knows no Python: let Ctrl-C end the process itself
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threads = args.threads or os.cpu_count() or 1
    start(f"{host}:{port}".encode(), cache, threads, len(lent), (c_void_p * len(lent))(*lent))


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port is {args.port}, it must be between 0 and 65535")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}, it must be at least 1")
    try:
        serve(args)
        print("entmtp.rpc_server: it stopped listening; the reason is above", file=sys.stderr)
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.rpc_server: {printable(str(e))}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    raise SystemExit(run_command(main))
