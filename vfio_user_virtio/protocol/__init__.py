"""The vfio-user wire format, sans-I/O: bytes and fd numbers in, values out, and back.

One module per group of commands, both directions in each: `encode_…_request` and
`decode_…_reply_untrusted` are what the sender of a command needs, `decode_…_request_untrusted` and
`encode_…_reply` what its receiver needs.  They deal in payloads, the bytes after the 16-byte
header; `header` puts the header in front.  (Register access is the exception: see `region`.)

Whose bytes are they?  Both peers are hostile, but what can be done about it differs:

- a malformed *request* raises `ClientError`: its sender gets an error reply, the connection lives;
- a malformed *reply* raises `ConnectionLost`: nothing that could be answered, nothing to rely on;
- broken framing and a failed VERSION raise `ConnectionLost`.

Decoders check what can be known from the message alone.  Whether an index, an offset or a vector
exists is for the session to say, with the `check_…` functions that stand beside the decoders.

Integers are little-endian: the protocol says host-endian, and the hosts are.
"""
