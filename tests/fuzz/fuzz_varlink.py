"""Any bytes to the control interface: calls or the end of the connection, and never anything else.

That is: what the splitter gives has no NUL and is within the limit, however it was cut; each
message is a call or ConnectionLost; and each call's parameters fit its method's description, or
MismatchError names the place.  What was a call is one again when it is encoded.

Run it with ``python -m tests.fuzz.fuzz_varlink -max_total_time=60`` (atheris, libFuzzer's options);
the tests run `one_input` on hypothesis' bytes.

Input: the size of the first piece, a byte, then what a peer sends.
"""

from __future__ import annotations

import importlib
import sys

from vfio_user_virtio.control.idl import MismatchError
from vfio_user_virtio.control.interface import INTERFACES
from vfio_user_virtio.control.varlink import (
    END,
    Call,
    Splitter,
    decode_call_untrusted,
    encode_call,
)
from vfio_user_virtio.errors import ConnectionLost

LIMIT = 4096


def check_parameters(call: Call) -> bool:
    """Whether a method of ours would be carried out."""
    interface = INTERFACES.get(call.interface)
    if interface is None or (method := interface.methods.get(call.name)) is None:
        return False
    try:
        interface.check_untrusted(method.parameters, dict(call.parameters), strict=True)
    except MismatchError:
        return False
    return True


def one_input(data: bytes) -> int:
    """One run of the fuzz target; how many calls would be carried out.  AssertionError or any
    other exception is a finding."""
    first = data[0] if data else 0
    splitter = Splitter(LIMIT)
    carried_out = 0
    try:
        for piece in (data[1 : 1 + first], data[1 + first :]):
            for message in splitter.feed_untrusted(piece):
                assert END not in message
                assert len(message) <= LIMIT
                call = decode_call_untrusted(message)
                carried_out += check_parameters(call)
                again = encode_call(call)
                assert decode_call_untrusted(again[:-1]) == call
    except ConnectionLost:
        pass
    return carried_out


def main() -> None:
    atheris = importlib.import_module("atheris")  # has no types, and is not there on Python 3.14
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
