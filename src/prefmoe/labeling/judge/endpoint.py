"""One question to an OpenAI-compatible endpoint, and what came of it: a reply, a fault to wait out, or a dead end.

Endpoints differ in what they take. A request begins with everything that helps (a JSON schema, temperature 0); what
an endpoint rejects by name is left out from then on. Retries are not made here: the SDK's own are off.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from prefmoe.errors import ConfigError
from prefmoe.labeling.judge.answers import (
    Answer,
    Reason,
    TokenOptions,
    answer_schema,
    read_answers,
    unusable,
)
from prefmoe.labeling.judge.pace import retry_after
from prefmoe.labeling.judge.questions import Asks
from prefmoe.labeling.judge.settings import JudgeSettings

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
_URL_VARIABLE = "OPENAI_BASE_URL"
_OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"  # the SDK wants one; a server without accounts does not look at it
_LIKELIEST = 5  # tokens shown in the place of an answer; some servers show no more
_SHOWN_CHARACTERS = 300

# What the SDK would tell every endpoint about this machine; nobody asked, and each header costs processor time.
_UNASKED = tuple(
    f"X-Stainless-{name}"
    for name in ("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async")
)
_UNASKED_PER_CALL = ("X-Stainless-Retry-Count", "X-Stainless-Read-Timeout")

# By what a rejected request may be rejected, and what is sent instead.
_OPTIONAL = ("response_format", "temperature", "max_tokens", "max_completion_tokens", "logprobs")
_TEMPORARY = (408, 409, 425, 429)
_TOO_LONG = ("context_length", "maximum context", "context window", "too long", "too many tokens")
_REFUSED = ("content_filter", "content_policy", "content management policy", "safety")


class Fault(Exception):
    """Something that may be over soon: too many requests, a server's error, a time-out, a broken connection.

    Attributes:
        wait: Seconds that the endpoint asks to wait, None if it does not say.
        may_stay: Whether it may be this very question that makes the endpoint fail.
    """

    def __init__(self, reason: str, wait: float | None = None, *, may_stay: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.may_stay = wait, may_stay


class Rejection(ConfigError):
    """The endpoint does not take such a request; others it may take."""


class Reply(NamedTuple):
    """The answers to a question, and the tokens that the endpoint counted; None where it did not count."""

    answers: dict[str, Answer]
    input_tokens: int | None = None
    output_tokens: int | None = None


class Endpoint:
    """A chat model behind an OpenAI-compatible address.

    Args:
        model: Its name there.
        base_url: The address up to `/v1`; None is OPENAI_BASE_URL, else OpenAI's.
        timeout: Seconds without an answer after which a call counts as failed.
        max_answer_tokens: Tokens of an answer on one point; models that think before they answer need more.
        confidence: Ask for the log-probabilities of the answers too.
        connections: Calls on the wire at the same time; further ones wait, made ready, for one to come home.

    Raises:
        ConfigError: the `openai` package or a key is missing, or the address is none.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        timeout: float = 60.0,
        max_answer_tokens: int = 16,
        confidence: bool = False,
        connections: int = 1024,
    ) -> None:
        self.model = model
        self.url = base_url or os.environ.get(_URL_VARIABLE) or _OPENAI
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._max_answer_tokens, self._confidence = max_answer_tokens, confidence
        self._dropped: set[str] = set()
        self._client = self._connect(timeout, connections)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def ask(self, question: Asks) -> Reply:
        """The answers to one question.

        Raises:
            Fault: try again later.
            Rejection: it does not take this request, for a reason that it does not name.
            ConfigError: trying again would not help: a wrong key, model or address.
        """
        messages = [
            {"role": "system", "content": question.system},
            {"role": "user", "content": question.user},
        ]
        schema = answer_schema(question.points, question.allowed)
        limit = self.output_limit(len(question.points))
        try:
            content = await self._post(messages, limit=limit, schema=schema)
        except _Unanswerable as dead_end:
            return Reply(unusable(question.points, dead_end.reason, str(dead_end)))
        return self._read(content, question)

    async def write(self, messages: Sequence[Mapping[str, str]], *, limit: int) -> str:
        """Free text, for what is no question."""
        try:
            content = await self._post(messages, limit=limit, schema=None)
        except _Unanswerable as dead_end:
            raise ConfigError(f"{self.model!r} does not answer ({dead_end.reason}): {dead_end}") from None
        return self._without_key(str(_message(content).get("content") or ""))

    def output_limit(self, num_points: int) -> int:
        """Most tokens that an answer may have."""
        return self._max_answer_tokens * num_points

    def _connect(self, timeout: float, connections: int) -> "AsyncOpenAI":
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                f"judge {self.model!r} is asked through the package `openai`, which is not installed; "
                "run pip install 'prefmoe[judge]', or take an offline judge such as local:smollm2-135m"
            ) from error
        if not self._key and self.url.rstrip("/").startswith(_OPENAI.removesuffix("/v1")):
            raise ConfigError(
                f"judge {self.model!r}: {KEY_VARIABLE} is not set, and {_OPENAI} wants a key; set it in the "
                "environment, or give --base-url of a server that wants none"
            )
        address = urlsplit(self.url)
        if "@" in address.netloc or address.query or address.fragment:  # errors show the address
            raise ConfigError(
                f"base_url: the address of {address.hostname!r} carries a name, a password, a query or a fragment; "
                f"expected one like http://127.0.0.1:8000/v1, and the key in {KEY_VARIABLE}"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"base_url {self.url!r} is no address; expected one like http://127.0.0.1:8000/v1"
            )
        # The SDK names no class for limits; its default is one of whichever httpx it stands on.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=connections, max_keepalive_connections=connections
        )
        patience = openai.Timeout(timeout, pool=None)  # to wait for a connection is no fault of the endpoint
        try:  # the extra `prefmoe[judge]` brings aiohttp, which takes half the processor time a call
            client = openai.DefaultAioHttpClient(timeout=patience, limits=limits, follow_redirects=False)
        except RuntimeError:
            client = openai.DefaultAsyncHttpxClient(timeout=patience, limits=limits, follow_redirects=False)
        return openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=self.url,
            max_retries=0,
            timeout=patience,
            http_client=client,
            default_headers=cast("dict[str, str]", dict.fromkeys(_UNASKED, openai.Omit())),
        )

    async def _post(
        self, messages: Sequence[Mapping[str, str]], *, limit: int, schema: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The reply's JSON; a request that is rejected for one of its optional fields is sent again without it."""
        while True:
            body = self._body(messages, limit, schema)
            try:
                return await self._send(body)
            except _Rejected as rejected:
                if not self._drop(body, str(rejected)):
                    raise Rejection(
                        f"{self.url} rejects the request for {self.model!r}: {self._clean(str(rejected))}"
                    ) from None

    def _body(
        self, messages: Sequence[Mapping[str, str]], limit: int, schema: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"temperature": 0, "max_tokens": limit}
        if schema is not None:
            json_schema = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        if self._confidence:
            body |= {"logprobs": True, "top_logprobs": _LIKELIEST}
        if "max_tokens" in self._dropped:
            body["max_completion_tokens"] = limit
        kept = {name: value for name, value in body.items() if name not in self._dropped}
        return {"model": self.model, "messages": messages, **kept}

    def _drop(self, body: Mapping[str, Any], complaint: str) -> bool:
        """Leaves out the field that an endpoint complains about, from now on; whether there was one."""
        text = complaint.lower()
        named = [
            name for name in _OPTIONAL if name in body and (name in text or name.replace("_", " ") in text)
        ]
        if "json_schema" in text and "response_format" in body:
            named = ["response_format"]
        if "logprobs" in named:
            raise ConfigError(f"{self.url} gives no log-probabilities; drop --confidence")
        self._dropped.update(named[:1])
        return bool(named)

    async def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        import openai

        try:
            # The text, not the SDK's typed object: half the processor time, and servers' own fields do no harm.
            # So do a whole address, a body that is bytes, and fewer headers: together 5 to 25 % of what is left.
            text = await self._client.post(
                f"{self._client.base_url}chat/completions",
                cast_to=str,
                content=json.dumps(body).encode(),
                options={"headers": dict.fromkeys(_UNASKED_PER_CALL, openai.Omit())},
            )
        except openai.APIConnectionError as error:
            in_time = not isinstance(error, openai.APITimeoutError)
            what = "the connection broke" if in_time else "no answer in time"
            raise Fault(
                f"{what} ({self._clean(str(error.__cause__ or error))})", may_stay=not in_time
            ) from None
        except openai.APIStatusError as error:
            raise self._status_problem(error) from None
        try:
            content = json.loads(text)
            _message(content)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise Fault(f"the reply is no chat completion: {self._clean(text)!r}") from None
        return dict(content)

    def _status_problem(self, error: "APIStatusError") -> Exception:
        """What a status other than 200 means: wait, give up this question, or give up."""
        status, text = error.status_code, self._clean(error.message)
        complaint = self._without_key(f"{error.message} {error.body}")
        lowered = complaint.lower()
        if status == 429 and "insufficient_quota" in lowered:
            return ConfigError(
                f"{self.url}: the account has no credit left: {text}; what is stored stays stored"
            )
        if status in _TEMPORARY or status >= 500:
            wait = retry_after(error.response.headers)
            return Fault(f"status {status}", wait, may_stay=status not in _TEMPORARY)
        if status in (401, 403):
            return ConfigError(
                f"{self.url} does not let us in (status {status}): {text}; check {KEY_VARIABLE}"
            )
        if status == 404:
            return ConfigError(f"{self.url} has no model {self.model!r} (status 404): {text}; check both")
        if any(sign in lowered for sign in _TOO_LONG):
            return _Unanswerable("too long", text)
        return _Unanswerable("refused", text) if any(s in lowered for s in _REFUSED) else _Rejected(complaint)

    def _read(self, content: Mapping[str, Any], question: Asks) -> Reply:
        choice, message = content["choices"][0], _message(content)
        usage = content.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        text = str(message.get("content") or "")
        reason: Reason | None = None
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            reason = "refused"
        elif choice.get("finish_reason") == "length":
            reason = "cut off"
        if reason is not None:
            answers = unusable(question.points, reason, self._clean(str(message.get("refusal") or text)))
        else:
            tokens = _token_options(choice)
            answers = read_answers(self._without_key(text), question.points, question.allowed, tokens=tokens)
        return Reply(answers, _count(counted.get("prompt_tokens")), _count(counted.get("completion_tokens")))

    def _without_key(self, text: str) -> str:
        """The text without the key, should a server repeat it: errors and the store never see it."""
        return text.replace(self._key, "***") if self._key else text

    def _clean(self, text: str) -> str:
        text = self._without_key(text)
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def open_endpoint(settings: JudgeSettings) -> Endpoint:
    """The endpoint that the settings name; a ConfigError says what is missing."""
    return Endpoint(
        settings.judge,
        base_url=settings.base_url,
        timeout=settings.timeout,
        max_answer_tokens=settings.max_answer_tokens,
        confidence=settings.confidence,
        connections=max(1, settings.concurrency // settings.processes),
    )


class _Rejected(Exception):
    """The endpoint does not take such requests."""


class _Unanswerable(Exception):
    """The endpoint takes such requests, but never this question."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


def _message(content: Any) -> dict[str, Any]:
    message = content["choices"][0]["message"]
    if not isinstance(message, dict):
        raise TypeError
    return message


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _token_options(choice: Mapping[str, Any]) -> list[TokenOptions]:
    """Tokens and alternatives as OpenAI lists them; none where they are missing or malformed."""
    try:
        listed = (choice.get("logprobs") or {}).get("content") or []
        return [
            TokenOptions(
                str(item["token"]),
                {str(option["token"]): float(option["logprob"]) for option in item["top_logprobs"]},
            )
            for item in listed
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
