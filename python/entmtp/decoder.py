"""The native decoder and its heads as Python objects: lifetimes, errors as exceptions, arrays as numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native as n
from .bank import Bank
from .errors import EntmtpError
from .policy import Arrays
from .stats import STEP_DTYPE, DraftStats, OlderSteps, Outputs, Traffic


class Heads:
    """Draft heads on the device of the base model's output layer.

    Args:
        path: heads file (docs/heads-gguf.md).
        model: `llama_model *` of the base model, which must outlive the heads.
        n_threads: CPU threads to draft with.

    Raises:
        EntmtpError: the file is damaged, or was made for another base model; the text says what differs.
    """

    def __init__(self, path: str | Path, model: int, n_threads: int):
        self._ptr = n.heads_load(str(path).encode(), model, n_threads)
        if not self._ptr:
            raise EntmtpError(n.last_error())
        self.info = n.HeadsInfo()
        n.heads_get_info(self._ptr, ctypes.byref(self.info))

    @property
    def n_heads(self) -> int:
        return self.info.n_heads

    @property
    def arch(self) -> str:
        """`medusa` or `hydra`."""
        return "hydra" if self.info.hydra else "medusa"

    def _states(self, hidden: npt.NDArray[np.float32], n_dims: int) -> npt.NDArray[np.float32]:
        h = np.ascontiguousarray(hidden, dtype=np.float32)
        if h.ndim != n_dims or h.shape[-1] != self.info.n_embd:
            raise ValueError(
                f"hidden has shape {h.shape}, its last dimension must be {self.info.n_embd} of {n_dims}"
            )
        return h

    def logits(
        self, head: int, hidden: npt.NDArray[np.float32], path: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Logits [n_vocab_draft] of one head.

        Args:
            head: its index.
            hidden: hidden state [n_embd]; with a prefix layer its output.
            path: the `head + 1` tokens after the hidden state's, read by grounded heads only.
        """
        h = self._states(hidden, 1)
        tokens = np.zeros(head + 1, dtype=np.int32)
        tokens[: len(path)] = path[: head + 1]
        out = np.empty(self.info.n_vocab_draft, dtype=np.float32)
        n.check(n.heads_logits(self._ptr, head, h.ctypes.data, tokens.ctypes.data, out.ctypes.data))
        return out

    def expand(
        self, head: int, hidden: npt.NDArray[np.float32], paths: Any, k: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best guesses of one head after each path, best first: base tokens [n, k] and their ln p [n, k].

        Args:
            hidden: hidden state [n_embd]; with a prefix layer its output.
            paths: tokens [n, head + 1], the root first; heads that do not see the path want n = 1.
        """
        h = self._states(hidden, 1)
        array = np.ascontiguousarray(paths, dtype=np.int32).reshape(-1, head + 1)
        tokens = np.empty((len(array), k), dtype=np.int32)
        log_p = np.empty((len(array), k), dtype=np.float32)
        n.check(
            n.heads_expand(
                self._ptr,
                head,
                h.ctypes.data,
                array.ctypes.data,
                len(array),
                k,
                tokens.ctypes.data,
                log_p.ctypes.data,
            )
        )
        return tokens, log_p

    def prefix(self, hidden: npt.NDArray[np.float32], pos0: int) -> npt.NDArray[np.float32]:
        """Output [n_embd] of the Hydra++ layer for the last of `hidden` [n, n_embd], positions from `pos0` on."""
        h = self._states(hidden, 2)
        out = np.empty(self.info.n_embd, dtype=np.float32)
        n.check(n.heads_prefix(self._ptr, h.ctypes.data, len(h), pos0, out.ctypes.data))
        return out

    def close(self) -> None:
        if self._ptr:
            n.heads_free(self._ptr)
            self._ptr = None


class Decoder:
    """A decode loop over a `llama_context *`: evaluate tokens, sample the next one (native/include/entmtp.h).

    Args:
        ctx: the context, which must outlive the decoder.
        heads: draft heads, used by this decoder alone; None decodes plainly.
    """

    def __init__(self, ctx: int, heads: Heads | None = None):
        self._ptr = n.decoder_init(ctx, heads._ptr if heads else None)
        if not self._ptr:
            raise EntmtpError(n.last_error())
        self._token = ctypes.c_int32()
        self._heads = heads
        self.bank: Bank | None = None
        self.stats_enabled = False
        self._before = Traffic()  # of before the last reset_stats

    def set_outputs(self, mode: str) -> None:
        """Where the logits of a pass are reduced: `"auto"`, `"host"`, `"rows"` or `"device"` (docs/gpu.md)."""
        n.check(n.decoder_set_outputs(self._ptr, n.OUTPUTS[mode]))

    @property
    def outputs(self) -> Outputs:
        """What is done with the logits of a pass, and why."""
        info = n.OutputsInfo()
        n.decoder_get_outputs(self._ptr, ctypes.byref(info))
        names = {number: name for name, number in n.OUTPUTS.items()}
        return Outputs(names[info.mode], info.device.decode(), info.note.decode())

    @property
    def traffic(self) -> Traffic:
        """What crossed between host and device since the decoder was made."""
        sums = n.Traffic()
        n.decoder_get_traffic(self._ptr, ctypes.byref(sums))
        return Traffic(**{f[0]: getattr(sums, f[0]) for f in sums._fields_})

    def set_trees(self, bank: Bank) -> None:
        """Hand over the topologies of `bank`; decoding is plain until `set_policy`."""
        with Arrays() as arrays:
            n.check(n.decoder_set_trees(self._ptr, *arrays.trees(bank.trees)))
        self.bank = bank

    def set_policy(self, bank: Bank, policy: str, static_tree: int = 0, **settings: Any) -> None:
        """Choose among the trees of `bank`, which `set_trees` was given before; arguments as in
        `entmtp.policy.Arrays.policy`."""
        with Arrays() as arrays:
            n.check(n.decoder_set_policy(self._ptr, arrays.policy(bank, policy, static_tree, **settings)))

    def set_bank(self, bank: Bank, policy: str, static_tree: int = 0, **settings: Any) -> None:
        """Draft from the trees of `bank`; arguments as in `entmtp.policy.Arrays.policy`."""
        self.set_trees(bank)
        self.set_policy(bank, policy, static_tree, **settings)

    def eval(self, tokens: Sequence[int], n_past: int, all_outputs: bool = False) -> None:
        """Evaluate `tokens` after the first `n_past` ones.

        Raises:
            Cancelled: `cancel` was called.
            EntmtpError: the context is full, or llama.cpp refused the batch.
        """
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        n.check(n.decoder_eval(self._ptr, array, len(tokens), n_past, all_outputs))

    def sample(self, sampler: int) -> int:
        """The next token, through a `llama_sampler *` chain."""
        n.check(n.decoder_sample(self._ptr, sampler, ctypes.byref(self._token)))
        return self._token.value

    def sample_typical(self, temp: float, epsilon: float, alpha: float) -> int:
        """The next token by typical acceptance (lossy)."""
        n.check(n.decoder_sample_typical(self._ptr, temp, epsilon, alpha, ctypes.byref(self._token)))
        return self._token.value

    def is_drafted(self, token: int) -> bool:
        """Whether the token sampled last is a draft that was right: evaluating it takes no pass."""
        return bool(n.decoder_is_drafted(self._ptr, token))

    def settle(self) -> None:
        """Leave in the context's memory what plain decoding would have there."""
        if self._ptr:
            n.check(n.decoder_settle(self._ptr))

    def invalidate(self, n_past: int) -> None:
        """The memory was changed from outside and holds `n_past` tokens now."""
        n.decoder_invalidate(self._ptr, n_past)

    def logits(self, n_vocab: int) -> npt.NDArray[np.float32]:
        """Logits [n_vocab] of the last evaluated token, valid until the next evaluation."""
        return self._row(n.decoder_logits(self._ptr), n_vocab)

    def hidden(self) -> npt.NDArray[np.float32]:
        """Hidden state [n_embd] of the last evaluated token, valid until the next evaluation; needs heads."""
        return self._row(n.decoder_hidden(self._ptr), self._heads.info.n_embd if self._heads else 0)

    def _row(self, ptr: Any, width: int) -> npt.NDArray[np.float32]:
        if not ptr:
            raise EntmtpError("there is no evaluated token to read from, or the decoder has no heads")
        return np.ctypeslib.as_array(ptr, shape=(width,))

    def cancel(self) -> None:
        """Stop the running evaluation, from any thread."""
        if self._ptr:
            n.decoder_cancel(self._ptr)

    def resume(self) -> None:
        """Take back a cancellation that came too late to stop anything."""
        n.decoder_resume(self._ptr)

    def can_tree(self) -> bool:
        """The memory of the model can hold a token tree (recurrent and hybrid ones cannot)."""
        return bool(n.decoder_can_tree(self._ptr))

    def set_stats(self, enabled: bool) -> None:
        n.decoder_set_stats(self._ptr, enabled)
        self.stats_enabled = enabled

    def reset_stats(self) -> None:
        n.decoder_reset_stats(self._ptr)
        self._before = self.traffic

    def stats(self) -> DraftStats:
        """What the steps since the last `reset_stats` did."""
        steps = np.zeros(n.decoder_n_steps(self._ptr), dtype=STEP_DTYPE)
        n.decoder_get_steps(self._ptr, steps.ctypes.data, 0, len(steps))
        names = [*(t.name for t in self.bank.trees), "grown"] if self.bank else ["plain"]
        sums = n.StepSums()
        by_tree = np.zeros(len(names), dtype=np.int64)
        n.decoder_get_older_steps(self._ptr, ctypes.byref(sums), by_tree.ctypes.data, len(names))
        older = OlderSteps(by_tree=by_tree, **{f[0]: getattr(sums, f[0]) for f in sums._fields_})
        return DraftStats(steps, names, older, self.traffic - self._before, self.outputs)

    def close(self) -> None:
        if self._ptr:
            n.decoder_free(self._ptr)
            self._ptr = None
