"""How many files this process may have open; every connection is one.

Owns: raising the system's limit, fitting our own limits into it. Does not own: those limits.
"""

import resource

WANTED = 4096
"""Enough for all connection limits together (docs/operations.md), the store and the libraries."""
SMALL = 16
"""A limit so small is never cut."""


def allow_many() -> None:
    """Raises the soft limit to `WANTED`, or as far as the hard one allows. A higher one stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return  # the system has a lower limit of its own: `fitting` goes by what is allowed


def fitting(most: int) -> int:
    """A limit of `most` connections where `WANTED` files may be open; in proportion less where fewer may, so
    that all limits together fit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= WANTED:
        return most
    return max(min(most, SMALL), most * soft // WANTED)
