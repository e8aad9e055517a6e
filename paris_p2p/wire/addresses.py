"""How many addresses of a node are told to others, and how long one may be.

By themselves, because who only moves bytes needs these two and nothing else of the records.
"""

MAX_ADDRESSES = 3
MAX_ADDRESS_CHARS = 112
"""The longest IPv6 address with port and peer id has 111; with 3 of them every record fits its cap."""
