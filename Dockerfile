# syntax=docker/dockerfile:1
# Pinned by tag, not by digest: no engine or image registry was at hand to read a digest that is certainly right.
# Replace the tag by image@sha256:... where `docker buildx imagetools inspect` can be run.
FROM python:3.11.14-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    HF_HUB_OFFLINE=1 \
    USE_HUB_KERNELS=0 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HOME=/tmp

WORKDIR /srv/routerscope

# For the CPU build of torch, hand in a pip.conf that says where it is: docker build --secret id=pip,src=pip.conf .
COPY requirements.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --disable-pip-version-check --requirement requirements.txt

COPY .streamlit ./.streamlit
COPY analysis ./analysis
COPY app ./app
COPY data ./data

# The tree belongs to root and is only read; recorded runs are the one thing written.
RUN groupadd --gid 10001 routerscope \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin routerscope \
    && install --directory --owner=10001 --group=10001 data/runs
USER 10001:10001
VOLUME ["/srv/routerscope/data/runs"]
EXPOSE 8501

HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]

# Inside a container the server listens on every address; allowedHosts in .streamlit/config.toml still admits localhost
# alone, so publish it there:
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --publish 127.0.0.1:8501:8501 --volume runs:/srv/routerscope/data/runs routerscope
CMD ["python", "-m", "streamlit", "run", "app/serve.py", "--server.port", "8501", "--server.address", "0.0.0.0"]
