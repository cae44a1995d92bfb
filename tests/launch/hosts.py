"""Two hosts on this machine: network namespaces on a bridge, each with a name of its own, whose links can be cut.

All of it lives in namespaces of one process; nothing is left when that process ends. As on Debian, a host's own name
leads to 127.0.1.1, and only the other's to an address that is worth something.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

NAMES = ("hosta", "hostb")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
UNSHARE = ("unshare", "--mount", "--uts", "--net", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child")
MAKE = """
set -e
mount -t tmpfs none /run
mkdir /run/netns
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
for i in 1 2; do
    ip netns add host$i
    ip link add end$i type veth peer name eth0 netns host$i
    ip link set end$i master bridge up
    nsenter --net=/run/netns/host$i sh -ec "
        ip link set lo up
        ip address add 10.77.0.$i/24 dev eth0
        ip link set eth0 up"
done
printf '127.0.0.1 localhost\\n127.0.1.1 hosta\\n10.77.0.2 hostb\\n' > /run/hosts1
printf '127.0.0.1 localhost\\n127.0.1.1 hostb\\n10.77.0.1 hosta\\n' > /run/hosts2
echo ready
exec sleep infinity
"""
BE = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class NoHosts(Exception):
    """This machine does not permit namespaces; the text is what it says."""


class Hosts:
    """The two hosts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", MAKE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            _, said = self._process.communicate()
            raise NoHosts(said.strip())
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._inside = ["nsenter", "--target", children.split()[0], "--all", f"--wdns={os.getcwd()}"]

    def start(
        self, host: int, command: list[str], environment: Mapping[str, str], output: Path
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host, numbered from 0; what it says goes to a file."""
        here = [*self._inside, "nsenter", f"--net=/run/netns/host{host + 1}", "unshare", "--mount", "--uts"]
        with open(output, "wb") as file:
            return subprocess.Popen(
                [*here, "sh", "-c", BE, NAMES[host], f"/run/hosts{host + 1}", *command],
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
            )

    def link(self, host: int, state: str) -> None:
        """Cut a host's link (`down`), or mend it (`up`)."""
        subprocess.run([*self._inside, "ip", "link", "set", f"end{host + 1}", state], check=True)

    def close(self) -> None:
        self._process.kill()  # and with it everything inside
        self._process.wait()
