"""Mixtures of experts: the same bits in a pass of any size, and the same text with a large tree."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_architectures import heads_for
from test_invariance import assert_passes_leave_no_trace, decode, needs_kernels

from entmtp import Llama
from entmtp.doctor.probes import weights
from entmtp.models.gguf_expand import expand
from entmtp.native import kernels
from helpers.models import EXPERTS, experts_path

pytestmark = [needs_kernels, pytest.mark.parametrize("name", EXPERTS)]

SETTINGS: dict[str, Any] = {
    "n_ctx": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
    "kernels": "auto",
}
TOKENS = np.random.default_rng(1).integers(0, 256, 154).tolist()
PROMPT, REST = TOKENS[:90], TOKENS[90:]


@pytest.mark.parametrize("flash_attn", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_pass_of_any_size_gives_the_same_bits(name: str, n_threads: int, flash_attn: bool) -> None:
    llm = Llama(
        experts_path(name),
        **SETTINGS | {"n_threads": n_threads, "n_threads_batch": n_threads, "flash_attn": flash_attn},
    )
    assert_passes_leave_no_trace(llm, PROMPT, REST)
    llm.close()


def test_the_63_node_tree_gives_the_text_of_plain_decoding(name: str, tmp_path: Path) -> None:
    model = experts_path(name)
    heads = heads_for(model, EXPERTS[name].n_embd, tmp_path, n_heads=4)
    plain = Llama(model, **SETTINGS)
    draft = Llama(
        model, draft="entmtp", heads=heads, trees="mc_sim_7b_63", policy="static", calibrate=False, **SETTINGS
    )
    assert draft.lossless == "exact"
    for seed, start in enumerate((0, 7, 40)):
        for temp in (0.0, 0.8):
            found = []
            for llm in (plain, draft):
                llm.reset()
                llm.set_seed(seed)
                found.append(list(islice(llm.generate(TOKENS[start : start + 50], temp=temp), 40)))
            assert found[0] == found[1], f"prompt {start}, temperature {temp:g}"
    stats = draft.draft_stats
    assert stats.n_drafted > 3000 and stats.n_accepted > 0
    plain.close()
    draft.close()


def test_as_near_to_exact_weights_as_ggml(name: str, tmp_path: Path) -> None:
    """KL divergence of the next token's distribution from that of the same weights in f32.

    Its median: a rounding can send a token to another expert, which moves all behind it.
    """
    exact = expand(experts_path(name), tmp_path / "exact.gguf")
    log_p = []
    for file, kind in ((exact, "off"), (experts_path(name), "auto"), (experts_path(name), "off")):
        with kernels.using(kernels.current()):
            llm = Llama(file, **SETTINGS | {"kernels": kind})
            logits = decode(llm, TOKENS, 0).astype(np.float64)
            llm.close()
        logits -= logits.max(axis=1, keepdims=True)
        log_p.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    ours, ggml = ((np.exp(log_p[0]) * (log_p[0] - q)).sum(axis=1) for q in log_p[1:])
    assert np.median(ours) <= 1.2 * np.median(ggml), (np.median(ours), np.median(ggml))


def write_adapter(path: Path, model: Path, rank: int = 32) -> Path:
    """A LoRA adapter of a model's experts and of a matrix of every attention, in the types that adapters come in."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 16.0)
    rng = np.random.default_rng(5)
    adapted = [t for t in reader.tensors if t.name.endswith(("_exps.weight", "attn_output.weight"))]
    for i, tensor in enumerate(adapted):
        n_in, n_out, *n_expert = (int(n) for n in tensor.shape)
        kind = gguf.GGMLQuantizationType[("F32", "F16", "BF16", "Q8_0")[i % 4]]
        for part, shape in (("lora_a", (*n_expert, rank, n_in)), ("lora_b", (*n_expert, n_out, rank))):
            values = rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32)
            writer.add_tensor(f"{tensor.name}.{part}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("n_threads", [1, 2])
def test_adapters_of_experts_leave_no_trace(name: str, n_threads: int, tmp_path: Path) -> None:
    model = experts_path(name)
    settings = SETTINGS | {"n_threads": n_threads, "n_threads_batch": n_threads}
    plain = Llama(model, **settings)
    without = decode(plain, PROMPT, 0)
    plain.close()
    llm = Llama(model, lora_path=str(write_adapter(tmp_path / "lora.gguf", model)), **settings)
    assert np.abs(decode(llm, PROMPT, 0) - without).max() > 0.1 * without.std()  # it takes part
    assert_passes_leave_no_trace(llm, PROMPT, REST, "adapter")
    llm.close()


def test_doctor_lists_experts_under_their_kernel(name: str) -> None:
    with kernels.using("auto"):
        found = {(row["type"], row["by"]): row["tensors"] for row in weights(experts_path(name))}
    with kernels.using("off"):
        assert {row["by"] for row in weights(experts_path(name))} == {"ggml"}
    # each layer's four matrices of attention, three of experts and a router; the output, but no biases
    expected = {
        "qwen3moe": {("Q4_K", "panels"): 10, ("Q6_K", "panels"): 4, ("F32", "panels"): 3},
        "gpt-oss": {("MXFP4", "panels"): 12, ("Q8_0", "panels"): 17, ("F32", "panels"): 4},
        "mixtral": {
            ("Q4_0", "panels"): 8, ("Q5_0", "panels"): 2, ("IQ3_S", "rows"): 2, ("F16", "panels"): 2,
            ("F32", "panels"): 3,
        },
        # 6 matrices of attention in 3 layers; 3 dense ones; 3 experts, 3 of the shared one and a router in 2 layers
        "deepseek2": {
            ("Q4_K", "panels"): 6, ("Q5_K", "panels"): 3, ("Q6_K", "panels"): 3, ("Q8_0", "panels"): 12,
            ("F32", "panels"): 12,
        },
    }  # fmt: skip
    assert found == expected[name]
