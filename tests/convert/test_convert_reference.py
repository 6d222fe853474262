"""The heads file means what the checkpoint means: both are run forward, and the logits are the same.

The file is run by the words of docs/heads-gguf.md, the checkpoint by tests/heads_reference.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from entmtp.convert import convert
from helpers.checkpoints import (
    N_EMBD,
    N_HEAD,
    N_HEAD_KV,
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    read_heads,
    tiny_base,
    write_checkpoint,
)
from helpers.heads_reference import hydra_logits, medusa_logits, prefix_forward


def file_logits(heads, i, x):
    """Logits of head i of a heads file for its input x [n_in]."""
    arch = heads.keys["general.architecture"]
    stored = 0
    for j in range(heads.keys[f"{arch}.block_count"]):
        if f"head.{i}.blk.{j}.weight" in heads.tensors:
            stored = j  # else: the same as the nearest stored block before it
        block = {key: heads.tensors.get(f"head.{i}.blk.{stored}.{key}") for key in ("weight", "bias")}
        y = block["weight"].astype(float) @ x + block["bias"]
        kept = x
        if f"head.{i}.blk.{stored}.res.weight" in heads.tensors:
            kept = heads.tensors[f"head.{i}.blk.{stored}.res.weight"].astype(float) @ x
            kept = kept + heads.tensors[f"head.{i}.blk.{stored}.res.bias"]
        x = kept + y / (1 + np.exp(-y))
    return heads.tensors[f"head.{i}.output.weight"].astype(float) @ x + heads.tensors.get(
        f"head.{i}.output.bias", 0
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_medusa(tmp_path, n_layers, shared):
    state, config = medusa_state(3, n_layers, shared=shared), medusa_config(3, n_layers)
    base = tiny_base(tmp_path / "base.gguf")
    heads = read_heads(
        convert(write_checkpoint(tmp_path / "c", state, config), base, tmp_path / "h.gguf").outfile
    )
    h = np.random.default_rng(1).standard_normal(N_EMBD)
    expected = medusa_logits(state, config, h)
    assert len(expected) == 3
    for i, logits in enumerate(expected):
        np.testing.assert_allclose(file_logits(heads, i, h), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("grounded", [True, False])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_hydra(tmp_path, n_layers, grounded, prefix):
    state, config = hydra_state(3, n_layers, grounded, prefix), hydra_config(3, n_layers, grounded, prefix)
    base = tiny_base(tmp_path / "base.gguf")
    heads = read_heads(
        convert(write_checkpoint(tmp_path / "c", state, config), base, tmp_path / "h.gguf").outfile
    )
    rng = np.random.default_rng(1)
    h, path = rng.standard_normal(N_EMBD), rng.standard_normal((3, N_EMBD))
    for i in range(3):
        logits = hydra_logits(state, config, i, h, path[: i + 1])
        x = np.concatenate([h, *path[: i + 1]]) if grounded else h
        np.testing.assert_allclose(file_logits(heads, i, x), logits, rtol=1e-9, atol=1e-9)


# the reference itself


@pytest.fixture
def prefix():
    state = hydra_state(1, prefix=True)
    hidden = np.random.default_rng(2).standard_normal((9, N_EMBD))
    return state, hidden, lambda h, p: prefix_forward(state, h, p, N_HEAD, N_HEAD_KV)


def test_prefix_layer_is_causal_and_relative(prefix):
    _, hidden, forward = prefix
    out = forward(hidden, np.arange(9))
    changed = hidden.copy()
    changed[5] += 1
    np.testing.assert_array_equal(forward(changed, np.arange(9))[:5], out[:5])
    assert np.abs(forward(changed, np.arange(9))[5:] - out[5:]).max() > 1e-3
    np.testing.assert_allclose(forward(hidden, np.arange(9) + 1000), out, atol=1e-9)
    assert np.abs(forward(hidden, np.arange(9) * 3) - out)[1:].max() > 1e-3


def test_prefix_layer_reads_every_weight(prefix):
    state, hidden, forward = prefix
    out = forward(hidden, np.arange(9))
    for name in [
        n for n in state if n.startswith("prefix") and "embed_tokens" not in n and "inv_freq" not in n
    ]:
        kept = state[name]
        state[name] = kept * 1.5
        assert np.abs(forward(hidden, np.arange(9)) - out).max() > 1e-4, name
        state[name] = kept


def test_repeated_states_leave_attention_even(prefix):
    """With one hidden state everywhere, every value is the same, so positions and scores make no difference."""
    _, hidden, forward = prefix
    out = forward(np.repeat(hidden[:1], 5, axis=0), np.array([0, 1, 7, 30, 31]))
    np.testing.assert_allclose(out, np.repeat(out[:1], 5, axis=0), atol=1e-9)


@pytest.mark.torch
def test_prefix_layer_against_pytorch(prefix):
    """The same layer from PyTorch's own functions, with rotations as complex numbers."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    f = torch.nn.functional
    state, hidden, forward = prefix
    w = {n.removeprefix("prefix_embeding_layer."): torch.tensor(a).double() for n, a in state.items()}
    x = torch.tensor(hidden)

    def heads(name, n):  # [n, 9, head_dim]
        normed = f.rms_norm(x, (N_EMBD,), w["layers.0.input_layernorm.weight"], 1e-5)
        return f.linear(normed, w[f"layers.0.self_attn.{name}.weight"]).view(9, n, -1).transpose(0, 1)

    def rotate(t):
        turns = torch.arange(9).double()[:, None] * 10000.0 ** (-torch.arange(4) / 4.0).double()
        pairs = torch.complex(t[..., :4], t[..., 4:]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    q, k, v = rotate(heads("q_proj", N_HEAD)), rotate(heads("k_proj", N_HEAD_KV)), heads("v_proj", N_HEAD_KV)
    mixed = f.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    x = x + f.linear(mixed.transpose(0, 1).reshape(9, N_EMBD), w["layers.0.self_attn.o_proj.weight"])
    normed = f.rms_norm(x, (N_EMBD,), w["layers.0.post_attention_layernorm.weight"], 1e-5)
    gate, up, down = (w[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    x = x + f.linear(f.silu(f.linear(normed, gate)) * f.linear(normed, up), down)
    expected = f.rms_norm(x, (N_EMBD,), w["norm.weight"], 1e-5)
    np.testing.assert_allclose(forward(hidden, np.arange(9)), expected.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.torch
@pytest.mark.parametrize("grounded", [True, False])
def test_hydra_head_against_pytorch_modules(grounded):
    """A head built from PyTorch modules as the papers describe it, fed by torch.roll'ed embeddings as in training."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state, config = hydra_state(2, 2, grounded), hydra_config(2, 2, grounded)
    rng = np.random.default_rng(3)
    hidden, embeddings = rng.standard_normal((6, N_EMBD)), rng.standard_normal((6, N_EMBD))
    tensors = {name: torch.tensor(a).double() for name, a in state.items()}

    def linear(name, x):
        layer = torch.nn.Linear(x.shape[-1], tensors[f"{name}.weight"].shape[0]).double()
        layer.load_state_dict({kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias")})
        return layer(x)

    for i in range(2):
        rolled = [torch.roll(torch.tensor(embeddings), -(k + 1), 0) for k in range(i + 1)]
        x = torch.cat([torch.tensor(hidden), *rolled], -1) if grounded else torch.tensor(hidden)
        kept = linear(f"hydra_mlp.{i}.0.res_connection", x) if grounded else x
        x = kept + torch.nn.SiLU()(linear(f"hydra_mlp.{i}.0.linear", x))
        x = x + torch.nn.SiLU()(linear(f"hydra_mlp.{i}.1.linear", x))
        expected = linear(f"hydra_lm_head.{i}", x).detach().numpy()
        for t in range(6 - i - 1):
            got = hydra_logits(state, config, i, hidden[t], embeddings[t + 1 : t + 2 + i])
            np.testing.assert_allclose(got, expected[t], rtol=1e-9, atol=1e-9)
