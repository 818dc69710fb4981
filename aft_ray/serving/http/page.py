"""The page at `/`: ask a question and see drafts, layers and answer arrive. It needs no build step.

Its content security policy lets the browser contact this server only and keeps text from becoming HTML. A key that a
user types stays in the page's memory. Anybody may open the page, but asking a question needs a key where the server has
keys.
"""

from __future__ import annotations

import html
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> APIRouter:
    """Return the routes of the page, its style and its script. They are not part of the API's schema."""
    router = APIRouter(include_in_schema=False)
    folder = files("aft_ray.serving.http") / "page"
    text = {name: (folder / name).read_text() for name in ("index.html", "page.css", "page.js")}

    @router.get("/")
    async def page(request: Request) -> HTMLResponse:
        root = html.escape(request.scope.get("root_path", "").rstrip("/"))
        return HTMLResponse(text["index.html"].replace("{root}", root), headers=HEADERS)

    @router.get("/page.css")
    async def style() -> Response:
        return Response(text["page.css"], media_type="text/css", headers=HEADERS)

    @router.get("/page.js")
    async def script() -> Response:
        return Response(text["page.js"], media_type="text/javascript", headers=HEADERS)

    return router
