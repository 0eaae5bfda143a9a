"""One chat completion from any server that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..files.rows import parse_json

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses worth another attempt
MAX_ANSWER = 1 << 20  # bytes


class EndpointError(ConnectionError):
    """The endpoint cannot be used; `transient` when the same request may succeed later."""

    def __init__(self, message: str, *, transient: bool = False):
        super().__init__(message)
        self.transient = transient


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key and the examples to another server."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Endpoint:
    """prompt -> text by POST `base_url`/chat/completions at temperature 0.

    base_url: such as "http://localhost:8000/v1". api_key is sent as a bearer token when it is given; timeout in
    seconds. Errors: EndpointError with the status and what the server said.
    """

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 60.0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ValueError(f"base_url must be an http(s) address such as http://host:8000/v1, got {self.base_url!r}")

    def __call__(self, prompt: str) -> str:
        return _content(*self._asked(prompt))

    def counted(self, prompt: str) -> tuple[str, int]:
        """(the answer, tokens of prompt and answer as the server counts them); EndpointError when it does not."""
        answer, url = self._asked(prompt)
        try:
            tokens = parse_json(answer)["usage"]["total_tokens"]
        except (ValueError, LookupError, TypeError):
            tokens = None
        text = _content(answer, url)
        if not isinstance(tokens, int) or tokens < 0:
            raise EndpointError(f"{url} does not say how many tokens an answer took (usage.total_tokens)")
        return text, tokens

    def _asked(self, prompt: str) -> tuple[bytes, str]:
        """(the body of the response, the address)."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer = response.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace").strip()
            raise EndpointError(f"{url} answered {error.code}: {said}", transient=error.code in TRANSIENT) from error
        except TimeoutError as error:
            raise EndpointError(f"{url} did not answer within {self.timeout:g} s", transient=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{url} cannot be reached: {error}", transient=True) from error
        return answer, url


def _content(answer: bytes, url: str) -> str:
    try:
        content = parse_json(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        said = answer[:200].decode(errors="replace")
        raise EndpointError(f"{url} did not answer with a chat completion but with: {said}", transient=True) from error
    return content if isinstance(content, str) else ""
