"""Ports of this machine."""

from __future__ import annotations

import errno
import socket

from clipsys.errors import ServerError

_BACKLOG = 128


def bind(host: str, port: int) -> socket.socket:
    """Binds a listening socket, so that the port is ours before anything else is done.

    Raises:
        ServerError: the address or port cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ServerError(f"{host}:{port}: not an address to listen on ({error})") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"port {port} on {host} is taken; choose another with --port {port + 1}, "
                "or stop the program that uses it"
            ) from error
        raise ServerError(
            f"{host}:{port}: cannot listen there ({error.strerror}); "
            "choose another --host or --port"
        ) from error
    return bound
