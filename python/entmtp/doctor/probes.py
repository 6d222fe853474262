"""What `entmtp doctor` finds out in processes of their own: a broken library may take its process with it.

Each probe prints one JSON object; `python -m entmtp.doctor.probes NAME ARGUMENTS` runs one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = 'import os\n\ndef read_lines(path):\n    """Return the lines of a file as a list of strings."""\n'


def libraries() -> dict[str, Any]:
    """Load everything that is native; tell versions, backends, devices, kernels, and which files were loaded."""
    from ..common.version import __version__
    from ..native import abi, kernels, library
    from ..native.backends import backends, llama_commit

    kernels.use()
    return {
        "entmtp": __version__,
        "libentmtp": abi.version().decode(),
        "llama.cpp": llama_commit(),
        "folder": str(library.library_folder()),
        "backends": {name: [vars(d) for d in found] for name, found in backends().items()},
        "kernels": kernels.current(),
        "kernels_available": kernels.available(),
        "loaded": loaded_libraries(),
    }


def loaded_libraries() -> list[str] | None:
    """Paths of the llama.cpp and ggml libraries in this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") > 5 and "/" in line}
    return sorted(p for p in paths if Path(p).name.startswith(("libggml", "libllama", "libentmtp")))


def selftest(n_tokens: int = 48) -> dict[str, Any]:
    """The bundled demo, greedy: tokens with drafting, and without. Small enough for every machine."""
    from ..llama import Llama
    from ..options.demo import demo_files

    model, heads = demo_files()
    settings: dict[str, Any] = {
        "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False,
    }  # fmt: skip
    drafting: dict[str, Any] = {
        "draft": "entmtp",
        "heads": heads,
        "trees": "generic-hydra:n8",
        "policy": "static",
    }
    tokens, per_step = [], 1.0
    plain: dict[str, Any] = {}
    for more in (plain, drafting):
        llm = Llama(model, **settings, **more)
        found: list[int] = []
        for token in llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0):
            found.append(token)
            if len(found) == n_tokens:
                break
        tokens.append(found)
        per_step = llm.draft_stats.tokens_per_step
        llm.close()
    return {"same": tokens[0] == tokens[1], "tokens": n_tokens, "tokens_per_step": round(per_step, 2)}


def weights(path: Path) -> list[dict[str, Any]]:
    """The matrices of a model's products by type and by how the CPU multiplies them, the largest share first.

    Args:
        path: the model, or its first part.
    """
    import gguf

    from ..models import hub
    from ..native import kernels

    found: dict[tuple[str, str], list[int]] = {}
    files = [path.with_name(name) for name in hub.parts(path.name)]
    tensors = [tensor for file in files for tensor in gguf.GGUFReader(file).tensors]
    tied = all(t.name != "output.weight" for t in tensors)  # the embeddings are the output projection, too
    for tensor in tensors:
        if len(tensor.shape) < 2 or tensor.name.endswith(".bias"):
            continue
        if tensor.name == "token_embd.weight" and not tied:
            continue
        how = kernels.of_type(int(tensor.tensor_type)) if kernels.current() != kernels.OFF else "ggml"
        sums = found.setdefault((tensor.tensor_type.name, how), [0, 0])
        sums[0] += 1
        sums[1] += int(tensor.n_bytes)
    rows = [{"type": t, "by": how, "tensors": n, "bytes": size} for (t, how), (n, size) in found.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def model(arguments: list[str]) -> dict[str, Any]:
    """Load the model and the heads that options name (options/model.py)."""
    from ..common.errors import EntmtpError, ModelError
    from ..common.machine import held_memory
    from ..measure.known import machine_key, tuned_path
    from ..options.model import add_model_options, load

    parser = argparse.ArgumentParser()
    add_model_options(parser)
    before = held_memory()
    try:
        llm = load(parser.parse_args(arguments), calibrate=False)
    except ModelError:
        raise
    except EntmtpError as e:  # what drafts is loaded after the model
        return {"model_error" if str(e).startswith("draft model") else "heads_error": str(e)}
    result: dict[str, Any] = {
        "name": llm.metadata.get("general.name") or Path(llm.model_path).name,
        "architecture": llm.metadata.get("general.architecture", "?"),
        "n_ctx": llm.n_ctx(),
        "lossless": llm.lossless,
    }
    if llm.model_params.n_gpu_layers == 0:
        result["weights"] = weights(Path(llm.model_path))
        result["held"] = {k: v - before[k] for k, v in held_memory().items() if k in before}
    if llm._decoder is not None:
        outputs = llm._decoder.outputs
        result |= {"outputs": str(outputs), "outputs_note": outputs.note}
    if llm._heads is not None:
        tuned = tuned_path(machine_key(llm))
        info = llm._heads.info
        result |= {
            "heads": f"{info.n_heads} {llm._heads.arch} heads on {info.device.decode()}",
            "tuned": str(tuned) if tuned.is_file() else None,
        }
    if llm.model_drafts:
        result["drafter"] = {
            "path": llm.draft_model_path, "us": llm.draft_token_us, "pass_us": one_pass(llm),
            "vocab": llm.draft_vocab, "all": llm.n_vocab(),
        }  # fmt: skip
    result["no_prediction"] = llm.no_prediction
    result["chain"] = chain(llm)
    llm.close()
    return result


def chain(llm: Any) -> dict[str, int] | None:
    """Tokens that a memory without trees can go back, and the bytes that it keeps for that; None of others."""
    import llama_cpp

    if llm._decoder is None or llm._decoder.can_tree() or not llm._decoder.can_chain():
        return None
    n = int(llama_cpp.llama_n_rs_seq(llm.ctx))
    llm.eval([llm.token_bos()])
    # with the one token's keys and values, which are few
    one = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    llm.reset()
    return {"tokens": n, "bytes": n * int(one)}


def gain(arguments: list[str]) -> dict[str, Any]:
    """What drafts bring of the model that options name, on this machine."""
    from ..options.model import add_model_options, load
    from .gain import measure_gain

    parser = argparse.ArgumentParser()
    add_model_options(parser)
    llm = load(parser.parse_args(arguments))
    try:
        return measure_gain(llm)
    finally:
        llm.close()


def one_pass(llm: Any) -> float:
    """Median microseconds of a pass over one token."""
    llm.set_trees(policy="off")
    llm.eval(llm.tokenize(b"The"))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        llm.eval([llm.token_eos()])
        times.append((time.perf_counter() - begin) * 1e6)
    llm.reset()
    return sorted(times[1:])[3]


def main(argv: list[str]) -> int:
    from ..common.errors import EntmtpError

    try:
        name, arguments = argv[0], argv[1:]
        probes = {"model": model, "gain": gain}
        found = (
            probes[name](arguments)
            if name in probes
            else {"libraries": libraries, "selftest": selftest}[name]()
        )
    except (EntmtpError, ValueError, ImportError, OSError) as e:
        found = {"error": str(e)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
