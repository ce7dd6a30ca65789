# Run a bundle with ONNX Runtime on an x86 or 64-bit ARM processor; ports, mounts and keys are in README.md.
# NEVER BUILT: no machine with a container engine was available. Checked: hadolint; the installation below in a new
# environment of Python 3.13 on x86, and for arm64 that pip finds a wheel of every package; `serve` from that environment,
# with the command of HEALTHCHECK.
#
#   docker build -f engines/devices/cpu.Dockerfile -t cushion-deploy:cpu .
FROM python:3.13.7-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/cushion \
    && /opt/cushion/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,chat,hub,serve]'

FROM python:3.13.7-slim-bookworm
RUN useradd --uid 10001 --create-home cushion
COPY --from=build /opt/cushion /opt/cushion
ENV PATH=/opt/cushion/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/cushion
EXPOSE 8000
# /health answers while the process lives, /ready once the bundle is loaded, which is what a start has to wait for.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["cushion-deploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]
