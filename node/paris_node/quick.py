"""The short way into `seed` and `get`: well-formed command lines are run without building the command line.

Owns: reading the plain form of these two commands' options, calling their bodies. Does not own: the options
(`cli` does, and everything that is not plain, such as `--help` or a mistake, is left to it).

Why: a swarm's worth of these processes may start at once on one machine, and typer, which checks values with
pydantic, takes as much CPU time as all the rest of `get` up to its first connection. Not by argparse either:
importing it and building two parsers takes 15 ms, a tenth of that start; and a form that is read here must
mean what it means to typer, where argparse has rules of its own (abbreviations, exits).
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paris_p2p.programs import Output, run_program, set_up_logging

FLAGS = {"--json", "--debug", "--keep-seeding", "--lan", "--no-lan"}
SINGLE = {
    *("--out", "--piece-length", "--home", "--seed-ratio", "--seed-time"),
    *("--limit-up", "--limit-down", "--peer-limit-up", "--peer-limit-down"),
}
REPEATED = {"--peer", "--listen", "--announce", "--via"}
OPTIONS = {
    "seed": (FLAGS | SINGLE | REPEATED) - {"--out", "--peer", "--keep-seeding"},
    "get": (FLAGS | SINGLE | REPEATED) - {"--piece-length"},
}


@dataclass(frozen=True, slots=True)
class Share:
    """The options that `seed` and `get` have in common, as given."""

    home: Path | None
    listen: Sequence[str] | None
    announce: Sequence[str] | None
    limit_up: str | None
    limit_down: str | None
    lan: bool
    seed_ratio: str | None = None
    seed_time: str | None = None
    via: Sequence[str] | None = None
    peer_limit_up: str | None = None
    peer_limit_down: str | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """A well-formed command line: its one argument, and the values of each option given."""

    command: str
    argument: str
    values: dict[str, list[str]]

    def one(self, option: str) -> str | None:
        """The option's value; the last one counts."""
        return self.values[option][-1] if option in self.values else None

    def path(self, option: str) -> Path | None:
        """The option's value as a path."""
        value = self.one(option)
        return None if value is None else Path(value)


def read_plain(arguments: Sequence[str]) -> Plain | None:
    """The command line `arguments`; None when it is another command's, or needs anything beyond the plain
    form: options spelt out, known values, one argument."""
    if not arguments or arguments[0] not in OPTIONS:
        return None
    known, positional, values = OPTIONS[arguments[0]], [], dict[str, list[str]]()
    rest = iter(arguments[1:])
    for word in rest:
        option, equals, value = word.partition("=")
        if not word:
            return None  # an unset variable of a script
        if not word.startswith("-"):
            positional.append(word)
        elif option not in known or (equals and option in FLAGS):
            return None
        elif option in FLAGS:
            values.setdefault(option, []).append("")
        else:
            given = value if equals else next(rest, "")
            if not given or given.startswith("-") or (option in SINGLE and option in values):
                return None
            values.setdefault(option, []).append(given)
    number = values.get("--piece-length", ["0"])[0]
    if len(positional) != 1 or not (number.isascii() and number.isdigit()):
        return None
    if (arguments[0] == "get" and "--out" not in values) or {"--lan", "--no-lan"} <= values.keys():
        return None
    return Plain(arguments[0], positional[0], values)


def run_plain(arguments: Sequence[str], loaded: Callable[[], None] = lambda: None) -> int | None:
    """Run a plain command line; its exit code, or None when `cli` has to do it. `loaded` is called once all
    modules are here and before anything happens."""
    plain = read_plain(arguments)
    if plain is None:
        return None
    as_json, debug = "--json" in plain.values, "--debug" in plain.values
    set_up_logging(debug)

    def run() -> int:
        importlib.import_module(f"paris_node.commands.{plain.command}")
        loaded()
        return _run(plain, as_json)

    return run_program(run, debug=debug)


def _run(plain: Plain, as_json: bool) -> int:
    share = Share(
        plain.path("--home"),
        plain.values.get("--listen"),
        plain.values.get("--announce"),
        plain.one("--limit-up"),
        plain.one("--limit-down"),
        "--lan" in plain.values,
        plain.one("--seed-ratio"),
        plain.one("--seed-time"),
        plain.values.get("--via"),
        plain.one("--peer-limit-up"),
        plain.one("--peer-limit-down"),
    )
    if plain.command == "seed":
        number = plain.one("--piece-length")
        return seed(Path(plain.argument), None if number is None else int(number), share, as_json)
    keep_seeding = "--keep-seeding" in plain.values
    out = Path(plain.values["--out"][-1])
    return get(plain.argument, plain.values.get("--peer"), out, keep_seeding, share, as_json)


def seed(path: Path, piece_length: int | None, share: Share, as_json: bool) -> int:
    """`paris-node seed`; its exit code."""
    from paris_node.commands import seed as command
    from paris_node.sharing import share_request

    return command.run(path, piece_length, share_request(share), Output(as_json))


def get(
    item: str, peers: Sequence[str] | None, out: Path, keep_seeding: bool, share: Share, as_json: bool
) -> int:
    """`paris-node get`; its exit code."""
    from paris_node.commands import get as command
    from paris_node.sharing import share_request

    request = command.GetRequest(item, tuple(peers or ()), out, keep_seeding, share_request(share))
    return command.run(request, Output(as_json))
