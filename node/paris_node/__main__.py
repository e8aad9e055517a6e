"""`paris-node`: see `cli`."""

from paris_node.cli import app


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="paris-node")


if __name__ == "__main__":
    main()
