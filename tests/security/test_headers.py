"""The really served app: foreign hosts and origins refused, every response with its headers, closed routes closed."""

import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from app.serve import EARLY, early_scripts, own_page
from tests.browser.served import served

HEADERS = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
PATHS = [
    "/",
    "/_stcore/health",
    "/_stcore/host-config",
    "/static/nothing.js",
    "/plotly.min.js",
    "/tokens",
    "/_stcore/metrics",
    "/../../etc/passwd",
    "/%2e%2e/README.md",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("served") / "runs") as url:
        yield url.removeprefix("http://")


def asked(address: str, path: str, host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host or address)
    connection.endheaders()
    response = connection.getresponse()
    response.read()
    return response


@pytest.mark.parametrize("path", PATHS)
def test_every_response_carries_the_headers(address: str, path: str) -> None:
    response = asked(address, path)
    assert {k: response.getheader(k) for k in HEADERS} == HEADERS
    policy = response.getheader("content-security-policy") or ""
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    scripts = next(d for d in policy.split("; ") if d.startswith("script-src"))
    assert "unsafe" not in scripts and "http" not in scripts and "*" not in scripts


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8501", "127.0.0.1.evil.example", "0.0.0.0", "localhost.evil.example"])
def test_foreign_hosts_are_refused(address: str, path: str, host: str) -> None:
    assert asked(address, path, host).status in (400, 403)


def test_counters_are_closed_and_the_page_is_open(address: str) -> None:
    assert asked(address, "/_stcore/metrics").status == 404
    assert asked(address, "/").status == 200 and asked(address, "/_stcore/health").status == 200


@pytest.mark.parametrize(("host", "origin"), [("evil.example", "http://evil.example"), (None, "http://evil.example"), (None, "null")])
def test_foreign_websockets_are_refused(address: str, host: str | None, origin: str) -> None:
    headers = {"Host": host} if host else {}
    with pytest.raises((InvalidStatus, OSError, EOFError)) as caught:
        with connect(f"ws://{address}/_stcore/stream", origin=origin, additional_headers=headers, open_timeout=10):
            pass
    assert isinstance(caught.value, InvalidStatus) and caught.value.response.status_code in (400, 403)


def test_own_websocket_is_accepted(address: str) -> None:
    with connect(f"ws://{address}/_stcore/stream", origin=f"http://{address}", open_timeout=10):
        pass


STATIC = Path(streamlit.__file__).parent / "static"


def test_the_page_is_ours_on_every_path_that_is_a_page(address: str) -> None:
    """Name and style are in it, as are the scripts of EARLY, each of which this release has and serves; other answers stay as they are."""
    page = own_page(STATIC)
    assert "<title>Routerscope</title>" in page and (Path("app") / "style.css").read_text() in page
    assert all(any(name.startswith(f"{part}.") for name in early_scripts(STATIC)) for part in EARLY)
    for path in ("/", "/tokens", "/specialization"):
        response = http.client.HTTPConnection(address, timeout=10)
        response.request("GET", path, headers={"Accept-Encoding": "gzip", "If-None-Match": "*"})
        answer = response.getresponse()
        assert answer.read().decode() == page and answer.getheader("etag") is None and answer.getheader("content-encoding") is None
    scripts = re.findall(r'href="(/static/js/[^"]+)"', page)
    assert len(scripts) == len(set(scripts)) >= len(EARLY) and all(asked(address, s).status == 200 for s in scripts)
    assert asked(address, "/_stcore/health").getheader("content-length") != str(len(page))
