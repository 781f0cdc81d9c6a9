"""Any image of device parts: the parts that a naive reader finds, or PartsError and nothing else.

That is: `parse_parts_untrusted` agrees with the format's text; what it accepts is written back byte
for byte, but for the zeros behind it; each part, whatever it is, has a name, a key and a value or a
PartsError that names it; putting parts into order neither adds nor drops one; and stripping what
some kernels append cuts 8 bytes behind the last part or nothing.

Run it with ``python -m tests.fuzz.fuzz_parts -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: the image.
"""

from __future__ import annotations

import importlib
import struct
import sys
from typing import TYPE_CHECKING, TypeAlias

from vfio_user_virtio import limits
from vfio_user_virtio.virtio.net_parts import decode_value_untrusted
from vfio_user_virtio.virtio.parts import (
    Part,
    PartsError,
    canonical,
    decode_headers_untrusted,
    decode_part_list_untrusted,
    encode_headers,
    encode_parts,
    first_out_of_order,
    first_repeated,
    image_size,
    parse_parts_untrusted,
    strip_kernel_junk,
)

if TYPE_CHECKING:
    from collections.abc import Callable

Fields: TypeAlias = tuple[int, int, int, bytes, bytes]


def expected(blob: bytes) -> list[Fields] | None:
    """What the image holds, as type, flags, reserved, selector and value; None if it is none."""
    found: list[Fields] = []
    while any(blob):
        if len(blob) < 16:
            return None
        type_, flags, reserved, selector, length = struct.unpack("<HBB8sI", blob[:16])
        if length > limits.MAX_PART_SIZE or not any(blob[:16]):
            return None
        value, blob = blob[16 : 16 + length], blob[16 + length :]
        if len(value) < length:
            return None
        found.append((type_, flags, reserved, selector, value))
    return None if len(found) > limits.MAX_PARTS else found


def refusal(decode: Callable[[], object]) -> PartsError | None:
    """The one place that says which exception may come out."""
    try:
        decode()
    except PartsError as error:
        return error
    return None


def parsed(blob: bytes) -> list[Part] | None:
    """What the library makes of it."""
    error = refusal(lambda: parse_parts_untrusted(blob))
    if error is None:
        return parse_parts_untrusted(blob)
    assert error.offset is not None
    assert 0 <= error.offset < len(blob)
    return None


def check_part(part: Part) -> None:
    assert part.name
    assert part.header.key[0] == part.type
    error = refusal(lambda: decode_value_untrusted(part))
    assert error is None or (error.part, error.offset) == (part.name, part.offset)


def check_headers(data: bytes) -> None:
    """As a list that was asked for, and as a device's answer."""
    assert data.startswith(encode_headers(decode_headers_untrusted(data)))
    if refusal(lambda: decode_part_list_untrusted(data)) is None:
        assert data[8:].startswith(encode_headers(decode_part_list_untrusted(data)))


def one_input(data: bytes) -> None:
    """One run of the fuzz target.  AssertionError or any other exception is a finding."""
    parts = parsed(data)
    fields = (
        None
        if parts is None
        else [(part.type, part.flags, part.reserved, part.selector, part.value) for part in parts]
    )
    assert fields == expected(data), "as the format says"
    check_headers(data)

    stripped, was_junk = strip_kernel_junk(data)
    assert stripped == (data[:-8] if was_junk else data)
    if was_junk:
        assert parsed(stripped) is not None, "there is an image before the junk"
        assert not strip_kernel_junk(stripped)[1], "only once"

    if parts is None:
        return
    raw = encode_parts(parts)
    assert len(raw) == image_size(parts)
    assert data.startswith(raw), "written back as it came"
    assert not any(data[len(raw) :]), "but for the zeros behind it"
    for part in parts:
        check_part(part)
    ordered = canonical(parts)
    assert first_out_of_order(ordered) is None
    assert sorted(map(repr, ordered)) == sorted(map(repr, parts))
    assert (first_repeated(parts) is None) == (first_repeated(ordered) is None)


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
