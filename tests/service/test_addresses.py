import pytest

from service.addresses import Allowance, is_public, may_connect, parse_address, parse_allowances


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8",
        "93.184.216.34",
        "192.0.1.1",
        "172.15.255.255",
        "100.63.255.255",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2a00:1450:4001:80b::200e",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ],
)
def test_public(text: str) -> None:
    assert is_public(parse_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.9",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%1",
        "2606:4700:4700::1111%1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_not_public(text: str) -> None:
    assert not is_public(parse_address(text))


def test_allowances() -> None:
    written = "10.1.0.0/16, 10.2.0.0/16:8080,[fd00::/8]:81 ,fd01::/16,192.168.1.7"
    allow = parse_allowances(written)
    assert [(str(one.network), one.ports) for one in allow] == [
        ("10.1.0.0/16", (80, 443)),
        ("10.2.0.0/16", (8080,)),
        ("fd00::/8", (81,)),
        ("fd01::/16", (80, 443)),
        ("192.168.1.7/32", (80, 443)),
    ]
    for text, port, expected in (
        ("10.1.2.3", 80, True),
        ("10.1.2.3", 443, True),
        ("10.1.2.3", 8080, False),
        ("::ffff:10.1.2.3", 80, True),
        ("10.2.2.3", 8080, True),
        ("10.2.2.3", 80, False),
        ("10.3.0.1", 80, False),
        ("fd00::1", 81, True),
        ("fd00::1", 80, False),
        ("8.8.8.8", 80, True),
        ("8.8.8.8", 8080, False),
    ):
        assert may_connect(parse_address(text), port, allow) is expected, (text, port)
    assert parse_allowances("") == parse_allowances(" , ") == ()


@pytest.mark.parametrize(
    "text",
    [
        "ten",
        "10.1.0.0/16:",
        "10.1.0.0/16:0",
        "10.1.0.0/16:65536",
        "10.1.0.0/33",
        "10.1.0.1/16",  # bits of a host: which network is meant?
        "10.1.0.0/16 8080",
        "[fd00::/8",
        "[fd00::/8]8080",
        "fd00::/129",
        "[]",
        "10.1/16",
        "example.com:80",
    ],
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r"network|ports go from") as caught:
        parse_allowances(f"10.9.0.0/16,{text}")
    assert repr(text) in str(caught.value)


def test_an_allowance_is_of_one_kind_of_address() -> None:
    (everything,) = parse_allowances("0.0.0.0/0:81")
    assert isinstance(everything, Allowance)
    assert everything.covers(parse_address("127.0.0.1"), 81)
    assert not everything.covers(parse_address("::1"), 81)
