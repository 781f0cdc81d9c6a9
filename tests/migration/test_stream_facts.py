"""What is read out of streams, and what two states differ in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.golden_streams import NAMES, golden
from tests.virtio.part_images import IMAGE, PARTS
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import (
    PRIVATE_TAG,
    PrivateState,
    encode_private,
)
from vfio_user_virtio.migration.stream import (
    OPTIONAL,
    RecordHeader,
    encode_image,
    encode_private_record,
    encode_record_header,
)
from vfio_user_virtio.migration.stream_facts import (
    IMAGE as IMAGE_KIND,
)
from vfio_user_virtio.migration.stream_facts import (
    PRIVATE,
    SKIPPED,
    RecordFacts,
    differences,
    final_state,
    part_facts,
    private_facts,
    read_stream_untrusted,
)
from vfio_user_virtio.virtio.common_parts import (
    VqCfg,
    common_cfg_part,
    dev_features_part,
    device_status_part,
    drv_features_part,
    vq_cfg_part,
)
from vfio_user_virtio.virtio.features import Feature, mask_of
from vfio_user_virtio.virtio.net_parts import MacTable, mac_table_part, vlan_part
from vfio_user_virtio.virtio.part_header import PartType, queue_selector
from vfio_user_virtio.virtio.parts import Part, encode_parts

MAC_A = bytes.fromhex("525400000001")
MAC_B = bytes.fromhex("525400000002")


def read(*pieces: bytes) -> list[RecordFacts]:
    return list(read_stream_untrusted(pieces))


def values(record: RecordFacts) -> dict[str, object]:
    return {fact.name: fact.value for fact in record.facts}


def until_refused(*pieces: bytes) -> tuple[list[RecordFacts], str]:
    """The records that came before the error, and the error."""
    found: list[RecordFacts] = []
    with pytest.raises(ClientError) as caught:
        found.extend(read_stream_untrusted(pieces))
    # `extend` keeps what it got before an exception
    return found, str(caught.value.args[0])


def test_an_image_by_name_and_value() -> None:
    (record,) = read(golden("image"))
    assert (record.kind, record.offset, record.size, record.tag) == (IMAGE_KIND, 0, 58, 0)
    assert values(record) == {
        "DEV_FEATURES": ["STATUS", "CTRL_VQ", "CTRL_RX", "VERSION_1"],
        "DEVICE_STATUS": ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"],
        "CVQ_CFG RX_PROMISC": True,
    }
    assert [fact.optional for fact in record.facts] == [True, False, False]
    assert record.problems == []
    assert record.notes == ()


def test_records_and_where_they_are() -> None:
    places = [(record.kind, record.offset, record.size) for record in read(golden("pre_copy"))]
    assert places == [(IMAGE_KIND, 0, 17), (IMAGE_KIND, 33, 17), (IMAGE_KIND, 66, 34)]
    skipped, empty, image = read(golden("optional"))
    assert [record.offset for record in (skipped, empty, image)] == [0, 21, 37]
    assert (skipped.kind, skipped.size, skipped.tag) == (SKIPPED, 5, 0x1234_5678)
    assert "0x12345678" in skipped.notes[0]
    assert (empty.kind, empty.size, empty.tag) == (SKIPPED, 0, 0x1234_5679)
    assert image.kind == IMAGE_KIND
    trailing = encode_image(IMAGE) + encode_record_header(RecordHeader(0, OPTIONAL, 7))
    assert [record.kind for record in read(trailing)] == [IMAGE_KIND, SKIPPED]


def test_the_record_of_ours() -> None:
    _, record = read(golden("private"))
    assert (record.kind, record.offset, record.size, record.tag) == (PRIVATE, 33, 62, PRIVATE_TAG)
    assert values(record)["status"] == "LINK_UP|ANNOUNCE"
    assert values(record)["mac"] == "52:54:00:12:34:56"
    newer = golden("image") + encode_private_record(golden("private_newer"))
    _, record = read(newer)
    assert values(record) == {"config_generation": "42"}
    assert ["field 9 " in record.notes[0], "field 65535 " in record.notes[1]] == [True, True]


def test_notes_on_what_is_odd() -> None:
    (record,) = read(golden("kernel_6_13"))
    assert "8 bytes are junk" in record.notes[0]
    status, features = device_status_part(15), drv_features_part(0)
    (record,) = read(encode_image(encode_parts([status, features, features])))
    late, again = record.notes
    assert late == "DRV_FEATURES comes later than the standard allows"
    assert again == "DRV_FEATURES is there more than once"
    assert record.problems == []


def test_a_malformed_value_is_shown_as_it_is_and_the_rest_by_value() -> None:
    bad = Part(PartType.VQ_CFG, b"abc", queue_selector(2))
    (record,) = read(encode_image(encode_parts([bad, *PARTS])))
    assert values(record)["VQ_CFG queue 2"] == "616263"
    (problem,) = record.problems
    assert problem == "VQ_CFG queue 2 at byte 0: its value has 3 bytes, not 32"
    assert len(record.facts) == 1 + len(PARTS)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "private_newer"])
def test_however_it_is_cut(name: str) -> None:
    def outcome(*pieces: bytes) -> tuple[list[RecordFacts], str]:
        found: list[RecordFacts] = []
        try:
            found.extend(read_stream_untrusted(pieces))
        except ClientError as error:
            return found, str(error)
        return found, ""

    stream = golden(name)
    whole = outcome(stream)
    assert bool(whole[1]) == (name == "mandatory")
    assert outcome(*(bytes((byte,)) for byte in stream)) == whole


def test_what_came_before_an_error_has_been_given() -> None:
    skipped = encode_record_header(RecordHeader(0, OPTIONAL, 7))
    found, problem = until_refused(skipped + golden("mandatory"))
    assert [record.kind for record in found] == [SKIPPED, IMAGE_KIND]
    assert "tag 0x12345678" in problem
    found, problem = until_refused(skipped + encode_record_header(RecordHeader(0, 0, 8)))
    assert [record.kind for record in found] == [SKIPPED]
    found, problem = until_refused(skipped + golden("image")[:-1])
    assert [record.kind for record in found] == [SKIPPED]
    assert "ends 1 bytes before the end" in problem
    found, problem = until_refused(golden("image"), encode_image(b"\1" * 16))
    assert len(found) == 1
    assert problem.startswith("in the record at byte 74: DRV_FEATURES at byte 0")
    assert until_refused(b"")[1] == "the migration stream has no image of the device"
    private = encode_private_record(b"\2\0\0\0")
    assert "in the record at byte 74: our record" in until_refused(golden("image") + private)[1]


def test_a_size_limit() -> None:
    with pytest.raises(ClientError, match="the limit is 10"):
        list(read_stream_untrusted([golden("image")], max_record_size=10))


@given(st.lists(st.binary(max_size=100), max_size=4))
def test_anything_is_read_or_refused(pieces: list[bytes]) -> None:
    for stream in (pieces, [encode_image(b"".join(pieces) + b"\0"), *pieces]):
        try:
            found = read(*stream)
        except ClientError:
            continue
        assert any(record.kind == IMAGE_KIND for record in found)


# --- two states ---------------------------------------------------------------------------------


def changes(ours: list[Part], theirs: list[Part]) -> dict[str, str]:
    found = differences(part_facts(ours), part_facts(theirs))
    return {difference.name: difference.text for difference in found}


def test_the_last_image_and_the_last_record_of_ours_count() -> None:
    state = final_state(read(golden("pre_copy")))
    assert [fact.name for fact in state] == ["DEVICE_STATUS", "CVQ_CFG RX_PROMISC"]
    assert state[1].value is False
    names = [fact.name for fact in final_state(read(golden("private")))]
    assert names[:2] == ["DEVICE_STATUS", "guest_offloads"]
    skipped = encode_record_header(RecordHeader(0, OPTIONAL, 7))
    assert [fact.name for fact in final_state(read(golden("private") + skipped))] == names


def test_nothing_differs() -> None:
    assert changes(PARTS, PARTS) == {}
    assert changes([], []) == {}


def test_entries_of_lists_one_by_one() -> None:
    ours = mask_of((Feature.MAC, Feature.MRG_RXBUF, Feature.VERSION_1))
    theirs = mask_of((Feature.MAC, Feature.GUEST_ANNOUNCE, Feature.VERSION_1))
    assert changes(
        [drv_features_part(ours), vlan_part({1, 7}), mac_table_part(MacTable((MAC_A,)))],
        [drv_features_part(theirs), vlan_part({1, 10, 5}), mac_table_part(MacTable((MAC_B,)))],
    ) == {
        "DRV_FEATURES": "-MRG_RXBUF +GUEST_ANNOUNCE",
        "CVQ_CFG VLAN_ADD": "-7 +5 +10",
        "CVQ_CFG MAC_TABLE_SET": "unicast -52:54:00:00:00:01 +52:54:00:00:00:02",
    }
    swapped = [mac_table_part(MacTable((MAC_A, MAC_B))), mac_table_part(MacTable((MAC_B, MAC_A)))]
    assert changes(swapped[:1], swapped[1:]) == {
        "CVQ_CFG MAC_TABLE_SET": "unicast the same entries, ordered otherwise"
    }


def test_fields_and_numbers() -> None:
    assert changes(
        [common_cfg_part(16, 0xFFFF), vq_cfg_part(0, VqCfg(256, 1, True, 0x1000, 0x2000, 0x3000))],
        [common_cfg_part(16, 4), vq_cfg_part(0, VqCfg(256, 2, False, 0x1000, 0x2000, 0x8000))],
    ) == {
        "PCI_COMMON_CFG config_msix_vector": "-none +4",
        "VQ_CFG queue 0": "msix_vector -1 +2, enabled -on +off, device -0x3000 +0x8000",
    }


def test_parts_that_one_side_has() -> None:
    status, vlans = device_status_part(15), vlan_part({4})
    (gone,) = differences(part_facts([status, vlans]), part_facts([status]))
    assert (gone.name, gone.ours, gone.theirs) == ("CVQ_CFG VLAN_ADD", [4], None)
    assert gone.text == "- 4"
    assert changes([status], [status, vlans]) == {"CVQ_CFG VLAN_ADD": "+ 4"}
    assert changes([status], [status, status]) == {
        "DEVICE_STATUS (2)": "+ ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK"
    }


def test_what_reads_the_same_and_is_not() -> None:
    one, two = dev_features_part(33, words=1), dev_features_part(33, words=2)
    text = changes([one], [two])["DEV_FEATURES"]
    assert text.startswith("the same value, in bytes -00010100")
    mandatory = Part(one.type, one.value)
    assert changes([one], [mandatory]) == {"DEV_FEATURES": "-OPTIONAL"}
    assert changes([mandatory], [one]) == {"DEV_FEATURES": "+OPTIONAL"}
    vlans, status = vlan_part({4}), device_status_part(15)
    (order,) = differences(part_facts([vlans, status]), part_facts([status, vlans]))
    assert order.name == "order of parts"
    assert order.theirs == ["DEVICE_STATUS", "CVQ_CFG VLAN_ADD"]


def test_a_malformed_part_against_a_sound_one() -> None:
    sound = vq_cfg_part(0, VqCfg(8, 0, True, 0, 0, 0))
    bad = Part(PartType.VQ_CFG, b"\1", queue_selector(0))
    assert changes([bad], [sound])["VQ_CFG queue 0"].startswith("-01 +size 8, ")


def test_fields_of_ours_that_differ() -> None:
    ours, theirs = PrivateState(isr=1, config_generation=3), PrivateState(isr=1, mac=MAC_A)
    found = differences(private_facts(ours), private_facts(theirs))
    assert [(one.name, one.text) for one in found] == [
        ("config_generation", "- 3"),
        ("mac", "+ 52:54:00:00:00:01"),
    ]
    stream = encode_image(IMAGE) + encode_private_record(encode_private(ours))
    assert differences(final_state(read(stream))[len(PARTS) :], private_facts(ours)) == []


some_parts = st.lists(
    st.builds(
        Part,
        st.sampled_from([*PartType, 0x201]),
        st.sampled_from([part.value for part in PARTS]) | st.binary(max_size=40),
        st.sampled_from([part.selector for part in PARTS]),
        st.integers(0, 1),
    ),
    max_size=6,
)


@given(some_parts, some_parts)
def test_there_are_differences_exactly_if_the_images_differ(
    ours: list[Part], theirs: list[Part]
) -> None:
    found = differences(part_facts(ours), part_facts(theirs))
    back = differences(part_facts(theirs), part_facts(ours))
    assert bool(found) == (encode_parts(ours) != encode_parts(theirs))
    assert {one.name for one in found} == {one.name for one in back}
    assert all(one.text.isprintable() for one in found)
