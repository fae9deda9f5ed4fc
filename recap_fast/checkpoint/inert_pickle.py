"""Reads a pickle without running anything that is in it.

Python's unpickler imports and calls what a pickle names. This one knows the few opcodes by which
plain values and dataclasses are written, and makes `Inert` objects, which only say what they were.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import Any, Final


class Refused(Exception):
    """A pickle has more than plain values and known names, or is cut; says what."""


class Inert:
    """A name, or the object that a pickle would have made by it.

    Attributes:
        name: of the class or function, with its module.
        arguments: what it would have been called with; None for the name itself.
        state: what would have been set on the object.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


_MARK: Final = object()
_USHORT, _UINT, _INT = (struct.Struct(form) for form in ("<H", "<I", "<i"))


def parse(data: bytes, known: Container[str]) -> Any:
    """Returns what a pickle holds: None, bool, int, str, list, tuple, dict, and `Inert` objects.

    Takes time and memory in proportion to the length of `data`, whatever it says.

    Args:
        data: of protocol 2 to 5.
        known: the names, such as "torch.Size", that it may have.

    Raises:
        Refused: It has anything else.
    """
    return _Machine(data, known).run()


class _Machine:
    """A stack, and what each opcode does to it."""

    def __init__(self, data: bytes, known: Container[str]) -> None:
        self._data = data
        self._known = known
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        data = self._data
        try:
            while True:
                opcode = data[self._at]
                self._at += 1
                if opcode == _STOP:
                    (value,) = self._stack
                    return value
                _OPCODES[opcode](self)
        except Refused:
            raise
        except KeyError:
            raise Refused(f"it has the opcode {opcode:#04x} at byte {self._at - 1}") from None
        except (LookupError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise Refused(f"it is no pickle: at byte {self._at}, {error}") from error

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise Refused("it is cut")
        self._at += count
        return part

    def _number(self, form: struct.Struct) -> int:
        value: int = form.unpack_from(self._data, self._at)[0]
        self._at += form.size
        return value

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _until_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("there is no mark")
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _push_long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._byte()), "little", signed=True))

    def _push_text(self, length: int) -> None:
        self._stack.append(str(self._take(length), "utf-8", "surrogatepass"))

    def _push_tuple(self, count: int) -> None:
        if count > len(self._stack):
            raise ValueError("the stack is too short")
        place = len(self._stack) - count
        self._stack[place:] = [tuple(self._stack[place:])]

    def _append(self, items: list[Any]) -> None:
        owner = self._stack[-1]
        if type(owner) is not list:
            raise ValueError(f"items for a {type(owner).__name__}")
        owner += items

    def _set_items(self, items: list[Any]) -> None:
        owner = self._stack[-1]
        if type(owner) is not dict:
            raise ValueError(f"keys for a {type(owner).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, Inert):  # others may be made to have one hash
                raise ValueError(f"a key that is a {type(key).__name__}")
            owner[key] = value

    def _name(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        full = f"{module}.{name}"
        if full not in self._known:
            raise Refused(f"it names {full[:80]!r}, which is not of a checkpoint")
        self._stack.append(Inert(full))

    def _call(self) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if type(arguments) is not tuple or type(function) is not Inert:
            raise ValueError("a call of something else than a name")
        if function.arguments is not None:
            raise ValueError(f"a call of an object of {function.name}")
        self._stack.append(Inert(function.name, arguments))

    def _set_state(self) -> None:
        state = self._stack.pop()
        owner = self._stack[-1]
        if type(owner) is not Inert or owner.arguments is None or owner.state is not None:
            raise ValueError("a state for what takes none")
        owner.state = state


_STOP: Final = ord(".")
# By what the pickle module calls them. There is none that imports, persists, extends or finds in
# the memo by a number that the pickle chose.
_OPCODES: Final[dict[int, Callable[[_Machine], Any]]] = {
    0x80: lambda m: m._take(1),  # PROTO
    0x95: lambda m: m._take(8),  # FRAME
    0x94: lambda m: m._memo.append(m._stack[-1]),  # MEMOIZE
    ord("h"): lambda m: m._stack.append(m._memo[m._byte()]),  # BINGET
    ord("j"): lambda m: m._stack.append(m._memo[m._number(_UINT)]),  # LONG_BINGET
    ord("N"): lambda m: m._stack.append(None),  # NONE
    0x88: lambda m: m._stack.append(True),  # NEWTRUE
    0x89: lambda m: m._stack.append(False),  # NEWFALSE
    ord("K"): lambda m: m._stack.append(m._byte()),  # BININT1
    ord("M"): lambda m: m._stack.append(m._number(_USHORT)),  # BININT2
    ord("J"): lambda m: m._stack.append(m._number(_INT)),  # BININT
    0x8A: lambda m: m._push_long(),  # LONG1
    0x8C: lambda m: m._push_text(m._byte()),  # SHORT_BINUNICODE
    ord("X"): lambda m: m._push_text(m._number(_UINT)),  # BINUNICODE
    ord("("): lambda m: m._stack.append(_MARK),  # MARK
    ord("]"): lambda m: m._stack.append([]),  # EMPTY_LIST
    ord("a"): lambda m: m._append([m._stack.pop()]),  # APPEND
    ord("e"): lambda m: m._append(m._until_mark()),  # APPENDS
    ord("}"): lambda m: m._stack.append({}),  # EMPTY_DICT
    ord("s"): lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),  # SETITEM
    ord("u"): lambda m: m._set_items(m._until_mark()),  # SETITEMS
    ord(")"): lambda m: m._stack.append(()),  # EMPTY_TUPLE
    0x85: lambda m: m._push_tuple(1),  # TUPLE1
    0x86: lambda m: m._push_tuple(2),  # TUPLE2
    0x87: lambda m: m._push_tuple(3),  # TUPLE3
    ord("t"): lambda m: m._stack.append(tuple(m._until_mark())),  # TUPLE
    0x93: lambda m: m._name(),  # STACK_GLOBAL
    ord("R"): lambda m: m._call(),  # REDUCE
    0x81: lambda m: m._call(),  # NEWOBJ
    ord("b"): lambda m: m._set_state(),  # BUILD
}
