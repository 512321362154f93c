# The HTTP server with what predicts: neither PyTorch nor transformers.
#   docker build -t kdlora-serve .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/runs/reviews/student-onnx:/models/reviews:ro" kdlora-serve /models/reviews
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir "/source[serve]" && rm -r /source && useradd --system server
USER server
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["kdlora", "serve", "--host", "0.0.0.0"]
