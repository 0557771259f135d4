"""What settings may be, what is said of one that cannot be, and where they are listed."""

from pathlib import Path

import pytest

from service.settings import (
    ClientSettings,
    InvalidSettings,
    Settings,
    load_client_settings,
    load_settings,
)
from service.settings_help import help_of, variable

REPOSITORY = Path(__file__).parents[2]
TYPE_WORDS = ("pydantic", "input should", "type=", "validation error", "literal", "NoneType")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of somebody's


def complaints_of(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(f"DINOSCOPE_{name}", value)
        with pytest.raises(InvalidSettings) as caught:
            load_settings()
    assert str(caught.value) == "; ".join(caught.value.complaints)
    return caught.value.complaints


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("PORT", "x", "must be a whole number from 0 to 65535"),
        ("PORT", "65536", "must be a whole number from 0 to 65535"),
        ("PORT", "", "must be a whole number from 0 to 65535"),
        ("PORT", "1.5", "must be a whole number from 0 to 65535"),
        ("MAX_QUEUE", "0", "must be a whole number of at least 1"),
        ("DEVICE", "tpu", "must be one of auto, cpu, cuda"),
        ("LOG_LEVEL", "loud", "must be one of critical, error, warning, info, debug"),
        ("KEYS_FILE", "", "must be a path; leave it out where no keys are asked for"),
        ("ROOT_PATH", "eyes", "must begin with / and not end with it, as /pictures does; not /v1"),
        ("ROOT_PATH", "/", "must begin with / and not end with it, as /pictures does; not /v1"),
        ("ROOT_PATH", "/v1", "must begin with / and not end with it, as /pictures does; not /v1"),
    ],
)
def test_a_bad_value_is_told_with_its_rule(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str
) -> None:
    assert complaints_of(monkeypatch, **{name: value}) == [f"DINOSCOPE_{name} = {value!r}: {rule}"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("CORS_ORIGINS", "https://a.example, b.example", "'b.example' must be an origin"),
        ("CORS_ORIGINS", "https://a.example/", "'https://a.example/' must be an origin"),
        ("CORS_ORIGINS", "*,https://a.example", "'*' must be an origin"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1/8", "'10.0.0.1/8' must be an IP address or a network"),
        ("FORWARDED_ALLOW_IPS", "127.0.0.1,proxy", "'proxy' must be an IP address or a network"),
    ],
)
def test_a_bad_value_in_a_list_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    [complaint] = complaints_of(monkeypatch, **{name: value})
    assert complaint.startswith(f"DINOSCOPE_{name} = ")
    assert told in complaint


def test_every_numeric_and_chosen_setting_has_a_rule_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = 0
    for name in Settings.model_fields:
        if name in ("model", "models", "host", "keys_file", "data_dir"):
            continue  # any text
        tried += 1
        [complaint] = complaints_of(monkeypatch, **{name.upper(): "x y/"})
        assert complaint.startswith(f"{variable(name)} = ")
        assert "must be" in complaint
        assert not any(word in complaint.lower() for word in TYPE_WORDS)
    assert tried > 10


def test_rules_across_settings_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    [complaint] = complaints_of(monkeypatch, MAX_QUEUE="127")
    assert complaint.startswith("DINOSCOPE_MAX_QUEUE = 127: ")
    assert "DINOSCOPE_MAX_REQUEST_IMAGES, 64" in complaint


def test_a_typo_is_told_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaints_of(monkeypatch, PROT="1", DEVICE="x") == [
        "DINOSCOPE_DEVICE = 'x': must be one of auto, cpu, cuda",
        "DINOSCOPE_PROT is not a setting; the nearest is DINOSCOPE_PORT",
    ]
    (tmp_path / ".env").write_text("DINOSCOPE_KEY_FILES=keys\nOTHER=1\n")
    assert complaints_of(monkeypatch) == [
        "DINOSCOPE_KEY_FILES is not a setting; the nearest is DINOSCOPE_KEYS_FILE"
    ]
    (tmp_path / ".env").write_bytes(b"DINOSCOPE_PORT=\xff\n")
    assert complaints_of(monkeypatch)[0].startswith(".env cannot be read: ")


def test_what_others_read_is_no_typo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOSCOPE_KEY", "k")  # a client's
    monkeypatch.setenv("DINOSCOPE_GOLDEN", "folder")  # the tests'
    monkeypatch.setenv("dinoscope_port", "4321")
    assert load_settings().port == 4321


def test_lists_have_commas_between_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOSCOPE_CORS_ORIGINS", " https://a.example , http://localhost:3000,")
    monkeypatch.setenv("DINOSCOPE_FORWARDED_ALLOW_IPS", "10.0.0.0/8,::1")
    settings = load_settings()
    assert settings.cors_origins == ("https://a.example", "http://localhost:3000")
    assert settings.forwarded_allow_ips == ("10.0.0.0/8", "::1")
    monkeypatch.setenv("DINOSCOPE_CORS_ORIGINS", "*")
    assert load_settings().cors_origins == ("*",)


def test_the_key_of_a_client_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOSCOPE_KEY", "dinoscope_secret")
    settings = load_client_settings()
    assert settings.key is not None
    assert settings.key.get_secret_value() == "dinoscope_secret"
    assert "secret" not in repr(settings).replace("SecretStr", "")


@pytest.mark.parametrize("settings", [Settings, ClientSettings])
def test_the_page_lists_every_setting(settings: type[Settings]) -> None:
    """It holds what `python -m service --help` prints; copy that there after a change."""
    assert help_of(settings) in (REPOSITORY / "docs" / "settings.md").read_text()
