#!/usr/bin/env python3
"""Fetch, patch, build and cache llama.cpp.

    python native/llama_cpp.py sdist                      path of the verified source distribution
    python native/llama_cpp.py source                     path of the patched source tree
    python native/llama_cpp.py build [-DGGML_CUDA=ON ..]  path of the built libraries and headers
    python native/llama_cpp.py baselines --libraries DIR  path of llama.cpp's own server and our driver of its drafting
    python native/llama_cpp.py archs --libraries DIR      path of the program that writes a model of every architecture
    python native/llama_cpp.py bump [--version X.Y.Z]     how the patches fare on another version

The source is the copy inside the llama-cpp-python source distribution, pinned by version and SHA-256 in
llama.cpp.pin.json, or a directory of the user's (--llama-dir). Only the result goes to stdout; progress goes to
stderr. CMakeLists.txt calls `build`; nothing outside the standard library is needed, as this runs before any
package is installed.

Layout of the cache (--cache, $ENTMTP_CACHE or the user's cache directory):

    sdist/           downloaded archives
    source/<key>/    patched source trees; key: pin (or content of the user's directory) + patches
    work/<key>/      builds under way; kept when a build is interrupted, so that the next one continues it
    build/<key>/     lib/ include/ src/ build-info.json; key: source + flags + compiler + machine
    baselines/<key>/ programs to compare with; key: of the libraries in build/

source/<key> and build/<key> appear by a rename, so a directory that exists is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `native` is

from native.llama_baselines import build_archs, build_baselines
from native.llama_build import build_libraries
from native.llama_bump import bump
from native.llama_cache import BuildError, default_cache
from native.llama_patches import PATCH_DIR, list_patches
from native.llama_source import fetch_sdist, load_pin, prepare_source


def parse_definitions(items: Sequence[str]) -> dict[str, str]:
    """["GGML_CUDA=ON", "GGML_X:BOOL=ON"] -> {"GGML_CUDA": "ON", "GGML_X": "ON"}"""
    flags = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BuildError(f"-D{item}: expected -DNAME=VALUE")
        flags[name.partition(":")[0]] = value
    return flags


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama_cpp.py", description="Fetch, patch, build and cache llama.cpp."
    )
    parser.add_argument("command", choices=("sdist", "source", "build", "baselines", "archs", "bump"))
    parser.add_argument("-D", dest="definitions", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cache", type=Path, help="default: $ENTMTP_CACHE or the user's cache directory")
    parser.add_argument("--llama-dir", type=Path, help="build from this llama.cpp directory (it is copied)")
    parser.add_argument("--libraries", type=Path, help="baselines, archs: folder of the libraries")
    parser.add_argument("--patches", type=Path, default=PATCH_DIR)
    parser.add_argument("--version", help="bump: of llama-cpp-python; default: the newest")
    parser.add_argument("--cmake", help="path of cmake")
    parser.add_argument("--generator", help="CMake generator; default: Ninja if found")
    parser.add_argument("--make-program", help="path of ninja")
    parser.add_argument("--jobs", type=int, help="parallel compile jobs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    try:
        flags = parse_definitions(args.definitions)
        cache = (args.cache or default_cache()).expanduser().resolve()
        pin = load_pin()
        if args.command == "sdist":
            print(fetch_sdist(cache, pin))
            return 0
        if args.command == "bump":
            return 0 if bump(cache, pin, list_patches(args.patches), args.version) else 1
        llama_dir = args.llama_dir.expanduser().resolve() if args.llama_dir else None
        if args.command in ("baselines", "archs"):
            if not args.libraries:
                raise BuildError(
                    f"{args.command}: --libraries is missing, the folder of libentmtp; or run make {args.command}"
                )
            build = build_baselines if args.command == "baselines" else build_archs
            print(build(cache, pin, list_patches(args.patches), args.libraries, llama_dir))
            return 0
        source, key = prepare_source(cache, pin, list_patches(args.patches), llama_dir)
        if args.command == "source":
            print(source)
            return 0
        commit = "custom" if llama_dir else pin["commit"]
        print(
            build_libraries(
                cache, source, key, flags, commit, args.cmake, args.generator, args.make_program, args.jobs
            )
        )
        return 0
    except (BuildError, OSError) as error:  # OSError: disk full, no permission
        print(f"entmtp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
