"""`make archs`: a small random model of every architecture that llama.cpp can write one of, drafting and not.

Of each, as it is written (F32) and quantised, in a process of its own: our kernels compute what ggml's do; passes over
several tokens give the bits of passes over one; and drafted texts are plain decoding's. The models are made by
llama.cpp's own test of its architectures, which is compiled from its source.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))

from entmtp import EntmtpError, Llama  # isort: skip (before llama_cpp: its library is ours)
import llama_cpp

from entmtp.drafting import CHAIN
from helpers.forced import draft_a_lot

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PASSES = (2, 5, 16)  # tokens
N_TOKENS = 60  # of each answer
# mean square of differences between our logits and ggml's, of the logits': F32 is summed in another order, and
# quantised weights are multiplied by activations of 8 bits, ours and ggml's in other blocks
FAR = {"F32": 1e-6, "quantised": 3e-2}
PATIENCE = 300  # seconds for a model
TEXTS = 4 + 12  # that are compared
THEIRS = "ggml's own kernels have computed it"


#
# one model, in a process of its own
#


@contextmanager
def loaded(path: Path, **more: Any) -> Iterator[Llama]:
    with closing(Llama(path, **{**SETTINGS, **more})) as llm:
        yield llm


def answer(llm: Llama, prompt: list[int], n: int = N_TOKENS, **sampling: Any) -> list[int]:
    llm.set_seed(3)
    walk = llm.generate(prompt, **sampling)
    tokens = [next(walk) for _ in range(n)]
    walk.close()
    return tokens


def logits_of(llm: Llama, prompt: list[int]) -> np.ndarray:
    llm.reset()
    llm.eval(prompt)
    return llm.decoder.logits(llm.n_vocab()).astype(np.float64)


def other_bits(llm: Llama, prompt: list[int], tokens: list[int]) -> list[int]:
    """The sizes of passes in which a row's bits are not those of a pass over one token."""
    found = []
    llm.set_trees(policy="off")
    for n in PASSES if llm.decoder.can_tree() else [n for n in PASSES if n <= CHAIN + 1]:
        rows = []
        llm.reset()
        llm.eval(prompt)
        for token in tokens[:n]:
            llm.eval([token])
            rows.append(llm.decoder.logits(llm.n_vocab()).copy())
        llm.reset()
        llm.eval(prompt)
        llm.decoder.eval(tokens[:n], len(prompt), all_outputs=True)
        if not np.array_equal(np.stack(rows), llm.rows(n)):
            found.append(n)
    return found


def texts_that_go_back(llm: Llama, plain: Llama, tokens: list[int]) -> int:
    """How many texts, of those that begin as what is in the memory and end otherwise, are not those of a memory that is
    empty: by one to five tokens, and behind a state that was loaded. Of both models.
    """
    state = [m.save_state() for m in (llm, plain)]
    wrong = 0
    for back, token in zip((2, 1, 4, 3, 5, 0), tokens, strict=False):
        if back == 0:
            llm.load_state(state[0])
            plain.load_state(state[1])
        text = [*llm.input_ids[: llm.n_tokens - (back or 3)].tolist(), token]
        got = [answer(m, text, 12, temp=0.0) for m in (llm, plain)]
        plain.reset()
        expected = answer(plain, text, 12, temp=0.0)
        wrong += sum(text != expected for text in got)
    return wrong


def examine(path: Path) -> dict[str, Any]:
    """What is true of a model."""
    rng = np.random.default_rng(0)
    try:
        with loaded(path, kernels="off") as ggml:
            n_vocab = ggml.n_vocab()
            prompt, tokens = (rng.integers(0, n_vocab, n).tolist() for n in (40, max(PASSES)))
            theirs = logits_of(ggml, prompt)
            print(THEIRS, flush=True)
    except (EntmtpError, ValueError) as e:
        return {"refused": str(e)}
    prompts = [prompt, [int(t) for t in prompt[:4]] * 9]
    with loaded(path) as plain:
        ours = logits_of(plain, prompt)
        with warnings.catch_warnings(), loaded(path, draft="entmtp", calibrate=False) as llm:
            warnings.simplefilter("ignore", RuntimeWarning)
            drafts = llm.decoder.can_chain() or llm.decoder.can_tree()
            bits = other_bits(llm, prompt, tokens) if drafts else []
            if drafts:
                draft_a_lot(llm)
            differ = 0
            for sampling in ({"temp": 0.0}, {"temp": 0.9, "top_k": 40}):
                for text in prompts:
                    differ += answer(llm, text, **sampling) != answer(plain, text, **sampling)
            differ += texts_that_go_back(llm, plain, tokens)
            return {
                "far": float(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)),
                "memory": "tree" if llm.decoder.can_tree() else "chain" if drafts else "plain",
                "says": llm.lossless,
                "bits": bits,
                "differ": differ,
                "drafted": llm.draft_stats.n_drafted if drafts else 0,
            }


