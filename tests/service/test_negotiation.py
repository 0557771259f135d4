import pytest

from service.routes.negotiation import preferred

OFFERED = ("image/png", "image/webp", "application/json")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "image/png"),
        ("*/*", "image/png"),
        ("image/webp", "image/webp"),
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("image/avif,image/webp,image/apng,image/*,*/*;q=0.8", "image/webp"),
        ("image/*", "image/png"),
        ("image/*;q=0.5, application/json;q=0.4", "image/png"),
        ("image/*;q=0.5, application/json;q=0.6", "application/json"),
        ("image/png;q=0, image/*", "image/webp"),
        ("Image/WebP; Q=0.9", "image/webp"),
        ("text/html", "image/png"),
        ("image/webp;q=many, application/json;q=0.1", "application/json"),
        ("image/webp;q=nan, application/json;q=0.1", "application/json"),
        (",, ;", "image/png"),
    ],
)
def test_what_is_liked_best(accept: str, expected: str) -> None:
    assert preferred(accept, OFFERED) == expected
