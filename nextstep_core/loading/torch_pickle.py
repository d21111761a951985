"""The pickle of a torch archive, looked at before PyTorch unpickles it: it makes tensors, and dictionaries by name.

PyTorch refuses to call what it does not know, but it hashes whatever is a key. A key of pairs of pairs of pairs takes
years, numbers of one hash take hours, and a key that is nested deeply enough ends the process.
"""

from __future__ import annotations

import pickletools

from ..errors import shown

STORAGES = frozenset(
    f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Char", "Byte")
)
REBUILT = frozenset({"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"})
ORDERED = "collections OrderedDict"

# Of each value on the pickle's stack only this is known: what made it.
TEXTS = frozenset({"BINUNICODE", "SHORT_BINSTRING"})
NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"})
TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
FLAT = "a tuple without tuples in it"
MARK, NO_ITEMS, DICTIONARY, MADE = "MARK", "EMPTY_TUPLE", "EMPTY_DICT", "an ordered dictionary"
PUTS, GETS = frozenset({"BINPUT", "LONG_BINPUT"}), frozenset({"BINGET", "LONG_BINGET"})
PLAIN = TEXTS | NUMBERS | TUPLES | {MARK, NO_ITEMS, DICTIONARY, "PROTO", "STOP"}


def check_pickle(text: bytes) -> None:
    """ValueError when the pickle of an archive is anything else than a description of tensors by their names."""
    stack: list[str] = []
    memo: dict[object, str] = {}
    for code, argument, _ in pickletools.genops(text):
        kind = code.name
        if kind in PUTS:
            memo[argument] = stack[-1] if stack else _refuse(kind)
            continue
        taken = _take(stack, code)
        if kind == "GLOBAL":
            kind = str(argument) if argument in STORAGES | REBUILT | {ORDERED} else _refuse(argument)
        elif kind in GETS:
            kind = memo[argument] if argument in memo else _refuse(kind)
        elif kind in TUPLES:
            kind = FLAT if all(part in TEXTS | NUMBERS | STORAGES for part in taken if part != MARK) else kind
        elif kind in ("SETITEM", "SETITEMS"):
            kind, *items = (part for part in taken if part != MARK)
            if not set(items[::2]) <= TEXTS or kind not in (DICTIONARY, MADE):
                raise ValueError("a key in it is no name")
        elif kind == "REDUCE":
            called, given = taken
            kind = MADE if called == ORDERED and given == NO_ITEMS else called if called in REBUILT else _refuse(called)
        elif kind == "BUILD":
            kind = MADE if taken == [MADE, DICTIONARY] else _refuse(taken[0])
        elif kind == "BINPERSID":
            kind = kind if taken == [FLAT] else _refuse(taken[0])
        elif kind not in PLAIN:
            _refuse(argument or kind)
        if code.stack_after:
            stack.append(kind)


def _refuse(what: object) -> str:
    raise ValueError(f"{shown(what)} in it is not a tensor")


def _take(stack: list[str], code: pickletools.OpcodeInfo) -> list[str]:
    """What an operation takes off the stack, with the mark where it takes all that lies above one."""
    before = code.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        start = len(stack) - 1 - stack[::-1].index(MARK) - before.index(pickletools.markobject)
    if start < 0:
        raise ValueError("it takes what is not there")
    taken = stack[start:]
    del stack[start:]
    return taken
