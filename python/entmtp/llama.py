"""`entmtp.Llama`: a `llama_cpp.Llama` that drafts."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from . import drafting
from .bank import Bank, load_bank
from .common.errors import BusyError, Cancelled, ClosedError, EntmtpError
from .common.use import Use
from .completion import Ending
from .drafted import Drafted
from .logprobs import Logprobs
from .models.beside import find_heads, heads_of
from .models.hub import PREFIX as HUB
from .models.known import is_known
from .models.names import resolve
from .models.tokenizer import Tokenizer
from .native import kernels as cpu_kernels
from .native.arrays import SCORES
from .native.decoder import Decoder, sample
from .native.heads import Heads
from .native.rpc import Servers, local_gpus
from .upstream import loading

READ_AT_ONCE = 64  # tokens of a prompt whose logits are wanted; rows may have 1 MB


class Llama(Drafted):
    """A `llama_cpp.Llama` in every argument and method, with tree speculation.

    With `draft="entmtp"` the same calls give the same tokens, in fewer passes of the model: each step drafts a tree of
    guesses, from what the text has said before and with heads if there are any, checks it in one pass, and samples
    along the branch that your sampler settings really draw.

    Examples:
        >>> llm = Llama("model.gguf", draft="entmtp")
        >>> llm("def fibonacci(n):", max_tokens=64)["choices"][0]["text"]
        >>> print(llm.draft_stats)

    Args:
        model_path: the base model: a GGUF file, or `hf:owner/repo[/file][@revision]` on the Hugging Face Hub.
        draft: None (plain decoding, through the same library) or `"entmtp"`.
        heads: heads file of this base model, written by `entmtp convert`, or its `hf:` name. None: the one
            that lies beside the model and was made for it, if there is one; without heads the text is drafted from.
        trees: a bank of trees: a path, a name under `trees/`, or either followed by `:tree` for one tree of it.
            None: the bank that `entmtp tune` made for this model on this machine, else the generic bank of
            the heads' kind.
        policy: `"auto"` (grow a tree for every step from all drafters), `"static"` (always the same tree), `"off"`;
            with heads also `"entropy"` (choose a tree by the running entropy), `"confidence"` (grow one from the heads'
            own probabilities), or a published policy for comparison, `"ladder"`, `"hysteresis"` and `"best-depth"`.
            None: `"auto"`, but `"entropy"` where `trees` are given to choose from.
        drafters: who drafts under policy `"auto"`: `"auto"` (all there are), or some of `"text"` (what followed when
            the last tokens came before), `"recycling"` (what the model held probable after a token last time) and
            `"heads"` and `"model"`.
        draft_model: a smaller model with the same vocabulary that drafts, or an EAGLE-3 layer or an assistant (Gemma 4)
            that was trained for the model: a GGUF file, or its `hf:` name. None: the model's own layers for multi-token
            prediction (NextN, MTP), if its file has any that llama.cpp can use, else such a layer or assistant beside
            it. With draft=None a `LlamaDraftModel`, as in llama-cpp-python.
        draft_vocab: how many tokens a model that drafts can propose, those that the text brought last and the first of
            its vocabulary: a number, `"all"`, or `"auto"` (an eighth of a large vocabulary).
        lookup: files or folders of your own texts to draft from, too, up to 32 MB; their tokens are kept in the cache.
        score: what a published policy follows: `"entropy"`, `"top1"` or `"path"`.
        calibrate: measure what passes cost on this machine (under two seconds, once per model and machine; kept in the
            user's cache) unless the bank was tuned here. False: believe the bank's costs until the process knows
            better.
        adapt: let costs and acceptance follow what is seen, and stop drafting where it loses.
        accept: `"lossless"`, or `"typical"` (Medusa's posterior threshold: faster at high temperature, and lossy).
        typical_epsilon, typical_alpha: the threshold, min(epsilon, alpha * exp(-H)).
        stats: keep a record of every step for `draft_stats`.
        rpc_servers: `host:port` of machines that run `entmtp rpc-server`, as a list or with commas between them. They
            come before the GPUs of this machine: `n_gpu_layers` (here -1, all, by default) and `tensor_split` say how
            many layers each gets.
        kernels: CPU kernels for the weights of this model, and from now on for attention in the whole process:
            `"auto"`, `"off"` (ggml's own), or one of `entmtp.kernels.available()`. None: the environment variable
            ENTMTP_KERNELS, else `"auto"`.
        outputs: where the logits of a pass are reduced: `"device"` (on a GPU they stay there), `"host"` (all are copied
            to the host), `"rows"` (those that are visited are), or `"auto"`. Tokens do not depend on it. None: the
            environment variable ENTMTP_OUTPUTS, else `"auto"`. With `logits_all` it is `"host"`, and `scores` has the
            row of each token; `llama_get_logits` finds those of a whole pass, drafts among them.
        n_threads, n_threads_batch: CPU threads of passes over one token, and over several. Without either, as many as
            the machine has to spare: a thread is dropped while other programs use its core, and taken back afterwards.
            (On a GPU, and with kernels="off", as llama-cpp-python chooses.)
        **kwargs: everything else that `llama_cpp.Llama` takes.

    Attributes:
        lossless: `"exact"`: drafted texts are plain decoding's, bit for bit; `"rounding"`: up to ties of two tokens.
        bank, policy, tree: what it drafts with. on_token: called with each token and who guessed it, or None.

    Raises:
        ValueError: an argument that cannot work, or a broken tree bank.
        EntmtpError: the heads file is damaged or belongs to another base model, or an `hf:` name cannot be had.
        ServerError: an RPC server cannot be used, or is lost. After that the model only raises it again, and the
            process can go on with others.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        draft: str | None = None,
        heads: str | Path | None = None,
        trees: str | Path | Bank | None = None,
        policy: str | None = None,
        drafters: str | Sequence[str] = "auto",
        draft_model: Any = None,
        draft_vocab: int | str = "auto",
        lookup: str | Path | Sequence[str | Path] | None = None,
        score: str = "entropy",
        calibrate: bool = True,
        adapt: bool = True,
        accept: str = "lossless",
        typical_epsilon: float = 0.09,
        typical_alpha: float = 0.3,
        stats: bool = True,
        rpc_servers: str | Sequence[str] | None = None,
        kernels: str | None = None,
        outputs: str | None = None,
        **kwargs: Any,
    ):
        # what another one is made with
        self._given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")} | kwargs
        # close() needs these, even after an argument that cannot work
        self._stack = contextlib.ExitStack()
        self.begin_drafting(drafts=draft is not None and policy in (None, "auto"))
        self._servers: Servers | None = None
        self._use = Use()
        self._reading: Logprobs | None = None  # of the one whose prompt is being evaluated
        self._begins = False  # a generation, which has not evaluated anything
        self._stopped = False  # what is generated is not wanted any more
        # called with each sampled token, and which drafters had guessed it (bits of native.abi.SOURCES; 0: none)
        self.on_token: Callable[[int, int], None] | None = None
        # read before the model, which may take long to load
        bank, tree = (None, None) if draft is None or trees is None else load_bank(trees)
        policy = policy or ("auto" if trees is None or (bank and bank.is_for_auto) else "entropy")
        drafting.check(draft, heads, draft_model, policy, accept, kwargs)
        drafting.one_of("score", score, SCORES)
        n_draft_vocab = drafting.draft_vocab_of(draft_vocab)
        outputs = outputs or os.environ.get("ENTMTP_OUTPUTS") or "auto"
        drafting.one_of("outputs", outputs, drafting.OUTPUTS)
        if str(model_path).startswith(HUB) or is_known(str(model_path)):
            model_path = resolve(model_path)
        if draft is not None:
            heads = heads_of(model_path, heads) if heads is not None else find_heads(Path(model_path))
            self.heads_path = None if heads is None else str(heads)
            drafting.check_heads(policy, heads is not None)
            self._find_draft_model(Path(model_path), draft_model, policy, drafters)
            has_model = self._predicts or self.draft_model_path is not None
            who = drafting.who_drafts(drafters, heads is not None, has_model)
            drafting.check_lookup(lookup, policy, who)
        elif draft_model is not None:
            kwargs["draft_model"] = draft_model

        if rpc_servers:
            self._servers = Servers(rpc_servers)
            kwargs.setdefault("n_gpu_layers", -1)
        elif isinstance(kwargs.get("n_gpu_layers"), int) and not local_gpus():
            kwargs["n_gpu_layers"] = 0  # llama.cpp would not mind, and nothing here is a GPU's
        with loading:
            own_kernels = self._load(model_path, kernels, **kwargs)
        self._check_servers()  # a model that was loaded to a lost server looks like one
        if kwargs.get("tokenizer") is None:
            self.tokenizer_ = Tokenizer(self)

        on_cpu = own_kernels and not self.model_params.n_gpu_layers and not rpc_servers
        # what drafts give is "exact" (plain decoding's text, bit for bit), "rounding" (where two tokens are as near as
        # what kernels round, either may come: docs/how-it-works.md) or "lossy" (accept="typical")
        self.lossless = drafting.how_lossless(on_cpu, accept)
        self._accept = accept
        self._typical = (typical_epsilon, typical_alpha)

        # embedding contexts are not decoded from, and encoders have no decode loop
        if self.context_params.embeddings or llama_cpp.llama_model_has_encoder(self.model):
            if heads is not None:
                raise ValueError("draft: this model is an encoder, there is nothing to draft")
            return
        if kwargs.get("vocab_only") or kwargs.get("draft_model") is not None:
            return

        with contextlib.ExitStack() as failed:
            failed.callback(self.close)  # now: collected as garbage, the context may go before what uses it
            if draft is not None and heads is not None:
                self._heads = self._stack.enter_context(
                    contextlib.closing(Heads(heads, self.model, self.n_threads_batch))
                )
            if draft is not None:
                self._load_corpus(lookup)
            if draft is not None and "model" in who:
                who = self._load_draft_model(who, n_draft_vocab)
            self._decoder = self._stack.enter_context(contextlib.closing(Decoder(self.ctx, self._heads)))
            self._decoder.set_stats(stats)
            self._decoder.set_outputs("host" if self.logits_all else outputs)

            if draft is not None and self._heads is None and not self._decoder.can_chain():
                self.warn_once(drafting.why_plain(llama_cpp.llama_n_ubatch(self.ctx)))
            elif draft is not None:
                if not self._decoder.can_tree() and self.architecture not in drafting.EXACT_CHAINS:
                    self.lossless = "rounding" if self.lossless == "exact" else self.lossless
                if self._draft_model is not None:
                    self._decoder.set_draft_model(self._draft_model)
                self._settings: dict[str, Any] = {"score": score, "adapt": adapt, "drafters": who}
                self._calibrate = calibrate
                self._set_bank(bank or drafting.default_bank(self), tree, policy)
                if self.lossless == "rounding" and kernels != cpu_kernels.OFF:  # else it was asked for
                    self.warn_once(drafting.up_to_rounding(self))
            failed.pop_all()

    def _load(self, model_path: str | Path, kernels: str | None, **kwargs: Any) -> bool:
        """Load the model on the kernels that are wanted, which are the process's; whether they are ours."""
        cpu_kernels.use(kernels)
        own = cpu_kernels.current() != cpu_kernels.OFF
        packs = own and not kwargs.get("n_gpu_layers") and self._servers is None
        locked = packs and bool(kwargs.get("use_mlock"))
        if locked:
            kwargs["use_mmap"] = False  # the mapping would be locked beside what is packed from it
        mapped = kwargs.get("use_mmap", True) and not kwargs.get("lora_path")
        self._holds = {"embeddings": packs and not mapped, "locked": locked}
        follows = not (kwargs.get("n_threads") or kwargs.get("n_threads_batch") or kwargs.get("n_gpu_layers"))
        self._n_states = drafting.states_kept(kwargs) if self._drafts else 0
        kwargs |= self.begin_pace(follows and own)
        try:
            super().__init__(str(model_path), **kwargs)
        except ValueError as e:
            self._check_servers()
            if self._no_prediction:  # llama.cpp loads no file that lacks part of a layer, used or not
                raise ValueError(f"{e}: {self._no_prediction}") from e
            raise
        if locked and (left := cpu_kernels.unlocked()):
            self.warn_once(
                f"use_mlock: the system did not lock {left / 1e6:.0f} MB of weights in memory (ulimit -l says how much "
                "it allows)"
            )
        return own

    def prepare_model(self, params: Any) -> None:
        cpu_kernels.hold(**self._holds)
        if self._servers is not None:
            params.devices = ctypes.cast(self._servers.devices, ctypes.c_void_p)
        params.load_mtp = self._predicts
        if self.heads_path is not None and cpu_kernels.current() == cpu_kernels.OFF:
            # heads look tokens up in the base's embeddings, which cannot be done where ggml packs them (AMX)
            params.use_extra_bufts = False

    def prepare_context(self, params: Any) -> None:
        params.n_rs_seq = self._n_states  # none where llama.cpp cannot go back

    @property
    def architecture(self) -> str:
        """What its file calls it, such as `llama`."""
        return str(self.metadata.get("general.architecture", ""))

    def must_evaluate(self) -> bool:
        with self._use:
            if self._decoder is None:
                return super().must_evaluate()
            return self._decoder.n_evaluated != self.n_tokens

    @property
    def rpc_servers(self) -> list[str]:
        """Addresses of the machines that hold layers of this model."""
        return list(self._servers.addresses) if self._servers else []

    def _check_servers(self) -> None:
        if self._servers is not None:
            self._servers.check()

    def record(self, asked: dict[str, Any], begin: int) -> Logprobs | None:
        n, echo = asked.get("logprobs"), bool(asked.get("echo")) and not asked.get("stream")
        return None if n is None or self._decoder is None else Logprobs(self, n, echo, begin)

    def cancel(self) -> None:
        """Stop the running generation within one pass of the model, from any thread. What was generated stays."""
        self._stop()

    # The two calls below are the plain decode loop. The rest of llama_cpp.Llama is built on them.

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those evaluated before.

        Raises:
            EntmtpError: they do not fit into the context, or llama.cpp refused them. What was evaluated before stays.
            Cancelled: `cancel` was called.
            BusyError: another thread is in a call of this model.
        """
        with self._use, self.noted():
            self._begins = False
            self.follow()
            if self._decoder is None:
                super().eval(tokens)
                self._check_servers()
                return
            if self.n_tokens + len(tokens) > self.n_ctx():
                raise EntmtpError(
                    f"the context is full: {self.n_tokens} tokens are in it and {len(tokens)} more do not fit into "
                    f"{self.n_ctx()}; shorten the prompt, or create the model with a larger n_ctx"
                )
            n_batch = self.n_batch if (reading := self._reading) is None else min(self.n_batch, READ_AT_ONCE)
            for i in range(0, len(tokens), n_batch):
                first, batch = self.n_tokens, tokens[i : i + n_batch]
                last = first + len(batch)
                self._decoder.eval(batch, first, self.logits_all or reading is not None)
                self.input_ids[first:last] = batch
                if reading is not None:
                    one = len(batch) == 1  # it went on from the last
                    row = self._decoder.logits(self.vocab_size)[None] if one else None
                    reading.see(self._decoder.all_logits(len(batch), self.vocab_size) if row is None else row)
                if self.logits_all:
                    one = len(batch) == 1  # a drafted token's row need not be the last batch's only one
                    self.scores[first:last] = (
                        self._decoder.logits(self.vocab_size) if one else self.rows(len(batch))
                    )
                self.n_tokens = last

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        grammar: Any = None,
        idx: int | None = None,
    ) -> int:
        """Sample the token after the evaluated ones; arguments as in `llama_cpp.Llama.sample`."""
        settings = {
            "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p, "temp": temp,
            "repeat_penalty": repeat_penalty, "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty, "tfs_z": tfs_z, "mirostat_mode": mirostat_mode,
            "mirostat_eta": mirostat_eta, "mirostat_tau": mirostat_tau, "penalize_nl": penalize_nl,
            "logits_processor": logits_processor, "grammar": grammar,
        }  # fmt: skip
        with self._use:
            with self._use.lent(), self.noted():
                token = self._sample(settings, idx)
            if self.on_token is not None and self._decoder is not None:
                self.on_token(token, self._decoder.drafted_by(token))
            return token

    def _sample(self, settings: dict[str, Any], idx: int | None) -> int:
        if self._decoder is None:
            with self.chain(**settings) as chain:
                return sample(self.ctx, chain.sampler, -1 if idx is None else idx - self.n_tokens)
        if idx is not None and idx != self.n_tokens - 1:  # as after tokens that were sent into generate()
            return self.sample_after(idx, settings)

        temp = settings["temp"]
        if self._accept == "typical" and temp > 0.0:
            if not (asked := drafting.unknown_to_typical(settings)):
                with self.chain(**settings) as chain:
                    return self._decoder.sample_typical(chain.sampler, temp, *self._typical)
            self.warn_once(f'accept="typical" does not know {asked[0]}: accepting losslessly')

        # outside of generate() there is no sampler that lives on, as in llama_cpp
        with self.chain(**settings) as chain:
            return self._decoder.sample(chain.sampler)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens; arguments and behaviour as in `llama_cpp.Llama.generate`.

        Another generation, or `reset`, may come between two tokens; then this generator is over, and says so when it
        is asked for the next one.

        Raises:
            ValueError: the prompt is empty, or the grammar cannot be read.
            BusyError: another thread is in a call of this model, or another generation began after this one.
        """
        tokens, ending = list(tokens), Ending.of(kwargs)
        record = ending.record if ending else None
        if ending:
            ending.begin(tokens)
        with self._use.of_a_new_generation() as turn:
            self._settle()
            self._resume()  # a cancellation after the end of the last generation is not meant for this one
            self._look_at_prompt(tokens, args[6] if len(args) > 6 else kwargs.get("reset", True))
            if record is not None and record.echo:  # all of it
                self._forget_text()
                record.read(tokens, self.token_bos())
                self._reading = record
            inner = super().generate(tokens, *args, **kwargs)
            self._begins = True  # it may reset the model
        sent: Sequence[int] | None = None
        n_drawn, n_ctx = 0, self.n_ctx()
        try:
            while True:
                with self._use.of(turn):
                    token = inner.send(sent)
                    if record is not None and self._decoder is not None:
                        record.draw(self._decoder.logits(self.vocab_size), token)
                        self._reading = None
                if ending:
                    ending.see(token)
                sent = yield token
                n_drawn += 1
                # the last one is not evaluated; what is in the memory behind it may be a guess (`LlamaDraftModel`)
                if ending and ending.must_end(n_drawn, n_ctx - len(tokens) - n_drawn + 1):
                    return
                if self._stopped and self._decoder is None:
                    raise Cancelled("cancelled")
        except (Cancelled, StopIteration) as e:
            if ending:
                ending.early = isinstance(e, Cancelled)
        finally:
            with contextlib.suppress(BusyError, ClosedError), self._use.of(turn):
                self._reading = None
                self.end_chain()
                self._settle()
                self.warn_of_draft_model()

    def _look_at_prompt(self, prompt: list[int], reset: bool) -> None:
        """Refuse a prompt without tokens, and forget what the memory cannot go on from."""
        if not prompt and (reset or self.must_evaluate()):
            raise ValueError("the prompt is empty: there is no token to go on from")
        if not reset or self.n_tokens == 0 or self._decoder is None:
            return
        same = self.longest_token_prefix(self.input_ids[: self.n_tokens].tolist(), prompt)
        if same == len(prompt) == self.n_tokens and not self.must_evaluate():
            return  # its logits are there
        reused = same - 1 if same == len(prompt) else same
        if reused > 0 and not self._decoder.can_continue(reused):
            self._forget_text()

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        with self._use:
            self.follow()
            result = super().embed(*args, **kwargs)
            self._check_servers()
            return result

    # Whatever looks at the memory, or changes it, finds what plain decoding would have left there.

    def _settle(self) -> None:
        if self._decoder is not None:
            self._decoder.settle()

    def save_state(self) -> llama_cpp.LlamaState:
        with self._use:
            self._settle()
            return super().save_state()

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        with self._use:
            self._settle()
            if state.input_ids[: state.n_tokens].tolist() != self.input_ids[: self.n_tokens].tolist():
                self._use.begin()
                self.end_chain()  # an older generation cannot: it is over
            try:
                super().load_state(state)
            finally:
                if self._decoder is not None:
                    self._decoder.invalidate(self.n_tokens)
                    self._decoder.set_text(self.input_ids[: self.n_tokens].tolist())

    def reset(self) -> None:
        with self._use:
            if not self._begins:
                self._use.begin()
                self.end_chain()
                self._resume()
            self._forget_text()

    def _forget_text(self) -> None:
        self._begins = False
        self._settle()
        super().reset()
        if self._decoder is not None:
            self._decoder.invalidate(0)  # the logits that are there belong to a text that is forgotten

    def close(self) -> None:
        """Free the model. Raises BusyError where another thread is in a call of it: `cancel` that first."""
        if self._use.ended:
            return
        with self._use:
            self._use.end()
            self.free()
            self._decoder = self._heads = self._draft_model = self._corpus = None
