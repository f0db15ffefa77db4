"""The FastAPI application: schema, documentation pages, probes.

Its `/predict` is a shell around the front's `answer`.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdeploy_server import wire
from nbdeploy_server.progress import READY

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nbdeploy_server.front import Front

PROBLEM = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}
PAGES = ("/docs", "/openapi.json", "/readyz", "/livez")
_ERRORS = {
    401: "No key, or a wrong one",
    413: "Body too large",
    422: "Does not fit the signature",
    429: "Queue full",
    500: "predict raised",
    503: "Not ready",
    504: "Timeout",
}


def build(front: Front) -> FastAPI:
    """Make the application of one Replica."""
    from fastapi import FastAPI, Request
    from fastapi.openapi.docs import get_swagger_ui_html
    from fastapi.responses import JSONResponse, RedirectResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.staticfiles import StaticFiles

    settings = front.settings
    app = FastAPI(
        title=settings.name,
        version=f"revision {settings.revision}",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.exception_handler(HTTPException)
    async def problem(request: Request, error: HTTPException) -> Response:
        detail = error.detail
        if error.status_code == 404:  # noqa: PLR2004 - the HTTP status
            detail = f"There is no {request.url.path}; there is POST /predict, and GET " + ", ".join(PAGES) + "."
        elif error.status_code == 405:  # noqa: PLR2004 - the HTTP status
            detail = f"{request.method} is not allowed here; predictions are POST /predict."
        body = {"type": "about:blank", "title": error.detail, "status": error.status_code, "detail": detail}
        return JSONResponse(body, error.status_code, headers=error.headers, media_type="application/problem+json")

    async def livez(_request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def readyz(_request: Request) -> Response:
        report = front.progress.report()
        return JSONResponse(report, 200 if report["phase"] == READY else 503)

    async def openapi(request: Request) -> Response:
        return JSONResponse(documents(with_sample=_has_key(request.headers, settings.key_sha256)))

    async def docs(_request: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{settings.name} · nbdeploy",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )

    async def root(_request: Request) -> Response:
        return RedirectResponse("docs")  # relative: the Endpoint may lie below a path of a proxy

    app.add_route("/", root, methods=["GET"], include_in_schema=False)
    for path, page in zip(PAGES, (docs, openapi, readyz, livez), strict=True):
        app.add_route(path, page, methods=["GET"], include_in_schema=False)

    class Shell(Response):
        """A response that lets the front write itself."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await front.answer(scope, receive, send)

    async def predict() -> Response:
        return Shell()

    app.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        operation_id="predict",
        summary=f"Call {settings.name}",
        response_class=JSONResponse,
        response_model=None,
        openapi_extra=_operation(front),
    )
    app.mount("/docs/assets", StaticFiles(directory=_assets()))
    _allow_origins(app, settings.cors)
    documents = _documents(app, front)
    return app


def _allow_origins(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Answer preflight requests of allowed pages; the front itself marks the answers."""
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["POST", "GET"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
        )


def _has_key(headers: Any, key_sha256: str) -> bool:
    if not key_sha256:
        return True
    given = headers.get("authorization", "")
    token = given[7:] if given[:7].lower() == "bearer " else headers.get("x-api-key", "")
    return hmac.compare_digest(hashlib.sha256(token.encode("latin-1")).hexdigest(), key_sha256)


def _documents(app: FastAPI, front: Front) -> Callable[..., dict[str, Any]]:
    """Return a function that gives FastAPI's OpenAPI document: made once with and once without the sample."""
    made: dict[bool, dict[str, Any]] = {}

    def documents(*, with_sample: bool) -> dict[str, Any]:
        if not made:
            document = app.openapi()
            operation = document["paths"]["/predict"]["post"]
            operation["responses"] = _responses(front)
            document.get("components", {}).pop("schemas", None)
            if front.settings.key_sha256:
                document.setdefault("components", {})["securitySchemes"] = _SCHEMES
            made[False] = document
            made[True] = copy.deepcopy(document)
            if front.predictor.sample is not None:
                arguments = wire.jsonable(wire.unpack(front.predictor.sample)["arguments"])
                body = made[True]["paths"]["/predict"]["post"]["requestBody"]
                body["content"]["application/json"]["example"] = arguments
        return made[with_sample]

    return documents


_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _operation(front: Front) -> dict[str, Any]:
    """What the route says beyond FastAPI's own knowledge: the body by Signature, and the key."""
    media = {"application/json": {"schema": front.predictor.signature.schema()}}
    operation: dict[str, Any] = {"requestBody": {"required": True, "content": media}}
    if front.settings.key_sha256:
        operation["security"] = [{"bearer": []}, {"header": []}]
    return operation


def _responses(front: Front) -> dict[str, Any]:
    returns, streams = front.predictor.signature.returns, front.predictor.streams
    content: dict[str, Any] = {
        "application/json": {"schema": {"type": "array", "items": returns} if streams else returns}
    }
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
        content["application/x-ndjson"] = {"schema": {"type": "string"}}
    content[wire.CONTENT_TYPE] = {"schema": {"type": "string", "format": "binary"}}
    responses: dict[str, Any] = {"200": {"description": "The return value of predict", "content": content}}
    for status, words in _ERRORS.items():
        if status != 401 or front.settings.key_sha256:  # noqa: PLR2004 - the HTTP status
            responses[str(status)] = {
                "description": words,
                "content": {"application/problem+json": {"schema": PROBLEM}},
            }
    return responses


def _assets() -> Path:
    """Return the folder of Swagger's files, which a package carries."""
    import fastapi_offline

    return Path(fastapi_offline.__file__).parent / "static"
