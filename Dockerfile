# The command ensemble-system on a CPU, from the wheel:
#   make wheel && docker build -t ensemble-system .
#   docker run --rm -v "$PWD:/work" ensemble-system demo --data "my leaves"
FROM python:3.12-slim
RUN useradd --create-home user
COPY dist/*.whl /tmp/
# PyTorch's own index has builds without CUDA, which are a tenth of the size.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "$(ls /tmp/*.whl)[pretrained]" \
    && rm /tmp/*.whl
USER user
WORKDIR /work
ENTRYPOINT ["ensemble-system"]
