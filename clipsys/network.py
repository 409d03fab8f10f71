"""Ports of this machine."""

from __future__ import annotations

import socket

from clipsys.errors import ServerError


def check_port(host: str, port: int) -> None:
    """Makes sure that a server can listen there.

    Raises:
        ServerError: the port is taken, forbidden, or no port at all.
    """
    if not 1 <= port <= 65535:
        raise ServerError(f"port {port} is not a port; choose --port between 1 and 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "choose another with --port"
            ) from error
