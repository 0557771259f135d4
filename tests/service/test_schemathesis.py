"""Requests drawn from the API's own description, and answers held against it.

docs/api.md has the longer form, which runs against a service that is up.
"""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks

from service.settings import Settings
from tests.service.fakes import FakeEncoder, created
from tests.service.pictures import data_uri, png

EXAMPLES = 8  # for each operation, beside those that cover each parameter's limits
# No description can say that a text must be a picture, or a collection's name one that exists.
EXCLUDED = ("positive_data_acceptance",)
OF_ANSWERS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def made(folder: Path) -> FastAPI:
    return created(Settings(_env_file=None, data_dir=folder), FakeEncoder())


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """On a folder of its own; the first request starts it, and it ends with the process."""
    return made(tmp_path_factory.mktemp("drawn"))


api = schemathesis.openapi.from_dict(made(Path("never-started")).openapi())


@api.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_described(case: schemathesis.Case, app: FastAPI) -> None:
    load_all_checks()
    case.call_and_validate(app=app, excluded_checks=CHECKS.get_by_names(EXCLUDED))
    if isinstance(case.body, dict) and case.media_type == "application/json":
        body, changed = with_real_pictures(case.body)
        if changed:  # so that more than the door is tried
            case.body, case.query = body, {}
            case.call_and_validate(app=app, checks=CHECKS.get_by_names(OF_ANSWERS))


def with_real_pictures(body: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A drawn body whose texts for pictures are pictures, and whether there were any."""
    picture = data_uri(png(1))
    real = dict(body)
    for field in {"image", "input"} & set(body):
        if isinstance(body[field], list):
            real[field] = [picture for _ in body[field]]
        else:
            real[field] = picture
    if isinstance(body.get("images"), list):
        real["images"] = [
            {**one, "image": picture} if isinstance(one, dict) else one for one in body["images"]
        ]
    return real, real != body
