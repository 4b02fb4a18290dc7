"""Which network interface the processes of several machines reach one another through.

Gloo listens on the address that the machine's own name has. Debian's /etc/hosts gives that name 127.0.1.1, and other
systems 127.0.0.1, where no other machine can connect.
"""

import contextlib
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

_SIOCGIFADDR = 0x8915  # ioctl: IPv4 address of an interface
_ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737): on no network, so its route is the default route
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def choose_gloo_interface(master: str) -> None:
    """Name in GLOO_SOCKET_IFNAME the interface of the route to ``master``, unless the user has named one.

    Args:
        master: Name or address of the machine of rank 0. If it is this machine, the interface is that of the address,
            or of the default route if the name stands for the loopback.

    Raises:
        ValueError: ``master`` has no address, or there is no route beyond this machine.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or master in _THIS_MACHINE or sys.platform != "linux":
        return
    for host in (master, _ELSEWHERE):
        name = _interface_towards(host)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
    raise ValueError(
        f"no network interface was found through which other machines reach this one: MASTER_ADDR '{master}' is the "
        "loopback here, and there is no default route. Name one (ip address lists them) in GLOO_SOCKET_IFNAME"
    )


def _interface_towards(host: str) -> str | None:
    """Return the interface of the route to ``host``, None if that is the loopback or unknown."""
    try:
        addresses = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise ValueError(f"MASTER_ADDR '{host}' has no address: {error.strerror}") from error
    for family, kind, _, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it asks for a route
            name = _interface_of(family, probe.getsockname()[0])
            if name not in (None, "lo"):
                return name
    return None


def _interface_of(family: int, address: str) -> str | None:
    """Return the interface that has this address of this machine."""
    if family == socket.AF_INET6:
        packed = socket.inet_pton(family, address.partition("%")[0]).hex()
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for number, *_, name in lines if number == packed), None)
    with socket.socket(family, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an IPv4 address
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
