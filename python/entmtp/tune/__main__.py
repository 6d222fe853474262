from ..common.streams import run_command
from .cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
