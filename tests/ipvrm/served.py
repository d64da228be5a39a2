"""A server that speaks vLLM's completions protocol in a thread and answers with a model's real numbers."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from ipvrm.models.causal_lm import load_model
from ipvrm.rollouts.engine import Sampling, TransformersEngine, stop_ids


class FakeServer:
    """vLLM's fields and defaults as of 0.11 to 0.32, on a free port, until the `with` ends.

    `mode` is --logprobs-mode. `asked` holds every request's path and body. `fault(path, body)`, where it is
    set, may return a fault to commit: see `_Handler`.
    """

    def __init__(self, folder, tokenizer, *, name=None, mode="raw_logprobs", model=None, port=0):
        self.folder, self.mode = str(folder), mode
        self.name = name or str(folder)
        self.model = load_model(folder) if model is None else model
        self.stops = stop_ids(self.model, tokenizer)
        self.adapters, self.asked, self.keys = {}, [], []
        self.fault, self.max_model_len = None, 4096
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"served": self})
        self.http = _Http(("127.0.0.1", port), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def models(self):
        base = {"id": self.name, "root": self.folder, "parent": None, "max_model_len": self.max_model_len}
        loras = [{"id": i, "root": str(p), "parent": self.name} for i, (p, _) in self.adapters.items()]
        return {"object": "list", "data": [base, *loras]}

    def load(self, body):
        from peft import PeftModel

        assert body["lora_name"] not in self.adapters, "vLLM refuses a name that it has"
        model = PeftModel.from_pretrained(load_model(self.folder), body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = (body["lora_path"], model)

    @torch.no_grad()
    def complete(self, body):
        """The one choice; what the request leaves out has vLLM's default."""
        model = self.model if body["model"] == self.name else self.adapters[body["model"]][1]
        prompt = body["prompt"]
        sampling = Sampling(
            body.get("max_tokens", 16),
            body.get("temperature", 1.0),
            body.get("top_p", 1.0),
            body.get("top_k", 0),
        )
        assert body.get("n", 1) == 1 and len(prompt) + sampling.max_new_tokens <= self.max_model_len
        stops = self.stops | set(body.get("stop_token_ids", []))
        (ids,) = TransformersEngine(model, stops)([prompt], sampling, [body.get("seed") or 0])
        choice = {"index": 0, "text": "never read", "logprobs": None, "prompt_logprobs": None}
        choice["finish_reason"] = "stop" if ids[-1] in stops else "length"
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        logits = model(torch.tensor([prompt + ids])).logits[0].float()  # (T, V)
        if body.get("logprobs") is not None:
            choice["logprobs"] = self.tops(logits[len(prompt) - 1 : -1], ids, sampling, body)
        if body.get("prompt_logprobs") is not None:
            logprobs = logits.log_softmax(-1)
            entries = [{str(t): self.entry(logprobs[i], t)} for i, t in enumerate(prompt[1:])]
            choice["prompt_logprobs"] = [None, *entries]
        return choice

    def entry(self, row, token):
        rank = int((row > row[token]).sum()) + 1
        return {"logprob": max(float(row[token]), -9999.0), "rank": rank, "decoded_token": "x"}

    def tops(self, logits, ids, sampling, body):
        """`logprobs` of a choice: of each token its own and the best, keyed as it was asked for."""
        kind, _, what = self.mode.partition("_")
        if kind == "processed" and sampling.temperature > 0:
            logits = logits / sampling.temperature
        values = logits.log_softmax(-1) if what == "logprobs" else logits
        name = "token_id:{}" if body.get("return_tokens_as_token_ids") else "text {}"
        tops = []
        for row, token in zip(values, ids, strict=True):
            best = [token, *(i for i in row.topk(body["logprobs"]).indices.tolist() if i != token)]
            tops.append({name.format(i): max(float(row[i]), -9999.0) for i in best})
        own = [float(row[token]) for row, token in zip(values, ids, strict=True)]
        return {"tokens": [name.format(i) for i in ids], "token_logprobs": own, "top_logprobs": tops}


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # 64 connect at once; beyond a queue of 5 a kernel may reset them

    def handle_error(self, request, client_address):
        """Silence for a client that has hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Faults: a number is a status, ("sleep", s) waits first, "die" closes the connection, "half" breaks off
    in the middle of the body, "words" is no JSON, a function changes the choice."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.served.asked.append((self.path, None))
        self.served.keys.append(self.headers["Authorization"])
        self.answer(self.served.models())

    def do_POST(self):
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served.asked.append((self.path, body))
        fault = None if served.fault is None else served.fault(self.path, body)
        if isinstance(fault, int):
            return self.answer({"error": {"message": f"status {fault} it is", "code": fault}}, fault)
        if fault == "die":
            return self.connection.close()
        if isinstance(fault, tuple):
            time.sleep(fault[1])
        with served.lock:
            if self.path.endswith("/load_lora_adapter"):
                served.load(body)
                return self.answer("Success: LoRA adapter added.")
            if self.path.endswith("/unload_lora_adapter"):
                del served.adapters[body["lora_name"]]
                return self.answer("Success: LoRA adapter removed.")
            choice = served.complete(body)
        if callable(fault):
            choice = fault(choice)
        whole = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
        self.answer("so be it" if fault == "words" else whole, half=fault == "half")

    def answer(self, value, status=200, half=False):
        raw = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if half else raw)


def scaled(folder, factor=10):
    """A model of `folder` with its matrices `factor` times as large: what it says depends on its prompt."""
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model
