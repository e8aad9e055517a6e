"""`paris-node`: see `cli`, and `quick` for what need not wait for it."""

import gc
import sys


def main() -> None:
    """Entry point of the console script."""
    gc.disable()  # imports make no garbage: looking for it takes a tenth of the start
    from paris_node.quick import run_plain

    code = run_plain(sys.argv[1:], loaded=_collect_garbage)
    if code is not None:
        sys.exit(code)
    from paris_node.cli import app

    _collect_garbage()
    app(prog_name="paris-node")


def _collect_garbage() -> None:
    """From now on, and never again among the modules that are here: they stay for good."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


if __name__ == "__main__":
    main()