#
# all of them
#


def quantised(path: Path, kind: str, folder: Path) -> Path:
    """A copy by llama.cpp's own quantiser."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 1
    copy = folder / f"{path.stem}-{kind}.gguf"
    status = llama_cpp.llama_model_quantize(str(path).encode(), str(copy).encode(), ctypes.byref(params))
    if status != 0:
        raise EntmtpError(f"llama.cpp cannot quantise {path.name} to {kind}")
    return copy


def in_a_process(path: Path) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, __file__, "--one", str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if child.returncode != 0:
        said = [
            line for line in child.stderr.splitlines() if re.search(r"ASSERT|abort|Error|\.cpp:\d+: ", line)
        ]
        why = f"status {child.returncode}: {(said or [''])[-1][:200]}"
        if THEIRS not in child.stdout:
            return {"refused": f"llama.cpp ends the process, with ggml's own kernels: {why}"}
        return {"crash": why}
    return dict(json.loads(child.stdout.splitlines()[-1]))


def fault(found: dict[str, Any], kind: str) -> str:
    """What is wrong with a model, empty: nothing."""
    if "crash" in found:
        return str(found["crash"])
    if "refused" in found:
        return ""
    wrong = []
    if not found["far"] < FAR["F32" if kind == "F32" else "quantised"]:
        wrong.append(f"our logits are off ggml's by {found['far']:.1e}")
    if found["says"] == "exact" and found["bits"]:
        wrong.append(f"other bits in passes of {found['bits']}")
    if found["says"] == "exact" and found["differ"]:
        wrong.append(f"{found['differ']} of {TEXTS} texts differ")
    if found["memory"] != "plain" and not found["drafted"]:
        wrong.append("nothing was drafted")
    return "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, help="what writes the models")
    parser.add_argument("--models", type=Path, help="a folder of models, in place of it")
    parser.add_argument("--kinds", nargs="+", default=["F32"], help="F32, Q4_K_M, Q8_0, … (default: F32)")
    parser.add_argument("--only", default="", help="models whose names hold this expression")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(examine(args.one)))
        return 0
    with tempfile.TemporaryDirectory(prefix="entmtp-archs-") as temporary:
        folder = args.models or Path(temporary) / "models"
        if args.models is None:
            folder.mkdir()
            log = subprocess.run(
                [args.program, "-o", folder, "-s", "1"], capture_output=True, text=True, check=False
            )
            if log.returncode != 0:
                print(f"{args.program}: {log.stdout[-500:]}{log.stderr[-500:]}", file=sys.stderr)
                return 1
        paths = [p for p in sorted(folder.glob("*.gguf")) if re.search(args.only, p.stem)]
        failed = False
        for kind in args.kinds:
            counts: Counter[str] = Counter()
            for path in track(paths, kind):
                copy = path if kind == "F32" else quantised(path, kind, Path(temporary))
                found = in_a_process(copy)
                if copy != path:
                    copy.unlink()
                wrong = fault(found, kind)
                failed |= bool(wrong)
                if "memory" in found:
                    same = (
                        "the same bits and texts"
                        if not found["bits"] and not found["differ"]
                        else "not the same"
                    )
                    counts[f"{found['memory']}, says {found['says']}: {same}"] += 1
                else:
                    counts["refused" if "refused" in found else "crashed"] += 1
                if wrong or "refused" in found or found["says"] != "exact":
                    print(f"{path.stem}, {kind}: {wrong or found.get('refused') or found}")
            print(
                f"{kind}: {len(paths)} models; "
                + "; ".join(f"{n} {what}" for what, n in counts.most_common())
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
