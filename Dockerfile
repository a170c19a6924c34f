# Routerscope, non-root. Build: docker build -t routerscope .   Run, on this machine only:
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8501:8501 -v routerscope-runs:/srv/data/runs routerscope
# The tag is pinned, not its digest: no registry could be asked for one where this file was written.
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 HOME=/tmp \
    OMP_WAIT_POLICY=passive USE_HUB_KERNELS=0
WORKDIR /srv
COPY requirements.txt ./
RUN python -m pip install --disable-pip-version-check "$(grep '^torch==' requirements.txt)" \
 && python -m pip install --disable-pip-version-check -r requirements.txt
COPY analysis ./analysis
COPY app ./app
COPY data ./data
COPY .streamlit ./.streamlit
RUN useradd --uid 10001 --no-create-home routerscope \
 && install -d -o routerscope -m 0700 /srv/data/runs
USER 10001
VOLUME /srv/data/runs
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
# Inside a container the socket must listen on all its interfaces; the host check and the published address keep it local.
CMD ["python", "-m", "streamlit", "run", "app/serve.py", "--server.port", "8501", "--server.headless", "true", "--server.address", "0.0.0.0"]
