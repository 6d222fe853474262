"""With what a model drafts, and how: heads, another model, a bank of trees, a policy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import drafting
from .bank import Bank, load_bank
from .common.errors import EntmtpError
from .models.corpus import corpus_tokens
from .models.drafter_file import check_drafter, find_drafter
from .models.names import resolve
from .models.nextn import prediction_layers
from .native import kernels as cpu_kernels
from .native.abi import vocab_fingerprint
from .native.arrays import POLICIES, PRICED, SCORES
from .native.corpus import Corpus
from .native.decoder import Decoder
from .native.draft_model import DraftModel
from .native.heads import Heads
from .native.stats import DraftStats
from .pace import Paced

if TYPE_CHECKING:
    from .measure.subject import Subject


class Drafted(Paced):
    """A model that may draft; `Llama` is one."""

    one_text = True  # at a time
    # asked as a text begins: whether whoever wanted it has left meanwhile
    unwanted: Callable[[], bool] | None = None
    _stopped: bool
    _settings: dict[str, Any]
    _calibrate: bool

    def begin_drafting(self, drafts: bool) -> None:
        """Before the model is loaded: what is there even if that fails.

        Args:
            drafts: tokens in a row may be drafted.
        """
        self.lossless = "exact"
        self.heads_path: str | None = None
        self.draft_model_path: str | None = None
        self.bank: Bank | None = None  # what is drafted from, None without drafting
        self.policy = "off"
        self.tree: str | None = None  # the one of policy "static"
        self._decoder: Decoder | None = None
        self._heads: Heads | None = None
        self._draft_model: DraftModel | None = None
        self._corpus: Corpus | None = None  # the user's texts, to draft from
        self._drafts = drafts
        self._predicts = False  # the model's own prediction layers draft
        self._no_prediction = ""  # why they cannot
        self._named = False  # the model that drafts was, and is not just found

    def _find_draft_model(
        self, model: Path, named: str | Path | None, policy: str, drafters: str | Sequence[str]
    ) -> None:
        """Which model drafts: one that is named, the model's own prediction layers, or what was trained for it and lies
        beside it: an EAGLE-3 layer or an assistant."""
        self._named = named is not None
        if named is not None:
            self.draft_model_path = str(resolve(named))
            check_drafter(Path(self.draft_model_path), model)
        elif (
            policy in drafting.MODEL_DRAFTS and self.one_text and (drafters == "auto" or "model" in drafters)
        ):
            layers = prediction_layers(model)
            if layers is not None and layers.problem:
                self._no_prediction = layers.problem
                text = f"{model.name}: its layers for multi-token prediction do not draft: {layers.problem}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
            self._predicts = layers is not None and not layers.problem
            # found by itself it joins a grown tree; a fixed one stays that of who was named
            if not self._predicts and policy == "auto" and (beside := find_drafter(model)):
                self.draft_model_path = str(beside)

    def _load_corpus(self, lookup: str | Path | Sequence[str | Path] | None) -> None:
        """Read the user's texts to draft from."""
        if not lookup:
            return
        paths = [lookup] if isinstance(lookup, (str, Path)) else list(lookup)
        tokens = corpus_tokens(
            paths,
            lambda text: self.tokenize(text, add_bos=False, special=False),
            vocab_fingerprint(self.model),
            self.n_vocab(),
        )
        self._corpus = Corpus(tokens)
        self._stack.callback(self._corpus.close)

    @property
    def n_lookup(self) -> int:
        """Tokens of the user's own texts that drafts come from, too."""
        return self._corpus.n_tokens if self._corpus is not None else 0

    def _load_draft_model(self, who: tuple[str, ...], draft_vocab: int) -> tuple[str, ...]:
        """Load the model that drafts; who drafts, without it where what was found by itself cannot be used."""
        try:
            self._draft_model = DraftModel(
                self.ctx, self.context_params, self.draft_model_path, self.model_params, draft_vocab
            )
        except EntmtpError as e:
            if self._named:
                raise
            self.warn_once(f"{self._drafter_name} cannot draft: {e}")
            self._predicts, self.draft_model_path = False, None
            return tuple(name for name in who if name != "model")
        self._stack.callback(self._draft_model.close)
        return who

    @property
    def decoder(self) -> Decoder:
        """The decode loop behind `eval` and `sample`.

        Raises:
            ValueError: an encoder, or a model for embeddings or without weights, has none.
        """
        if self._decoder is None:
            raise ValueError("this model has no decode loop")
        return self._decoder

    @property
    def draft_heads(self) -> Heads:
        """The heads that draft.

        Raises:
            ValueError: there are none.
        """
        if self._heads is None:
            raise ValueError('there are no draft heads: create the model with draft="entmtp" and heads')
        return self._heads

    @property
    def _drafter_name(self) -> str:
        return self.draft_model_path or "the model's layers for multi-token prediction"

    @property
    def model_drafts(self) -> bool:
        """A smaller model drafts, or the model's own prediction layers do."""
        return self._draft_model is not None

    @property
    def no_prediction(self) -> str:
        """Why the prediction layers of the file do not draft, one sentence; empty: they do, or there are none."""
        return self._no_prediction

    @property
    def draft_vocab(self) -> int:
        """Tokens that the model that drafts can propose; 0: none drafts."""
        return self._draft_model.draft_vocab if self._draft_model is not None else 0

    @property
    def draft_token_us(self) -> float:
        """Microseconds of drafting one token with the model that drafts."""
        return self._draft_model.token_us if self._draft_model is not None else 0.0

    @property
    def draft_model_broken(self) -> str:
        """Why the model that drafts does not any more, one sentence; empty: it does, or there is none."""
        return self._draft_model.broken if self._draft_model is not None else ""

    def warn_of_draft_model(self) -> None:
        """Say it once if the model that drafts has stopped."""
        if broken := self.draft_model_broken:
            self.warn_once(f"{self._drafter_name} does not draft any more: {broken}")

    @property
    def drafters(self) -> tuple[str, ...]:
        """Who drafts under policy "auto": some of "text", "recycling", "heads" and "model"."""
        return tuple(self._settings["drafters"]) if self.bank is not None else ()

    def _set_bank(self, bank: Bank, tree: str | None, policy: str) -> None:
        assert self._decoder is not None
        if policy in PRICED and self._calibrate:
            bank = self.with_own_costs(bank)
        if policy == "auto":
            bank = drafting.with_calibration(cast("Subject", self), bank)
        static_tree = 0
        if policy == "static":
            if tree is None and len(bank.trees) != 2:
                names = ", ".join(t.name for t in bank.trees)
                raise ValueError(
                    f'policy="static" needs one tree: trees="{bank.name}:NAME" with one of {names}'
                )
            static_tree = bank.index(tree) if tree is not None else 1
        elif tree is not None:
            raise ValueError(f'trees names the tree {tree}, which only policy="static" uses')
        self.bank, self.policy = bank, policy
        self.tree = bank.trees[static_tree].name if policy == "static" else None
        self.install(self._decoder)
        self.name_threads()

    def install(self, decoder: Decoder) -> None:
        """Have a decoder draft as this model does."""
        assert self.bank is not None
        static_tree = self.bank.index(self.tree) if self.tree is not None else 0
        decoder.set_bank(self.bank, self.policy, static_tree, **self._settings)
        decoder.set_corpus(self._corpus)

    def set_trees(
        self,
        trees: str | Path | Bank | None = None,
        policy: str = "auto",
        score: str = "entropy",
        tree: str | None = None,
        drafters: str | Sequence[str] | None = None,
    ) -> None:
        """Draft in another way from now on, without loading anything anew. What was learned so far is forgotten.

        Args:
            trees, policy, score, drafters: as in the constructor; None keeps the bank, or who drafts.
            tree: the tree of the bank that policy "static" uses.

        Raises:
            ValueError: arguments that cannot work; all stays as it was.
        """
        if self.bank is None:
            raise ValueError('this model does not draft: create it with draft="entmtp"')
        drafting.one_of("policy", policy, POLICIES)
        drafting.one_of("score", score, SCORES)
        drafting.check_heads(policy, self._heads is not None)
        bank, named = (self.bank, None) if trees is None else load_bank(trees)
        with self._use:
            before, settings = (self.bank, self.tree, self.policy), self._settings
            try:
                self._settings = settings | {"score": score}
                if drafters is not None:
                    self._settings["drafters"] = drafting.who_drafts(
                        drafters, self._heads is not None, self._draft_model is not None
                    )
                self._set_bank(bank, tree or named, policy)
            except (EntmtpError, ValueError):
                self._settings = settings
                self._set_bank(*before)
                raise

    def _stop(self) -> None:
        self._stopped = True
        if self._decoder:
            self._decoder.cancel()

    def is_unwanted(self) -> bool:
        """Nobody waits for the text that begins."""
        return self.unwanted is not None and self.unwanted()

    def _resume(self) -> None:
        self._stopped, self.failed = False, None
        if self._decoder is not None:
            self._decoder.resume()
        if self.is_unwanted():
            self._stop()

    @property
    def lossless(self) -> str:
        """What texts of drafts are to plain decoding's: `"exact"`, bit for bit; `"rounding"`, up to ties of two tokens,
        also while another model has switched our kernels off (`kernels="off"`); `"lossy"` (`accept="typical"`)."""
        is_off = self._lossless == "exact" and cpu_kernels.current() == cpu_kernels.OFF
        return "rounding" if is_off else self._lossless

    @lossless.setter
    def lossless(self, what: str) -> None:
        self._lossless = what

    @property
    def draft_stats(self) -> DraftStats:
        """What the steps since the last `reset_draft_stats` did."""
        with self._use:
            stats = self._decoder.stats() if self._decoder else DraftStats()
            return replace(stats, lossless=self.lossless)

    def reset_draft_stats(self) -> None:
        """Start counting anew."""
        with self._use:
            if self._decoder:
                self._decoder.reset_stats()
