"""The published checkpoint layouts of Medusa and Hydra, and how their tensors are named in a heads file.

Medusa (FasterDecoding/Medusa), head i with L residual blocks:
    {i}.{j}.linear.{weight,bias}  j < L          {i}.{L}.weight
Hydra (zankner/Hydra), `mlp`:
    hydra_mlp.{i}.{j}.linear.*                   hydra_lm_head.{i}.{weight,bias}
    hydra_mlp.{i}.0.res_connection.*             (grounded heads only)
Hydra++, `prefix-mlp`: a Dropout stands before every module, so block j is number 2 j + 1 and the output is
hydra_lm_head.{i}.1; and a decoder layer `prefix_embeding_layer` runs first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entmtp.common.errors import ConvertError
from entmtp.models.base import BaseModel
from entmtp.models.formats.tensors import Rows, SourceTensor, equal

_N = r"(0|[1-9][0-9]{0,3})"
_MEDUSA_BLOCK = re.compile(rf"{_N}\.{_N}\.(linear\.(?:weight|bias))")
_MEDUSA_OUTPUT = re.compile(rf"{_N}\.{_N}\.(weight|bias)")
_HYDRA_BLOCK = re.compile(rf"hydra_mlp\.{_N}\.{_N}\.((?:linear|res_connection)\.(?:weight|bias))")
_HYDRA_OUTPUT = re.compile(rf"hydra_lm_head\.{_N}\.(1\.)?(weight|bias)")
_PREFIX = "prefix_embeding_layer."  # spelt so in the published code
_INV_FREQ = _PREFIX + "layers.0.self_attn.rotary_emb.inv_freq"
# copies of the base model's embedding, and buffers that can be computed
_HYDRA_IGNORED = re.compile(
    r"input_embed_fn\.weight|prefix_embeding_layer\.embed_tokens\.weight"
    r"|prefix_embeding_layer\..*rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)
_WRAPPERS = re.compile(r"(?:.*\.)?(?:medusa_head|hydra_head)\.")

# prefix layer: tensor in the checkpoint, tensor in the heads file, its two dimensions (see _prefix_dims) or one
_PREFIX_TENSORS = (
    ("layers.0.input_layernorm.weight", "prefix.attn_norm", ("embd",)),
    ("layers.0.self_attn.q_proj.weight", "prefix.attn_q", ("embd", "embd")),
    ("layers.0.self_attn.k_proj.weight", "prefix.attn_k", ("kv", "embd")),
    ("layers.0.self_attn.v_proj.weight", "prefix.attn_v", ("kv", "embd")),
    ("layers.0.self_attn.o_proj.weight", "prefix.attn_output", ("embd", "embd")),
    ("layers.0.post_attention_layernorm.weight", "prefix.ffn_norm", ("embd",)),
    ("layers.0.mlp.gate_proj.weight", "prefix.ffn_gate", ("ff", "embd")),
    ("layers.0.mlp.up_proj.weight", "prefix.ffn_up", ("ff", "embd")),
    ("layers.0.mlp.down_proj.weight", "prefix.ffn_down", ("embd", "ff")),
    ("norm.weight", "prefix.output_norm", ("embd",)),
)


@dataclass(frozen=True)
class PrefixLayer:
    """Hyperparameters of the Hydra++ decoder layer."""

    n_head: int
    n_head_kv: int
    n_ff: int
    rms_eps: float
    rope_base: float


@dataclass
class Heads:
    """What goes into a heads file: hyperparameters, and (name, source) of every tensor in order."""

    arch: str  # "medusa" or "hydra"
    n_heads: int
    n_blocks: int  # residual blocks per head
    grounded: bool = False
    prefix: PrefixLayer | None = None
    tensors: list[tuple[str, SourceTensor | Rows]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # one sentence each, for the user
    draft_vocab: np.ndarray | None = None  # base token of each draft token, ascending; None: all tokens
    shared_output: bool = False  # the base model's projection is the heads'


@dataclass
class _Head:
    blocks: dict[int, dict[str, SourceTensor]] = field(default_factory=dict)
    output: dict[str, SourceTensor] = field(default_factory=dict)
    output_index: int | None = None


class _Reader:
    """Sorts the tensors of one checkpoint into heads and checks them against config and base model."""

    def __init__(
        self,
        tensors: dict[str, SourceTensor],
        config: dict[str, Any],
        base: BaseModel,
        label: str,
        shared: bool,
    ):
        self.tensors, self.config, self.base, self.label = tensors, config, base, label
        self.shared = shared  # the base model's projection will serve: the heads' own may be missing
        self.heads: dict[int, _Head] = {}
        self.notes: list[str] = []

    # messages

    def missing(self, name: str) -> ConvertError:
        return ConvertError(
            f"{self.label}: the tensor '{name}' is missing; the checkpoint is incomplete or its tensors were renamed, "
            "get it again from its author"
        )

    def unknown(self, name: str, kind: str) -> ConvertError:
        return ConvertError(
            f"{self.label}: the tensor '{name}' does not belong to {kind}; only the layouts of the published "
            "Medusa and Hydra code can be converted, so restore the published names"
        )

    def config_int(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is not None and type(value) is not int:
            raise ConvertError(f"config.json: '{key}' is {value!r} in place of a whole number; correct it")
        return value

    def expect(self, tensor: SourceTensor, *shape: int) -> SourceTensor:
        if tensor.shape != shape:
            raise ConvertError(
                f"{tensor.label} has the shape {list(tensor.shape)} in place of {list(shape)}; check that the heads "
                f"were trained for the base model {self.base.path.name}"
            )
        return tensor

    # heads

    def head(self, index: str) -> _Head:
        return self.heads.setdefault(int(index), _Head())

    def count_heads(self, key: str, first: str) -> int:
        """Number of heads, by the tensors; a differing config is reported and not believed."""
        n_heads = len(self.heads)
        if sorted(self.heads) != list(range(n_heads)) or n_heads == 0:
            gap = next(i for i in range(n_heads + 1) if i not in self.heads)
            raise self.missing(first.format(i=gap))
        told = self.config_int(key)
        if told is not None and told != n_heads:
            self.notes.append(
                f"config.json says {told} heads, and the checkpoint holds {n_heads}: using {n_heads}"
            )
        return n_heads

    def count_blocks(self, key: str, counts: Iterable[int]) -> int:
        """Number of residual blocks per head, by the tensors, as `count_heads`."""
        found = set(counts)
        if len(found) != 1:
            raise ConvertError(
                f"{self.label}: the heads have different numbers of residual blocks ({sorted(found)}), which no "
                "published code does; the checkpoint is incomplete, get it again from its author"
            )
        n_blocks = found.pop()
        told = self.config_int(key)
        if told is not None and told != n_blocks:
            self.notes.append(
                f"config.json says {told} residual blocks per head, and the checkpoint holds {n_blocks}: "
                f"using {n_blocks}"
            )
        return n_blocks

    def check_base(self, weight: SourceTensor, output: SourceTensor | None) -> None:
        """Say plainly when the heads belong to another model: by width and vocabulary of the first head."""
        base = self.base
        told = self.config.get("base_model_name_or_path")
        trained = f" (config.json names '{told}')" if isinstance(told, str) else ""
        mend = f"give the GGUF of the model they were trained for{trained} with --base"
        if len(weight.shape) == 2 and weight.shape[0] != base.n_embd:
            raise ConvertError(
                f"{self.label}: the heads are {weight.shape[0]} wide and the hidden states of {base.path.name} "
                f"{base.n_embd}; {mend}"
            )
        if output is not None and len(output.shape) == 2 and output.shape[0] != base.n_vocab:
            raise ConvertError(
                f"{self.label}: the heads know a vocabulary of {output.shape[0]} tokens and {base.path.name} "
                f"{base.n_vocab}; {mend}"
            )

    def one_projection(self, n_heads: int) -> SourceTensor | None:
        """The projection of all heads, if they have several and these are equal."""
        weights = [self.heads[i].output.get("weight") for i in range(n_heads)]
        first, *others = weights
        if first is None or not others:
            return None
        return first if all(t is not None and equal(first, t) for t in others) else None

    def emit(self, heads: Heads, block_name: str, output_name: str) -> None:
        """Check all tensors of all heads and add them to `heads`, a repeated block once."""
        n_embd, n_vocab = self.base.n_embd, self.base.n_vocab
        one = self.one_projection(heads.n_heads)
        if one is not None:
            heads.tensors.append(("output.weight", self.expect(one, n_vocab, n_embd)))
        for i in range(heads.n_heads):
            head = self.heads[i]
            last: dict[str, SourceTensor] = {}
            differ = False
            for j in range(heads.n_blocks):
                block = head.blocks.get(j, {})
                wide = heads.grounded and j == 0
                n_in = n_embd * (i + 2) if wide else n_embd
                parts = {}
                for part in ("linear", "res_connection") if wide else ("linear",):
                    for kind, shape in (("weight", (n_embd, n_in)), ("bias", (n_embd,))):
                        name = block_name.format(i=i, j=j, j2=2 * j + 1, part=f"{part}.{kind}")
                        if f"{part}.{kind}" not in block:
                            raise self.missing(name)
                        parts[f"{part}.{kind}"] = self.expect(block[f"{part}.{kind}"], *shape)
                if len(parts) < len(block):
                    extra = next(t.name for key, t in block.items() if key not in parts)
                    raise self.unknown(
                        extra, f"block {j} of {'a grounded' if heads.grounded else 'an ungrounded'} head"
                    )
                if parts.keys() == last.keys() and all(equal(parts[key], last[key]) for key in parts):
                    continue
                differ = differ or parts.keys() == last.keys()
                last = parts
                for key, tensor in parts.items():
                    name = key.replace("linear.", "").replace("res_connection.", "res.")
                    heads.tensors.append((f"head.{i}.blk.{j}.{name}", tensor))
            if differ:
                self.notes.append(f"the residual blocks of head {i} differ, so each is stored")
            if "weight" in head.output:
                own = self.expect(head.output["weight"], n_vocab, n_embd)
                heads.tensors += [] if one else [(f"head.{i}.output.weight", own)]
            elif not self.shared:
                raise self.missing(output_name.format(i=i, j=heads.n_blocks))
            if "bias" in head.output:
                heads.tensors.append((f"head.{i}.output.bias", self.expect(head.output["bias"], n_vocab)))

    # layouts

    def medusa(self) -> Heads:
        for name, tensor in self.tensors.items():
            if m := _MEDUSA_BLOCK.fullmatch(name):
                self.head(m[1]).blocks.setdefault(int(m[2]), {})[m[3]] = tensor
            elif m := _MEDUSA_OUTPUT.fullmatch(name):
                head = self.head(m[1])
                if head.output_index not in (None, int(m[2])):
                    raise self.unknown(name, "a Medusa head, which has one output projection")
                head.output_index = int(m[2])
                head.output[m[3]] = tensor
            else:
                raise self.unknown(name, "a Medusa head")
        n_heads = self.count_heads("medusa_num_heads", "{i}.0.linear.weight")
        if not self.shared and all(head.output_index is None for head in self.heads.values()):
            raise ConvertError(
                f"{self.label}: the heads have no output projections ('0.1.weight'), as those of the first Medusa "
                "release, which were trained to share the base model's; convert them with --share-lm-head"
            )
        for i, head in self.heads.items():
            if head.output_index is None and not self.shared:
                raise self.missing(f"{i}.{max(head.blocks) + 1}.weight")

        def count(head: _Head) -> int:
            return max(head.blocks, default=-1) + 1 if head.output_index is None else head.output_index

        n_blocks = self.count_blocks("medusa_num_layers", map(count, self.heads.values()))
        first = self.heads[0]
        if (block := first.blocks.get(0, {}).get("linear.weight")) is not None:
            self.check_base(block, first.output.get("weight"))
        for head in self.heads.values():
            for j in head.blocks:
                if j >= n_blocks:
                    raise self.unknown(
                        next(iter(head.blocks[j].values())).name, "a Medusa head before its output"
                    )
        heads = Heads("medusa", n_heads, n_blocks, notes=self.notes)
        self.emit(heads, "{i}.{j}.{part}", "{i}.{j}.weight")
        return heads

    def hydra(self) -> Heads:
        self.refuse_unsupported()
        has_prefix = any(name.startswith(_PREFIX) for name in self.tensors)
        told = self.config.get("hydra_head_arch")
        if told == "prefix-mlp" and not has_prefix:
            raise self.missing(_PREFIX + "layers.0.self_attn.q_proj.weight")
        if told == "mlp" and has_prefix:
            self.notes.append(
                "config.json says 'mlp', and the checkpoint holds a prefix layer: using 'prefix-mlp'"
            )
        prefix_tensors: dict[str, SourceTensor] = {}
        prefix_names = {_PREFIX + name for name, _, _ in _PREFIX_TENSORS}
        for name, tensor in self.tensors.items():
            if m := _HYDRA_BLOCK.fullmatch(name):
                index = int(m[2])
                if has_prefix and index % 2 == 0:
                    raise self.unknown(name, "a 'prefix-mlp' head, whose blocks have odd numbers")
                self.head(m[1]).blocks.setdefault(index // 2 if has_prefix else index, {})[m[3]] = tensor
            elif (m := _HYDRA_OUTPUT.fullmatch(name)) and bool(m[2]) == has_prefix:
                self.head(m[1]).output[m[3]] = tensor
            elif name in prefix_names:
                prefix_tensors[name] = tensor
            elif not _HYDRA_IGNORED.fullmatch(name):
                raise self.unknown(
                    name, f"a Hydra head of the kind '{'prefix-mlp' if has_prefix else 'mlp'}'"
                )
        block_name = "hydra_mlp.{i}." + ("{j2}" if has_prefix else "{j}") + ".{part}"
        first_name = "hydra_mlp.{i}." + ("1" if has_prefix else "0") + ".linear.weight"
        n_heads = self.count_heads("hydra_num_heads", first_name)
        n_blocks = self.count_blocks(
            "hydra_num_layers", (max(h.blocks, default=-1) + 1 for h in self.heads.values())
        )
        if n_blocks == 0:
            raise self.missing(first_name.format(i=0))
        first = self.heads[0]
        weight = first.blocks.get(0, {}).get("linear.weight")
        if weight is None:
            raise self.missing(first_name.format(i=0))
        self.check_base(weight, first.output.get("weight"))
        heads = Heads("hydra", n_heads, n_blocks, self.grounded(weight), notes=self.notes)
        self.emit(heads, block_name, "hydra_lm_head.{i}." + ("1." if has_prefix else "") + "weight")
        if has_prefix:
            heads.prefix = self.prefix_layer(heads, prefix_tensors)
        return heads

    def refuse_unsupported(self) -> None:
        arch, offset = self.config.get("hydra_head_arch"), self.config.get("hidden_state_offset", 0)
        if arch not in (None, "mlp", "prefix-mlp"):
            raise ConvertError(
                f"config.json: heads of the kind {arch!r} (hydra_head_arch) are not supported; 'mlp' and 'prefix-mlp' "
                "are, so choose a checkpoint of one of these"
            )
        if offset not in (0, None):
            raise ConvertError(
                f"config.json: heads on an inner layer (hidden_state_offset = {offset!r}) are not supported; choose a "
                "checkpoint trained on the last hidden state (hidden_state_offset = 0)"
            )

    def grounded(self, weight: SourceTensor) -> bool:
        """Whether the heads are grounded, by the width of the first block of head 0."""
        grounded = len(weight.shape) == 2 and weight.shape[1] == 2 * self.base.n_embd
        told = self.config.get("grounded_heads")
        if told is not None and told is not grounded:
            self.notes.append(
                f"config.json says grounded_heads = {told!r}, and the shapes of the tensors say {grounded}: "
                f"using {grounded}"
            )
        return grounded

    def prefix_layer(self, heads: Heads, tensors: dict[str, SourceTensor]) -> PrefixLayer:
        """Check the decoder layer, add its tensors to `heads` and return its hyperparameters."""
        base = self.base
        scaling = base.keys.get("rope.scaling.type", "none")
        if self.config.get("rope_scaling") is not None or scaling not in ("none", ""):
            raise ConvertError(
                f"{self.label}: a prefix layer under RoPE scaling is not supported; choose heads whose base model has "
                "an unscaled context"
            )
        n_head, n_ff = int(base.get("attention.head_count")), int(base.get("feed_forward_length"))
        n_head_kv = (
            int(base.get("attention.head_count_kv")) if "attention.head_count_kv" in base.keys else n_head
        )
        if n_head <= 0 or n_head_kv <= 0 or base.n_embd % n_head or n_head % n_head_kv:
            raise ConvertError(
                f"{base.path}: {n_head} attention heads ({n_head_kv} for keys) do not divide a width of {base.n_embd}, "
                "so a prefix layer cannot be built; check that this is the right base model"
            )
        sizes = {"embd": base.n_embd, "kv": base.n_embd // n_head * n_head_kv, "ff": n_ff}
        for name, out_name, dims in _PREFIX_TENSORS:
            if _PREFIX + name not in tensors:
                raise self.missing(_PREFIX + name)
            tensor = self.expect(tensors[_PREFIX + name], *(sizes[dim] for dim in dims))
            heads.tensors.append((f"{out_name}.weight", tensor))
        eps = float(base.get("attention.layer_norm_rms_epsilon"))
        return PrefixLayer(n_head, n_head_kv, n_ff, eps, self.rope_base(base.n_embd // n_head))

    def rope_base(self, head_dim: int) -> float:
        """RoPE base: by config, else by the inv_freq buffer, else 10000; config and buffer are compared.

        inv_freq[k] = base^(-2 k / head_dim); the buffer may be float16, so it is compared to 1 %.
        """
        told, buffer = self.config.get("rope_theta"), self.tensors.get(_INV_FREQ)
        if told is not None and (
            isinstance(told, bool) or not isinstance(told, (int, float)) or not told > 1
        ):
            raise ConvertError(
                f"config.json: 'rope_theta' is {told!r} in place of a number above 1; correct it"
            )
        if buffer is None or head_dim < 4:
            return float(told or 10000.0)
        inv_freq = np.concatenate([c.ravel() for c in self.expect(buffer, head_dim // 2).chunks()]).astype(
            np.float64
        )
        if not np.all(inv_freq > 0) or inv_freq[-1] >= 1:
            raise ConvertError(
                f"{buffer.label} holds no rotary frequencies; the checkpoint is damaged, get it again"
            )
        exponent = np.arange(len(inv_freq)) * 2 / head_dim
        fitted = float(f"{inv_freq[-1] ** (-1 / exponent[-1]):.2g}")  # bases are round numbers
        base = float(told or fitted)
        if np.abs(np.log(inv_freq) + exponent * np.log(base)).max() > 0.01:
            raise ConvertError(
                f"{buffer.label} holds the rotary frequencies of another base than {base:g}; correct 'rope_theta' in "
                "config.json (frequency k is rope_theta^(-2 k / head width))"
            )
        return base


def _unwrap(tensors: dict[str, SourceTensor], label: str) -> dict[str, SourceTensor]:
    """Drop what is around the heads: the base model's tensors beside `medusa_head.*`, and outer prefixes."""
    if any(_WRAPPERS.match(name) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if _WRAPPERS.match(name)}
    heads: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        short = _WRAPPERS.sub("", name, count=1).removeprefix("module.")
        if short in heads:
            raise ConvertError(
                f"{label}: the tensor '{name}' comes twice, under two prefixes; keep one set of heads in the file"
            )
        heads[short] = tensor
    return heads


def plan_heads(
    tensors: dict[str, SourceTensor],
    config: dict[str, Any],
    base: BaseModel,
    label: str,
    shared: bool = False,
) -> Heads:
    """Find the heads among a checkpoint's tensors and check every shape against the base model.

    `label` names the checkpoint in messages; with `shared` the heads need no projections of their own.
    Raises ConvertError for anything that a heads file cannot hold.
    """
    heads = _unwrap(tensors, label)
    if not heads:
        raise ConvertError(
            f"{label}: the file holds no tensors; check that it is a Medusa or Hydra checkpoint"
        )
    if any(name.startswith("model.layers.") for name in heads):
        raise ConvertError(
            f"{label}: this is a model without Medusa or Hydra heads; give the heads as CHECKPOINT and this model, "
            "as GGUF, as --base"
        )
    is_hydra = any(name.startswith(("hydra_", _PREFIX)) for name in heads) or "hydra_head_arch" in config
    reader = _Reader(heads, config, base, label, shared)
    return reader.hydra() if is_hydra else reader.medusa()
