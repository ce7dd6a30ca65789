# Run a bundle with a TensorRT-RTX plan on an NVIDIA RTX card; ports, mounts and keys are in README.md.
# NEVER BUILT, and no plan has ever been run on a GPU. Checked: hadolint; the installation below in a new environment of
# Python 3.13 on x86 without a GPU, and what `cushion-deploy doctor` says there.
#
#   docker build -f engines/devices/rtx.Dockerfile -t cushion-deploy:rtx .
#   docker run --gpus all ...
FROM python:3.13.7-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/cushion \
    && /opt/cushion/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,chat,hub,serve,rtx,cuda]'

FROM python:3.13.7-slim-bookworm
RUN useradd --uid 10001 --create-home cushion
COPY --from=build /opt/cushion /opt/cushion
# CUDA's runtime and TensorRT-RTX are in the packages above; the driver comes from the NVIDIA Container Toolkit.
ENV PATH=/opt/cushion/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /home/cushion
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["cushion-deploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--engine", "tensorrt-rtx"]
