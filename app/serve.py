"""The ASGI entry: ``python -m streamlit run app/serve.py``. Host checks, security headers, friendly errors.

Streamlit's own allowedHosts guards the WebSocket; the middleware here guards every HTTP route as well.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import re
import uuid
from pathlib import Path

import streamlit as st
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("localhost", "127.0.0.1")
# The parts of Streamlit's page that ours open with, as its files are called; plotly.js, the largest, first.
EARLY = ("PlotlyChart", "Html", "Selectbox", "PageLink", "BidiComponent", "Metric", "DownloadButton", "ButtonGroup")
# Streamlit's internal counters name sessions and scripts; nobody outside needs them.
CLOSED = ("/_stcore/metrics",)


def content_security_policy(page: str) -> str:
    """The policy for Streamlit's page: own scripts, its one inline script by hash, and blob modules of components."""
    inline = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in inline)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' blob: {hashes}",
            "style-src 'self' 'unsafe-inline' blob:",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "manifest-src 'self'",
            "media-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )


def early_scripts(static: Path) -> list[str]:
    """Names of the scripts for EARLY and of all they import, without those that Streamlit's page names itself.

    Asked for with the page: without that, the browser asks for some forty of them once the script has run. Their names hold digests,
    so they are looked up, and what this release of Streamlit has no more is left out.
    """
    scripts, named = static / "static" / "js", (static / "index.html").read_text(encoding="utf-8")
    wanted = [path.name for part in EARLY for path in scripts.glob(f"{part}.*.js")]
    for name in wanted:  # grows while it is walked through
        imported = re.findall(r"(?:from|import)\"\./([^\"/]+\.js)\"", (scripts / name).read_text(encoding="utf-8"))
        wanted += [n for n in dict.fromkeys(imported) if n not in named and n not in wanted]
    return wanted


def own_page(static: Path) -> str:
    """Streamlit's page with our name, our style and the scripts it will need."""
    page = (static / "index.html").read_text(encoding="utf-8")
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    early = "".join(f'<link rel="modulepreload" crossorigin href="/static/js/{name}">\n' for name in early_scripts(static))
    return page.replace("<title>Streamlit</title>", "<title>Routerscope</title>").replace(
        "</head>", f"{early}<style>{style}</style>\n</head>"
    )


class OwnPage:
    """Sends ``page`` wherever Streamlit answers with its own: at the root and at every path of one name."""

    def __init__(self, app: ASGIApp, page: str) -> None:
        self.app, self.page = app, page.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "/" in scope["path"].strip("/"):
            await self.app(scope, receive, send)
            return
        conditions = (b"if-none-match", b"if-modified-since", b"range")  # a browser may know Streamlit's own page from before
        scope = {**scope, "headers": [h for h in scope["headers"] if h[0] not in conditions]}
        ours = False

        async def replaced(message: Message) -> None:
            nonlocal ours
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                ours = message["status"] == 200 and headers.get("content-type", "").startswith("text/html")
                if ours:
                    headers["Content-Length"] = str(len(self.page))
                    for name in ("etag", "last-modified", "content-encoding"):  # they tell of the page replaced
                        del headers[name]
            elif ours:
                message = {**message, "body": b"" if message.get("more_body") else self.page}
            await send(message)

        await self.app(scope, receive, replaced)


class SecurityHeaders:
    """Adds the headers to every response; ``page`` is what its policy is made for."""

    def __init__(self, app: ASGIApp, page: str) -> None:
        self.app = app
        self.headers = {
            "Content-Security-Policy": content_security_policy(page),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers)


class ClosedRoutes:
    """Answers 404 on the routes nobody needs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"].rstrip("/") in CLOSED
        target = PlainTextResponse("not found", status_code=404) if closed else self.app
        await target(scope, receive, send)


def on_script_error(error: Exception) -> bool:
    """Show one sentence with an id; the log gets the id and the kind of error, never its text (it may hold a prompt)."""
    mark = uuid.uuid4().hex[:8]
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last is not None else "?"
    logging.getLogger("routerscope").error("error %s: %s at %s", mark, type(error).__name__, where)
    st.error("Something went wrong on this page. Reload it; if it stays, look for this id in the log of the server:")
    st.code(mark, language=None)
    return True


def plotly_script(_: Request) -> FileResponse:
    """plotly.js as the installed Plotly ships it, for figures that become files; asked for when the first one is saved."""
    package = importlib.util.find_spec("plotly")  # where it is, without importing it
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "package_data" / "plotly.min.js"
    return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})


PAGE = own_page(Path(st.__file__).parent / "static")

app = st.App(
    "main.py",
    routes=[Route("/plotly.min.js", plotly_script)],
    middleware=[Middleware(SecurityHeaders, page=PAGE), Middleware(OwnPage, page=PAGE), Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS)),
                Middleware(ClosedRoutes)],
    on_script_error=on_script_error,
)  # fmt: skip
