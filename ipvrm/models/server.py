"""A model behind a server that speaks the OpenAI-compatible protocol with token ids, as vLLM's does.

Prompts go out as token ids and responses come back as token ids (`return_token_ids`), so that no text is
tokenised twice. A server of the plain protocol gives text alone; it is refused.

    GET  /v1/models              what is served, and up to how many tokens
    POST /v1/completions         `token_ids` and `finish_reason` of a response; `prompt_logprobs` of a prompt
    POST /v1/load_lora_adapter   a policy in training (`unload_lora_adapter` afterwards)

A request whose answer fails in any way raises one line. Nothing is asked again by itself: the commands keep
what is finished and go on behind it.
"""

import http.client
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

from ipvrm.data.responses import Response
from ipvrm.errors import IpvrmError, cause, reading

LOCAL = "transformers"  # the value of --engine that means no server
ENGINE_TIMEOUT = 600.0
AGAIN = "see that it runs, and give the same command again: it goes on"
HALF = "; it must be a server that answers with token ids, such as vLLM 0.10.2 or newer"
ADDRESS = f"it must be {LOCAL}, or the address of a server's API such as http://localhost:8000/v1"
CLAMPED = -9999.0  # what vLLM writes for -inf, which JSON does not have
T = TypeVar("T")
R = TypeVar("R")


class ServerError(IpvrmError):
    """A server that is not there, is another one, or answers badly: no fault of what it was asked about."""


def check_engine(engine: str, timeout: float, **local: bool) -> None:
    """Raises IpvrmError for an `--engine` that is neither LOCAL nor an address, for an `--engine_timeout`
    that nothing reads or that is no time, and for one of the `local` flags, which a server does not take."""
    if engine == LOCAL:
        if timeout != ENGINE_TIMEOUT:
            raise IpvrmError("--engine_timeout belongs to the --engine of a server")
        return
    _parts(engine)
    if not 0 < timeout < math.inf:
        raise IpvrmError(f"engine_timeout must be positive and finite; got {timeout}")
    for name, value in local.items():
        if value:
            raise IpvrmError(f"--{name} has no effect on --engine {engine}; leave it out")


def kind_of(engine: str) -> dict[str, str]:
    """What of `--engine` decides the results: that it is a server, which may move."""
    return {} if engine == LOCAL else {"engine": "a server"}


def served_pair(engine: str, reference_engine: str, timeout: float, **local: bool) -> tuple[str, ...]:
    """The addresses of a reward model's server and its reference's; empty where both are in memory.

    Raises:
        IpvrmError: one of them alone, or as `check_engine`.
    """
    pair = (engine, reference_engine)
    if pair.count(LOCAL) == 1:
        raise IpvrmError("--engine and --reference_engine: a server of both, or of neither")
    for url in pair:
        check_engine(url, timeout, **local)
    return () if LOCAL in pair else pair


def _parts(url: str) -> SplitResult:
    with reading(f"--engine {url!r}", "not an address", ADDRESS):
        parts = urlsplit(url)
        parts.port  # noqa: B018 (a port that is no number raises)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise IpvrmError(f"--engine {url!r}: not an address; {ADDRESS}")
    return parts


