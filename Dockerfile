# fasttrain on NVIDIA GPUs; docs/install.md says how to build and run it. torch and DALI bring their own CUDA
# libraries, so the base needs none.
FROM python:3.12-slim

# torch.compile compiles with a C and a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# First what changes rarely: the packages, in the pinned versions.
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE MANIFEST.in ./
COPY fasttrain/__init__.py fasttrain/
RUN pip install --no-cache-dir -c constraints.txt .

# Then fasttrain itself. Its results name this commit.
ARG FASTTRAIN_COMMIT=""
COPY fasttrain fasttrain
RUN FASTTRAIN_COMMIT="$FASTTRAIN_COMMIT" pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --create-home --uid 1000 fasttrain \
    && install --directory --owner fasttrain /work
USER fasttrain
WORKDIR /work
ENTRYPOINT ["fasttrain"]
CMD ["doctor"]
