"""Checks that arguments have the types that are written beside them, and that a seed is one.

The command line and YAML come through jsonargparse, which sees to types; Python does not. A number of numpy would even
train, for hours, into a checkpoint that ``weights_only`` refuses to load.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_SEED = 2**32 - 1  # Lightning's and numpy's


def check_types(function: Callable[..., Any], given: Mapping[str, object]) -> None:
    """Check arguments against a function's annotations; of a ``Literal`` the type alone.

    Args:
        function: whose annotations.
        given: arguments by name; what is no argument of the function is passed over.

    Raises:
        TypeError: if one has another type.

    Example:
        >>> def blur(sigma: float | None = None) -> None: ...
        >>> check_types(blur, {"sigma": 2})
        >>> check_types(blur, {"sigma": "2"})
        Traceback (most recent call last):
        TypeError: sigma='2': expected float | None, not str.
    """
    for name, hint in get_type_hints(function).items():
        if name in given and not _fits(given[name], hint):
            value, annotation = given[name], function.__annotations__[name]
            msg = f"{name}={value!r}: expected {annotation}, not {type(value).__name__}."
            raise TypeError(msg)


def arguments_of(function: Callable[..., Any], given: Mapping[str, object]) -> dict[str, Any]:
    """Return those of some arguments that a function takes, by name.

    Example:
        >>> arguments_of(lambda sigma: None, {"sigma": 2, "seed": 0})
        {'sigma': 2}
    """
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


def check_seed(name: str, seed: int) -> None:
    """Check that every random generator takes a seed.

    Raises:
        ValueError: if one would not.
    """
    if not 0 <= seed <= LARGEST_SEED:
        msg = f"{name}={seed!r}: expected a seed, 0 to {LARGEST_SEED}."
        raise ValueError(msg)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument is one of those that there are.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        msg = f"{name}={value!r}: expected one of {', '.join(choices)}."
        raise ValueError(msg)


def check_positive(name: str, number: float | None) -> None:
    """Check that a number, if it is given, is above zero and finite.

    Raises:
        ValueError: if it is not.
    """
    if number is not None and not 0 < number < float("inf"):
        msg = f"{name}={number!r}: expected a number above 0."
        raise ValueError(msg)


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return type(value) in {type(choice) for choice in parts}
    if origin is not None:  # a sequence, or a tuple of a fixed length
        if not isinstance(value, list | tuple):
            return False
        kinds = parts if origin is tuple else parts * len(value)
        return len(value) == len(kinds) and all(_fits(*pair) for pair in zip(value, kinds, strict=True))
    if hint is float:
        return type(value) in {int, float}
    # Exactly: True is an int to Python, and numpy's float64 a float, its str_ a str.
    return type(value) is hint if hint in {int, bool, str} else isinstance(value, hint)
