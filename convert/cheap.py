"""Cheap heads: projections to the frequent tokens alone, or none of their own but the base model's.

Most of a head is its projection to the vocabulary, which every guess reads in whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType, quants

from entmtp.common.errors import ConvertError
from entmtp.convert.layout import Heads
from entmtp.models.base import BaseModel
from entmtp.models.formats.tensors import Rows, SourceTensor

_N_COMPARED = 1024  # rows of a projection that are compared with the base model's
_ALIKE = 0.35  # relative difference that the coarsest quantisation of the same weights stays below


def cheapen(
    heads: Heads, base: BaseModel, draft_vocab: Sequence[int] | None = None, share_lm_head: bool = False
) -> Heads:
    """Heads with fewer or shared projections.

    Args:
        heads: as `plan_heads` gives them.
        draft_vocab: the base tokens that can be drafted, in any order; None: all. They are kept in ascending order.
        share_lm_head: leave the projections out; the base model's serves. If those left out differ from it, a note
            says so.

    Raises:
        ConvertError: a draft vocabulary that cannot be, or a base model without a projection.
    """
    tensors: list[tuple[str, SourceTensor | Rows]] = list(heads.tensors)
    notes = list(heads.notes)
    if share_lm_head:
        if base.output is None:
            raise ConvertError(
                f"{base.path}: the base model has no output projection of {base.n_vocab} tokens that heads could "
                "share; leave --share-lm-head out"
            )
        own = [t for name, t in tensors if _is_projection(name) and isinstance(t, SourceTensor)]
        differences = [difference(base, tensor) for tensor in own]
        known = [d for d in differences if d is not None]
        if len(known) < len(own):
            notes.append("whether these heads were trained to share the base model's projection is not known")
        elif known and max(known) > _ALIKE:
            notes.append(
                f"these heads have projections of their own, which differ from the base model's by {max(known):.0%}: "
                "they were not trained to share it, so expect few of their guesses to be right"
            )
        # heads trained to share have a bias of zeros, for the published Hydra code wants one
        tensors = [
            (name, t)
            for name, t in tensors
            if not _is_projection(name) and not (name.endswith(".output.bias") and _is_zero(t))
        ]
    ids = None
    if draft_vocab is not None:
        ids = check_vocab(draft_vocab, base)
        tensors = [
            (name, Rows(t, ids) if "output" in name.split(".")[-2:] and isinstance(t, SourceTensor) else t)
            for name, t in tensors
        ]
    return replace(heads, tensors=tensors, notes=notes, draft_vocab=ids, shared_output=share_lm_head)


def _is_projection(name: str) -> bool:
    """Of a head, or of all."""
    return name.split(".")[-2:] == ["output", "weight"]


def _is_zero(tensor: SourceTensor | Rows) -> bool:
    return not any(chunk.any() for chunk in tensor.chunks())


def check_vocab(tokens: Sequence[int], base: BaseModel) -> np.ndarray:
    """A draft vocabulary in ascending order. Raises ConvertError unless it is a set of base tokens."""
    ids = np.sort(np.asarray(tokens, dtype=np.int64).ravel())
    if not len(ids):
        raise ConvertError("the draft vocabulary is empty; name at least one token")
    if ids[0] < 0 or ids[-1] >= base.n_vocab:
        bad = ids[0] if ids[0] < 0 else ids[-1]
        raise ConvertError(
            f"the draft vocabulary names token {bad}, and {base.path.name} has tokens 0 to {base.n_vocab - 1}"
        )
    if (twice := ids[1:][np.diff(ids) == 0]).size:
        raise ConvertError(f"the draft vocabulary names token {twice[0]} twice; name each token once")
    return ids


def difference(base: BaseModel, own: SourceTensor) -> float | None:
    """How far a projection is from the base model's, relative to its size, over rows spread evenly; None: not known."""
    info = base.output
    if info is None:
        return None
    index = np.unique(np.linspace(0, base.n_vocab - 1, _N_COMPARED).astype(np.int64))
    stored = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,)).reshape(base.n_vocab, -1)
    try:
        theirs = quants.dequantize(_as_stored(stored[index], info.type), info.type).reshape(len(index), -1)
    except NotImplementedError:  # a type that the gguf package cannot read
        return None
    ours = np.concatenate(list(Rows(own, index).chunks()))
    return float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))


def _as_stored(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes as the gguf package wants them: plain types as such."""
    plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}.get(kind)
    return rows.view(plain) if plain else rows
