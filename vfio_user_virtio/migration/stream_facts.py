"""What is in a migration stream, by name and value: for people, programs, and to compare two.

A stream is taken apart by the decoder that resumes a device, so what is refused here is refused
there.  What it refuses ends the reading with the error; what came before has been given by then.
The value of a single part may be malformed and the rest be of use: such a part is given with its
bytes and the problem.

Of two streams it is the state that they end in that is compared (`final_state`): the last image,
and the last record of ours.  `differences` speaks of parts by name, and of features, VLANs and
addresses one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio import limits
from vfio_user_virtio.errors import ClientError
from vfio_user_virtio.migration.private_record import (
    PRIVATE_TAG,
    PrivateState,
    decode_private_untrusted,
    describe,
)
from vfio_user_virtio.migration.stream import (
    RECORD_HEADER_SIZE,
    RecordHeader,
    StreamDecoder,
)
from vfio_user_virtio.virtio.part_text import Json, reading_untrusted, text
from vfio_user_virtio.virtio.parts import (
    Part,
    PartsError,
    encode_parts,
    first_out_of_order,
    first_repeated,
    parse_parts_untrusted,
    strip_kernel_junk,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_user_virtio.migration.stream import Record
    from vfio_user_virtio.protocol.header import Buffer

IMAGE: Final = "image"
PRIVATE: Final = "private"
SKIPPED: Final = "skipped"


@attrs.frozen
class Fact:
    """A part, or a field of the record of ours.

    `value` is the reading of it; of a malformed part, its bytes in hexadecimal, and `problem` says
    what is wrong.  `raw` is all of it, as it was in the stream.
    """

    name: str
    value: Json
    raw: bytes
    optional: bool = False
    problem: str | None = None


@attrs.frozen
class RecordFacts:
    """A record: an image, the record of ours, or one that was skipped.

    `offset` is where its header is in the stream, `size` that of its payload, both in bytes.
    """

    kind: str
    offset: int
    size: int
    tag: int
    facts: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        return [fact.problem for fact in self.facts if fact.problem is not None]


def read_stream_untrusted(
    pieces: Iterable[Buffer], *, max_record_size: int = limits.MAX_MIGRATION_RECORD
) -> Iterator[RecordFacts]:
    """The records of a stream that comes in `pieces`, each as it completes.

    Raises ClientError as `StreamDecoder` does, and where an image is not made of parts.
    """
    place = _Place()
    skipped: list[RecordFacts] = []
    decoder = StreamDecoder(
        max_record_size=max_record_size,
        on_skip=lambda header: skipped.append(_skipped(header, place.of_next(header.record_size))),
    )
    for piece in pieces:
        try:
            for record in decoder.feed_untrusted(piece):
                offset = place.of_next(len(record.payload))
                yield from skipped
                skipped.clear()
                yield _known_untrusted(record, offset)
        except ClientError:
            yield from skipped
            raise
        yield from skipped
        skipped.clear()
    decoder.finish_untrusted()


@attrs.define
class _Place:
    """Where the next record is, in bytes of the stream."""

    offset: int = 0

    def of_next(self, size: int) -> int:
        """Where the record is whose payload has `size` bytes; the next one is behind it."""
        offset = self.offset
        self.offset += RECORD_HEADER_SIZE + size
        return offset


def _skipped(header: RecordHeader, offset: int) -> RecordFacts:
    note = f"tag {header.tag:#x} is unknown here; the record is optional and was skipped"
    return RecordFacts(SKIPPED, offset, header.record_size, header.tag, notes=(note,))


def _known_untrusted(record: Record, offset: int) -> RecordFacts:
    read = _private_untrusted if record.tag == PRIVATE_TAG else _image_untrusted
    try:
        facts, notes = read(bytes(record.payload))
    except ClientError as error:
        raise ClientError(error.errno, f"in the record at byte {offset}: {error.args[0]}") from None
    kind = PRIVATE if record.tag == PRIVATE_TAG else IMAGE
    return RecordFacts(kind, offset, len(record.payload), record.tag, tuple(facts), tuple(notes))


def _private_untrusted(payload: bytes) -> tuple[list[Fact], list[str]]:
    state, notes = decode_private_untrusted(payload)
    return private_facts(state), list(notes)


def private_facts(state: PrivateState) -> list[Fact]:
    """The fields that are there."""
    return [Fact(name, shown, shown.encode()) for name, shown in describe(state).items()]


def _image_untrusted(payload: bytes) -> tuple[list[Fact], list[str]]:
    image, had_junk = strip_kernel_junk(payload)
    parts = parse_parts_untrusted(image)
    return part_facts(parts), [*_notes(parts, had_junk=had_junk)]


def _notes(parts: list[Part], *, had_junk: bool) -> Iterator[str]:
    if had_junk:
        yield "the last 8 bytes are junk: the source is Linux 6.13.0 to 6.15.2"
    if (late := first_out_of_order(parts)) is not None:
        yield f"{late.name} comes later than the standard allows"
    if (again := first_repeated(parts)) is not None:
        yield f"{again.name} is there more than once"


def part_facts(parts: Iterable[Part]) -> list[Fact]:
    """Each part by name and value; one that is malformed with its problem."""
    return [_fact_untrusted(part) for part in parts]


def _fact_untrusted(part: Part) -> Fact:
    raw = encode_parts([part])
    try:
        return Fact(part.name, reading_untrusted(part), raw, part.header.optional)
    except PartsError as error:
        return Fact(part.name, part.value.hex(), raw, part.header.optional, str(error.args[0]))


# --- two streams --------------------------------------------------------------------------------


@attrs.frozen
class Difference:
    """What one state has otherwise than another; `text` says so in a line.

    `ours` and `theirs` are the readings, None where there is none.
    """

    name: str
    ours: Json | None
    theirs: Json | None
    text: str


def final_state(records: Iterable[RecordFacts]) -> list[Fact]:
    """What a device would be resumed with: the last image, and the last record of ours."""
    last: dict[str, tuple[Fact, ...]] = {IMAGE: (), PRIVATE: ()}
    for record in records:
        last[record.kind] = record.facts
    return [*last[IMAGE], *last[PRIVATE]]


def differences(ours: Iterable[Fact], theirs: Iterable[Fact]) -> list[Difference]:
    """What differs, in our order, with what only they have behind it; nothing if all is the same.

    In the text ``-`` stands before what only we have, ``+`` before what only they have.
    """
    mine, others = _by_name(ours), _by_name(theirs)
    found = [_difference(name, mine.get(name), others.get(name)) for name in {**mine, **others}]
    changed = [difference for difference in found if difference is not None]
    common = [name for name in mine if name in others]
    order = [name for name in others if name in mine]
    if common != order:
        changed.append(Difference("order of parts", [*common], [*order], "not the same"))
    return changed


def _by_name(facts: Iterable[Fact]) -> dict[str, Fact]:
    """Facts by name; a second of the same name has its number behind it."""
    named: dict[str, Fact] = {}
    count: dict[str, int] = {}
    for fact in facts:
        count[fact.name] = number = count.get(fact.name, 0) + 1
        named[fact.name if number == 1 else f"{fact.name} ({number})"] = fact
    return named


def _difference(name: str, mine: Fact | None, other: Fact | None) -> Difference | None:
    if mine is None or other is None:
        present = mine or other
        assert present is not None
        sign = "-" if other is None else "+"
        line = f"{sign} {text(present.value, name)}"
        return Difference(
            name, None if mine is None else mine.value, None if other is None else other.value, line
        )
    if mine.raw == other.raw:
        return None
    if mine.value != other.value:
        line = _changed(mine.value, other.value, name)
    elif mine.optional != other.optional:
        line = "-OPTIONAL" if mine.optional else "+OPTIONAL"
    else:
        line = f"the same value, in bytes -{_bytes(mine)} +{_bytes(other)}"
    return Difference(name, mine.value, other.value, line)


def _changed(mine: Json, other: Json, name: str) -> str:
    if isinstance(mine, list) and isinstance(other, list):
        before, after = [text(entry) for entry in mine], [text(entry) for entry in other]
        both = {*before} & {*after}
        gone = [f"-{entry}" for entry in before if entry not in both]
        new = [f"+{entry}" for entry in after if entry not in both]
        return text([*gone, *new]) if gone or new else "the same entries, ordered otherwise"
    if isinstance(mine, dict) and isinstance(other, dict):
        return ", ".join(
            f"{key} {_changed(mine[key], other[key], key)}"
            for key in mine
            if mine[key] != other[key]
        )
    return f"-{text(mine, name)} +{text(other, name)}"


def _bytes(fact: Fact) -> str:
    return text(fact.raw.hex())
