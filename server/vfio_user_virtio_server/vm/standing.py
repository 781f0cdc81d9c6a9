"""Where the guest is once a move is over, whatever became of the processes that took part.

What a process's death does depends on when it comes; the guest never runs at both ends.

| who dies | before QEMU has sent all | then, until the target runs | after |
|---|---|---|---|
| the source's QEMU | `LOST`: the guest with it | `ARRIVED` all the same | `ARRIVED` |
| the source's server | `DEAF` | `ARRIVED` all the same | `ARRIVED` |
| the target's QEMU | `BACK` | `BACK` | the source stays stopped |
| its server | `BACK` | `BACK` | as the death of any server |

The source's server is not needed any more once the devices' state and registers are saved, which is
a little before.  A guest whose server has died has lost its device, and QEMU may abort then, at
once or when it maps memory anew (11.1.3 does), so that what is `DEAF` may soon be `LOST`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ARRIVED: Final = "the guest runs at the target"
UNTOUCHED: Final = "nothing was changed"
LOST: Final = "the source has ended, and the guest with it; the target has ended"
UNSURE: Final = "the source may not run on"
DEAF: Final = "the source runs on without its device, the target has ended"
BACK: Final = "the source runs on, the target has ended"


def in_words(
    *, arrived: bool, touched: bool, source_gone: bool, server_gone: bool, failed: Sequence[str]
) -> str:
    """`failed`: what could not be undone or ended; `server_gone`: one of the source's."""
    if arrived:
        where = ARRIVED
    elif not touched:
        where = UNTOUCHED
    elif source_gone:
        where = LOST
    elif failed:
        where = UNSURE
    else:
        where = DEAF if server_gone else BACK
    return "; ".join((where, *failed))
