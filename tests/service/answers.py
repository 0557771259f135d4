"""What tests expect of answers."""

from typing import Any

import httpx

TYPES = {"invalid_request_error", "not_found_error", "rate_limit_error", "server_error"}


def error_of(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, after a look at its shape and status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] in TYPES
    assert error["param"] is None or (isinstance(error["param"], str) and error["param"])
    assert isinstance(error["code"], str)
    assert error["code"]
    if code is not None:
        assert error["code"] == code, error
    return error


def json_of(response: httpx.Response, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    return response.json()
