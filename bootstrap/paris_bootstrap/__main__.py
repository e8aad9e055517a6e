"""`paris-bootstrap`: see `cli`."""

from paris_bootstrap.cli import app


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="paris-bootstrap")


if __name__ == "__main__":
    main()
