"""Which of a host's addresses the others see."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

_SIOCGIFADDR = 0x8915


def address_towards(place: str) -> str:
    """This host's address as a host at `place` sees it; empty if the place is this host itself under a name that is
    a loopback here (Debian gives a host's own name 127.0.1.1) and something else elsewhere."""
    ours = _source(place)
    if ours.startswith("127.") and not place.startswith(("127.", "localhost")):
        return ""
    return ours


def name_interface(others: list[str]) -> None:
    """Tell gloo its interface (GLOO_SOCKET_IFNAME) where there are other hosts and this one's name does not lead to
    an address that they can reach, which gloo would offer them."""
    if not others or "GLOO_SOCKET_IFNAME" in os.environ or not _unreachable_name():
        return
    ours = _source(others[0])
    for _, name in socket.if_nameindex():
        if _address_of(name) == ours:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _unreachable_name() -> bool:
    """Whether the host's name has no address here, a loopback, or one that is no interface's."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return True
    return address.startswith("127.") or address not in {
        _address_of(name) for _, name in socket.if_nameindex()
    }


def _source(place: str) -> str:
    """Our address on the way there; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place, 9))
        return probe.getsockname()[0]
    return "127.0.0.1"


def _address_of(interface: str) -> str | None:
    """IPv4 address of an interface, on Linux."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("256s", interface[:15].encode())
            return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)[20:24])
    except (ImportError, OSError):
        return None
