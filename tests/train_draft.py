"""Distil a small draft model from a Llama-like model, with its tokenizer, so that drafting with one can be tested and
measured. Text and probabilities are those of `entmtp train --keep-work`.

    entmtp train -m base.gguf -o heads.gguf --data prompts.jsonl --tokens 400k --heads 1 --keep-work
    python tests/train_draft.py base.gguf heads.gguf.train draft.gguf
    entmtp bench run -m base.gguf --draft-model draft.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from entmtp.train.base import read_matrices
from helpers.distilling import Teacher, fit, judged, parser_of, rope

EPS, ROPE_BASE = 1e-5, 10000.0
HEAD = 32  # dimensions


class Small(nn.Module):
    """A Llama whose embeddings are its output projection, too; tensors by their names in GGUF files."""

    def __init__(self, n_vocab: int, n_embd: int, n_layer: int):
        super().__init__()
        self.n_embd, self.n_layer, self.n_head, self.n_ff = n_embd, n_layer, n_embd // HEAD, 3 * n_embd
        square = (n_embd, n_embd)
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_vocab, n_embd), "output_norm": (n_embd,)}
        for i in range(n_layer):
            shapes |= {f"blk.{i}.attn_{part}": square for part in ("q", "k", "v", "output")}
            shapes |= {f"blk.{i}.{part}_norm": (n_embd,) for part in ("attn", "ffn")}
            shapes |= {f"blk.{i}.ffn_{part}": (self.n_ff, n_embd) for part in ("gate", "up")}
            shapes[f"blk.{i}.ffn_down"] = (n_embd, self.n_ff)
        self.w = nn.ParameterDict()
        for name, shape in shapes.items():
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5
            self.w[name.replace(".", "/")] = nn.Parameter(value)

    def tensor(self, name: str) -> torch.Tensor:
        return self.w[name.replace(".", "/")]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, n] -> logits."""

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.rms_norm(x, (self.n_embd,), self.tensor(name), EPS)

        b, n = tokens.shape
        x = self.tensor("token_embd")[tokens]
        for i in range(self.n_layer):
            a = norm(x, f"blk.{i}.attn_norm")
            q, k, v = (
                (a @ self.tensor(f"blk.{i}.attn_{part}").T).view(b, n, self.n_head, HEAD).transpose(1, 2)
                for part in ("q", "k", "v")
            )
            mixed = F.scaled_dot_product_attention(rope(q, ROPE_BASE), rope(k, ROPE_BASE), v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(b, n, -1) @ self.tensor(f"blk.{i}.attn_output").T
            f = norm(x, f"blk.{i}.ffn_norm")
            gate, up = (f @ self.tensor(f"blk.{i}.ffn_{part}").T for part in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.tensor(f"blk.{i}.ffn_down").T
        return norm(x, "output_norm") @ self.tensor("token_embd").T


def write(model: Small, base: Path, path: Path, kind: str) -> None:
    """With the tokenizer of `base`, and all else that says how texts are read."""
    w = gguf.GGUFWriter(path, "llama")
    for name, field in gguf.GGUFReader(base).fields.items():
        if name.startswith("tokenizer."):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            value: Any = field.contents()
            w.add_key_value(name, value, field.types[0], field.types[-1] if array else None)
    w.add_name(f"draft model for {base.stem}")
    w.add_context_length(4096)
    w.add_embedding_length(model.n_embd)
    w.add_block_count(model.n_layer)
    w.add_head_count(model.n_head)
    w.add_feed_forward_length(model.n_ff)
    w.add_layer_norm_rms_eps(EPS)
    w.add_rope_freq_base(ROPE_BASE)
    w.add_rope_dimension_count(HEAD)
    w.add_vocab_size(model.tensor("token_embd").shape[0])
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, value in model.w.items():
        data = value.detach().numpy()
        name = name.replace("/", ".") + ".weight"
        if data.ndim == 1:
            w.add_tensor(name, data)
        else:
            w.add_tensor(name, gguf.quants.quantize(data, quantisation), raw_dtype=quantisation)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    parser = parser_of(__doc__, epochs=4, lr=2e-3)
    parser.add_argument(
        "--width", type=int, default=128, help="hidden size, of whole heads of 32 (default: 128)"
    )
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)

    n_vocab, n_embd = read_matrices(args.base)[0].shape
    teacher = Teacher(args.work, n_embd, n_vocab, args.batch_tokens)
    model = Small(n_vocab, args.width, args.layers)
    everything = np.arange(n_vocab)

    def losses(texts: list[int]) -> tuple[torch.Tensor, list[float]]:
        batch = teacher.read(texts)
        loss, right = judged(model(batch.tokens), everything, everything, batch.ids, batch.p)
        return loss, [right]

    fit(model, teacher, losses, args)
    write(model, args.base, args.outfile, args.type)
    print(f"{args.outfile}: {args.outfile.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
