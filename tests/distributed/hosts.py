"""Two hosts on this machine: namespaces with a name, an address, mounts and a network of their own, joined by a cable.

They need no privilege where users may make namespaces (`unshare --user`).
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPACES = ("--net", "--uts", "--mount")
ADDRESSES = {"one": "10.99.0.1", "two": "10.99.0.2"}


@dataclass
class Host:
    """A process that does nothing but keep the namespaces of a host."""

    name: str
    keeper: subprocess.Popen[bytes]

    @property
    def enter(self) -> list[str]:
        """The words before a command that is to run on this host."""
        return ["nsenter", "--target", str(self.keeper.pid), "--user", "--preserve-credentials", *SPACES]

    def do(self, command: str) -> None:
        subprocess.run([*self.enter, *command.split()], check=True)

    def link(self, state: str) -> None:
        """Cut the cable (down), or mend it (up): nothing that is sent arrives, and nobody is told so."""
        self.do(f"ip link set eth0 {state}")

    def lose(self) -> None:
        """End all its processes as if the power went: the other host hears nothing of it."""
        self.link("down")
        self.kill()

    def kill(self) -> None:
        """End all its processes but the keeper."""
        network = os.stat(f"/proc/{self.keeper.pid}/ns/net")
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            with contextlib.suppress(OSError):  # it is gone
                if pid != self.keeper.pid and os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), network):
                    os.kill(pid, signal.SIGKILL)


def why_not() -> str | None:
    """Return why there can be no hosts here; None if there can be."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        return f"no {missing[0]} (util-linux, iproute2)"
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", *SPACES, "ip", "link", "add", "eth0", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"no right to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def two_hosts(place: Path) -> Iterator[dict[str, Host]]:
    """Make the hosts one and two, which know each other by name, and end all their processes afterwards."""
    hosts: dict[str, Host] = {}
    with contextlib.ExitStack() as stack:
        before = ["unshare", "--user", "--map-root-user"]
        for name in ADDRESSES:
            keeper = subprocess.Popen(
                [*before, *SPACES, "sh", "-c", "echo made; exec sleep 600"], stdout=subprocess.PIPE
            )
            stack.callback(keeper.wait)
            stack.callback(keeper.kill)
            assert keeper.stdout is not None
            stack.enter_context(keeper.stdout)
            keeper.stdout.readline()
            hosts[name] = host = Host(name, keeper)
            stack.callback(host.kill)
            host.do(f"hostname {name}")
            known = {"localhost": "127.0.0.1", **ADDRESSES, name: "127.0.1.1"}  # its own name as Debian has it
            (place / f"hosts-{name}").write_text("".join(f"{known[n]} {n}\n" for n in known))
            host.do(f"mount --bind {place}/hosts-{name} /etc/hosts")
            host.do("ip link set lo up")
            before = [*host.enter[: -len(SPACES)], "unshare"]  # the same user's, who may then join the two
        one, two = hosts.values()
        one.do(f"ip link add eth0 type veth peer name eth0 netns {two.keeper.pid}")
        for host in hosts.values():
            host.do(f"ip address add {ADDRESSES[host.name]}/24 dev eth0")
            host.link("up")
        yield hosts
