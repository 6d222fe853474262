"""One reader of targets.py under atheris, libFuzzer for Python. run.py starts this, with libFuzzer's own arguments.

python tests/fuzz/reader.py TARGET -max_total_time=60 build/fuzz/found/TARGET tests/fuzz/corpus/TARGET
"""

from __future__ import annotations

import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]


class Unwrapped:
    """Finds modules of an editable install with Python's own loaders: those around them show atheris no code."""

    @classmethod
    def find_spec(cls, *args: Any) -> ModuleSpec | None:
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            if spec := finder.find_spec(*args):
                spec.loader = getattr(spec.loader, "_skbuild_loader", spec.loader)
                return spec
        return None


def main(name: str, *arguments: str) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit(
            "atheris is not installed: pip install atheris has it for CPython 3.11 to 3.13 on Linux and macOS"
        )

    sys.meta_path.insert(0, Unwrapped)
    # edges of the package and of what it reads archives with; not of numpy and the rest
    with atheris.instrument_imports(include=["entmtp", "zipfile", "pickletools"]):
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    seeds = target.seeds()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if len(data) < 2 or rng.randrange(256) == 0:
            data = rng.choice(seeds)  # what it begins with
        return target.mutate(bytes(data), rng, lambda x: bytes(atheris.Mutate(x, len(x) + 64)))[:max_size]

    def run(data: bytes) -> None:
        target.run(bytes(data))

    command = f"{sys.executable} {__file__} {name}"  # with which libFuzzer starts another process to merge
    atheris.Setup([command, *arguments], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