class Server:
    """One served model.

    Args:
        url: of the API, for example `http://localhost:8000/v1`.
        model: the folder or Hub name that it must serve. A server calls a model by `--served-model-name`, or
            by the path it was started with: that or its last part must be `model` or the last part of it.
        timeout: most seconds to wait for one answer.
        concurrency: most requests at a time.
        also: other names of the same model.

    The environment's OPENAI_API_KEY, where there is one, goes along.

    Raises:
        IpvrmError: a url that is none, no server there, or one that serves another model.
    """

    def __init__(
        self,
        url: str,
        model: str | Path,
        timeout: float = ENGINE_TIMEOUT,
        concurrency: int = 64,
        also: Sequence[str] = (),
    ):
        parts = _parts(url)
        if not 0 < timeout < math.inf or concurrency < 1:
            raise ServerError(
                f"{url}: timeout must be positive and at least one request go at a time; got {timeout}, "
                f"{concurrency}"
            )
        self.url, self.timeout, self.concurrency = url.rstrip("/"), timeout, concurrency
        self._https, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self._address = (parts.hostname or "", parts.port)
        self._open: set[http.client.HTTPConnection] = set()
        self._hung_up = threading.Event()
        entry = self._entry(str(model), also)
        self.name: str = entry["id"]
        limit = entry.get("max_model_len")
        self.max_positions: int | None = limit if isinstance(limit, int) else None

    def _entry(self, model: str, also: Sequence[str]) -> dict[str, Any]:
        """What /models says of `model`."""
        found = self._ask("GET", "/models")
        listed = found.get("data") if isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in listed
        ):
            raise ServerError(f"{self.url}/models: names no models{HALF}")
        wanted = {name for given in (model, *also) for name in (given, Path(given).absolute().name)}
        for entry in listed:
            names = [entry["id"], entry.get("root") or ""]
            if not entry.get("parent") and wanted & {*names, *(Path(name).name for name in names)}:
                return dict(entry)
        serves = ", ".join(entry["id"] for entry in listed) or "nothing"
        name = Path(model).absolute().name
        raise ServerError(
            f"{self.url}: serves {serves}, not {model}; start it with that model (vllm serve {model}), or if "
            f"it has the same weights elsewhere, call them so (--served-model-name {name})"
        )

    # -------------------------------------------------------------------------------------------- requests

    def completion(
        self, prompt: Sequence[int], *, name: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        """The one choice of a completion; of a `prompt` that the server took as it is.

        Args:
            name: of an adapter, in place of the model's.
            settings: of the request besides.
        """
        model = name or self.name
        body = {"model": model, "prompt": list(prompt), "n": 1, "return_token_ids": True, **settings}
        answer = self._ask("POST", "/completions", body)
        if answer.get("model") != model:
            raise ServerError(
                f"{self.url}: answers for {answer.get('model')!r}, asked for {model!r}; {AGAIN}"
            )
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerError(f"{self.url}: half an answer: one choice was asked for; {AGAIN}")
        choice = choices[0]
        for field in ("prompt_token_ids", "token_ids"):
            ids = choice.get(field)
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise ServerError(f"{self.url}: its answer has no {field}{HALF}")
        if choice["prompt_token_ids"] != list(prompt):
            raise ServerError(
                f"{self.url}: it has changed the prompt, of {len(prompt)} tokens to "
                f"{len(choice['prompt_token_ids'])}; tokens must be taken as they are"
            )
        return dict(choice)

    def logprobs(self, responses: Sequence[Response], name: str | None = None) -> list[Tensor]:
        """log pi(y_t | x, y_<t) of every response token at temperature 1: a list of (T_b,) fp32.

        They are the server's `prompt_logprobs` of the whole sequence, which no temperature enters; -inf of a
        token that its model rules out.

        Args:
            name: of an adapter, in place of the model's.

        Raises:
            ServerError: a response that is too long, or an answer without them.
        """

        def of(response: Response) -> Tensor:
            ids = response.input_ids
            if self.max_positions is not None and len(ids) >= self.max_positions:
                raise ServerError(  # vLLM makes a token behind the sequence
                    f"{self.url}: {len(ids)} tokens and one more are over its {self.max_positions} "
                    "(--max-model-len)"
                )
            choice = self.completion(ids, name=name, max_tokens=1, temperature=0.0, prompt_logprobs=0)
            found = choice.get("prompt_logprobs")
            if not isinstance(found, list) or len(found) != len(ids):
                raise ServerError(f"{self.url}: no prompt_logprobs of each of {len(ids)} tokens{HALF}")
            start = response.prompt_length
            values = [_logprob(entry, token) for entry, token in zip(found[start:], ids[start:], strict=True)]
            if any(value is None for value in values):
                raise ServerError(f"{self.url}: a prompt_logprobs entry lacks its own token{HALF}")
            result = torch.tensor(values, dtype=torch.float32)
            return result.masked_fill(result <= CLAMPED, -math.inf)

        return self.each(of, responses)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serves the LoRA adapter in `folder`, a path that the server can read, under `name`."""
        advice = (
            "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank of at "
            "least --lora_r, where it sees the same files"
        )
        path = str(folder.absolute())
        try:
            self._ask("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": path}, text=True)
        except ServerError as error:
            raise ServerError(f"{error} (loading {path}: {advice})") from error

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; one that a restarted server does not know is forgotten already."""
        with suppress(IpvrmError):
            self._ask("POST", "/unload_lora_adapter", {"lora_name": name}, text=True)

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of every item in threads; the first that fails ends the others, whose connections are
        cut, so that the server drops them too."""
        try:
            with ThreadPoolExecutor(self.concurrency) as pool:
                try:
                    futures: list[Future[R]] = [pool.submit(function, item) for item in items]
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    failed = [error for future in done if (error := future.exception()) is not None]
                    if failed:
                        raise failed[0]
                    return [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self._hang_up()
                    raise
        finally:
            self._hung_up.clear()

    def _hang_up(self) -> None:
        self._hung_up.set()
        for connection in list(self._open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(SHUT_RDWR)

    def _ask(self, method: str, path: str, body: Any = None, text: bool = False) -> Any:
        """The parsed answer (`text`: nothing of it) to one request, on a connection of its own."""
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        host, port = self._address
        connection = kind(host, port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        self._open.add(connection)
        try:
            if self._hung_up.is_set():
                raise ServerError(f"{self.url}: another request has failed")
            content = None if body is None else json.dumps(body)
            connection.request(method, f"{self._path}{path}", body=content, headers=headers)
            answer = connection.getresponse()
            raw = answer.read()
        except TimeoutError as error:
            raise ServerError(
                f"{self.url}{path}: no answer within {self.timeout:g} s (--engine_timeout); {AGAIN}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = "half an answer" if isinstance(error, http.client.IncompleteRead) else cause(error)
            raise ServerError(f"{self.url}{path}: {reason}; {AGAIN}") from error
        finally:
            self._open.discard(connection)
            connection.close()
        if answer.status != 200:
            raise ServerError(f"{self.url}{path}: HTTP {answer.status}: {_said(raw)}")
        if text:
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            raise ServerError(f"{self.url}{path}: half an answer, no JSON; {AGAIN}") from error


def _logprob(entry: Any, token: int) -> float | None:
    """Of `token` in one entry of `prompt_logprobs`: an object whose keys are ids as text."""
    found = entry.get(str(token)) if isinstance(entry, dict) else None
    value = found.get("logprob") if isinstance(found, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _said(raw: bytes) -> str:
    """The message of an error's body."""
    text = raw.decode("utf-8", "replace")
    with suppress(ValueError):
        parsed = json.loads(text)
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
        if isinstance(error, dict):
            text = str(error.get("message") or error.get("detail") or text)
    return cause(Exception(text))
