"""Draft heads in PyTorch, under the names of the published checkpoints (Medusa, arXiv 2401.10774; Hydra, 2402.05109).

A state is a dict of tensors as FasterDecoding/Medusa and zankner/Hydra save it. At the start every head says what the
base model's own LM head says of its input: blocks that add nothing, a prefix layer that changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]

PREFIX = "prefix_embeding_layer."  # spelt so in the published code
LAYER = PREFIX + "layers.0."
SHARED = "lm_head.weight"  # one projection of all heads; the published layout has it under the name of each


@dataclass(frozen=True)
class Shape:
    """What heads are trained: `n_layers` residual blocks per head, and of hydra++ the decoder layer's numbers."""

    arch: str
    n_heads: int
    n_layers: int
    n_embd: int
    lm_head: str  # projections: "own" of each head, one "shared" by all, or the "base" model's as it is
    n_head: int = 0
    n_head_kv: int = 0
    n_ff: int = 0
    rms_eps: float = 0.0
    rope_base: float = 0.0

    @property
    def grounded(self) -> bool:
        """Heads see the tokens drafted before."""
        return self.arch != "medusa"

    @property
    def prefix(self) -> bool:
        return self.arch == "hydra++"

    @property
    def n_projections(self) -> int:
        """That are trained."""
        return {"own": self.n_heads, "shared": 1, "base": 0}[self.lm_head]

    def block(self, head: int, layer: int) -> str:
        """Name of a residual block."""
        if not self.grounded:
            return f"{head}.{layer}"
        # in the published prefix-mlp a dropout stands before every module
        return f"hydra_mlp.{head}.{2 * layer + 1 if self.prefix else layer}"

    def output(self, head: int) -> str:
        """Name of a projection to the vocabulary in the published layout."""
        if not self.grounded:
            return f"{head}.{self.n_layers}"
        return f"hydra_lm_head.{head}.1" if self.prefix else f"hydra_lm_head.{head}"

    def weight(self, head: int) -> str:
        """Name of a trained projection's matrix. A bias is each head's own."""
        return SHARED if self.lm_head == "shared" else f"{self.output(head)}.weight"

    def block_rows(self, head: int) -> int:
        """Rows of n_embd numbers in the matrices of a head's blocks."""
        first = 2 * (head + 2) if self.grounded else 1
        return self.n_embd * (first + self.n_layers - 1)

    def config(self, base: str) -> dict[str, object]:
        """config.json of the published layout."""
        if not self.grounded:
            return {
                "medusa_num_heads": self.n_heads, "medusa_num_layers": self.n_layers, "base_model_name_or_path": base
            }  # fmt: skip
        config: dict[str, object] = {
            "hydra_num_heads": self.n_heads,
            "hydra_num_layers": self.n_layers,
            "hydra_head_arch": "prefix-mlp" if self.prefix else "mlp",
            "grounded_heads": True,
            "hidden_state_offset": 0,
            "base_model_name_or_path": base,
        }
        return config | ({"rope_theta": self.rope_base} if self.prefix else {})


def initial(shape: Shape, output: torch.Tensor, scale: float, seed: int) -> State:
    """The state before training.

    Args:
        output: the base model's projection [n_vocab, n_embd], the rows that heads can propose.
        scale: root mean square of the base model's hidden states.
    """
    g = torch.Generator().manual_seed(seed)
    d = shape.n_embd
    state: State = {}

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g) * 0.02

    for i in range(shape.n_heads):
        for j in range(shape.n_layers):
            wide = shape.grounded and j == 0
            n_in = d * (i + 2) if wide else d
            name = shape.block(i, j)
            state[f"{name}.linear.weight"] = torch.zeros(d, n_in)
            state[f"{name}.linear.bias"] = torch.zeros(d)
            if wide:
                state[f"{name}.res_connection.weight"] = torch.cat([torch.eye(d), noise(d, n_in - d)], 1)
                state[f"{name}.res_connection.bias"] = torch.zeros(d)
        if shape.lm_head != "base":
            if shape.weight(i) not in state:
                state[shape.weight(i)] = output.clone()
            if shape.grounded:
                state[f"{shape.output(i)}.bias"] = torch.zeros(len(output))
    if shape.prefix:
        kv = d // shape.n_head * shape.n_head_kv
        for name, size in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            state[f"{LAYER}self_attn.{name}.weight"] = noise(size, d)
        state[f"{LAYER}self_attn.o_proj.weight"] = torch.zeros(d, d)
        state[f"{LAYER}mlp.gate_proj.weight"] = noise(shape.n_ff, d)
        state[f"{LAYER}mlp.up_proj.weight"] = noise(shape.n_ff, d)
        state[f"{LAYER}mlp.down_proj.weight"] = torch.zeros(d, shape.n_ff)
        state[f"{LAYER}input_layernorm.weight"] = torch.ones(d)
        state[f"{LAYER}post_attention_layernorm.weight"] = torch.ones(d)
        state[f"{PREFIX}norm.weight"] = torch.full((d,), scale)
    return state


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def before_projection(shape: Shape, state: State, head: int, x: torch.Tensor) -> torch.Tensor:
    """What a head projects to the vocabulary, [n, n_embd].

    Args:
        x: [n, n_in]: hidden states, of grounded heads followed by the embeddings of the head + 1 tokens after them.
    """
    for j in range(shape.n_layers):
        name = shape.block(head, j)
        kept = _linear(state, f"{name}.res_connection", x) if shape.grounded and j == 0 else x
        x = kept + F.silu(_linear(state, f"{name}.linear", x))
    return x


def _rope(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate [n_seqs, n_head, n, head_dim] by the positions 0 .. n - 1."""
    half = x.shape[-1] // 2
    inverse = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), inverse)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def prefix_layer(shape: Shape, state: State, hidden: torch.Tensor) -> torch.Tensor:
    """The decoder layer of Hydra++ over whole sequences [n_seqs, n, n_embd], from their beginning."""
    n_seqs, n, d = hidden.shape

    def split(name: str, x: torch.Tensor, n_head: int) -> torch.Tensor:
        y = _linear(state, f"{LAYER}self_attn.{name}", x)
        return y.view(n_seqs, n, n_head, d // shape.n_head).transpose(1, 2)

    x = F.rms_norm(hidden, (d,), state[f"{LAYER}input_layernorm.weight"], shape.rms_eps)
    q = _rope(split("q_proj", x, shape.n_head), shape.rope_base)
    k = _rope(split("k_proj", x, shape.n_head_kv), shape.rope_base)
    v = split("v_proj", x, shape.n_head_kv)
    repeat = shape.n_head // shape.n_head_kv
    mixed = F.scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), is_causal=True
    )
    hidden = hidden + _linear(state, f"{LAYER}self_attn.o_proj", mixed.transpose(1, 2).reshape(n_seqs, n, d))
    x = F.rms_norm(hidden, (d,), state[f"{LAYER}post_attention_layernorm.weight"], shape.rms_eps)
    gated = F.silu(_linear(state, f"{LAYER}mlp.gate_proj", x)) * _linear(state, f"{LAYER}mlp.up_proj", x)
    hidden = hidden + _linear(state, f"{LAYER}mlp.down_proj", gated)
    return F.rms_norm(hidden, (d,), state[f"{PREFIX}norm.weight"], shape.rms_eps)
