"""Forbid the network to every Python process of the tests, and save what is most of their time and not looked at.

`conftest.py` puts this folder on the path of children.
"""

import ipaddress
import os
import sys
from typing import Any

LOG = "KDLORA_TESTS_NETWORK_LOG"
_WATCHED = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def own_addresses() -> frozenset[str]:
    """List this machine's own addresses, by which Ray's processes reach each other; no packet to them leaves it."""
    found, last = set(), ""
    try:
        with open("/proc/net/fib_trie", encoding="ascii") as table:  # noqa: PTH123 - no imports that tests may patch
            for line in table:
                last = line.split("|--")[1].strip() if "|--" in line else last
                if "/32 host LOCAL" in line:
                    found.add(last)
    except OSError:
        pass
    return frozenset(found)


_OWN = own_addresses()


def is_local(host: Any) -> bool:
    """Say whether an address is on this machine."""
    if host is None or host in ("", b"", "localhost", b"localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
        return address.is_loopback or address.is_unspecified or str(address) in _OWN
    except (ValueError, AttributeError):
        return False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _WATCHED:
        return
    target = arguments[-1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    if isinstance(target, str | bytes) and event in ("socket.connect", "socket.sendto"):
        return  # a socket in the file system
    host = target[0] if isinstance(target, tuple) else target
    if is_local(host):
        return
    # Refused, and no fault of ours: Ray's dashboard looks for a cloud around it, and reports that it reports nothing;
    # `datasets` looks for a second server of the Hub beside the one that is named, and does without.
    of_dashboard = sys.argv[0].endswith("/ray/dashboard/dashboard.py")
    of_the_hub = isinstance(host, str) and is_local(host.removeprefix("datasets-server."))
    if (path := os.environ.get(LOG)) and not of_dashboard and not of_the_hub:
        with open(path, "a", encoding="utf-8") as log:  # noqa: PTH123 - no imports that tests may patch
            log.write(f"{event} {target!r} {sys.argv[:3]!r}\n")
    raise RuntimeError(f"a test asked the network: {event} {target!r}")


def _hurry() -> None:
    """Time models of two layers a few times only."""
    for module, name, value in (
        ("kdlora.experiment.scoring", "_TIMED", ((1, 1, 0.0), (3, 3, 0.0))),
        ("kdlora.experiment.settle", "_TIMED_SECONDS", 0.0),
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, value)


if os.environ.get(LOG):
    sys.addaudithook(_watch)
    os.fsync = lambda handle: None  # a killed process loses nothing by it, and no test pulls the plug
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_hurry)
if os.environ.get("KDLORA_TESTS_SYSTEM"):
    import other_system

    other_system.take_away()
