"""Typed records whose tensors are not converted by precision plugins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, Self, dataclass_transform

from torch import Tensor


@dataclass_transform()
class Record:
    """Base class whose annotations are fields, as in a dataclass.

    Precision plugins of Lightning and wrappers of distributed modules convert floating-point tensors in mappings, sequences, named tuples and
    dataclasses, but not in records. Statistics, log-probabilities and normalisers therefore stay float32 in every precision.
    """

    __signature__: ClassVar[inspect.Signature] = inspect.Signature()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherited = {name: parameter for base in reversed(cls.__mro__[1:]) for name, parameter in parameters_of(base).items()}
        own = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
        declared = {
            name: inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=vars(cls).get(name, inspect.Parameter.empty))
            for name in own
        }
        cls.__signature__ = inspect.Signature(list({**inherited, **declared}.values()))

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Create an instance.

        Raises:
            TypeError: If the class is a dataclass.
        """
        if is_dataclass(cls):
            raise TypeError(
                f"{cls.__name__} must not be decorated with @dataclass: precision plugins would convert its float tensors; "
                "its annotations are fields without the decorator"
            )
        return super().__new__(cls)

    def __init__(self, *values: Any, **named: Any) -> None:
        try:
            bound = self.__signature__.bind(*values, **named)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}; the fields are {', '.join(self.field_names())}") from None
        bound.apply_defaults()
        vars(self).update(bound.arguments)

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name in self.field_names())
        shown = (f"{name}={tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{name}={value!r}" for name, value in values)
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields, in the order of the constructor's arguments."""
        return tuple(cls.__signature__.parameters)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changed fields.

        Raises:
            TypeError: If there is no such field.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.field_names()}, **changes})


def parameters_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """Return the fields of a record class; empty for other classes."""
    return cls.__signature__.parameters if issubclass(cls, Record) else {}
