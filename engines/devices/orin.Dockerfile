# Compile and run a bundle with standard TensorRT on a Jetson Orin with JetPack 6 (Jetson Linux 36.4, TensorRT 10.3).
# NEVER BUILT and never run on a Jetson; standard TensorRT itself has not been run by this project. Checked: hadolint;
# that pip finds a wheel for arm64 and Python 3.10 of every package of the first installation, and of cuda-bindings.
# Not checked: the base image, and the installation for `compile`.
#
#   docker build -f engines/devices/orin.Dockerfile --target compile -t cushion-deploy:orin-compile .
#   docker build -f engines/devices/orin.Dockerfile -t cushion-deploy:orin .
#   docker run --runtime nvidia ...
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0 AS base
# The distribution's own Python 3.10, because TensorRT's module for Python is JetPack's package for it, not one of PyPI.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('tensorrt') is None)" \
    && useradd --uid 10001 --create-home --groups video cushion
WORKDIR /src
COPY . .
# JetPack 6 has the driver of CUDA 12, so the bindings are those of CUDA 12 too: not those of constraints.txt.
RUN python3 -m venv --system-site-packages /opt/cushion \
    && /opt/cushion/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,chat,hub,serve]' \
    && /opt/cushion/bin/pip install --no-cache-dir cuda-bindings==12.8.0
ENV PATH=/opt/cushion/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/cushion

# For `engine`, once per bundle and device: it exports the float16 graph from the original model, so it needs torch. The
# build of torch for the CPU is enough, and brings no CUDA beside that of JetPack.
FROM base AS compile
WORKDIR /src
RUN /opt/cushion/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && /opt/cushion/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,chat,build,report]'
USER 10001
WORKDIR /home/cushion
ENTRYPOINT ["cushion-deploy"]
CMD ["doctor"]

FROM base
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["cushion-deploy"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--engine", "tensorrt"]
