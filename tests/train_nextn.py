"""Train a prediction layer (NextN) for a Llama-like model, so that drafting with one can be tested and measured.

The model comes out under the name of an architecture that has such layers (helpers/nextn.py). Text and states are those
of `entmtp train --keep-work`.

    entmtp train -m base.gguf -o heads.gguf --data prompts.jsonl --tokens 400k --heads 1 --keep-work
    python tests/train_nextn.py base.gguf heads.gguf.train nextn.gguf
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from entmtp.train.base import read_matrices
from entmtp.train.states import Layout, Store
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

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, n, head_dim], neighbouring dimensions paired."""
        n, half = x.shape[2], self.head_dim // 2
        angle = torch.arange(n)[:, None] * self.rope_base ** (-torch.arange(half) / half)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, embedding: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """[batch, n, n_embd] each -> the input of the output projection."""
        x = torch.cat([self.norm(embedding, "nextn_enorm"), self.norm(h, "nextn_hnorm")], -1)
        x = x @ self.w["nextn_eh_proj"].T
        b, n, _ = x.shape
        a = self.norm(x, "attn_norm")

        def heads(name: str, count: int) -> torch.Tensor:
            return (a @ self.w[name].T).view(b, n, count, self.head_dim).transpose(1, 2)

        q, k = self.rope(heads("attn_q", self.n_head)), self.rope(heads("attn_k", self.n_head_kv))
        mixed = F.scaled_dot_product_attention(
            q, k, heads("attn_v", self.n_head_kv), is_causal=True, enable_gqa=True
        )
        x = x + mixed.transpose(1, 2).reshape(b, n, -1) @ self.w["attn_output"].T
        f = self.norm(x, "post_attention_norm")
        x = x + (F.silu(f @ self.w["ffn_gate"].T) * (f @ self.w["ffn_up"].T)) @ self.w["ffn_down"].T
        return self.norm(x, "nextn_shared_head_norm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path, help="folder of text and states")
    parser.add_argument("outfile", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--vocab", type=int, default=6144, help="frequent tokens that are told apart (default: 6144)"
    )
    parser.add_argument(
        "--others", type=int, default=1024, help="further tokens, drawn for each step (default: 1024)"
    )
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--type", default="Q8_0", help="of the layer's matrices (default: Q8_0)")
    parser.add_argument("--minutes", type=float, default=60.0, help="that it may take at most")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    layer = Layer(args.base)
    embedding, output = (torch.tensor(m) for m in read_matrices(args.base))
    n_rows = (args.work / "states.hidden").stat().st_size // 2 // layer.n_embd
    k = (args.work / "states.ids").stat().st_size // 4 // n_rows
    texts, states = Store(args.work, Layout(n_rows, layer.n_embd, k)).opened()

    counts = np.bincount(texts.tokens, minlength=len(output))
    frequent = np.argsort(-counts, kind="stable")[: args.vocab]
    rest = np.setdiff1d(np.arange(len(output)), frequent)
    order = np.argsort(-texts.lengths, kind="stable")
    train = [i for i in order if not texts.held_out[i] and texts.lengths[i] > CHAIN + 2]
    held = [i for i in order if texts.held_out[i] and texts.lengths[i] > CHAIN + 2]
    batches: list[list[int]] = [[]]
    for i in train:  # of texts that are about as long as each other
        if batches[-1] and (len(batches[-1]) + 1) * int(texts.lengths[batches[-1][0]]) > args.batch_tokens:
            batches.append([])
        batches[-1].append(int(i))
    n_steps = args.epochs * len(batches)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def losses(batch: list[int], others: int) -> tuple[torch.Tensor, list[float]]:
        """The loss, and for each guess in a row the share of best guesses that are the base model's best token."""
        n = max(int(texts.lengths[i]) for i in batch)
        tokens = np.zeros((len(batch), n), np.int64)
        h = np.zeros((len(batch), n, layer.n_embd), np.float32)
        ids = np.zeros((len(batch), n, k), np.int64)
        p = np.zeros((len(batch), n, k), np.float32)
        for row, i in enumerate(batch):
            at = slice(int(texts.starts[i]), int(texts.starts[i]) + int(texts.lengths[i]))
            m = at.stop - at.start
            tokens[row, :m], h[row, :m] = texts.tokens[at], states.hidden[at]
            ids[row, :m], p[row, :m] = states.ids[at], states.p[at][:, :k]
        chosen = np.concatenate([frequent, rng.choice(rest, min(others, len(rest)), replace=False)])
        place = np.full(len(output), -1)
        place[chosen] = np.arange(len(chosen))
        columns = output[chosen]
        embedded = embedding[torch.tensor(tokens)]

        total, right = torch.zeros(()), []
        state = torch.tensor(h)
        for step in range(CHAIN):
            # the token at t + 1 and the state at t (of the guess before: the layer's own) -> the token at t + 2
            state = layer(embedded[:, 1 + step :], state[:, :-1])
            # of these the last has no row of the base model to learn from
            of = slice(1 + step, n)
            where = torch.tensor(place[ids[:, of]])
            share = torch.tensor(p[:, of]) * (where >= 0)
            logits = state @ columns.T
            log_p = F.log_softmax(logits, -1)
            row_loss = -(log_p.gather(-1, where.clamp(min=0)) * share).sum(-1)
            weight = share.sum(-1)
            total = total + DECAY**step * row_loss.sum() / weight.sum().clamp(min=1e-6)
            real = torch.tensor(p[:, of].sum(-1) > 0)
            best = torch.tensor(chosen)[logits.argmax(-1)] == torch.tensor(ids[:, of, 0])
            right.append(float((best & real).sum() / real.sum()))
        return total, right

    began = time.monotonic()
    step = 0
    for _ in range(args.epochs):
        for at in rng.permutation(len(batches)):
            done = max(step / n_steps, (time.monotonic() - began) / 60 / args.minutes)
            if done >= 1:
                break
            warm = min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
            loss, right = losses(batches[at], args.others)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == n_steps:
                shares = " ".join(f"{x:.3f}" for x in right)
                print(
                    f"step {step}/{n_steps} {time.monotonic() - began:.0f} s loss {loss.item():.3f} right {shares}",
                    flush=True,
                )
    with torch.no_grad():
        rights = [losses([int(i)], 0)[1] for i in held]
    print("held out, right:", " ".join(f"{x:.3f}" for x in np.mean(rights, 0)))
    weights = {name: layer.w[name.replace(".", "_")].detach().numpy() for name in layer_shapes(1, 1, 1, 1, 1)}
    with_nextn(args.base, args.outfile, weights, args.type)
    print(f"{args.outfile}: {args.outfile.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
