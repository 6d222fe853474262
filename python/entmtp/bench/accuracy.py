"""`entmtp bench accuracy`: how far kernels are from exact weights, and passes of several tokens from passes of one.

What is compared is the distribution of the next token, by its KL divergence, after every token of some prompts. Exact
are the same weights in f32, computed by ggml. ggml's kernels read weights as the file has them.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..common.errors import EntmtpError
from ..common.progress import stages
from ..context import requantise
from ..llama import Llama
from ..models.gguf_expand import expand
from ..native import kernels
from ..options.model import arguments
from ..report.tables import Form, table
from .inputs import changed, model_of, shape_of
from .questions import asked_of, read_tasks

SIZE = 8  # tokens of the passes that are not of one
PROMPT = 256  # tokens of a prompt, at most
KERNELS = {"off": "ggml's", "auto": "ours"}
# types that llama.cpp's quantiser makes a file of: enum llama_ftype
TYPES = {
    name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    for name, ftype in {
        "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k": "Q5_K_M", "q4_k": "Q4_K_M",
        "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1", "q3_k": "Q3_K_M", "q2_k": "Q2_K",
        "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
    }.items()
}  # fmt: skip


class InPlace(Llama):
    """A model whose weights ggml does not pack anew."""

    def prepare_model(self, params: Any) -> None:
        super().prepare_model(params)
        params.use_extra_bufts = False


def with_type(name: str) -> tuple[str, str | None]:
    """Model and type of a name like `smollm2:q8_0`; no type of others, random weights by shape among them."""
    model, _, quant = name.rpartition(":")
    return (model, quant) if model and quant in TYPES and not shape_of(name) else (name, None)


def requantised(source: Path, target: Path, quant: str) -> Path:
    """A file of a model in f32 in another type, by llama.cpp's quantiser."""
    if not requantise(source, target, TYPES[quant]):
        raise EntmtpError(f"llama.cpp could not write {source.name} in {quant}")
    return target


def log_probs(llm: Llama, tokens: list[int], size: int, by: str) -> npt.NDArray[np.float32]:
    """Of the next token after each, [n_tokens, n_vocab], from passes of `size` tokens by some kernels."""
    with kernels.using(by):
        llm.reset()
        for i in range(0, len(tokens), size):
            llm.eval(tokens[i : i + size])
    logits = llm.scores[: len(tokens)]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(logits - log_sum, np.float32)


def divergence(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """KL(p | q) in nats of each row, [n]; both are logarithms."""
    return np.asarray(
        [(np.exp(a, dtype=np.float64) * (a.astype(np.float64) - b)).sum() for a, b in zip(p, q, strict=True)]
    )


def measure(files: dict[str, Path], args: Namespace, advance: Any) -> list[dict[str, Any]]:
    """By kernels: mean KL from exact weights of passes of one and of SIZE tokens, and between the two; and the share of
    tokens whose most probable successor differs between the two.

    Args:
        files: "exact" and "model".
    """
    with ExitStack() as stack:
        settings = arguments(changed(args, draft="off"), None)
        settings |= {"logits_all": True, "n_ctx": PROMPT, "verbose": False}

        def loaded(file: str, by: str) -> Llama:
            kind = InPlace if by == "off" else Llama
            return stack.enter_context(closing(kind(files[file], **settings | {"kernels": by})))

        exact, models = loaded("exact", "off"), {by: loaded("model", by) for by in KERNELS}
        asked = asked_of(exact, read_tasks(args), changed(args, tokens=0))
        sums = {by: np.zeros(4) for by in KERNELS}
        n_tokens = 0
        for i, (_, tokens) in enumerate(asked):
            p = log_probs(exact, tokens, SIZE, "off")
            for by, llm in models.items():
                one, several = (log_probs(llm, tokens, n, by) for n in (1, SIZE))
                other = one.argmax(axis=1) != several.argmax(axis=1)
                found = (divergence(p, one), divergence(p, several), divergence(one, several), other)
                sums[by] += [x.sum() for x in found]
            n_tokens += len(tokens)
            advance("prompts", i + 1, len(asked))
    names = ("one", "several", "between", "other")
    return [
        {"kernels": by, "tokens": n_tokens} | dict(zip(names, sums[by] / n_tokens, strict=True))
        for by in KERNELS
    ]


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    report["accuracy"] = []
    for name in [args.model, *args.more_models]:
        model, quant = with_type(name)
        with ExitStack() as stack, stages() as advance:
            stack.enter_context(kernels.using(kernels.current()))  # back to these
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entmtp-accuracy-")))
            file = Path(stack.enter_context(model_of(args, model, drafts=False)).model)
            exact = expand(file, folder / "exact.gguf")
            if quant:
                file = requantised(exact, folder / f"{file.stem}-{quant}.gguf", quant)
                exact = expand(file, folder / "exact.gguf")
            found = {"model": name, "rows": measure({"exact": exact, "model": file}, args, advance)}
        report["accuracy"].append(found)
    rows = [
        row | {"model": found["model"] if row["kernels"] == "off" else "", "by": KERNELS[row["kernels"]]}
        for found in report["accuracy"]
        for row in found["rows"]
    ]
    columns: dict[str, Form] = {
        "model": "{model}", "kernels": "{by}", "KL from exact weights, 1 token": "{one:.5f}",
        f"{SIZE} tokens": "{several:.5f}",
        f"KL between passes of 1 and of {SIZE}": lambda row: f"{row['between']:.5f}" if row["between"] else "0",
        "other most probable token": "{other:.2%}",
    }  # fmt: skip
    n_tokens = report["accuracy"][0]["rows"][0]["tokens"]
    yield f"{n_tokens} tokens of prompts; KL in nats.\n\n" + table(columns, rows, n_text=2)
