"""Every bound that protects the process from a client, a guest or a peer, each with its reason."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20

# --- vfio-user messages -------------------------------------------------------------------------

MAX_DATA_XFER_SIZE: Final = 1 * MIB
"""Payload of one data-carrying message; the specification's default, and what QEMU offers."""

MAX_MESSAGE_OVERHEAD: Final = 4 * KIB
"""What a message may carry besides its data: header, fixed part, and 200 posted writes."""

MAX_MESSAGE_SIZE: Final = MAX_DATA_XFER_SIZE + MAX_MESSAGE_OVERHEAD
"""A header that announces more ends the connection before a byte of it is stored."""

MAX_MSG_FDS: Final = 16
"""File descriptors per message that we take; QEMU refuses a server that says more."""

MAX_ANCILLARY_FDS: Final = 253
"""The kernel's SCM_MAX_FD: room for every fd one read can bring, so that none is truncated."""

MAX_VERSION_REPLY_SIZE: Final = 214
"""QEMU receives the VERSION reply into the buffer of its own request, which has this size."""

MAX_VERSION_JSON: Final = 4 * KIB
"""A capabilities document is about 200 bytes; more is not a negotiation."""

MAX_PENDING_REQUESTS: Final = 64
"""Commands of ours that may await a reply at once on one connection."""

PARTIAL_MESSAGE_SECONDS: Final = 10.0
"""How long a client may take from a message's first byte to its last."""

HANDSHAKE_SECONDS: Final = 10.0
"""How long a client may take from connecting to a complete VERSION."""

REMOTE_DMA_SECONDS: Final = 10.0
"""How long a reply to DMA_READ or DMA_WRITE may take before the device gives up on it."""

RELEASE_SECONDS: Final = 1.0
"""How long a device may take to give back a session's fds and mappings, and a last reply to leave;
the daemon must stop within 2 s of SIGTERM."""

REMOTE_DMA_CHUNK: Final = 64 * KIB
"""Largest DMA_READ or DMA_WRITE: QEMU truncates replies that do not fit its socket buffer."""

MAX_WRITE_MULTI: Final = 200
"""Writes in one REGION_WRITE_MULTI; QEMU's own bound."""

# --- the control interface ----------------------------------------------------------------------

MAX_CONTROL_MESSAGE: Final = 1 * MIB
"""One varlink message: room for `CONTROL_CHUNK` in base64, and for the status of 255 devices."""

CONTROL_CHUNK: Final = 512 * KIB
"""Bytes of guest memory or of an image in one message, before base64 makes four of three."""

CONTROL_RANGES: Final = 4_096
"""Ranges, mappings or pieces in one message, of about 70 bytes each."""

MAX_CONTROL_CONNECTIONS: Final = 16
"""Connections at once; an orchestrator wants one, a live view another."""

CONTROL_SECONDS: Final = 10.0
"""How long a peer may take for the rest of a message, or to take what is sent to it."""

DIRTY_REPORT_BYTES: Final = 4 << 30
"""Guest memory that is reported while others wait: a bitmap of 128 KiB, about 3 ms."""

# --- guest memory -------------------------------------------------------------------------------

MAX_DMA_MAPS: Final = 65_535
"""Mappings of one client; the specification's default, and the most that QEMU accepts."""

MAX_MAPPED_FILES: Final = 240
"""Distinct backing files of one client, each an fd and a kernel mapping of ours: so few that 255
clients together stay below the 65,530 mappings that a process may have (vm.max_map_count)."""

MAX_MAPPED_BYTES: Final = 1 << 42
"""Address space for one client's files (4 TiB of the 128 that a process has), however sparse."""

PAGE_SIZE: Final = 4_096
"""Granularity of DMA mappings (the capability ``pgsizes``)."""

# --- rings --------------------------------------------------------------------------------------

MAX_QUEUE_SIZE: Final = 1_024
"""Descriptors in a queue; Linux's stack limit for indirect tables, and QEMU's largest."""

MAX_QUEUE_PAIRS: Final = 8
"""RX/TX pairs of one member."""

