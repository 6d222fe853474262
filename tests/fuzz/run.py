"""Fuzz one reader with atheris, libFuzzer for Python: `make fuzz MINUTES=5` runs this for each of targets.py.

    python tests/fuzz/run.py TARGET --seconds 60

It begins with the files of tests/fuzz/corpus/TARGET, goes on with those that it found before (build/fuzz/TARGET), and ends
with code 0 where the reader read or refused every file. The file that it did not is kept beside them.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--merge", action="store_true", help="add to the corpus in the repository what brings new edges")
    args = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; pip install atheris has wheels for Linux and CPython 3.11 to 3.13")

    # the package alone counts, not numpy or the machinery around
    with atheris.instrument_imports(include=["entmtp", "zipfile", "pickletools"]):
        from fuzz.targets import TARGETS
    if args.target not in TARGETS:
        parser.error(f"there is no target {args.target}: {', '.join(TARGETS)}")
    target = TARGETS[args.target]

    found, kept = args.found / args.target, HERE / "corpus" / args.target
    for folder in (found, kept):
        folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (found / f"seed-{i}").write_bytes(seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = target.mutate(
            bytes(data), random.Random(seed), lambda x: bytes(atheris.Mutate(x, len(x) + 64))
        )
        return changed[:max_size]

    options = ["-max_len=200000", "-timeout=20", "-rss_limit_mb=3000", "-print_final_stats=1", f"-artifact_prefix={found}-crash-"]
    if args.merge:
        options += ["-merge=1", str(kept), str(found)]
    else:
        options += [f"-max_total_time={args.seconds}", str(found), str(kept)]
    atheris.Setup([sys.argv[0], *options], lambda data: target.run(bytes(data)) and None, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
