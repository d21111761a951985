"""JSON text that is no longer good: other values, other keys, other text."""

from __future__ import annotations

import json
from random import Random
from typing import Any

# Text in place of a value. What Python writes from a value is not enough: JSON can say more than Python can hold.
VALUES = (
    "null", "true", "false", "0", "-0", "1", "2", "3", "-1", "7", "32", "64", "128", "1e6", "1e-6", "0.0", "1e30",
    "1e308", "1e400", "-1e400", "1e-320", "NaN", "Infinity", "-Infinity", "2147483648", "4294967296",
    "9223372036854775807", "18446744073709551616", "1" + "0" * 5000, "-" + "9" * 5000,
    "0." + "1" * 5000, "100000", "1000000", "1099511627776",
    '""', '"x"', '"../.."', '"/etc"', '"\\ud800"', '"\\u0000"', '"\\n"', '"' + "a" * 100_000 + '"', "[]", "{}", "[1]",
    "[1,1,1,1]", "[1,1,1,1,1,1,1,1]", "[1000000,1,1,1]", "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000,
    '[null,{"a":[]}]', "[" + "1," * 20_000 + "1]",
)  # fmt: skip
MARK = "\x00value\x00"
CHARACTERS = '\0\n",]}é\ud800\uffff'


def mutated(text: str, rng: Random) -> tuple[str, str]:
    """(what was done, the text after it) of a JSON object."""
    if rng.random() < 0.25:
        return _torn(text, rng)
    data, done = json.loads(text), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(data)))
        way = rng.random()
        if way < 0.1:
            done.append(f"without {key!r}")
            del holder[key]
        elif way < 0.3 and type(holder[key]) in (int, float):
            holder[key] = rng.choice(
                (holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], holder[key] * 1e3)
            )
            done.append(f"{key!r}: {holder[key]!r}")
        else:
            value = rng.choice(VALUES)
            done.append(f"{key!r}: {value[:40]}")
            holder[key] = MARK + value
    return ", ".join(done), _with_raw_values(json.dumps(data))


def _places(data: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of every value below."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = [(data, key) for key, _ in items]
    for holder, key in list(found):
        found += _places(holder[key])
    return found


def _with_raw_values(text: str) -> str:
    """Marked strings replaced by what they stand for."""
    for value in sorted(VALUES, key=len, reverse=True):
        text = text.replace(json.dumps(MARK + value), value)
    return text


def _torn(text: str, rng: Random) -> tuple[str, str]:
    """The text as such, cut, doubled, buried or replaced."""
    place = rng.randrange(len(text))
    return rng.choice((
        ("cut off", text[:place]),
        ("a character changed", text[:place] + rng.choice(CHARACTERS) + text[place + 1 :]),
        ("a key twice", text.rstrip().removesuffix("}") + ',"hidden_size":1,"hidden_size":2,"model_type":"nextstep"}'),
        ("a value by itself", rng.choice(VALUES)),
        ("a thousand times", text * 1000),
        ("followed by megabytes", text + " " * (5 << 20)),
        ("a byte order mark", "\ufeff" + text),
        ("buried", "[" * 100_000 + text),
        ("nothing", ""),
    ))  # fmt: skip