MAX_CHAIN_DESCRIPTORS: Final = 1_024
"""Descriptors in one chain; equals UIO_MAXIOV, which a chain becomes in readv and writev."""

MAX_CHAIN_PIECES: Final = 1_024
"""Pieces of host memory that one chain's buffers lie in: UIO_MAXIOV again.  A vIOMMU can scatter a
buffer over pages, and without this bound a chain over 67 million views."""

MAX_DESCRIPTOR_LENGTH: Final = 1 * MIB
"""How much of one buffer we look at: more than any frame or command, and 257 pages at the most."""

MAX_FRAME_SIZE: Final = 65_589
"""Largest Ethernet frame before segmentation: what virtio-net asks an RX buffer to hold (65,601
with GUEST_TSO or GUEST_USO) less the 12 bytes of virtio_net_hdr."""

MAX_CONTROL_SIZE: Final = 64 * KIB
"""Readable bytes of one control command."""

MAX_MAC_TABLE: Final = 256
"""Addresses in a member's unicast and in its multicast filter table."""

# --- device parts -------------------------------------------------------------------------------

MAX_PARTS: Final = 16_384
"""Parts in one image: two for each of 8,000 queues, four times what MSI-X has vectors for, and
about 4 MiB of objects."""

MAX_PART_SIZE: Final = 16 * MIB
"""Value of one part.  The largest that the standard defines, an RSS table, has 131 KB; the rest is
for parts to come."""

MAX_FEATURE_WORDS: Final = 16
"""u64 words of features in a part: 1,024 features; the standard has none above 70."""

# --- the software owner -------------------------------------------------------------------------

MAX_MEMBERS: Final = 255
"""Members of one owner: device parts allow 255 resource objects of a kind."""

MAX_FDB_ENTRIES: Final = 4_096
"""Learnt addresses of one switch; beyond it unknown addresses are flooded, not learnt."""

MAX_FDB_ENTRIES_PER_PORT: Final = 1_024
"""Learnt addresses of one port, so that one guest cannot push the others out of the table."""

FDB_AGE_SECONDS: Final = 300.0
"""How long a learnt address lives unseen (IEEE 802.1Q's default)."""

MAX_GUEST_LOG_LINES: Final = 50
"""Lines that one guest can make us log in a session by what its driver does, such as resetting its
device over and over; each of them is counted all the same."""

WORK_BUDGET: Final = 256
"""Packets one queue may move before others get their turn."""

MAX_RECEIVED_PIECES: Final = 16_384
"""Pieces of receive buffers that a member may fill before others get their turn: 256 frames of
64 KiB in buffers of 1,500 bytes have 11,264, and 256 frames in 1,024 pieces each took 0.5 s."""

PIECES_OF_WORK: Final = 16
"""Pieces of a chain that cost as much as a packet: 256 chains of 1,024 pieces took 110 ms."""

MAX_GSO_SEGMENTS: Final = 512
"""Segments that one frame may become in software, about 2 ms of work: 64 KiB at an MSS of 128."""

MAX_FLOODED_SEGMENTS: Final = 64
"""Segments of one frame that is flooded: each goes to every port that cannot take it whole."""

MAX_COPIES: Final = 4_096
"""Deliveries, beyond one per frame, that a sender's floods and segments may cost, about 10 ms,
before others get their turn."""

MAX_BLOCKED_SECONDS: Final = 0.1
"""How long a port without room may hold up its senders at once; then they lose frames instead, so
that a guest that takes nothing stops nobody else."""

BLOCKED_SECONDS_PER_FRAME: Final = 0.000_25
"""What each frame that a port takes adds to the time it may hold its senders up: a guest that takes
less than 4,000 frames a second while others wait loses frames."""

MAX_BURST_SECONDS: Final = 0.01
"""What a member's rate limit lets through at once if the user names no burst."""

MIN_RECONNECT_SECONDS: Final = 0.1
"""First pause before an uplink's peer is sought again; it doubles from then on."""

