"""`dataclass` for values: the standard library's classes, made in a quarter of the time.

Owns: making frozen or mutable slotted dataclasses cheaply. Does not own: fields, `replace`, `asdict` and all
else about dataclasses, which are the standard library's and work on these classes.

Why: the standard decorator writes six functions for each class as text and compiles them, half a millisecond
a class. `paris-node get` defines seventy before its first connection and uses a third of them. Here methods
that need no text are shared closures, and `__init__` is compiled when the first instance is made.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # so that type checkers know what it does
else:

    def dataclass(*, slots: bool, frozen: bool = False, eq: bool = True) -> Callable[[type], type]:
        """As `dataclasses.dataclass`, always with slots; the other options are left out because nobody here
        needs them. Raises `TypeError` for keyword-only and init-only fields."""
        if not slots:
            raise TypeError("without slots use dataclasses.dataclass")
        return lambda cls: _make(cls, frozen, eq)


def _make(cls: type[Any], frozen: bool, eq: bool) -> type[Any]:
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # the standard decorator would work out a signature instead
    dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    fields = dataclasses.fields(cls)
    if any(field.kw_only or not field.init for field in fields):
        raise TypeError(f"{cls.__name__}: keyword-only fields and fields without init are not made here")
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    for field in fields:
        body.pop(field.name, None)  # a default: it would stand in the way of the slot
    body["__slots__"] = tuple(field.name for field in fields if field.name not in inherited)
    body |= _methods(fields, frozen, eq, body)
    metaclass: Any = type(cls)
    made: type[Any] = metaclass(cls.__name__, cls.__bases__, body)
    made.__qualname__ = cls.__qualname__
    made.__init__ = _first_init(made, fields, frozen)
    return made


def _methods(
    fields: Sequence["dataclasses.Field[Any]"], frozen: bool, eq: bool, own: dict[str, Any]
) -> dict[str, Any]:
    compared = _getter([field.name for field in fields if field.compare])
    shown = [field.name for field in fields if field.repr]

    def __repr__(self: Any) -> str:
        inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__qualname__}({inside})"

    def __eq__(self: Any, other: object) -> bool:
        return compared(self) == compared(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(compared(self))

    methods: dict[str, Any] = {"__repr__": __repr__}
    if eq:
        methods |= {"__eq__": __eq__, "__hash__": __hash__ if frozen else None}
    methods = {name: method for name, method in methods.items() if name not in own}
    return methods | ({"__setattr__": _refuse, "__delattr__": _refuse} if frozen else {})


def _getter(names: Sequence[str]) -> Callable[[Any], Any]:
    if not names:
        return lambda value: ()
    return attrgetter(*names)


def _refuse(self: Any, name: str, value: object = None) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot change field {name!r} of {type(self).__name__}")


def _first_init(
    made: type[Any], fields: Sequence["dataclasses.Field[Any]"], frozen: bool
) -> Callable[..., None]:
    """An `__init__` that puts the real one into its place."""

    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        if made.__dict__["__init__"] is __init__:
            made.__init__ = _compile_init(made, fields, frozen)
        made.__init__(self, *args, **kwargs)

    return __init__


def _compile_init(
    made: type[Any], fields: Sequence["dataclasses.Field[Any]"], frozen: bool
) -> Callable[..., None]:
    names: dict[str, Any] = {"missing": dataclasses.MISSING}
    parameters, lines = ["self"], []
    for number, field in enumerate(fields):
        name, value = field.name, field.name
        if field.default is not dataclasses.MISSING:
            names[f"default_{number}"] = field.default
            parameters.append(f"{name}=default_{number}")
        elif field.default_factory is not dataclasses.MISSING:
            names[f"factory_{number}"] = field.default_factory
            parameters.append(f"{name}=missing")
            value = f"factory_{number}() if {name} is missing else {name}"
        else:
            parameters.append(name)
        if frozen:
            names[f"set_{number}"] = getattr(made, name).__set__  # the slot's own: `__setattr__` refuses
            lines.append(f" set_{number}(self, {value})")
        else:
            lines.append(f" self.{name} = {value}")
    if hasattr(made, "__post_init__"):
        lines.append(" self.__post_init__()")
    text = f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"])
    exec(text, names)
    init: Callable[..., None] = names["__init__"]
    init.__qualname__ = f"{made.__qualname__}.__init__"
    return init
