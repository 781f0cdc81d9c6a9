"""What the control interface offers, as its varlink description: `CONTROL`, and varlink's own.

`records` are the same structures as classes.

Every method that changes a device names it.  What lasts (a device that is stopped, half loaded, or
whose writes are logged) belongs to the connection that began it, and ends with it, so that an
orchestrator that dies leaves a guest that runs; with ``keep`` it outlasts the connection, and any
other may go on with it.  A client that migrates the device itself, or logs, comes first: then all
of that is refused with Busy, and the other way round.
"""

from __future__ import annotations

from typing import Final

from vfio_user_virtio.control.idl import parse

CONTROL_TEXT: Final = """\
# The devices of a vfio-user-virtio server: how they are, and what it takes to move their guests.
interface io.vfio-user-virtio.Control

# What a device offers here. A method that it does not offer answers NotSupported. dirty_pages: its
# dirty log knows which pages were written; without that, all that it may write always counts.
type Ability (migration, dirty_log, dirty_pages, memory, replay, announce)

# The states of linux/vfio.h.
type MigrationState (
  ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P
)

# Who has the migration, or the dirty log, of a device in hand.
type Holder (nobody, client, control)

# The client of a device. connected: seconds since 1970; process: its pid, if that can be seen.
# version: what was negotiated, null before. commands: how many of each it has sent.
type Session (
  connected: float,
  process: ?int,
  version: ?string,
  commands: [string]int,
  errors: int,
  bytes_received: int,
  bytes_sent: int
)

# options: optional states on offer. to_read: bytes of the stream that can be read now; read,
# loaded: bytes that have been. images: whole ones that were loaded. half_loaded: something was, and
# takes effect when the device runs.
type Migration (
  state: MigrationState,
  options: []string,
  holder: Holder,
  to_read: int,
  read: int,
  loaded: int,
  images: int,
  half_loaded: bool
)

# mappings, mapped, remote: how many DMA mappings there are, and the bytes in those that came with a
# file and without.
type Memory (mappings: int, mapped: int, remote: int)

type Device (
  name: string,
  kind: string,
  identity: string,
  abilities: []Ability,
  session: ?Session,
  migration: ?Migration,
  memory: ?Memory,
  dirty_log: Holder
)

# Counters since the server was started, in groups such as device, port and interrupts.
type Counters (group: string, counts: [string]int)

type Statistics (device: string, counters: []Counters)

# size bytes of guest memory from iova on.
type Range (iova: int, size: int)

type Mapping (iova: int, size: int, read: bool, write: bool, file: bool)

# What is in these ranges of guest memory, one after the other, in base64.
type Pages (ranges: []Range, data: string)

method GetDevices() -> (devices: []Device)

method GetDevice(device: string) -> (device: Device)

# Of one device, or of all.
method GetStatistics(device: ?string) -> (statistics: []Statistics)

# Stop a device, as migration does: it finishes what it has begun, touches no memory, sends no
# interrupt. Nothing if it has been done here.
method Quiesce(device: string, keep: ?bool) -> ()

# Let it run, with whatever was loaded; each queue is looked at, each interrupt sent once, and where
# something was loaded the network is told.
method Resume(device: string) -> ()

# End what was begun here with a device: it runs as it did before, and one that is half loaded is
# reset.
method Release(device: string) -> ()

# Go to a migration state, by way of others if need be.
method SetMigrationState(device: string, state: MigrationState, keep: ?bool)
  -> (migration: Migration)

# Look for a newer image (in PRE_COPY): bytes to read of the first one, and beyond.
method GetPrecopyInfo(device: string) -> (initial: int, dirty: int)

# How many bytes the final image is likely to have.
method GetImageSize(device: string) -> (size: int)

# What there is of the migration stream, in pieces (more), in base64; the last one is empty.
method ReadImage(device: string) -> (data: string)

# The next bytes of the migration stream, in base64.
method WriteImage(device: string, data: string) -> (migration: Migration)

# Log what the device writes to guest memory, in these ranges, or everywhere.
method StartDirtyLog(device: string, ranges: ?[]Range, keep: ?bool) -> ()

method StopDirtyLog(device: string) -> ()

# What was written since the last report (more): in a range, or in all that is mapped. Whole pages.
method ReportDirtyLog(device: string, range: ?Range) -> (ranges: []Range)

# The client's DMA mappings (more).
method GetMappings(device: string) -> (mappings: []Mapping)

# Guest memory, in pieces (more) that WriteMemory takes as they are.
method ReadMemory(device: string, ranges: []Range) -> (pages: Pages)

method WriteMemory(device: string, pages: Pages) -> (size: int)

# Look at each queue as if its driver had notified, and send each interrupt once. The guest of a
# physical device must not be setting it up meanwhile.
method Replay(device: string) -> ()

# Tell the network that the device's address is here.
method Announce(device: string) -> ()

error DeviceNotFound (device: string)

# The device does not offer this; why is for people.
error NotSupported (device: string, ability: Ability, why: string)

# Somebody else has it in hand.
error Busy (device: string, why: string)

# There is no client, and therefore no guest memory.
error NoClient (device: string)

# The device refuses; errno is Linux's.
error Refused (device: string, errno: int, why: string)
"""

SERVICE_TEXT: Final = """\
# What every varlink service offers.
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied ()

error ExpectedMore ()
"""

CONTROL: Final = parse(CONTROL_TEXT)
SERVICE: Final = parse(SERVICE_TEXT)
INTERFACES: Final = {interface.name: interface for interface in (SERVICE, CONTROL)}
