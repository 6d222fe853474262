"""`entmtp train`: the command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..common.errors import ConvertError, EntmtpError
from ..common.streams import printable
from .options import options_of, parse, setup_arg_parser
from .run import report, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    from ..convert.writer import OUTTYPES

    args = parse(argv)
    if args.outtype not in (*OUTTYPES, "auto"):
        setup_arg_parser().error(
            f"--outtype {args.outtype!r} is not known; use one of {', '.join(OUTTYPES)} or auto"
        )
    try:
        options = options_of(args)
        if args.report:
            report(options, args.json)
        else:
            train(options)
        return 0
    except (EntmtpError, ConvertError, ValueError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(
            f"error: {where}{(e.strerror or str(e)).lower()}; what was done is kept, go on with --resume",
            file=sys.stderr,
        )
    except MemoryError:
        print(
            "error: not enough memory; lower --batch-tokens, or train with a smaller --draft-vocab or --lm-head base",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped; what was done is kept, go on with --resume", file=sys.stderr)
        return 130
    return 1
