"""`paris-node`: see `cli`, and `quick` for what need not wait for it."""

import gc
import sys

from paris_node.quick import run_plain


def main() -> None:
    """Entry point of the console script."""
    gc.set_threshold(50_000, 20, 50)  # imports make no garbage: looking for it takes a tenth of the start
    code = run_plain(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    from paris_node.cli import app

    app(prog_name="paris-node")


if __name__ == "__main__":
    main()
