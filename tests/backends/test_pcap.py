"""The capture file, byte for byte, and how a capture ends."""

from __future__ import annotations

import os
import resource
import signal
import struct
from typing import TYPE_CHECKING

import pytest

from tests.backends.switch_ports import FakeAlarm, MemberPort, UplinkPort, as_frame, ethernet, mac
from vfio_user_virtio.backends.software.pcap import Capture
from vfio_user_virtio.backends.software.switch import Switch

if TYPE_CHECKING:
    from pathlib import Path

NOW = 0x1801_0203_0405_0607


def golden() -> bytes:
    when = struct.pack("<II", NOW >> 32, NOW & 0xFFFF_FFFF).hex()
    return bytes.fromhex(
        # Section Header Block: little-endian, version 1.0, length unknown
        "0a0d0d0a 1c000000 4d3c2b1a 0100 0000 ffffffffffffffff 1c000000"
        # Interface Description Block: Ethernet, snap length 40; if_name, if_tsresol
        "01000000 2c000000 0100 0000 28000000"
        "0200 0800 6d656d6265722031 0900 0100 09000000 00000000 2c000000"
        # Enhanced Packet Block: 22 bytes whole, padded, inbound
        f"06000000 44000000 00000000 {when} 16000000 16000000"
        "525400000001 525400000000 88b5 3132333435363738 0000"
        "0200 0400 01000000 0000 0000 44000000"
        # Enhanced Packet Block: 40 of 114 bytes, outbound
        f"06000000 54000000 00000000 {when} 28000000 72000000"
        "525400000000 525400000001 88b5" + "61" * 26 + "0200 0400 02000000 0000 0000 54000000"
    )


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def test_golden_file(tmp_path: Path) -> None:
    path = tmp_path / "golden.pcapng"
    capture = Capture(opened(path), "member 1", snap_length=40, clock=lambda: NOW)
    capture.record(as_frame(ethernet(mac(1), mac(0), b"12345678"))[0], inbound=True)
    capture.record(as_frame(ethernet(mac(0), mac(1), b"a" * 100))[0], inbound=False)
    capture.close()
    capture.close()
    capture.record(as_frame(ethernet(mac(1), mac(0)))[0], inbound=True)
    assert path.read_bytes() == golden()


def test_both_directions_at_a_port_of_the_switch(tmp_path: Path) -> None:
    path = tmp_path / "member.pcapng"
    switch = Switch(alarm=FakeAlarm())
    a, uplink = MemberPort(switch, "a"), UplinkPort(switch)
    switch.plug(a, a)
    switch.plug_uplink(uplink)
    capture = Capture(opened(path), "a")
    switch.capture(a, capture)
    assert switch.direct_receiver(uplink) is None
    a.send(ethernet(mac(1), mac(0), b"to the uplink"))
    uplink.send(ethernet(mac(0), mac(1), b"to the member"))
    uplink.room = 0
    a.send(ethernet(mac(1), mac(0), b"not yet"))
    assert b"not yet" not in path.read_bytes()
    uplink.make_room()
    data = path.read_bytes()
    texts = (b"to the uplink", b"to the member", b"not yet")
    assert sorted(texts, key=data.index) == list(texts)
    switch.capture(a, None)
    assert switch.direct_receiver(uplink) is a
    assert a.send(ethernet(mac(1), mac(0), b"unseen"))
    assert b"unseen" not in path.read_bytes()
    capture.close()


def test_it_ends_at_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "bounded.pcapng"
    caplog.set_level("INFO")
    capture = Capture(opened(path), "a", max_size=300)
    for _ in range(50):
        capture.record(as_frame(ethernet(mac(1), mac(0), bytes(50)))[0], inbound=True)
    assert not capture.is_open
    assert 200 < path.stat().st_size <= 300
    assert len(caplog.records) == 1
    assert "capture of a ended: it has reached its bound" in caplog.text


def test_a_port_is_direct_again_when_its_capture_has_ended(tmp_path: Path) -> None:
    switch = Switch(alarm=FakeAlarm())
    a, uplink = MemberPort(switch, "a"), UplinkPort(switch)
    switch.plug(a, a)
    switch.plug_uplink(uplink)
    switch.capture(a, Capture(opened(tmp_path / "short.pcapng"), "a", max_size=100))
    assert switch.direct_receiver(uplink) is None
    assert a.send(ethernet(mac(1), mac(0), bytes(100)))
    assert switch.direct_receiver(uplink) is not None
    assert len(uplink.received) == 1


def test_a_write_error_ends_it_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    capture = Capture(writer, "a")
    os.close(reader)
    for _ in range(3):
        capture.record(as_frame(ethernet(mac(1), mac(0)))[0], inbound=True)
    assert not capture.is_open
    assert len(caplog.records) == 1
    assert "capture of a ended" in caplog.text


def test_a_file_that_takes_only_half_a_record_stays_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "full.pcapng"
    capture = Capture(opened(path), "a")
    begin = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (begin + 20, before[1]))
        capture.record(as_frame(ethernet(mac(1), mac(0)))[0], inbound=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not capture.is_open
    assert path.stat().st_size == begin
    assert "the file takes no more" in caplog.text


def test_half_a_record_in_a_pipe(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    capture = Capture(writer, "a")
    while capture.is_open:
        capture.record(as_frame(ethernet(mac(1), mac(0), bytes(9_000)))[0], inbound=True)
    assert caplog.records
    os.close(reader)


def test_frames_in_very_many_pieces(tmp_path: Path) -> None:
    path = tmp_path / "pieces.pcapng"
    data = bytes(12) + ethernet(mac(1), mac(0), bytes(range(256)) * 5)
    capture = Capture(opened(path), "a")
    capture.record([data[:30], *(data[n : n + 1] for n in range(30, len(data)))], inbound=True)
    capture.record([data[:5], b"", data[5:13], data[13:]], inbound=True)
    capture.close()
    assert path.read_bytes().count(data[12:]) == 2


def test_a_full_file_system_is_told_at_once() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        Capture(fd, "a")
    os.close(fd)


def test_a_snap_length_of_nothing_is_refused(tmp_path: Path) -> None:
    fd = opened(tmp_path / "never")
    with pytest.raises(ValueError, match="must be 1 or more"):
        Capture(fd, "a", snap_length=0)
    os.close(fd)
