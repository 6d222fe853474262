"""`make fuzz MINUTES=5`: every fuzzer for so long, one after the other, and a table of what they came to.

What they find new is in build/fuzz/found (build/fuzz-fast, where FUZZ_SANITIZE=undefined), beside the inputs that broke
something (NAME-crash-...). `--merge` puts what brings new edges into tests/fuzz/corpus, which `make test` runs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
NATIVE = ("fuzz_heads", "fuzz_api", "fuzz_tree")
READERS = ("gguf", "safetensors", "torch", "bank", "conversation", "traces")
LIMITS = ("-timeout=60", "-rss_limit_mb=3000", "-len_control=0")
MAX_LEN = {"fuzz_api": 1024, "fuzz_tree": 2048}  # decisions, each of which may be a pass
MAX_FILE = 100_000  # bytes, of the others
MAX_KEPT = 16 << 10  # bytes of a file of the corpus

# a memory of files, where there is one: a disk would be the slowest part
FILES = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
ENV = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_THREAD_LIMIT": "1",  # for passes of a tiny model two threads take twice as long; `make test` has them
}


def start(build: Path, name: str, arguments: list[str], log: Path) -> int:
    """Run one fuzzer, its output into a file; returns its exit code."""
    program = (
        [str(build / "native" / name)] if name in NATIVE else [sys.executable, str(HERE / "reader.py"), name]
    )
    with tempfile.TemporaryDirectory(prefix="entmtp-fuzz-", dir=FILES) as tmp, open(log, "wb") as file:
        env = {**ENV, "TMPDIR": tmp}
        return subprocess.run([*program, *arguments], env=env, stdout=file, stderr=file).returncode


def figures(log: str) -> tuple[str, str, str, str, str]:
    """Runs, edges, features, and the run that brought the last edge and its minute, from libFuzzer's lines."""
    lines = re.findall(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+).* exec/s: (\d+)", log, re.M)
    if not lines:
        return ("", "", "", "", "")
    runs, edges, features, _ = lines[-1]
    first, per_second = next((run, int(rate)) for run, cov, _, rate in lines if cov == edges)
    return runs, edges, features, first, f"{int(first) / per_second / 60:.1f}" if per_second else "0.0"


def fuzz(build: Path, name: str, seconds: int) -> bool:
    found, kept = build / "found" / name, CORPUS / name
    for folder in (found, kept):
        folder.mkdir(parents=True, exist_ok=True)
    log = found.with_suffix(".log")
    code = start(
        build,
        name,
        [
            *LIMITS,
            f"-max_len={MAX_LEN.get(name, MAX_FILE)}",
            f"-max_total_time={seconds}",
            f"-artifact_prefix={found}-",
            "-print_final_stats=1",
            str(found),
            str(kept),
        ],
        log,
    )
    found_figures = figures(log.read_text("utf-8", "replace"))
    blind = not any(found_figures)  # it saw no edges, and so followed none
    print(f"{name:14}", *(f"{x:>10}" for x in found_figures), "BROKEN" if code or blind else "ok")
    if code or blind:
        why = "the input lies beside it" if code else "nothing was instrumented"
        print(f"  see {log}; {why}", flush=True)
    return not (code or blind)


def merge(build: Path, name: str) -> None:
    found, kept = build / "found" / name, CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    large = found.with_name(f"{name}-large")
    large.mkdir(exist_ok=True)
    for path in found.iterdir():
        if path.stat().st_size > MAX_KEPT:
            path.rename(large / path.name)
    start(
        build,
        name,
        [*LIMITS, "-use_counters=0", "-set_cover_merge=1", str(kept), str(found)],
        found.with_name(f"{name}-merge.log"),
    )
    files = list(kept.iterdir())
    print(f"{name:14} {len(files)} files, {sum(f.stat().st_size for f in files)} bytes", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for each (default: 5)")
    parser.add_argument("--only", choices=(*NATIVE, *READERS), action="append", help="may be given again")
    parser.add_argument(
        "--merge", action="store_true", help="what was found into the corpus, without fuzzing"
    )
    parser.add_argument("--build", type=Path, default=Path("build/fuzz"), help="folder of the native fuzzers")
    args = parser.parse_args()
    names = args.only or (*NATIVE, *READERS)
    if args.merge:
        for name in names:
            merge(args.build, name)
        return 0
    print(f"{'':14}", *(f"{x:>10}" for x in ("runs", "edges", "features", "last edge", "minute")), flush=True)
    results = [fuzz(args.build, name, int(60 * args.minutes)) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
