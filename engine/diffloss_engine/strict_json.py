"""JSON that came from somebody else: refused, with its place named, wherever it is not what was expected."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from diffloss_engine.errors import BundleError, DiffLossError

T = TypeVar("T")

MAX_BYTES = 16 * 1024 * 1024

_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file of at most `MAX_BYTES`, without NaN, infinities or repeated keys.

    Raises BundleError, naming the file, when it cannot be read or is not such a file.
    """
    return parse_json(read_limited(path, BundleError), str(path))


def read_limited(path: Path, error_class: type[DiffLossError]) -> bytes:
    """Read a file of at most `MAX_BYTES`. Raises an error of the given class, naming the file, if that cannot be."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise error_class(f"{path} is larger than the {MAX_BYTES} bytes that are read as JSON")
    return content


def parse_json(content: bytes, where: str) -> Any:
    """Parse UTF-8 JSON without NaN, infinities or repeated keys. Raises BundleError, naming `where`, if it is not."""
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    # Deep nesting is the one malformed input that the json module does not report as a ValueError.
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON: {error}") from error


def expect(value: object, kind: type[T], where: str) -> T:
    """Return `value` if its JSON type is `kind`, else raise BundleError; true and false are not integers."""
    if type(value) is not kind:
        came = _JSON_NAMES.get(type(value), type(value).__name__)
        raise BundleError(f"{where} is {came}, expected {_JSON_NAMES[kind]}")
    return value


def expect_positive(value: object, where: str) -> int:
    """Return `value` if it is an integer of at least 1, else raise BundleError."""
    number = expect(value, int, where)
    if number < 1:
        raise BundleError(f"{where} is {number}, expected at least 1")
    return number


def expect_object(value: object, keys: frozenset[str], where: str) -> dict[str, Any]:
    """Return `value` if it is an object with exactly these keys, else raise BundleError."""
    found = expect(value, dict, where)
    missing, unknown = sorted(keys - found.keys()), sorted(found.keys() - keys)
    if missing or unknown:
        raise BundleError(f"{where} lacks the fields {missing} and has the unknown fields {unknown}")
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object repeats a key: {sorted(key for key, _ in pairs)}")
    return found


def _finite(text: str) -> float:
    # What is beyond a float, such as 1e999, is read as infinity.
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond the range of a float")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
