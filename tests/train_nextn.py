"""Train a prediction layer (NextN) for a Llama-like model, so that drafting with one can be tested and measured.

The model comes out under the name of an architecture that has such layers (helpers/nextn.py). Text and states are those
of `entmtp train --keep-work`.

    entmtp train -m base.gguf -o heads.gguf --data prompts.jsonl --tokens 400k --heads 1 --keep-work
    python tests/train_nextn.py base.gguf heads.gguf.train nextn.gguf
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
from helpers.nextn import layer_shapes, with_nextn

CHAIN = 2  # guesses in a row that are trained: the later ones from the layer's own states
DECAY = 0.7  # what each weighs against the one before


class Layer(nn.Module):
    """A decoder layer over [enorm(embedding of the next token), hnorm(hidden state)]."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        reader = gguf.GGUFReader(base)
        tensors = {t.name: t for t in reader.tensors}

        def number(key: str, default: Any = None) -> Any:
            field = reader.fields.get(f"llama.{key}")
            return field.contents() if field else default

        n_layer = number("block_count")
        self.n_embd, self.n_head = number("embedding_length"), number("attention.head_count")
        self.n_head_kv = number("attention.head_count_kv", self.n_head)
        self.head_dim = number("attention.key_length", self.n_embd // self.n_head)
        self.eps = number("attention.layer_norm_rms_epsilon")
        self.rope_base = number("rope.freq_base", 10000.0)
        shapes = layer_shapes(
            self.n_embd, self.n_head, self.n_head_kv, self.head_dim, number("feed_forward_length") // 4 * 4
        )
        # begins as the identity of the hidden state, with the insides of the model's last layer
        self.w = nn.ParameterDict()
        names = {"post_attention_norm": "ffn_norm", "nextn.shared_head_norm": "output_norm"}
        for name, shape in shapes.items():
            source = names.get(name, name)
            source = f"{source}.weight" if source == "output_norm" else f"blk.{n_layer - 1}.{source}.weight"
            if name == "nextn.eh_proj":
                value = np.concatenate([0.3 * np.eye(self.n_embd), np.eye(self.n_embd)], 1)
            elif name == "nextn.enorm":
                value = np.ones(shape)
            else:
                t = tensors["output_norm.weight" if name == "nextn.hnorm" else source]
                value = gguf.quants.dequantize(t.data, t.tensor_type)[tuple(slice(n) for n in shape)]
                if name == "nextn.hnorm":
                    value = 1 / np.maximum(value, 0.1)
                elif name in ("attn_output", "ffn_down"):
                    value = 0.05 * value
            self.w[name.replace(".", "_")] = nn.Parameter(torch.tensor(np.array(value, dtype=np.float32)))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (self.n_embd,), self.w[name], self.eps)

    def forward(self, embedding: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """[batch, n, n_embd] each -> the input of the output projection."""
        x = torch.cat([self.norm(embedding, "nextn_enorm"), self.norm(h, "nextn_hnorm")], -1)
        x = x @ self.w["nextn_eh_proj"].T
        b, n, _ = x.shape
        a = self.norm(x, "attn_norm")

        def heads(name: str, count: int) -> torch.Tensor:
            return (a @ self.w[name].T).view(b, n, count, self.head_dim).transpose(1, 2)

        q, k = (
            rope(heads(name, n), self.rope_base)
            for name, n in (("attn_q", self.n_head), ("attn_k", self.n_head_kv))
        )
        mixed = F.scaled_dot_product_attention(
            q, k, heads("attn_v", self.n_head_kv), is_causal=True, enable_gqa=True
        )
        x = x + mixed.transpose(1, 2).reshape(b, n, -1) @ self.w["attn_output"].T
        f = self.norm(x, "post_attention_norm")
        x = x + (F.silu(f @ self.w["ffn_gate"].T) * (f @ self.w["ffn_up"].T)) @ self.w["ffn_down"].T
        return self.norm(x, "nextn_shared_head_norm")


def main() -> None:
    parser = parser_of(__doc__, epochs=2, lr=1e-3)
    parser.add_argument(
        "--vocab", type=int, default=6144, help="frequent tokens that are told apart (default: 6144)"
    )
    parser.add_argument(
        "--others", type=int, default=1024, help="further tokens, drawn for each step (default: 1024)"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    layer = Layer(args.base)
    embedding, output = (torch.tensor(m) for m in read_matrices(args.base))
    teacher = Teacher(args.work, layer.n_embd, len(output), args.batch_tokens)
    frequent = np.argsort(-teacher.counts, kind="stable")[: args.vocab]
    rest = np.setdiff1d(np.arange(len(output)), frequent)

    def losses(texts: list[int]) -> tuple[torch.Tensor, list[float]]:
        """The loss, and for each guess in a row the share of best guesses that are the base model's best token."""
        batch = teacher.read(texts)
        n = batch.tokens.shape[1]
        others = min(args.others, len(rest)) if torch.is_grad_enabled() else 0
        chosen = np.concatenate([frequent, rng.choice(rest, others, replace=False)])
        place = np.full(len(output), -1)
        place[chosen] = np.arange(len(chosen))
        embedded, state = embedding[batch.tokens], batch.hidden
        total, right = torch.zeros(()), []
        for step in range(CHAIN):
            # the token at t + 1 and the state at t (of the guess before: the layer's own) -> the token at t + 2
            state = layer(embedded[:, 1 + step :], state[:, :-1])
            of = slice(1 + step, n)  # of these the last has no row of the base model to learn from
            loss, share = judged(state @ output[chosen].T, chosen, place, batch.ids[:, of], batch.p[:, of])
            total = total + DECAY**step * loss
            right.append(share)
        return total, right

    fit(layer, teacher, losses, args)
    weights = {name: layer.w[name.replace(".", "_")].detach().numpy() for name in layer_shapes(1, 1, 1, 1, 1)}
    with_nextn(args.base, args.outfile, weights, args.type)
    print(f"{args.outfile}: {args.outfile.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
