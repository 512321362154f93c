"""A small language model behind the chat protocol, on loopback: `python benchmarks/llm_server.py MODEL [--threads N]`.

Prints its address once it serves. It answers with one token and the likeliest alternatives, which is all that
`kdlora ask` wants. Of prompts that begin alike, such as those of one template, the beginning is computed once.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

KEPT = 16
"""So many beginnings are kept."""


class Model:
    """Gives the log-probabilities of the next token."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._begun: OrderedDict[str, tuple[list[int], DynamicCache]] = OrderedDict()

    @torch.inference_mode()
    def answer(self, prompt: str) -> tuple[torch.Tensor, int]:
        """Give a log-probability for each token, and the number of tokens read."""
        chat = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        key = prompt.rpartition("\n\nText: ")[0]  # where the default template puts what differs
        before, cache = self._begun.pop(key, ([], DynamicCache()))
        same = next((n for n, pair in enumerate(zip(before, tokens, strict=False)) if len({*pair}) > 1), len(before))
        same = min(same, len(tokens) - 1)
        if same < len(before):
            cache.crop(same - len(before))
        output = self.model(torch.tensor([tokens[same:]]), cache=cache, logits_to_keep=1)
        self._begun[key] = (tokens, cache)
        if len(self._begun) > KEPT:
            self._begun.popitem(last=False)
        return output.logits[0, -1].float().log_softmax(-1), len(tokens)


def serve(model: Model) -> None:
    """Answer one request after another, until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            """Answer a request of the chat protocol."""
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            likely, read = model.answer(asked["messages"][-1]["content"])
            values, places = likely.topk(asked.get("top_logprobs", 1))
            tops = [
                {"token": model.tokenizer.decode([place]), "logprob": value}
                for place, value in zip(places.tolist(), values.tolist(), strict=True)
            ]
            choice = {
                "message": {"role": "assistant", "content": tops[0]["token"]},
                "logprobs": {"content": [{**tops[0], "top_logprobs": tops}]},
            }
            usage = {"prompt_tokens": read, "completion_tokens": 1}
            body = json.dumps({"model": asked["model"], "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # one thread serves all: nobody may hold it
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


def main() -> None:
    """Serve as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    serve(Model(given.model, given.dtype))


if __name__ == "__main__":
    main()
