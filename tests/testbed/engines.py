"""The engines that serve: for tests that run on both, and what one of them does otherwise.

A test that takes the fixture `engine` (or whose module has `usefixtures("engine")`) runs once with
each.  What libvfio-user does otherwise than the specification, or than ours, is in `DEPARTURES`:
the test is expected to fail there, for that reason, and it is news if it does not.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import attrs

from vfio_user_virtio.libvfio_user.session import LibvfioUserSession

if TYPE_CHECKING:
    import socket

    from vfio_user_virtio.device import Device
    from vfio_user_virtio.libvfio_user import Library
    from vfio_user_virtio.transport.listener import MakeSession, Serving

NATIVE: Final = "native"
LIBVFIO_USER: Final = "libvfio-user"
ENGINES: Final = (NATIVE, LIBVFIO_USER)


@attrs.frozen
class Departure:
    """What the library does otherwise: the tests (a pattern of their names), and why.

    `run`: whether it is of use to see the test fail; not if it waits in vain for long.
    """

    tests: str
    why: str
    run: bool = True


NO_MULTI: Final = "libvfio-user has no REGION_WRITE_MULTI"
OWN_LIMITS: Final = "libvfio-user tells limits of its own in VERSION, whatever the client's are"
ONE_ERRNO: Final = "libvfio-user has EINVAL for what it does not know"
OTHER_FDS: Final = "libvfio-user closes fds that do not belong there, and carries on"
NOT_OURS: Final = "the test is about the native session's own records and log"
THREAD: Final = "a clock that jumps does not wait for the thread that this engine has"
NO_MESSAGES: Final = "libvfio-user's DMA by messages is unsafe, so this engine has none"
EXACT: Final = "libvfio-user drops, and reports on, exactly one mapping at a time"
STATES: Final = "libvfio-user has migration states of its own, and takes data in RESUMING only"
NO_P2P: Final = "libvfio-user has no P2P states, so nobody is asked for them"
ALWAYS_PRE_COPY: Final = "libvfio-user says that every device has PRE_COPY, and no P2P"
STOPPED: Final = "libvfio-user refuses most of what is asked of a stopped device"
BY_ITSELF: Final = "libvfio-user does it by itself and calls nobody"
VERSION_0_2: Final = "libvfio-user speaks 0.2 to who says so, which differs in nothing"
NO_ECHO: Final = "libvfio-user's reply to an access of nothing has no payload"
LONG_ERROR: Final = "some error replies of libvfio-user have a payload"
IRQ_FLAGS: Final = "libvfio-user shows EVENTFD, for every interrupt index, and no other flag"
IRQ_NONE: Final = "libvfio-user refuses to disable an interrupt index that has no interrupts"
NO_ROOM: Final = "libvfio-user refuses a report for which the client has no room"
EIO_FIRST: Final = "libvfio-user answers a request in which the device failed with EIO"

DEPARTURES: Final = (
    Departure("test_version_is_negotiated_and_kept_for_a_successor*", OWN_LIMITS),
    Departure("test_nothing_is_granted_beyond_what_was_proposed*", OWN_LIMITS),
    Departure("test_03_version_minor_99_is_answered_with_our_own*", VERSION_0_2),
    Departure("test_accesses_of_nothing_are_answered_and_do_not_reach*", NO_ECHO),
    Departure("test_32_read_of_nothing_is_echoed*", NO_ECHO),
    Departure("test_31_write_to_a_region_that_is_read_only*", LONG_ERROR),
    Departure("test_write_multi_writes_in_order*", NO_MULTI),
    Departure("test_irq_info*", IRQ_FLAGS),
    Departure("test_set_irqs_without_eventfds(*request_2)", BY_ITSELF),
    Departure("test_set_irqs_without_eventfds(*request_5)", IRQ_NONE),
    Departure("test_29_set_irqs_does_not_add_up(*beyond max_msg_fds)", OTHER_FDS),
    Departure("test_14_as_many_fds_as_the_kernel_allows(*-9)", OTHER_FDS),
    Departure("test_14_as_many_fds_as_the_kernel_allows(*-13)", OTHER_FDS),
    Departure("test_11_unknown_command_is_drained*", ONE_ERRNO),
    Departure("test_37_device_feature_is_malformed(*unknown feature)", ONE_ERRNO),
    Departure("test_device_features*", ONE_ERRNO),
    Departure("test_27_unmap_is_malformed(*-dirty bitmap)", ONE_ERRNO),
    Departure("test_unmap_that_cannot_tell_unmaps_nothing*", ONE_ERRNO),
    Departure("test_migration_data(*", STATES),
    Departure("test_the_target_refuses(*_P2P)", NO_P2P),
    Departure("test_the_source_refuses(*_P2P)", NO_P2P),
    Departure("test_cancelled(*_P2P)", NO_P2P),
    Departure("test_the_target_goes(*_P2P)", NO_P2P),
    Departure("test_a_source_is_lost(*_P2P)", NO_P2P),
    Departure("test_a_source_gives_up(*_P2P)", NO_P2P),
    Departure("test_a_target_is_lost(*_P2P)", NO_P2P),
    Departure("test_a_target_gives_up(*_P2P)", NO_P2P),
    Departure("test_a_target_that_gives_up_without_a_reset(*_P2P)", NO_P2P),
    Departure("test_the_server_ends(*_P2P)", NO_P2P),
    Departure("test_a_device_without_pre_copy_says_so*", ALWAYS_PRE_COPY),
    Departure("test_registers_of_a_stopped_device(*-STOP_COPY)", STOPPED),
    Departure("test_interrupts_of_a_stopped_device*", STOPPED),
    Departure("test_memory_of_a_stopped_device*", STOPPED),
    Departure("test_memory_is_mapped_and_unmapped*", EXACT),
    Departure("test_26_unmap_that_matches_nothing_or_splits*", EXACT),
    Departure("test_unmap_tells_what_was_written*", EXACT),
    Departure("test_unmap_that_is_refused_forgets_nothing*", EXACT),
    Departure("test_a_client_without_room_for_the_report_has_not_had_it*", NO_ROOM),
    Departure("test_a_bitmap_of_all_that_a_message_may_carry*", EXACT),
    Departure("test_any_range_and_page_size*", EXACT, run=False),
    Departure("test_memory_however_it_was_given(*-True)", NO_MESSAGES, run=False),
    Departure("test_a_broken_chain_asks_for_a_reset(*-True-*)", NO_MESSAGES, run=False),
    Departure("test_a_broken_receive_chain_harms_nobody(*-True-*)", NO_MESSAGES, run=False),
    Departure("test_an_index_that_jumps_asks_for_a_reset(*-True-*)", NO_MESSAGES, run=False),
    Departure("test_any_ring_at_all_harms_nobody*", NO_MESSAGES, run=False),
    Departure("test_commands_all_the_time(*-messages)", NO_MESSAGES, run=False),
    Departure("test_there_and_back(*-messages-*)", NO_MESSAGES, run=False),
    Departure("test_messages_that_are_not_answered_while*", NO_MESSAGES, run=False),
    Departure("test_13_message_that_never_ends*", THREAD, run=False),
    Departure("test_13_a_byte_now_and_then_does_not_help*", THREAD, run=False),
    Departure("test_13_slow_but_whole_messages_are_taken*", THREAD, run=False),
    Departure("test_device_failure_ends_its_session_and_is_logged_once*", EIO_FIRST),
    Departure("test_device_task_failure_ends_its_session*", NOT_OURS),
    Departure("test_failure_of_the_device_in_work_ends_its_session*", NOT_OURS),
    Departure("test_failure_while_releasing_is_logged_and_goes_no_further*", NOT_OURS),
    Departure("test_client_that_leaves_before_version*", NOT_OURS),
    Departure("test_statistics_of_a_session_that_is_over_remain*", NOT_OURS),
    Departure("test_a_thousand_posted_writes_then_a_read*", NOT_OURS),
    Departure("test_an_error_of_the_device_is_answered_and_counted*", NOT_OURS),
    Departure("test_07_second_version*", NOT_OURS),
)
"""Brackets are written as parentheses, so that they are no part of a pattern."""


def departure(name: str) -> Departure | None:
    """The departure of the test called `name`, parameters and all, if it has one."""
    plain = name.replace("[", "(").replace("]", ")")
    for one in DEPARTURES:
        if fnmatchcase(plain, one.tests):
            return one
    return None


def libvfio_user_sessions(library: Library) -> MakeSession:
    """What makes sessions behind libvfio-user."""

    def make(sock: socket.socket, device: Device, name: str) -> Serving:
        return LibvfioUserSession(library, sock, device, name=name)

    return make
