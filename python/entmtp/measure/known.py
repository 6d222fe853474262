"""The user's cache of costs, and of tuned banks: by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..bank.costs import Costs, from_json
from ..common.atomic import atomic_path
from ..common.cache import cache_folder
from ..common.errors import BankError
from ..common.machine import cpu_name
from ..native import kernels, library
from .subject import Subject


def machine_key(llm: Subject) -> str:
    """Digest of all that costs depend on: model, heads, build, device, threads and the context's settings."""

    def file_identity(path: str | Path) -> list[Any]:
        # not the name or the date: the same file elsewhere costs the same
        n, size = 1 << 18, Path(path).stat().st_size
        with open(path, "rb") as file:
            ends = file.read(n)
            file.seek(max(size - n, 0))
            ends += file.read(n)
        return [size, hashlib.sha256(ends).hexdigest()]

    build = library.library_folder() / "build-info.json"
    p = llm.context_params
    facts = [
        file_identity(llm.model_path), file_identity(llm.heads_path) if llm.heads_path else "",
        build.read_text() if build.exists() else "", cpu_name(),
        llm.draft_heads.info.device.decode() if llm.heads_path else "", llm.n_threads, llm.n_threads_batch,
        llm.model_params.n_gpu_layers, p.flash_attn_type, p.type_k, p.type_v, p.n_ubatch, p.offload_kqv,
        kernels.current(),
    ]  # fmt: skip
    if llm.rpc_servers:
        facts += [llm.rpc_servers, llm.tensor_split]
    outputs = llm.decoder.outputs.mode
    if outputs != "host":
        facts.append(outputs)
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:20]


def tuned_path(key: str | None) -> Path:
    """Where entmtp tune leaves the bank that Llama uses for a model, its heads and this machine."""
    return cache_folder() / "banks" / f"{key}.json"


def cached(llm: Subject) -> Costs | None:
    """Costs measured before for this very model, machine and build; None if there are none, or the file is broken."""
    path = cache_folder() / "costs" / f"{machine_key(llm)}.json"
    try:
        return from_json(json.loads(path.read_text("utf-8")), str(path))
    except (OSError, ValueError, BankError):
        return None


def keep(costs: Costs) -> None:
    """Put costs in the cache. A cache that cannot be written to is no reason to fail."""
    folder = cache_folder() / "costs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{costs.key}.json") as temporary:
            temporary.write_text(json.dumps(costs.to_json()), "utf-8")
    except OSError:
        return
