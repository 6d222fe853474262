"""Layers on other machines: llama.cpp's RPC servers as devices of a model (docs/rpc.md)."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from ..common.errors import ServerError
from .backends import ggml

# RPC_PROTO_MAJOR_VERSION and _MINOR_ of ggml-rpc.h; test_rpc.py compares them with what our own server says
PROTOCOL = (7, 0)
HELLO, CAPS = 14, 24  # RPC_CMD_HELLO, RPC_CONN_CAPS_SIZE
ANSWER_WITHIN = 5.0  # seconds

GPU, INTEGRATED = 1, 2  # enum ggml_backend_dev_type


def parse(servers: str | Sequence[str]) -> list[str]:
    """Addresses from a list, or from one string with commas between them.

    Raises:
        ValueError: one is no `host:port`, or is named twice.
    """
    names = servers.split(",") if isinstance(servers, str) else list(servers)
    addresses = [str(name).strip() for name in names if str(name).strip()]
    for address in addresses:
        host, colon, port = address.rpartition(":")
        if not colon or not host or ":" in host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(
                f"RPC server {address!r}: give it as host:port, with a name or an IPv4 address, "
                "such as 192.168.1.7:50052"
            )
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"RPC server {address} is named twice")
    return addresses


def function(name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    """A function of the RPC backend, found as llama.cpp finds it.

    Raises:
        ServerError: the libraries were built without RPC.
    """
    lib = ggml()
    lib.ggml_backend_reg_by_name.restype = c_void_p
    lib.ggml_backend_reg_by_name.argtypes = [c_char_p]
    lib.ggml_backend_reg_get_proc_address.restype = c_void_p
    lib.ggml_backend_reg_get_proc_address.argtypes = [c_void_p, c_char_p]
    backend = lib.ggml_backend_reg_by_name(b"RPC")
    found = lib.ggml_backend_reg_get_proc_address(backend, name.encode()) if backend else None
    if not found:
        raise ServerError("these libraries were built without RPC; build them again without -DGGML_RPC=OFF")
    return ctypes.CFUNCTYPE(restype, *argtypes)(found)


def check(address: str) -> None:
    """Ask a server for its version, as llama.cpp will: its own errors would not tell the reason.

    Raises:
        ServerError: there is none, it is none, or it cannot be used.
    """
    if function("ggml_backend_rpc_connected", c_bool, c_char_p)(address.encode()):
        return  # this process uses it already, and it serves one connection at a time
    host, _, port = address.rpartition(":")
    what = f"RPC server {address}"
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    except OSError as e:
        raise ServerError(f"{what}: there is no machine named {host}; check the name") from e
    try:
        connection = socket.create_connection(found[0][4][:2], ANSWER_WITHIN)  # type: ignore[arg-type]
    except ConnectionRefusedError as e:
        raise ServerError(
            f"{what}: nothing listens there; start `entmtp rpc-server` on that machine, or check the port"
        ) from e
    except OSError as e:
        raise ServerError(
            f"{what}: it cannot be reached; check the address, and whether a firewall keeps the port closed"
        ) from e
    with connection:
        try:
            connection.sendall(struct.pack("<BQ", HELLO, CAPS) + bytes(CAPS))
            size = struct.unpack("<Q", _read(connection, 8))[0]
            # all of it: a rest would make the server see a broken connection
            version = tuple(_read(connection, size)[:3]) if 3 <= size <= 1024 else None
        except TimeoutError as e:
            raise ServerError(
                f"{what}: it does not answer; it may be serving another program, which it does one at a time, "
                "or be no RPC server"
            ) from e
        except (EOFError, OSError):
            version = None
    if version is None:
        raise ServerError(
            f"{what}: what listens there is no RPC server of this version of llama.cpp; check the port, and use "
            "the same version of EntMTP on both machines"
        )
    if version[0] != PROTOCOL[0] or version[1] > PROTOCOL[1]:
        raise ServerError(
            f"{what}: it speaks version {'.'.join(map(str, version))} of the RPC protocol, this llama.cpp "
            f"{PROTOCOL[0]}.{PROTOCOL[1]}; use the same version of EntMTP on both machines"
        )


def _read(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = connection.recv(n - len(data))
        if not more:
            raise EOFError
        data += more
    return data


class Servers:
    """RPC servers as a list of devices for `llama_model_params`, with the GPUs of this machine behind them.

    Attributes:
        addresses: as they were given.
        devices: `ggml_backend_dev_t`s, ended by NULL. In the order in which llama.cpp gives them layers.

    Raises:
        ServerError: one cannot be used; the text says why.
        ValueError: one is no `host:port`.
    """

    def __init__(self, servers: str | Sequence[str]):
        self.addresses = parse(servers)
        self._n_lost = function("ggml_backend_rpc_n_lost", c_uint64, c_char_p)
        found: list[int] = []
        for address in self.addresses:
            check(address)
            found += _devices_of(address)
        found += local_gpus()
        self.devices = (c_void_p * (len(found) + 1))(*found)
        self._before = [self._n_lost(a.encode()) for a in self.addresses]

    def lost(self) -> str | None:
        """The address of one whose connection was lost since, if any was."""
        for address, before in zip(self.addresses, self._before, strict=True):
            if self._n_lost(address.encode()) != before:
                return address
        return None

    def check(self) -> None:
        """Raises ServerError if one was lost: what was read from it since means nothing."""
        if address := self.lost():
            raise ServerError(
                f"the RPC server {address} is lost: it ended, or the network did; start it again, then load the "
                "model anew"
            )


def _devices_of(address: str) -> list[int]:
    # never registered with ggml, whose other models would use them, too
    backend = function("ggml_backend_rpc_add_server", c_void_p, c_char_p)(address.encode())
    if not backend:
        raise ServerError(f"RPC server {address}: it has no device, or was lost just now; start it again")
    lib = ggml()
    lib.ggml_backend_reg_dev_count.restype = c_size_t
    lib.ggml_backend_reg_dev_count.argtypes = [c_void_p]
    lib.ggml_backend_reg_dev_get.restype = c_void_p
    lib.ggml_backend_reg_dev_get.argtypes = [c_void_p, c_size_t]
    return [lib.ggml_backend_reg_dev_get(backend, i) for i in range(lib.ggml_backend_reg_dev_count(backend))]


def local_gpus() -> list[int]:
    """The GPUs of this machine, integrated ones only if there are no others: what llama.cpp would choose itself."""
    lib = ggml()
    lib.ggml_backend_dev_count.restype = c_size_t
    lib.ggml_backend_dev_get.restype = c_void_p
    lib.ggml_backend_dev_get.argtypes = [c_size_t]
    lib.ggml_backend_dev_type.restype = c_int
    lib.ggml_backend_dev_type.argtypes = [c_void_p]
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    kinds = [lib.ggml_backend_dev_type(d) for d in devices]
    kind = GPU if GPU in kinds else INTEGRATED
    return [d for d, k in zip(devices, kinds, strict=True) if k == kind]
