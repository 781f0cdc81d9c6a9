"""Read one table of a TOML file: every key is taken once, with its type and its grammar.

The keys that were asked for are the keys that exist: `Table.finish` refuses any other and names
the nearest, so there is no second list of keys that could disagree.  Errors name the file, the
table, the key, the value and what to write instead.  cattrs and pydantic were considered: the
first needs as much code to give such messages, the second costs more than the rest of start-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from vfio_user_virtio.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")
_Value = TypeVar("_Value", str, int, bool)

_TYPE_NAMES: Final = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    float: "a number with a fraction",
    dict: "a table",
    list: "an array",
}


class Table:
    """One table of a file.  `where` is how messages call it, the file's name included."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.where = where
        self._values = values
        self._known: set[str] = set()

    def take(self, key: str, kind: type[_Value]) -> _Value | None:
        """The value of `key`, which must be a `kind`; None when it is absent."""
        self._known.add(key)
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise self.error(key, f"{_show(value)} is {_kind(value)}; write {_TYPE_NAMES[kind]}")
        return value

    def parse(self, key: str, grammar: Callable[[str], _T]) -> _T | None:
        """The string at `key` as `grammar` reads it, which raises ValueError to refuse it."""
        text = self.take(key, str)
        return None if text is None else self._checked(key, grammar, text)

    def check(self, key: str, check: Callable[[int], int]) -> int | None:
        """The integer at `key`, if `check` does not raise ValueError."""
        number = self.take(key, int)
        return None if number is None else self._checked(key, check, number)

    def table(self, key: str) -> Table:
        """The table at `key`, empty when it is absent."""
        self._known.add(key)
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"{_show(value)} is {_kind(value)}; write a table")
        return Table(value, f"{self.where}, {key}")

    def tables(self, key: str) -> list[Table]:
        """The array of tables at `key`, empty when it is absent."""
        self._known.add(key)
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"is {_kind(value)}; write [[{key}]] before each of them")
        return [Table(item, f"{self.where}, {key} {n}") for n, item in enumerate(value, 1)]

    def keys(self) -> list[str]:
        """The keys that are there."""
        return list(self._values)

    def finish(self) -> None:
        """Refuse whatever was not asked for."""
        for key in self._values:
            if key not in self._known:
                raise self.unknown("key", key, sorted(self._known))

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: {problem}")

    def unknown(self, what: str, name: str, known: list[str]) -> ConfigError:
        """An error that refuses `name` and offers the nearest of `known`, or all of them."""
        import difflib

        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(known)}"
        return ConfigError(f"{self.where}: unknown {what} {name!r}; {remedy}")

    def _checked(self, key: str, grammar: Callable[[_Value], _T], value: _Value) -> _T:
        try:
            return grammar(value)
        except ValueError as error:
            raise self.error(key, str(error)) from None


def _kind(value: object) -> str:
    return _TYPE_NAMES.get(type(value), "a date or time")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
