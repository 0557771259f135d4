"""Which addresses and ports a fetch may lead to."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS = (80, 443)

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What `is_global` lets pass, in every version of Python or in older ones.
_NOT_PUBLIC: tuple[Network, ...] = (
    ipaddress.IPv4Network("168.63.129.16"),  # Azure's host, which answers its guests alone
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays of 6to4
    ipaddress.IPv4Network("224.0.0.0/4"),  # multicast
    ipaddress.IPv6Network("2001::/23"),  # protocol assignments, with Teredo's embedded IPv4
    ipaddress.IPv6Network("2002::/16"),  # 6to4: an IPv4 address is embedded
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)
_ALLOWANCE = re.compile(
    r"(?:\[(?P<bracketed>[^]]+)\]|(?P<ipv4>[0-9.]+(?:/[0-9]+)?))(?::(?P<port>[0-9]+))?"
    r"|(?P<ipv6>[0-9a-fA-F:.]+(?:/[0-9]+)?)"
)


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """A network that may be fetched from though it is not public, at these ports."""

    network: Network
    ports: tuple[int, ...] = PORTS

    def covers(self, address: Address, port: int) -> bool:
        """Whether a connection to `address` at `port` is within it."""
        return port in self.ports and address in self.network


def parse_address(text: str) -> Address:
    """An address; an IPv4 address mapped into IPv6 becomes the IPv4 address that it stands for.

    Raises:
        ValueError: no address in its usual spelling.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: Address) -> bool:
    """Whether an address is one that anybody on the internet can reach.

    Not so: private, loopback, link-local, multicast, reserved and shared (CGNAT) ones, and IPv6
    addresses that hold an IPv4 address; but those of NAT64 count as what they hold, for a network
    of IPv6 alone reaches the others through them.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST or address.scope_id is not None:
            return False
    return address.is_global and not any(address in network for network in _NOT_PUBLIC)


def parse_allowances(text: str) -> tuple[Allowance, ...]:
    """Networks with or without a port, separated by commas: `10.1.0.0/16:8080, [fd00::/8]:80`.

    Raises:
        ValueError: the first one that is none, and what is wrong with it.
    """
    return tuple(_parse_allowance(part.strip()) for part in text.split(",") if part.strip())


def may_connect(address: Address, port: int, allow: Sequence[Allowance]) -> bool:
    """Whether the address is public and the port one of `PORTS`, or an allowance covers both."""
    if port in PORTS and is_public(address):
        return True
    return any(allowance.covers(address, port) for allowance in allow)


def _parse_allowance(text: str) -> Allowance:
    found = _ALLOWANCE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} must be a network, with a port or without one, such as 10.1.0.0/16, "
            "10.1.0.0/16:8080 or [fd00::/8]:8080"
        )
    try:
        network = ipaddress.ip_network(found["bracketed"] or found["ipv4"] or found["ipv6"])
    except ValueError as error:
        raise ValueError(f"{text!r} is not a network: {error}") from error
    if found["port"] is None:
        return Allowance(network=network)
    port = int(found["port"])
    if not 1 <= port <= 65535:
        raise ValueError(f"{text!r} has the port {port}; ports go from 1 to 65535")
    return Allowance(network=network, ports=(port,))
