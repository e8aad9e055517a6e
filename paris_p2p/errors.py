"""The error tree, ordered by remedy: what the catcher should do decides the class."""


class ParisError(Exception):
    """Base of every error this project raises on purpose."""


class LocalProtocolError(ParisError):
    """We broke our own protocol: a bug here, never the peer's fault."""


class RemoteProtocolError(ParisError):
    """A peer sent something the protocol forbids: penalise the peer, keep going."""


class TransportError(ParisError):
    """A connection failed or a deadline passed: try again, or elsewhere."""


class StoreError(ParisError):
    """The local disk refused (full, permissions, damaged file): the operator must act."""


class DiskFullError(StoreError):
    """No room for more bytes, on the disk or within the quota: pause, and go on when there is some."""


class WorkerError(ParisError):
    """A child process died or answered nonsense: restart it."""


class NetworkError(ParisError):
    """The network side cannot start or finds nothing (bootstrap unreachable, no run): exit code 3."""


class IncompleteError(ParisError):
    """The wanted thing exists only in part (roles without a checkpoint): exit code 4."""


class ConfigError(ParisError):
    """The user's input is wrong; the message says what to change: exit code 2."""


class ManifestError(ConfigError):
    """A run manifest is damaged, forged, or of another format; the message names the reason."""
