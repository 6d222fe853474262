"""Plain and drafted decoding on small random-weight models of several architectures: the same tokens."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from entmtp import Bank, EntmtpError, Llama
from entmtp.bank.tree import PLAIN, Tree
from entmtp.convert import convert
from helpers.checkpoints import medusa_config, medusa_state, write_checkpoint
from helpers.models import N_VOCAB, ON_GPU, SPECS, model_path

SETTINGS: dict[str, Any] = {
    "n_ctx": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": 0,
    "type_v": 0,
    "verbose": False,
    **ON_GPU,
}

PROMPTS = ([5, 6, 7, 8], [5, 6, 7, 8, 9, 10], [5, 6, 9], list(range(20, 80)))

BUSHY = Bank(
    "bushy",
    (
        PLAIN,
        Tree.from_paths("bushy", [[i] for i in range(24)] + [[i, j] for i in range(6) for j in range(4)]),
    ),
)


def answers(llm: llama_cpp.Llama) -> list[list[int]]:
    """Greedy answers to the prompts, which share prefixes: later ones reuse the memory of earlier ones."""
    result = []
    for prompt in PROMPTS:
        walk = llm.generate(prompt, temp=0.0)
        result.append([next(walk) for _ in range(60)])
        walk.close()
    return result


def heads_for(model: Path, n_embd: int, folder: Path, n_heads: int = 2) -> Path:
    """Medusa heads that project the hidden state as the base model does: they guess that the next token comes again."""
    state = medusa_state(n_heads=n_heads, n_layers=1, n_embd=n_embd, n_vocab=N_VOCAB)
    tensors = {t.name: t for t in GGUFReader(model).tensors}
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    rows = dequantize(output.data, output.tensor_type).astype(np.float32).reshape(N_VOCAB, n_embd)
    for i in range(n_heads):
        state[f"{i}.0.linear.weight"] = np.zeros((n_embd, n_embd), np.float32)
        state[f"{i}.1.weight"] = rows
    checkpoint = write_checkpoint(folder / "medusa", state, medusa_config(n_heads=n_heads))
    heads = folder / "heads.gguf"
    convert(checkpoint, model, heads, outtype="f32", progress=False)
    return heads


@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_at_once_is_one_token_by_token(name: str) -> None:
    """The row of logits is the last token's, however the prompt was cut."""
    with closing(Llama(model_path(name), **SETTINGS)) as llm:
        rows = []
        for size in (1, 7, 60):
            llm.reset()
            for i in range(0, 60, size):
                llm.eval(PROMPTS[3][i : i + size])
            rows.append(llm.decoder.logits(N_VOCAB).copy())
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_same_tokens_as_llama_cpp_python(name: str, tmp_path: Path) -> None:
    model = model_path(name)
    stock = llama_cpp.Llama(str(model), **SETTINGS)
    expected = answers(stock)
    stock.close()

    plain = Llama(model, **SETTINGS)
    assert answers(plain) == expected
    plain.close()

    heads = heads_for(model, SPECS[name].n_embd, tmp_path)
    if SPECS[name].arch == "mamba":
        with pytest.raises(EntmtpError, match="cannot hold a token tree"):
            Llama(model, draft="entmtp", heads=heads, **SETTINGS)
        return
    llm = Llama(model, draft="entmtp", heads=heads, trees=BUSHY, policy="static", **SETTINGS)
    assert answers(llm) == expected
    assert llm.draft_stats.n_accepted > 0, "no guess was ever right: this run proves nothing"
    llm.close()
