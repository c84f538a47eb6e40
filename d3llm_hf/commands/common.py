"""Options and output that subcommands share."""

import argparse
import os
import socket
import sys


def new_parser(subparsers, name: str, run, description: str) -> argparse.ArgumentParser:
    """Adds the parser of a subcommand that `run(args)` carries out."""
    parser = subparsers.add_parser(name, help=description[0].lower() + description[1:], description=description + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def tell(message: str) -> None:
    """Writes a line to stderr: stdout is for results that another program may read."""
    sys.stderr.write(message + "\n")


def check_address(host: str, port: int) -> None:
    """Refuses an address at which no server could listen, before a model is loaded.

    Raises:
        ValueError: naming `--host` or `--port`.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"`--port` must be from 0 to 65535 (got {port}). Leave it out, or pass for example 8000.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"`--host` must be an address of this machine (got {host!r}: {error}). 127.0.0.1 is for this machine "
            "alone, 0.0.0.0 for all that reach it."
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, to start again at once
        try:
            probe.bind(address)
        except OSError as error:
            raise ValueError(
                f"`--port` must be free at `--host` (got {port} at {host}: {error.strerror}). Pass another one, or "
                "end what listens there."
            ) from error
