"""llama.cpp's own programs to compare with, those of `make baselines`, and the methods that they are asked for by name.

`llama.cpp server` is llama-server without our patches, `llama.cpp server, ngram-mod` the same with its drafting.
`llama.cpp ngram-mod` is the same drafting by itself (its common/speculative.h), on our llama.cpp with our CPU kernels,
and `llama.cpp plain` its loop without any. A number at the end, as in `llama.cpp ngram-mod 8`, is the most tokens of a
draft.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..common.cache import cache_folder
from ..common.errors import EntmtpError, UsageError
from ..native.backends import build_info

SERVER, DRIVER = "llama-server", "entmtp-speculative"

MOST = 65535
# who drafts in llama.cpp, and its options for drafts of at most N tokens: each gets N, or this if it is less
KINDS: dict[str, dict[str, int]] = {
    # what it looks for must not be longer than the draft, or it drafts nothing
    "ngram-simple": {"--spec-ngram-simple-size-m": MOST, "--spec-ngram-simple-size-n": 12},
    "ngram-map-k": {"--spec-ngram-map-k-size-m": MOST},
    "ngram-map-k4v": {"--spec-ngram-map-k4v-size-m": MOST},
    "ngram-mod": {
        "--spec-ngram-mod-n-max": MOST,
        "--spec-ngram-mod-n-min": 1,
    },  # by itself it drafts 48 or nothing
    "ngram-cache": {},
    "draft-simple": {"--spec-draft-n-max": MOST},
    "draft-eagle3": {"--spec-draft-n-max": MOST},
    "draft-mtp": {"--spec-draft-n-max": MOST},
}
BESIDE = ("draft-simple", "draft-eagle3")  # those that need --draft-model
PREFIX, PLAIN = "llama.cpp", "plain"
LABELS = (f"{PREFIX} server", f"{PREFIX} server, KIND", f"{PREFIX} server, KIND N", f"{PREFIX} {PLAIN}",
          f"{PREFIX} KIND", f"{PREFIX} KIND N")  # fmt: skip


class Baseline(NamedTuple):
    """A method of llama.cpp's own."""

    label: str
    server: bool  # its server, else our driver of its drafting
    kind: str | None  # who drafts
    n_max: int | None  # the most tokens of a draft; None: llama.cpp's default

    def options(self, draft_model: str | Path | None = None) -> list[str]:
        """How llama.cpp is told.

        Raises:
            UsageError: it cannot be told, or another model is missing.
        """
        if self.kind is None:
            return []
        words = ["--spec-type", self.kind]
        if self.kind in BESIDE:
            if draft_model is None:
                raise UsageError(f"method {self.label}: {self.kind} needs another model; give --draft-model")
            words += ["--spec-draft-model", str(draft_model)]
        if self.n_max is None:
            return words
        if not KINDS[self.kind]:
            raise UsageError(
                f"method {self.label}: llama.cpp fixes the length of {self.kind}; leave the number out"
            )
        lengths = {option: min(self.n_max, most) for option, most in KINDS[self.kind].items()}
        return words + [str(word) for length in lengths.items() for word in length]


def baseline(label: str) -> Baseline | None:
    """The method of llama.cpp's own that a label means; None of another label.

    Raises:
        UsageError: it begins as one, and is none.
    """
    if not label.startswith(PREFIX):
        return None
    kinds = "|".join(KINDS)
    found = re.fullmatch(rf"{re.escape(PREFIX)}( server)?(?:,? ({PLAIN}|{kinds})( [1-9]\d*)?)?", label)
    if found is None or not (found[1] or found[2]) or (found[2] == PLAIN and (found[1] or found[3])):
        raise UsageError(
            f"there is no method {label}; there are {'; '.join(LABELS)}, KIND one of {', '.join(KINDS)}"
        )
    return Baseline(
        label, bool(found[1]), None if found[2] == PLAIN else found[2], int(found[3]) if found[3] else None
    )


def find(program: str) -> Path:
    """A program of `make baselines`, of the llama.cpp that this package runs.

    Raises:
        EntmtpError: it was not built.
    """
    folder = cache_folder() / "baselines" / str(build_info().get("key", "unknown"))
    for name in (program, f"{program}.exe"):
        if (folder / name).is_file():
            return folder / name
    raise EntmtpError(
        f"{program}, which is compared with, is not in {folder}; build it with `make baselines` in a clone of EntMTP"
    )


def missing(programs: Sequence[str] = (SERVER, DRIVER)) -> str | None:
    """Why there is nothing to compare with; None if there is."""
    try:
        for program in programs:
            find(program)
    except EntmtpError as e:
        return str(e)
    return None
