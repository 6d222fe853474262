"""The decode loop as a Python object: lifetime, errors as exceptions, arrays as numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bank.acceptance import N_INPUTS, N_SETS
from ..bank.bank import Bank
from ..bank.costs import Costs
from ..common.errors import EntmtpError
from . import abi as n
from .arrays import Arrays
from .corpus import Corpus
from .draft_model import DraftModel
from .heads import Heads
from .stats import NODE_DTYPE, STEP_DTYPE, DraftStats, OlderSteps, Outputs, Traffic, Walk


def sample(ctx: Any, sampler: int, i: int) -> int:
    """A token through a `llama_sampler *` chain from output i of a `llama_context *`; -1: the last.

    Raises:
        EntmtpError: the grammar leads to nothing, or to too much.
    """
    token = ctypes.c_int32()
    n.check(n.sample(ctx, sampler, i, ctypes.byref(token)))
    return token.value


class Decoder:
    """A decode loop over a `llama_context *`: evaluate tokens, sample the next one (native/include/entmtp.h).

    Args:
        ctx: the context, which must outlive the decoder.
        heads: draft heads, used by this decoder alone; None decodes plainly.
    """

    def __init__(self, ctx: int, heads: Heads | None = None):
        self._begin(n.decoder_init(ctx, heads._ptr if heads else None), heads)

    @classmethod
    def of_group(cls, pointer: Any, heads: Heads | None) -> Decoder:
        """One that belongs to a group, which frees it."""
        decoder = cls.__new__(cls)
        decoder._begin(pointer, heads)
        decoder._is_own = False
        return decoder

    def _begin(self, pointer: Any, heads: Heads | None) -> None:
        if not pointer:
            raise EntmtpError(n.last_error())
        self._ptr = pointer
        self._is_own = True
        self._token = ctypes.c_int32()
        self._heads = heads
        self.draft_model: DraftModel | None = None  # that drafts
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

    def set_threads(self, n_threads: int, costs: Costs | None = None) -> None:
        """Compute passes and drafts on so many CPU threads from now on.

        Costs are kept by number of threads; the first call after `set_policy` says what number the policy's are of.

        Args:
            costs: of a number that is new to the policy; None: as they are now.
        """
        with Arrays() as arrays:
            trees = self.bank.trees if self.bank else ()
            pointer = arrays.costs(costs, trees) if costs and trees else None
            n.check(n.decoder_set_threads(self._ptr, n_threads, pointer))

    def set_corpus(self, corpus: Corpus | None) -> None:
        """Draft from other texts, too, which must outlive this; None: from the text alone.

        Raises:
            EntmtpError: they hold a token that is not in the model's vocabulary.
        """
        n.check(n.decoder_set_corpus(self._ptr, corpus.pointer if corpus is not None else None))

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

    def sample_typical(self, sampler: int, temp: float, epsilon: float, alpha: float) -> int:
        """The next token by typical acceptance (lossy): a draft that passes, else through a `llama_sampler *` chain."""
        n.check(n.decoder_sample_typical(self._ptr, sampler, temp, epsilon, alpha, ctypes.byref(self._token)))
        return self._token.value

    def is_drafted(self, token: int) -> bool:
        """Whether the token sampled last is a draft that was right: evaluating it takes no pass."""
        return bool(n.decoder_is_drafted(self._ptr, token))

    def drafted_by(self, token: int) -> int:
        """Which drafters guessed the token sampled last: bits of `abi.SOURCES`; 0: none."""
        return int(n.decoder_drafted_by(self._ptr, token))

    def walk(self) -> Walk:
        """What the last step drafted, and how far the text went along with it."""
        head, room = n.Walk(), 64
        while True:
            nodes = np.zeros(room, dtype=NODE_DTYPE)
            n.check(n.decoder_get_walk(self._ptr, ctypes.byref(head), nodes.ctypes.data, room))
            if head.n_nodes <= room:
                return Walk(head.n_past, nodes[: head.n_nodes], head.entropy)
            room = head.n_nodes

    def signals(self, token: int) -> tuple[float, float]:
        """Entropy (nats) of the distribution that the token sampled last was drawn from, and its ln p in it."""
        seen = n.Signals()
        n.check(n.decoder_signals(self._ptr, token, ctypes.byref(seen)))
        return seen.entropy, seen.log_root

    def set_text(self, tokens: Sequence[int]) -> None:
        """The tokens in the memory, where they did not come through `eval`: drafts may come from them."""
        n.decoder_set_text(self._ptr, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens))

    def forget(self) -> None:
        """Forget what drafters remember of other texts than the one in the memory."""
        n.decoder_forget(self._ptr)

    def acceptance(self) -> npt.NDArray[np.float32]:
        """Weights of the acceptance model as they are now, [N_SETS, N_INPUTS] as in bank/acceptance.py."""
        weights = np.zeros((N_SETS, N_INPUTS), dtype=np.float32)
        n.check(n.decoder_get_acceptance(self._ptr, weights.ctypes.data))
        return weights

    def set_acceptance(self, weights: npt.NDArray[np.float32]) -> None:
        """Have the acceptance model go on from other weights, [N_SETS, N_INPUTS]."""
        given = np.ascontiguousarray(weights, dtype=np.float32)
        if given.shape != (N_SETS, N_INPUTS):
            raise ValueError(f"weights are {given.shape}, must be {(N_SETS, N_INPUTS)}")
        n.check(n.decoder_set_acceptance(self._ptr, given.ctypes.data))

    def best(self, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k (at most 8) most probable tokens after the last evaluated one, the best first, and their ln p. Where
        fewer are known, the last ones are -1."""
        tokens, log_p = np.full(k, -1, dtype=np.int32), np.zeros(k, dtype=np.float32)
        n.check(min(n.decoder_best(self._ptr, k, tokens.ctypes.data, log_p.ctypes.data), 0))
        return tokens, log_p

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

    def all_logits(self, n_tokens: int, n_vocab: int) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of the tokens of the last `eval` with all_outputs, valid until the next."""
        return self._row(n.decoder_all_logits(self._ptr), n_tokens * n_vocab).reshape(n_tokens, n_vocab)

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

    @property
    def n_evaluated(self) -> int:
        """Tokens evaluated, the last of which can be sampled after; -1 where an evaluation failed, or none was."""
        return int(n.decoder_n_evaluated(self._ptr))

    def can_continue(self, n_past: int) -> bool:
        """The memory still holds what a token after the first `n_past` attends to (sliding windows forget)."""
        return bool(n.decoder_can_continue(self._ptr, n_past))

    def set_draft_model(self, draft: DraftModel | None) -> None:
        """The model that drafts from now on, under the policy `auto`; it must outlive the decoder."""
        n.check(n.decoder_set_draft_model(self._ptr, draft._ptr if draft else None))
        self.draft_model = draft

    def can_chain(self) -> bool:
        """It can hold drafts one after the other and be cut back by them: trees, or a recurrent memory with states to
        go back to."""
        return bool(n.decoder_can_chain(self._ptr))

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

    def clear(self) -> None:
        """Forget the text, and give its cells back to others of the group."""
        n.check(n.decoder_clear(self._ptr))

    def in_common(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the memory begins with."""
        return int(n.decoder_in_common(self._ptr, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens)))

    @property
    def n_held(self) -> int:
        """Cells of the memory that its sequence takes, whether or not the text can be gone on with."""
        return int(n.decoder_n_held(self._ptr))

    def share(self, other: Decoder, tokens: Sequence[int]) -> int:
        """Begin with as many of `tokens` as `other`, of the same group, has evaluated; returns how many they are.

        0: there are none that can be shared, and the own text stays.
        """
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        return int(n.check(n.decoder_share(self._ptr, other._ptr, array, len(tokens))))

    def close(self) -> None:
        if self._ptr and self._is_own:
            n.decoder_free(self._ptr)
        self._ptr = None
