"""A multipart/form-data body to a form, while it streams in.

Starlette's own reader returns a body that was cut off as a complete form; this one refuses it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.contract import PICTURE
from deployments.errors import InvalidParameter, MalformedRequest, UnsupportedMedia

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_PARTS = 40
MAX_FIELD_BYTES = 64 * 1024
_IMAGE_FIELD = "image"
MAY_BE_FILES = ("background", "mask")
"""Fields that are a text, or a picture that comes as a file."""
_ALSO_IMAGE = "image[]"
"""The name that clients of other services, and forms of several files, give it."""
_PLAIN = ("7bit", "8bit", "binary")
"""Values of Content-Transfer-Encoding that change no byte."""
_MAX_PREAMBLE_BYTES = 64 * 1024
_MAX_PADDING_BYTES = 80
"""Behind the first boundary, where nothing precedes it."""
_FORM_REMEDY = "Send multipart/form-data, as curl -F image=@photo.jpg does."


@dataclass(slots=True)
class Form:
    """A parsed upload.

    Attributes:
        image: the file's bytes; None if there is none.
        fields: every other part, as text; `background` and `mask` are "picture" where they are
            files.
        background, mask: the bytes of those files; None if there is none.
    """

    image: bytes | None = None
    fields: dict[str, str] = field(default_factory=dict[str, str])
    background: bytes | None = None
    mask: bytes | None = None


async def read_form(request: Request, *, needs_image: bool = True) -> Form:
    """Read a multipart body while it streams in.

    Args:
        request: not read yet.
        needs_image: whether a form without an image is refused.

    Raises:
        UnsupportedMedia: the body is not multipart/form-data.
        MalformedRequest: the multipart is broken, ends early, or lacks the image.
        InvalidParameter: a field comes twice or is no UTF-8 text.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMedia(
            "The body must be multipart/form-data or JSON.",
            value=kind.decode("latin-1") or "no content-type",
            remedy=_FORM_REMEDY,
        )
    if not options.get(b"boundary"):
        raise MalformedRequest(
            "The content-type names no boundary.",
            value=request.headers["content-type"],
            remedy=_FORM_REMEDY,
        )
    reader = _FormReader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks())
        preamble = _Preamble(options[b"boundary"])
        async for chunk in request.stream():
            reader.seen_bytes += len(chunk)
            parser.write(preamble.without(chunk))
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(
            "The multipart body cannot be read.",
            value=f"{reader.seen_bytes} bytes so far",
            remedy=_FORM_REMEDY,
        ) from error
    return reader.form(needs_image=needs_image)


class _Preamble:
    """Leaves out what may stand before the first part (RFC 2046, section 5.1.1).

    That is text before the first boundary, and blanks behind it, neither of which the parser takes.
    """

    def __init__(self, boundary: bytes) -> None:
        self._line = b"--" + boundary
        self._first = re.compile(
            rb"(?:^|\r\n)" + re.escape(self._line) + rb"(?=--|[ \t]*\r\n)[ \t]*"
        )
        self._held: bytearray | None = bytearray()

    def without(self, chunk: bytes) -> bytes:
        """The bytes of the body so far from the first boundary on; empty before it is known.

        Raises:
            FormParserError: there is too much before it.
        """
        if self._held is None:
            return chunk
        # A boundary that ends in this chunk begins at the last line before it, or later.
        start = self._held.rfind(b"\r\n")
        if start < 0:
            start = max(len(self._held) - len(self._line) - _MAX_PADDING_BYTES, 0)
        self._held += chunk
        match = self._first.search(self._held, start)
        if (match.start() if match else len(self._held)) > _MAX_PREAMBLE_BYTES:
            raise FormParserError("no boundary")
        if match:
            rest = self._line + bytes(self._held[match.end() :])
            self._held = None
            return rest
        return b""


class _FormReader:
    """Collects the parser's callbacks into a Form."""

    def __init__(self) -> None:
        self.seen_bytes = 0
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[str, str] = {}
        self._data = bytearray()
        self._name = ""
        self._pictures: set[str] = {_IMAGE_FIELD}
        self._filename: bytes | None = None
        self._files: set[str] = set()
        self._parts: list[tuple[str, bytes]] = []
        self._ended = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def form(self, *, needs_image: bool) -> Form:
        if not self._ended:
            raise MalformedRequest(
                "The multipart body ends before its closing boundary.",
                value=f"{self.seen_bytes} bytes",
                remedy=_FORM_REMEDY,
            )
        names = [name for name, _ in self._parts]
        if needs_image and _IMAGE_FIELD not in names:
            raise MalformedRequest(
                "The form has no field named image.",
                value=", ".join(sorted(names)) or "no field",
                remedy="Add the picture as a file: -F image=@photo.jpg.",
            )
        form = Form()
        for name, data in self._parts:
            if names.count(name) > 1:
                raise InvalidParameter(
                    f"The field {name[:100]} comes more than once.",
                    value=f"{names.count(name)} times",
                    remedy="Send it once.",
                )
            if name == _IMAGE_FIELD:
                form.image = data
            elif name in self._pictures:
                setattr(form, name, data)
                form.fields[name] = PICTURE
            elif name in self._files:
                raise _no_file(name)
            else:
                form.fields[name] = _text(name, data)
        return form

    def _on_part_begin(self) -> None:
        if len(self._parts) == MAX_PARTS:
            raise MalformedRequest(
                f"The form has more than {MAX_PARTS} parts.",
                value=f"at least {MAX_PARTS + 1}",
                remedy="Send each parameter once.",
            )
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header.extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value.extend(data[start:end])

    def _on_header_end(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._header, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        disposition = self._headers.get("content-disposition", "")
        _, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._name = _IMAGE_FIELD if name == _ALSO_IMAGE else name
        if self._name in MAY_BE_FILES and b"filename" in options:
            self._pictures.add(self._name)
        self._filename = options.get(b"filename")
        if not self._name:
            raise MalformedRequest(
                "A part of the form has no name.",
                value=disposition.encode("latin-1") or "no content-disposition",
                remedy=_FORM_REMEDY,
            )
        encoding = self._headers.get("content-transfer-encoding", "binary")
        if encoding.strip().lower() not in _PLAIN:
            raise MalformedRequest(
                f"The field {self._name[:100]} is encoded, and no part of a form may be.",
                value=f"Content-Transfer-Encoding: {encoding}",
                remedy="Send its bytes as they are (RFC 7578, section 4.7).",
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.extend(data[start:end])
        if self._name not in self._pictures and len(self._data) > MAX_FIELD_BYTES:
            if self._filename:
                raise _no_file(self._name)
            raise InvalidParameter(
                f"The field {self._name[:100]} is longer than {MAX_FIELD_BYTES} bytes.",
                value=f"at least {len(self._data)} bytes",
                remedy="Shorten it. The picture itself goes into the field image.",
            )

    def _on_part_end(self) -> None:
        data, self._data = bytes(self._data), bytearray()
        if self._filename == b"" and not data:
            return  # what a page sends of a file that nobody chose
        self._parts.append((self._name, data))
        if self._filename:
            self._files.add(self._name)

    def _on_end(self) -> None:
        self._ended = True


def _no_file(name: str) -> InvalidParameter:
    return InvalidParameter(
        f"The field {name[:100]} takes no file.",
        value="a file",
        remedy="Send it as text, or leave it out. The picture itself goes into the field image.",
    )


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidParameter(
            f"The field {name[:100]} is not UTF-8 text.",
            value=data[:40],
            remedy="Encode it as UTF-8; lone surrogates cannot be encoded.",
        ) from error
