"""The records are the structures of the description, field by field and type by type."""

from __future__ import annotations

import types
import typing

import attrs
import pytest

from vfio_user_virtio.control import records
from vfio_user_virtio.control.idl import Array, Enum, Map, Maybe, Named, Primitive, Struct, Type
from vfio_user_virtio.control.interface import CONTROL
from vfio_user_virtio.migration.migratable_device import Holder
from vfio_user_virtio.protocol.migration import MigrationState

PRIMITIVES = {"bool": bool, "int": int, "float": float, "string": str, "object": dict}
CLASSES = {
    name: getattr(records, name) for name, kind in CONTROL.types.items() if isinstance(kind, Struct)
}


def as_python(kind: Type) -> object:
    match kind:
        case Primitive(name):
            return PRIMITIVES[name]
        case Named(name):
            found = CONTROL.types[name]
            return str if isinstance(found, Enum) else CLASSES[name]
        case Array(element):
            return types.GenericAlias(list, (as_python(element),))
        case Map(element):
            return types.GenericAlias(dict, (str, as_python(element)))
        case Maybe(element):
            return typing.cast("type", as_python(element)) | None
    raise AssertionError(kind)


@pytest.mark.parametrize("name", CLASSES)
def test_a_record_is_its_structure(name: str) -> None:
    kind = CONTROL.types[name]
    assert isinstance(kind, Struct)
    assert typing.get_type_hints(CLASSES[name]) == {
        field: as_python(element) for field, element in kind.fields.items()
    }


def test_enumerations_are_those_of_the_library() -> None:
    def words(name: str) -> set[str]:
        kind = CONTROL.types[name]
        assert isinstance(kind, Enum)
        return set(kind.words)

    assert words("MigrationState") == {state.name for state in MigrationState}
    assert words("Holder") == {holder.value for holder in Holder}


def test_to_json_and_back() -> None:
    device = records.Device(
        name="vm1",
        kind="software",
        identity="MAC address 02:00:00:00:00:01",
        abilities=["migration"],
        session=records.Session(connected=1.5, process=7, version=None, commands={"VERSION": 1}),
        migration=None,
        memory=records.Memory(3, 4096, 0),
        dirty_log="nobody",
    )
    shown = records.to_json(device)
    CONTROL.check_untrusted(Named("Device"), shown, strict=True)
    assert records.from_json(records.Device, shown) == device
    assert records.from_json(list[records.Range], [{"iova": 1, "size": 2}]) == [records.Range(1, 2)]
    del shown["migration"]
    assert records.from_json(records.Device, shown) == device
    assert attrs.asdict(device)["session"]["commands"] == {"VERSION": 1}
