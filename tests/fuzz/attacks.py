"""Hostile requests, byte by byte: what no client library would send."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hypothesis import strategies as st

from deployments.tasks import Task
from serve_app.jobs.options import JobOptions
from tests.fuzz.pictures import WHOLE, pictures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hypothesis.strategies import SearchStrategy

Framing = Literal["length", "chunked", "short", "long", "none"]


@dataclass(frozen=True)
class Attack:
    """A request. Words such as {job:3} stand for things that only a running service has.

    Attributes:
        method, target: of its first line.
        headers: lines, but for those that frame the body.
        body: of it.
        framing: how it says where its body ends; short and long lie.
        pieces: that the body is sent in.
        pause_s: between them.
        leaves: whether the client leaves before the answer.
    """

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    framing: Framing = "length"
    pieces: int = 1
    pause_s: float = 0
    leaves: bool = False

    def head(self) -> bytes:
        """All before the body."""
        lines = [b" ".join((self.method, self.target, b"HTTP/1.1"))]
        lines += [name + b": " + value for name, value in (*self.headers, *self._frame())]
        return b"\r\n".join((*lines, b"", b""))

    def content(self) -> list[bytes]:
        """The body in pieces, as it is sent."""
        size = max(-(-len(self.body) // self.pieces), 1)
        cut = [self.body[at : at + size] for at in range(0, len(self.body), size)]
        if self.framing == "chunked":
            return [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in cut] + [
                b"0\r\n\r\n"
            ]
        return cut

    def _frame(self) -> list[tuple[bytes, bytes]]:
        size = len(self.body)
        match self.framing:
            case "length":
                return [(b"Content-Length", str(size).encode())] if size else []
            case "short":
                return [(b"Content-Length", str(size // 2).encode())]
            case "long":
                return [(b"Content-Length", str(size + 7).encode())]
            case "chunked":
                return [(b"Transfer-Encoding", b"chunked")]
            case _:
                return []


@dataclass
class Prey:
    """What answers have told of so far, for the words in attacks.

    Attributes:
        tokens: of API keys, by name.
        jobs: ids.
        links: signed ones.
    """

    tokens: Mapping[str, str]
    jobs: deque[bytes] = field(default_factory=lambda: deque(maxlen=16))
    links: deque[bytes] = field(default_factory=lambda: deque(maxlen=8))

    def fill(self, template: bytes) -> bytes:
        """The words replaced."""
        return re.sub(rb"\{(\w+):(-?\w+)\}", self._word, template)

    def _word(self, found: re.Match[bytes]) -> bytes:
        kind, which = found[1].decode(), found[2].decode()
        if kind == "token":
            return self.tokens.get(which, "nothing").encode()
        known = self.jobs if kind == "job" else self.links
        if not known:
            return b"0" * 32
        chosen = known[int(which) % len(known)]
        if kind == "job":
            return chosen
        path, expires, signature = re.split(rb"\?expires=|&signature=", chosen)
        return {"path": path, "expires": expires, "signature": signature}[kind]


_NUMBERS = (
    *(b"0", b"1", b"2", b"3", b"8", b"9", b"-1", b"1.0", b"1.5", b"1e3", b"1e308", b"1e999999999"),
    *(b"nan", b"inf", b"-inf", b"0x10", b"1_000", b" 1 ", b"+1", b"-0", b"9" * 5000, b"1e-400"),
    *(
        "\uff19".encode(),
        "\u0663".encode(),
        b"4294967295",
        b"4294967296",
        b"18446744073709551616",
        b"",
    ),
)
_ODD = (
    *(b"", b" ", b"\0", b"a\0b", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\x7f", b"\x1b[31m"),
    *(b"%00", b"%ff", b"%", b"%zz", b"%ed%a0%80", b"../..", b"..%2f..", b"%2e%2e/", b"\\", b"//"),
    *(
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'"',
        b"'",
        b"<script>",
        b"$(id)",
        b"{0}",
        b"%s%n",
        b";",
        b",",
    ),
    *("é".encode(), "💥".encode(), "\u202e".encode(), "é".encode("latin-1"), b"a" * 3000),
)
_WEBHOOKS = (
    *(b"https://example.com/hook", b"http://example.com", b"https://127.1", b"https://0x7f.1"),
    *(b"https://[::1]", b"https://[::ffff:10.0.0.1]/", b"https://[", b"https://[fe80::1%25eth0]"),
    *(b"https://u:p@example.com", b"https://example.com:0", b"https://example.com:99999"),
    *(b"https://" + b"a" * 64 + b".com", b"https://" + b"a." * 200, b"https://\xff", b"https:///x"),
    *(
        "https://bücher.example".encode(),
        "https://\uff11\uff12\uff17.0.0.1".encode(),
        b"https://xn--\x80.com",
    ),
    *(b"https://169.254.169.254/", b"https://localhost", b"https://a\0b", b"https://a b", b"://"),
    *(b"file:///etc/passwd", b"javascript:1", b"https://example.com/" + b"a" * 2500, b"https://."),
)
PLAUSIBLE: dict[bytes, tuple[bytes, ...]] = {
    b"steps": (b"1", b"2", b"3", b"150"),
    b"seed": (b"7", b"-1", b"9223372036854775807"),
    b"strength": (b"0.5", b"1", b"0.001"),
    b"guidance_scale": (b"5", b"1"),
    b"noise_level": (b"20",),
    b"prompt": (b"a cat", "é💥".encode(), b"slow", b"slow"),
    b"negative_prompt": (b"blue",),
    b"output_format": (b"png", b"webp", b"jpeg", b"jpg", b"gif"),
    b"output_compression": (b"0", b"50", b"100", b"101", b"high"),
    b"output_size": (b"input", b"working"),
    b"output": (b"rgba", b"mask", b"color"),
    b"color": (b"#2060a0", b"red", b"#fa0", b"reddish"),
    b"edges": (b"estimated", b"original", b"soft"),
    b"background": (b"red", b"#fff", b"picture", b"", b"reddish"),
    b"mask": (b"alpha", b"picture", b"", b"white"),
    b"mask_changes": (b"white", b"transparent", b"black"),
    b"mask_feather_px": (b"0", b"8", b"128", b"129"),
    b"detail": (b"full", b"working", b"half"),
    b"long_prompt": (b"cut", b"chunk", b"all"),
    b"prompt_weights": (b"true", b"false", b"1.3"),
    b"model": (b"comic-starter", b"upscale-starter", b"none"),
    b"crop": (b"none", b"subject", b"0"),
    b"shadow": (b"none", b"soft", b"1"),
    b"scale": (b"2", b"3", b"4", b"8"),
    b"width": (b"64", b"1", b"100000"),
    b"height": (b"64", b"1", b"100000"),
    b"metadata": (b"full", b"none"),
    b"strict": (b"true", b"false", b"maybe"),
    b"n": (b"1", b"2", b"8"),
    b"priority": (b"interactive", b"batch", b"high"),
    b"deadline_s": (b"1", b"3600", b"604800"),
    b"webhook": (b"https://example.com/hook",) * len(_WEBHOOKS) + _WEBHOOKS,
    b"webhook_events": (
        b"completed",
        b"processing,failed",
        b"",
        b",",
        b"queued",
        b"completed,completed",
    ),
    b"preview": (b"true", b"false", b"yes"),
}
_HEADERS: dict[bytes, tuple[bytes, ...]] = {
    b"Prefer": (
        *[b"respond-async"] * 5,
        *(b"wait=1", b"wait=0", b"wait=999999999", b"wait=9999999999999999999"),
        *(b"wait=2, respond-async", b"respond-async;q=1", b"wait=-1", b'wait="1"', b"WAIT = 1"),
    ),
    b"Idempotency-Key": (b"a", b"b", b"c", b"k" * 255, b"k" * 256, b"a b"),
    b"Last-Event-ID": (
        *(b"0-0", b"0", b"1732633445123-0", b"9" * 20 + b"-0", b"9" * 20 + b"-" + b"9" * 20),
        *(
            b"18446744073709551615-18446744073709551615",
            b"18446744073709551616-0",
            b"-",
            b"+",
            b"$",
        ),
    ),
    b"Accept": (b"image/webp", b"image/*;q=0", b"*/*;q=nan", b"text/html", b"a/b;q=1e999, */*"),
    b"Authorization": (
        *(b"Bearer {token:valid}", b"Bearer {token:tight}", b"Bearer {token:revoked}", b"Bearer"),
        *(b"Basic YTpi", b"bearer  {token:valid} ", b"Bearer imagen_00000000_" + b"a" * 43),
    ),
    b"Range": (b"bytes=0-1", b"bytes=-1", b"bytes=9-1", b"bytes=" + b"0-1," * 500),
    b"If-None-Match": (b"*", b'"a"'),
    b"If-Modified-Since": (b"Thu, 01 Jan 1970 00:00:00 GMT", b"yesterday"),
    b"Host": (b"[", b"[::1", b"a:b:c", b"]", b"evil/../x", b"a b", b"\xff", b"", b"x:99999", b"?"),
    b"Expect": (b"100-continue", b"200-ok"),
    b"Transfer-Encoding": (b"gzip", b"chunked", b"chunked, chunked", b"identity"),
    b"Content-Encoding": (b"gzip", b"br"),
    b"Content-Length": (b"0", b"5", b"-1", b"99999999999999999999", b"33554433", b"1, 1", b"+1"),
    b"Content-Type": (b"application/json", b"multipart/form-data", b"text/plain; charset=utf-99"),
    b"Connection": (b"close", b"keep-alive", b"Upgrade"),
    b"Upgrade": (b"websocket", b"h2c"),
    b"Sec-WebSocket-Key": (b"dGhlIHNhbXBsZSBub25jZQ==",),
    b"Sec-WebSocket-Version": (b"13",),
    b"X-Request-Id": (b"mine", b"a b", b"x" * 200),
    b"X-Forwarded-For": (b"1.2.3.4", b"unknown, ,"),
    b"X-Forwarded-Proto": (b"https", b"javascript"),
    b"Origin": (b"https://evil.example", b"null"),
    b"Access-Control-Request-Method": (b"POST",),
    b"Cookie": (b"a=b; c", b"=" * 100),
    b"Traceparent": (b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", b"00-0-0-0"),
}
_JOB = b"/api/v1/jobs/{job:%d}"
_BELOW_JOB = (b"", b"/result", b"/results/0", b"/results/7", b"/events", b"/retry", b"/")
_PATHS = (
    *(b"/", b"", b"*", b"/healthz", b"/readyz", b"/docs", b"/openapi.json", b"/api/v1/models"),
    *(b"/api/v1/webhook-secret", b"/docs/static/", b"/docs/static/swagger-ui.css", b"/files/"),
    *(b"//api/v1/jobs", b"/api//v1/jobs", b"/api/v1/jobs/", b"/API/V1/JOBS", b"/api/v1/jobs;a=1"),
    *(b"/api/v1/jobs/../models", b"/api/v1/images/%75pscale", b"/docs/static/%00", b"/docs/..;/"),
    *(b"/docs/static/%2e%2e/%2e%2e/etc/passwd", b"/docs/static/../../../../etc/passwd"),
    *(b"http://evil.example/healthz", b"http://[/healthz", b"/docs/static/" + b"a" * 300),
    *(b"/docs/static/" + b"a/" * 3000, b"/docs/oauth2-redirect", b"evil:80", b"/%f0%9f%92%a5"),
)
_PLAIN = ((b"Host", b"127.0.0.1"), (b"Authorization", b"Bearer {token:valid}"))
_FORM = (b"Content-Type", b"multipart/form-data; boundary=XyZ")
_METHODS = (b"GET", b"POST", b"DELETE", b"HEAD", b"OPTIONS", b"PUT", b"PATCH", b"TRACE", b"get")
_ODD_METHODS = (b"CONNECT", b"FOO", b"", b"GET\0", b"M-SEARCH", b"QUERY", b"\xff")


def _odd() -> SearchStrategy[bytes]:
    return st.one_of(st.sampled_from(_ODD), st.sampled_from(_NUMBERS), st.binary(max_size=20))


def _mostly(usual: tuple[bytes, ...]) -> SearchStrategy[bytes]:
    return st.one_of(*[st.sampled_from(usual)] * 8, _odd())


def _rarely(draw: st.DrawFn, one_in: int) -> bool:
    return draw(st.integers(1, one_in)) == one_in


@st.composite
def _headers(draw: st.DrawFn) -> tuple[tuple[bytes, bytes], ...]:
    host = draw(st.sampled_from(_HEADERS[b"Host"])) if _rarely(draw, 25) else b"127.0.0.1"
    lines = [(b"Host", host), (b"Authorization", b"Bearer {token:valid}")]
    if draw(st.booleans()):
        lines.append((b"Prefer", draw(st.sampled_from(_HEADERS[b"Prefer"]))))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 3)))):
        name = draw(st.sampled_from(sorted(_HEADERS)))
        if draw(st.booleans()):  # in place of the one that is there
            lines = [line for line in lines if line[0] != name]
        value = draw(_mostly(_HEADERS[name]))
        if not _rarely(draw, 20):
            value = re.sub(rb"[\0-\x1f\x7f]", b"", value)  # servers refuse these at once
        lines.append((name, value))
    if _rarely(draw, 30):
        lines.append((draw(_odd()), draw(_odd())))
    return tuple(lines)


@st.composite
def _part(draw: st.DrawFn, name: bytes, value: bytes) -> bytes:
    quoted = b'Content-Disposition: form-data; name="' + name + b'"'
    head = quoted + (b'; filename="a.png"' if name == b"image" else b"")
    if _rarely(draw, 12):
        odd = draw(_odd())
        head = draw(
            st.sampled_from(
                (
                    b"Content-Disposition: form-data; name=" + name,
                    b"Content-Disposition: form-data; name*=utf-8''" + name,
                    b"content-disposition:form-data;name='" + name + b"';filename=" + odd,
                    quoted + b"\r\n" + quoted,
                    quoted + b"\r\nContent-Type: text/plain; charset=" + odd,
                    quoted + b"\r\nContent-Transfer-Encoding: base64",
                    quoted + b"; filename*=utf-16''" + odd,
                    b"X: " + b"y" * 20_000 + b"\r\n" + quoted,
                    b"X\r\n" * 30 + quoted,
                    b"Content-Disposition: " + odd,
                    odd,
                )
            )
        )
    return head + b"\r\n\r\n" + value


@st.composite
def _form(draw: st.DrawFn, task: Task) -> tuple[bytes, bytes]:
    """A Content-Type and a body."""
    parts: list[bytes] = []
    read = [*task.request.model_fields, *JobOptions.model_fields]
    names = sorted(PLAUSIBLE) if _rarely(draw, 20) else [name.encode() for name in read]
    if not _rarely(draw, 15):
        file = draw(pictures()) if _rarely(draw, 3) else draw(st.sampled_from(WHOLE))
        parts.append(draw(_part(b"image", file)))
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=not _rarely(draw, 20))):
        value = draw(_mostly(PLAUSIBLE[name]))
        parts.append(draw(_part(draw(_odd()) if _rarely(draw, 40) else name, value)))
    if _rarely(draw, 40):
        parts += [parts[-1]] * draw(st.sampled_from((1, 45))) if parts else []
    if _rarely(draw, 60):
        parts.append(draw(_part(b"prompt", b"p" * draw(st.sampled_from((2001, 65_537, 200_000))))))
    boundary = draw(_odd()) if _rarely(draw, 25) else b"XyZ"
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    body += b"--" + boundary + b"--\r\n"
    if _rarely(draw, 6):
        body = draw(_spoiled(body))
    return b"multipart/form-data; boundary=" + boundary, body


@st.composite
def _spoiled(draw: st.DrawFn, body: bytes) -> bytes:
    a, b = sorted(draw(st.tuples(*[st.integers(0, len(body))] * 2)))
    return draw(
        st.sampled_from(
            (
                body[:a],
                body[:a] + body[b:],
                body[:a] + draw(_odd()) + body[a:],
                body.replace(b"\r\n", b"\n"),
                b"preamble\r\n" + body,
                body + b"epilogue" * 100,
                body + body,
                body.replace(b"--", b"-"),
            )
        )
    )


@st.composite
def _uploads(draw: st.DrawFn) -> Attack:
    """A form for an image route."""
    task = draw(st.sampled_from(Task))
    kind, body = draw(_form(task))
    headers = (*draw(_headers()), (b"Content-Type", kind))
    path = task.route.encode()
    if _rarely(draw, 20):
        path += b"?" + draw(_odd())
    slow = _rarely(draw, 40)
    return Attack(
        method=draw(st.sampled_from(_METHODS)) if _rarely(draw, 30) else b"POST",
        target=path,
        headers=headers,
        body=body,
        framing=draw(st.sampled_from(("chunked", "short", "long", "none")))
        if _rarely(draw, 8)
        else "length",
        pieces=draw(st.integers(2, 5)) if slow else draw(st.sampled_from((1, 1, 1, 3))),
        pause_s=draw(st.sampled_from((0.05, 0.3, 1.0))) if slow else 0,
        leaves=_rarely(draw, 30),
    )


@st.composite
def _targets(draw: st.DrawFn) -> bytes:
    match draw(st.integers(0, 9)):
        case 0 | 1 | 2 | 3 | 4:
            path = _JOB % draw(st.integers(0, 15)) + draw(st.sampled_from(_BELOW_JOB))
        case 5 | 6:
            fields = st.sampled_from((b"status", b"limit", b"cursor", b"", b"Limit", b"x"))
            values = _mostly((b"completed", b"failed", b"1", b"100", b"1e3", b"{job:1}", b"0" * 32))
            pairs = draw(st.lists(st.tuples(fields, values), max_size=3))
            path = b"/api/v1/jobs?" + b"&".join(b"=".join(pair) for pair in pairs)
        case 7:
            k = draw(st.integers(0, 7))
            words = [b"{path:%d}" % k, b"{expires:%d}" % k, b"{signature:%d}" % k]
            if draw(st.booleans()):
                words[draw(st.integers(0, 2))] = draw(_odd())
            path = b"%b?expires=%b&signature=%b" % tuple(words)
            path = path if path.startswith(b"{") else b"/files/" + path
        case 8:
            path = draw(st.sampled_from(_PATHS))
        case _:
            path = b"/api/v1/jobs/" + draw(_odd()) + draw(st.sampled_from(_BELOW_JOB))
    if _rarely(draw, 15):
        path += draw(
            st.sampled_from((b"/", b"?", b"?a=b", b"#x", b"%20", b"?\xff", b"?" + b"a" * 9000))
        )
    # A space or a line end would only make another malformed first line.
    return path if _rarely(draw, 20) else re.sub(rb"[\s\0]", b"%20", path)


@st.composite
def _calls(draw: st.DrawFn) -> Attack:
    """A request to any other route."""
    target = draw(_targets())
    if _rarely(draw, 25):
        method = draw(st.sampled_from(_ODD_METHODS))
    elif _rarely(draw, 8):
        method = draw(st.sampled_from(_METHODS))
    elif target.startswith(b"/api/v1/jobs/") and target.endswith(b"}"):
        method = draw(st.sampled_from((b"GET", b"DELETE")))
    else:
        method = b"POST" if target.endswith(b"retry") else b"GET"
    headers, body = draw(_headers()), b""
    if target.endswith(b"events") and draw(st.booleans()):
        headers += ((b"Last-Event-ID", draw(st.sampled_from(_HEADERS[b"Last-Event-ID"]))),)
    if _rarely(draw, 6):
        kind, body = draw(
            st.one_of(_form(Task.COMIC), st.tuples(st.just(b"application/json"), _odd()))
        )
        headers += ((b"Content-Type", kind),)
    framings = st.sampled_from(("length", "length", "chunked", "short", "long", "none"))
    framing: Framing = draw(framings) if body or _rarely(draw, 20) else "length"
    return Attack(method, target, headers, body, framing, leaves=_rarely(draw, 30))


def attacks() -> SearchStrategy[Attack]:
    """Half uploads, nearly half everything else; and streams of jobs that take a while."""
    return st.one_of(*[_uploads(), _calls()] * 10, _slow_jobs(), _streams())


@st.composite
def _slow_jobs(draw: st.DrawFn) -> Attack:
    """A request that is well-formed and becomes a job of a second."""
    task = draw(st.sampled_from((Task.COMIC, Task.AGED, Task.ENHANCE)))
    parts = (
        draw(_part(b"image", draw(st.sampled_from(WHOLE)))),
        b'Content-Disposition: form-data; name="prompt"\r\n\r\nslow',
    )
    body = b"".join(b"--XyZ\r\n" + part + b"\r\n" for part in parts) + b"--XyZ--\r\n"
    headers = (*_PLAIN, (b"Prefer", b"respond-async"), _FORM)
    return Attack(b"POST", task.route.encode(), headers, body)


@st.composite
def _streams(draw: st.DrawFn) -> Attack:
    """A stream of one of the last jobs, with a body that may not come."""
    path = _JOB % draw(st.sampled_from((-1, -2, -3))) + b"/events"
    return Attack(b"GET", path, _PLAIN, b"x", draw(st.sampled_from(("length", "long", "chunked"))))