MAX_RECONNECT_SECONDS: Final = 5.0
"""Longest such pause, and how long a peer must have stayed for the pauses to start anew."""

# --- migration ----------------------------------------------------------------------------------

MAX_MIGRATION_RECORD: Final = 64 * MIB
"""Payload of one record of a migration stream, unless configured: thousands of times the image of
a member with 8 queue pairs, and what a hostile source can make us hold."""

MAX_PRIVATE_RECORD: Final = 16 * KIB
"""Payload of the record that carries what device parts cannot: under 100 bytes today."""

MAX_PRIVATE_FIELDS: Final = 64
"""Fields in that record, known or not: each unknown one becomes a note in the log."""

MAX_DIRTY_CHUNKS: Final = 131_072
"""Chunks of 8,192 pages that a dirty log keeps: 4 TiB (`MAX_MAPPED_BYTES`) in pages of 4 KiB, in
144 MiB of memory.  A guest can spread its writes wider only with a vIOMMU."""

STOP_SECONDS: Final = 0.2
"""How long a member that is being stopped waits for accesses to guest memory that are under way.
QEMU answers no DMA_READ while it waits for the stop itself, and its guest stands still then."""

MAX_TRANSFER_PAYLOAD: Final = 1 * MIB + 8
"""Payload of one frame between two hosts: `MAX_DATA_XFER_SIZE` of pages and their address."""

MAX_TRANSFER_TEXT: Final = 4 * KIB
"""Bytes of a name, or of a reason to abort, in such a frame."""

MAX_ZERO_RUN: Final = 1 << 30
"""Guest memory that one frame may say is zero: what a few bytes can make a receiver write."""

TRANSFER_SECONDS: Final = 30.0
"""How long a peer of a transfer may take to answer, or to take or send anything at all."""

# --- administration commands --------------------------------------------------------------------

ADMIN_QUEUE_DEPTH: Final = 32
"""Commands of ours in one administration virtqueue at once, of all members together."""

MAX_ADMIN_COMMAND_SIZE: Final = 1 * MIB
"""Readable or writable bytes of one command, of ours or of the software owner's driver: hundreds of
times the largest image; the driver could have `ADMIN_RING_SIZE` of them held at once."""

ADMIN_RING_SIZE: Final = 64
"""Descriptors in an administration virtqueue: `ADMIN_QUEUE_DEPTH` commands of two."""

ADMIN_MEMORY: Final = 4 * MIB
"""Locked memory for the ring and the buffers of all commands in flight: half of what a user may
lock by default (ulimit -l)."""

OWNER_RESET_SECONDS: Final = 5.0
"""How long a PF may take from device_status = 0 until it reads 0."""

MIN_RECOVERY_SECONDS: Final = 0.1
"""First pause before a PF that failed is reset and brought up again; it doubles from then on."""

MAX_RECOVERY_SECONDS: Final = 30.0
"""Longest such pause."""

ADMIN_COMMAND_SECONDS: Final = 3.0
"""How long one command may take, from waiting for its turn to the last time it is sent."""

ADMIN_REQUEST_SECONDS: Final = 4.5
"""How long all commands for one request of a client may take: QEMU waits 5 s for its reply."""

ADMIN_RETRIES: Final = 8
"""How often a command is sent that the device wants sent again."""

ADMIN_RETRY_SECONDS: Final = 0.01
"""The first pause before a command is sent again; it doubles."""

ADMIN_MAX_RETRY_SECONDS: Final = 0.5
"""The longest such pause."""

IMAGE_ATTEMPTS: Final = 4
"""How often an image is asked for whose size grew meanwhile."""

# --- kernel VFIO --------------------------------------------------------------------------------

INLINE_PIN_BYTES: Final = 2 * MIB
"""What is pinned or unpinned while other sessions wait: 512 pages, or one huge one."""

INLINE_REGISTER_BYTES: Final = 256
"""Registers of a real device that are read or written while other sessions wait: 64 accesses."""

SLOW_PIN_SECONDS: Final = 2.5
"""How long a DMA mapping may take before the user is told: half of what QEMU waits."""
