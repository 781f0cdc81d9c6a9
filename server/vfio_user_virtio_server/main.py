"""The command ``vfio-user-virtio``: pick the subcommand, run it, turn failures into exit codes.

`COMMANDS` is the whole list.  A subcommand is a module with two functions,

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(options: argparse.Namespace) -> int: ...

and only the module that was asked for is imported, since a client waits while a socket-activated
server starts.  argparse stays the parser: its ``--option=value`` contract is what the vfio-user
specification asks of a server, and it costs nothing at run time.

Exit codes are those of sysexits.h.  What a user can mend is one line on standard error: what
failed, the value, how to mend it.  A traceback means a bug of ours, and exits with EX_SOFTWARE.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, cast

import attrs

from vfio_user_virtio.errors import ConfigError, ConnectionLost, HostError, RemoteError
from vfio_user_virtio_server import log

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

PROGRAM: Final = "vfio-user-virtio"


class Subcommand(Protocol):
    """What a module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


@attrs.frozen
class _Command:
    module: str
    summary: str


COMMANDS: Final = {
    "serve": _Command("vfio_user_virtio_server.serve", "serve virtio-net devices over vfio-user"),
    "probe": _Command("vfio_user_virtio_server.probe", "show the device behind a socket"),
    "status": _Command("vfio_user_virtio_server.status", "show what a running server does"),
    "top": _Command("vfio_user_virtio_server.top", "watch what a running server does"),
    "migrate": _Command(
        "vfio_user_virtio_server.migrate", "move a device's state from one server to another"
    ),
    "send": _Command("vfio_user_virtio_server.send", "send a device's state to another host"),
    "receive": _Command(
        "vfio_user_virtio_server.receive", "load a device with what another host sends"
    ),
    "migrate-vm": _Command(
        "vfio_user_virtio_server.migrate_vm", "move a running guest to another QEMU"
    ),
    "image": _Command("vfio_user_virtio_server.image", "look into saved migration streams"),
    "bind": _Command("vfio_user_virtio_server.bind", "give PCI functions to vfio-pci"),
    "unbind": _Command("vfio_user_virtio_server.bind", "give PCI functions back to the kernel"),
    "check": _Command(
        "vfio_user_virtio_server.check", "tell what this host lacks for serving physical VFs"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.  ``--help`` and usage errors exit directly."""
    sys.excepthook = _report_bug
    _fill_standard_descriptors()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser(arguments).parse_args(arguments)
    log.set_up(options.log_level, options.log_format)
    command = _load(COMMANDS[options.command])
    try:
        code = command.run(options)
        sys.stdout.flush()  # a reader that has gone is met here, not when the interpreter ends
    except ConfigError as error:
        return _fail(str(error), os.EX_CONFIG)
    except HostError as error:
        return _fail(str(error), error.exit_code)
    except (ConnectionLost, RemoteError) as error:
        return _fail(str(error), os.EX_IOERR)
    except BrokenPipeError:
        # Whoever read our output has enough; keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_IOERR
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
    return code


class Parser(argparse.ArgumentParser):
    """argparse with sysexits' code for usage errors and one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(os.EX_USAGE, f"{self.prog}: {log.escape(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """``--version``; importlib.metadata is slow to import, so only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import importlib.metadata

        try:
            version = importlib.metadata.version(PROGRAM)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed: run from its source)"
        print(PROGRAM, version)
        parser.exit()


def _parser(arguments: Sequence[str]) -> Parser:
    """The parser of everything, with the options of only those subcommands that were named."""
    parser = Parser(
        prog=PROGRAM,
        description="A virtio-net Virtual Function for QEMU guests over vfio-user.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _add_log_options(parser, level="info")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.summary, description=command.summary, allow_abbrev=False
        )
        if name in arguments:
            _load(command).add_arguments(subparser)
        _add_log_options(subparser, level=argparse.SUPPRESS)
    return parser


def _add_log_options(parser: argparse.ArgumentParser, *, level: str) -> None:
    """These are understood before and after the subcommand; the later place has no default."""
    nested = level == argparse.SUPPRESS
    parser.add_argument(
        "--log-level", choices=log.LEVELS, default=level, help="what to log (default: info)"
    )
    parser.add_argument(
        "--log-format",
        type=_log_format,
        default=argparse.SUPPRESS if nested else None,
        metavar="{text,journal,json}",
        help="how to log (default: journal if standard error leads there, else text)",
    )


def _log_format(text: str) -> log.LogFormat:
    try:
        return log.LogFormat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not text, journal or json") from None


def _load(command: _Command) -> Subcommand:
    return cast("Subcommand", importlib.import_module(command.module))


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: {log.escape(message)}", file=sys.stderr)
    return code


def _fill_standard_descriptors() -> None:
    """Have 0, 1 and 2 lead somewhere: a socket that got one of them would be written to."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - likewise


def _report_bug(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """An exception that nobody foresaw: show it, and exit with EX_SOFTWARE instead of 1."""
    sys.__excepthook__(kind, error, traceback)
    print(f"{PROGRAM}: this is a bug; please report it with the lines above", file=sys.stderr)
    sys.exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    sys.exit(main())
