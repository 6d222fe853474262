"""What a training will be, known before it starts: shape, amount of text, disk and memory, and the digests that tie
its files together."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..common.errors import ModelError
from ..models.base import BaseModel, files_of, read_base
from .choice import MOST
from .data import Data, read_data
from .eagle3 import ARCH, Layer, layer_for
from .heads import Shape
from .loss import PIECE_BYTES
from .options import Options
from .states import VERSION as STATES_VERSION
from .states import Layout

MARGIN = 64 << 20  # bytes of disk to leave free
TEXT = 24  # bytes of memory per token of text
LIBRARIES = 80 << 20  # bytes that PyTorch and oneDNN take as they go
FRAY = 1.5  # memory that numbers which come and go take, to their own: measured with glibc's heap


@dataclass(frozen=True)
class Plan:
    """A training that can begin.

    Attributes:
        options: with `bf16` decided.
        data: the user's.
        work: folder of cache and checkpoints.
        n_tokens: of text that will be made, at least; the last sequence may go beyond.
        layout: of the hidden states, with room for that.
        shape: before there is text with projections that need most memory, if that is for this program to choose.
        n_draft: tokens that heads can propose, alike.
        is_open: number and kind of the projections' rows are chosen when there is text.
        text_digest: of all that the text depends on.
    """

    options: Options
    facts: BaseModel
    shape: Shape | Layer
    data: Data
    work: Path
    n_tokens: int
    layout: Layout
    n_draft: int
    is_open: bool
    text_digest: str

    @property
    def n_steps(self) -> int:
        return self.options.n_steps(self.n_tokens)

    @property
    def needs(self) -> Needs:
        return needs(self.shape, self.options, self.layout, self.facts.n_vocab, self.n_draft)

    @property
    def outputs(self) -> tuple[Path, Path | None]:
        """The heads file, and the folder of the published layout, which EAGLE-3 layers do not come in."""
        outfile = self.options.outfile
        if isinstance(self.shape, Layer):
            return outfile, None
        beside = outfile.with_suffix("") if outfile.suffix else outfile.with_name(outfile.name + ".torch")
        return outfile, self.options.torch_folder or beside


def make(options: Options) -> Plan:
    """Read what there is to know before anything is computed.

    Raises:
        ModelError, ConvertError: a model without what heads need, data that cannot be read, or too little disk allowed.
    """
    o = replace(options, bf16=_has_bf16() if options.bf16 is None else options.bf16)
    facts = read_base(o.model)
    shape = _shape(o, facts)
    inputs = shape.inputs if isinstance(shape, Layer) else ()
    width = max(1, len(inputs)) * facts.n_embd
    data = read_data(o.data)
    n_draft = facts.n_vocab
    if o.draft_vocab is not None:
        n_draft = min(n_draft, MOST if isinstance(o.draft_vocab, str) else o.draft_vocab)
    k = min(o.k, facts.n_vocab)
    per_token = Layout(1, width, k).bytes_per_token
    n_tokens = min(o.n_tokens, int(o.cache_gb * 1e9 / per_token) - o.seq_len)
    if n_tokens < 8 * o.seq_len:
        raise ModelError(f"--cache-gb {o.cache_gb:g} holds too few hidden states; give more")
    identity = (STATES_VERSION, facts.fingerprint, sum(file.stat().st_size for file in files_of(o.model)))
    of_text = digest(
        *identity, data, n_tokens, o.seq_len, o.own, o.made_up, o.temps, o.n_held_out, o.seed, o.raw, k, *inputs
    )  # fmt: skip
    work = o.work or o.outfile.with_name(o.outfile.name + ".train")
    layout = Layout(n_tokens + o.seq_len, width, k)
    is_open = o.draft_vocab == "auto" or (o.lm_head == "auto" and not isinstance(shape, Layer))
    return Plan(o, facts, shape, data, work, n_tokens, layout, n_draft, is_open, of_text)


def _shape(o: Options, facts: BaseModel) -> Shape | Layer:
    if o.arch == ARCH:
        for flag, given in {
            "--layers": o.n_layers != 1,
            f"--lm-head {o.lm_head}": o.lm_head not in ("auto", "own"),
            "--torch-dir": o.torch_folder,
        }.items():
            if given:
                raise ModelError(f"{flag} is not for an EAGLE-3 layer; leave it out")
        return layer_for(facts, o.n_heads)
    layer: dict[str, Any] = {}  # the decoder layer's numbers, as the base model's own layers have them
    if o.arch == "hydra++":
        n_head = int(facts.get("attention.head_count"))
        layer = {
            "n_head": n_head,
            "n_head_kv": int(facts.keys.get("attention.head_count_kv") or n_head),
            "n_ff": int(facts.get("feed_forward_length")),
            "rms_eps": float(facts.get("attention.layer_norm_rms_epsilon")),
            "rope_base": float(facts.keys.get("rope.freq_base") or 10000.0),
        }
    lm_head = "own" if o.lm_head == "auto" else o.lm_head
    return Shape(o.arch, o.n_heads, o.n_layers, facts.n_embd, lm_head, **layer)


def _has_bf16() -> bool:
    """The CPU multiplies in bfloat16, so that it gains."""
    ops = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(ops and ops())


#
# disk and memory
#


def n_parameters(shape: Shape | Layer, n_draft: int) -> int:
    """Numbers that are trained."""
    if isinstance(shape, Layer):
        return sum(prod(size) for size in shape.shapes(n_draft).values())
    d, total = shape.n_embd, 0
    for i in range(shape.n_heads):
        for j in range(shape.n_layers):
            wide = shape.grounded and j == 0
            total += (d * (i + 2) + 1) * d * 2 if wide else (d + 1) * d
        if shape.grounded and shape.n_projections:
            total += n_draft  # bias
    total += shape.n_projections * n_draft * d
    if shape.prefix:
        kv = d // shape.n_head * shape.n_head_kv
        total += 2 * d * d + 2 * d * kv + 3 * d * shape.n_ff + 3 * d
    return total


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    cache: int  # hidden states and distributions
    other: int  # text, checkpoints, results
    text: int  # memory for the text
    training: int  # memory, above what the process has without the base model

    @property
    def disk(self) -> int:
        return self.cache + self.other


def needs(shape: Shape | Layer, options: Options, layout: Layout, n_vocab: int, n_draft: int) -> Needs:
    """What a training takes on disk and in memory."""
    n = n_parameters(shape, n_draft)
    d = shape.n_embd
    # a checkpoint holds parameters and two moments, and a new one is written before the old one goes
    checkpoints = 2 * 12 * n
    # f16, projections to all tokens; EAGLE-3 layers come in no published layout
    published = 0 if isinstance(shape, Layer) else 2 * n + 2 * n_vocab * d * max(1, shape.n_projections)
    results = 2 * n + 2 * published
    # parameters, gradients and moments; a projection in bf16, and its gradient from one head
    fixed = 16 * n + 8 * n_draft * d + LIBRARIES
    # per token of a batch, as measured: the widest head's input in both types with what its gradient needs, and the
    # decoder layer's
    if isinstance(shape, Layer):
        work = shape.floats(min(options.seq_len, options.batch_tokens), options.batch_tokens)
    else:
        numbers = 5 * d + (5 * shape.n_heads * d if shape.grounded else 0)
        if shape.prefix:
            numbers += 2 * (12 * d + 4 * shape.n_ff)
        work = numbers * options.batch_tokens
    return Needs(
        layout.n_bytes,
        checkpoints + results + 8 * layout.n_tokens,
        TEXT * layout.n_tokens,
        max(fixed + int(FRAY * 4 * (PIECE_BYTES + work)), 16 * n + 2 * n + published),
    )


def check_disk(need: int, folder: Path) -> None:
    """Raises ModelError if the disk is too full."""
    free = shutil.disk_usage(folder).free
    if free < need + MARGIN:
        raise ModelError(
            f"{folder}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some, or give another "
            "--work, or fewer --tokens"
        )


def check_memory(p: Plan) -> None:
    """Raises ModelError if there is too little to train with, where that does not depend on what is chosen later."""
    free, need = available(), p.needs.training
    if not p.is_open and free is not None and need > free:
        raise ModelError(
            f"training takes {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; give --draft-vocab auto, "
            "--lm-head shared or base, or fewer --batch-tokens"
        )


def available() -> int | None:
    """Bytes of memory that a program can have without others' being driven out; None where it cannot be known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident() -> int:
    """Memory of this process that is its own (not mapped files), bytes; 0 where it cannot be known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def give_back() -> None:
    """Let the system have memory that was freed, where the C library can be told to; it would keep much for later."""
    gc.collect()  # an optimizer and its tensors hold each other
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


#
# what files belong to
#


def digest(*parts: Any) -> str:
    """Of settings that must be the same for files to be used again."""
    plain = [asdict(p) if hasattr(p, "__dataclass_fields__") else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
