"""An S3 server on the loopback address, as test_copying.py, test_places.py and test_cluster.py use it."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .conftest import ROOT

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}  # of every client


@contextmanager
def bucket() -> Iterator[str]:
    """Addresses in a bucket of a moto server, %s for a run's name. moto needs an older python-dateutil than is pinned, so it lives in an
    environment of its own.
    """
    program = ROOT / ".venv/s3/bin/moto_server"
    if not program.is_file():
        pytest.skip("no S3 server: make s3-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                    urllib.request.urlopen(request, timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline and server.poll() is None, "the S3 server does not start"
                    time.sleep(0.5)
            yield f"s3://bucket/runs/%s?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=false"
        finally:
            server.kill()
