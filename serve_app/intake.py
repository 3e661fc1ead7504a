"""The way of every request, whatever its protocol: what was sent becomes a job for a model.

A protocol reads bytes into a `Call`, `Intake.run` checks it and asks the model, and the protocol
writes the result as bytes.
"""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

from deployments import images
from deployments.contract import PICTURE, ImageJob, JobProgress, OutputFormat, check_used, parse
from deployments.errors import (
    ImagenError,
    InvalidParameter,
    MalformedRequest,
    NotAcceptable,
    NotReady,
    SlowUpload,
    TooLarge,
    about,
    too_late,
)
from deployments.masks import check_size
from deployments.tiling import check_tiles

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from typing import Literal

    from deployments.catalogue import Registry
    from deployments.contract import ImageRequest, ImageResult
    from deployments.notes import Note
    from deployments.registry import ModelSpec
    from deployments.settings import ClientSettings
    from deployments.tasks import Task

    State = Literal["ready", "idle", "starting", "failed"]

T = TypeVar("T")
Answers: TypeAlias = "AsyncGenerator[JobProgress | tuple[ImageResult, ...]]"
_OPERATOR_S = 60
"""`Retry-After` of a model that failed to start: it waits for an operator."""
_HEADER_THREADS = 2
"""Few, because a hostile header can keep a thread busy for seconds."""
_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)


class Backend(Protocol):
    """Whatever runs one model. Raises only errors of our own tree."""

    async def __call__(self, job: ImageJob) -> ImageResult: ...

    def stream(self, job: ImageJob) -> Answers:
        """Tells how far a request is; its results come last."""
        ...


class Details(NamedTuple):
    """What lies behind the states.

    Attributes:
        replicas: what each running replica of a model serves, by the model's name: digest serving,
            digest wanted, and why they differ.
        pulling: percent of each model that some node is fetching, by model name.
    """

    replicas: Mapping[str, list[Any]]
    pulling: Mapping[str, float]


class Backends(Protocol):
    """The models by name, and how they are."""

    def __getitem__(self, name: str) -> Backend: ...

    def recovery_s(self, name: str) -> float:
        """Seconds after which a model that is not ready will probably answer."""
        ...

    async def states(self) -> Mapping[str, State]:
        """ready, idle (no replica, wakes on demand), starting or failed."""
        ...

    async def details(self) -> Details:
        """What replicas serve, and what nodes pull."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a protocol has read it.

    Attributes:
        task: what is asked for.
        fields: parameters as text, by name; and `model`, the name of a model.
        image: the uploaded file; None if there is none.
        background: a second file, to lay below the result; None if there is none.
        mask: another file, which says what is changed; None if there is none.
        accept: the Accept header; empty if there is none.
        request_id: for the log.
        charge: called with the pixels of the picture once its header is read, before any work; may
            raise RateLimited. None charges nobody.
        n: results, of seeds that follow one another; above 1 only for models that use chance.
        preview: whether `Intake.follow` shows small pictures of the steps.
        notes: of what the protocol lost or chose.
    """

    task: Task
    fields: Mapping[str, str]
    image: bytes | None
    background: bytes | None = None
    mask: bytes | None = None
    accept: str = ""
    request_id: str = ""
    charge: Callable[[int], Awaitable[None]] | None = None
    n: int = 1
    preview: bool = False
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that its model would take.

    Attributes:
        spec: its model.
        request: the fields that the client set.
        output_format: of the result.
        width_px, height_px: of the picture, upright; without one, of what is made.
        background_px: width x height of the background picture; 0 without one.
    """

    spec: ModelSpec
    request: ImageRequest
    output_format: OutputFormat
    width_px: int
    height_px: int
    background_px: int = 0


class Intake:
    """Checks requests against their models, and hands them over.

    Args:
        backends: the models.
        registry: what each model is.
        clients: limits and deadlines.
    """

    def __init__(self, backends: Backends, registry: Registry, clients: ClientSettings) -> None:
        self._backends = backends
        self._registry = registry
        self._timeout_s = clients.request_timeout_s
        self._limits = clients.limits
        self._header_threads = ThreadPoolExecutor(_HEADER_THREADS, "headers")

    def deadline_s(self) -> float:
        """When a request that arrives now must be answered, on the event loop's clock."""
        return asyncio.get_running_loop().time() + self._timeout_s

    async def read(self, body: Awaitable[T], deadline_s: float) -> T:
        """What a protocol reads of a body.

        Raises:
            SlowUpload: the deadline passed first.
        """
        try:
            async with asyncio.timeout_at(deadline_s):
                return await body
        except TimeoutError as error:
            raise SlowUpload(
                "The upload takes too long.",
                value=f"more than {self._timeout_s:g} s",
                remedy="Send a smaller picture, or use a faster connection.",
            ) from error

    async def run(self, call: Call, deadline_s: float) -> ImageResult:
        """The result of a request.

        Raises:
            RequestError: the request is wrong.
            ServiceError: the model is not ready, busy, failed, or too late.
        """
        name = self.spec_of(call).name
        try:
            async with asyncio.timeout_at(deadline_s):
                checked = await self.check(call)
                return await self._backends[name](self._job(call, checked, deadline_s))
        except TimeoutError as error:
            raise await self._why_late(name) from error

    def spec_of(self, call: Call) -> ModelSpec:
        """The model that a request names, or its task's default.

        Raises:
            InvalidParameter: it names none that serves the task.
        """
        return self._registry.choose(call.task, call.fields.get("model"))

    async def follow(self, call: Call, deadline_s: float) -> Answers:
        """How far a request is, and then its results.

        Raises as `run`: what is wrong with the request before the first answer, the rest with it
        or later.
        """
        name = self.spec_of(call).name
        try:
            async with asyncio.timeout_at(deadline_s):
                checked = await self.check(call)
                answers = self._backends[name].stream(self._job(call, checked, deadline_s))
                first = await anext(answers)
                # Until it has begun, so that a refusal has a status of its own.
                while isinstance(first, JobProgress) and not first.steps:
                    first = await anext(answers)
        except TimeoutError as error:
            raise await self._why_late(name) from error
        return self._followed(name, first, answers, deadline_s)

    async def _followed(
        self, name: str, answer: Any, answers: Answers, deadline_s: float
    ) -> Answers:
        try:
            while True:
                yield answer
                async with asyncio.timeout_at(deadline_s):
                    answer = await anext(answers)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise await self._why_late(name) from error
        finally:
            await answers.aclose()

    async def check(self, call: Call) -> Checked:
        """Whether a request can be sent to its model.

        Raises:
            RequestError: it is wrong.
        """
        spec = self.spec_of(call)
        check_picture(call)
        fields = {name: text for name, text in call.fields.items() if name != "model"}
        request = parse(call.task.request, fields)
        check_used(request, spec.parameters)
        check_prompt(request, spec)
        check_n(call.n, spec)
        check_files(call, request)
        if call.image is None:
            width_px, height_px = self._canvas(request, spec)
        else:
            width_px, height_px = await self._size_px(call.image)
        if call.mask is not None:
            with about("mask"):
                mask_size = await self._size_px(call.mask)
            check_size(mask_size, (width_px, height_px))
        background_px = 0
        if call.background is not None:
            with about("background"):
                background_px = math.prod(await self._size_px(call.background))
        output_format = self._output_format(request, call.accept, width_px, height_px, spec)
        if call.charge is not None:
            pictures = call.n + (call.mask is not None)
            await call.charge(width_px * height_px * pictures + background_px)
        return Checked(spec, request, output_format, width_px, height_px, background_px)

    def _job(self, call: Call, checked: Checked, deadline_s: float) -> ImageJob:
        return ImageJob(
            request=checked.request,
            image=call.image,
            output_format=checked.output_format,
            timeout_s=deadline_s - asyncio.get_running_loop().time(),
            whole_s=self._timeout_s,
            request_id=call.request_id,
            width_px=checked.width_px,
            height_px=checked.height_px,
            sent_unix_s=time.time(),
            n=call.n,
            preview=call.preview,
            notes=call.notes,
            background=call.background,
            background_px=checked.background_px,
            mask=call.mask,
        )

    def _canvas(self, request: ImageRequest, spec: ModelSpec) -> tuple[int, int]:
        """Width and height, px, of what a task without a picture makes."""
        width_px, height_px = request.canvas(spec.buckets[0] if spec.buckets else (0, 0))
        limit = self._limits.max_output_px
        if width_px * height_px > limit:
            raise TooLarge(
                f"The result may have at most {limit} px.",
                value=f"{width_px} x {height_px} = {width_px * height_px} px",
                remedy="Ask for a smaller width or height.",
            )
        return width_px, height_px

    async def _size_px(self, image: bytes) -> tuple[int, int]:
        header = await asyncio.get_running_loop().run_in_executor(
            self._header_threads, images.read_header, image, self._limits
        )
        return header.width_px, header.height_px

    def _output_format(
        self, request: ImageRequest, accept: str, width_px: int, height_px: int, spec: ModelSpec
    ) -> OutputFormat:
        """The format to write, once the result is known to fit it and the limits."""
        check_input(width_px, height_px, spec)
        check_tiles(request, width_px, height_px, spec)
        result_px = request.result_size(width_px, height_px, spec.scale)
        if spec.scale > 1:
            check_output((width_px, height_px), result_px, self._limits.max_output_px)
        chosen = choose_format(request.output_format, accept, transparent=request.needs_alpha)
        images.check_encodable(chosen, *result_px, request.output_compression)
        return chosen

    async def _why_late(self, name: str) -> ImagenError:
        state = (await self._backends.states()).get(name, "starting")
        if state == "ready":
            return too_late()
        return not_ready(name, state, self._backends.recovery_s(name))


def check_input(width_px: int, height_px: int, spec: ModelSpec) -> None:
    """Whether a picture fits a model that works on all of it at once.

    Raises:
        TooLarge: it does not.
    """
    limit = spec.max_picture_px
    if limit is not None and width_px * height_px > limit:
        raise TooLarge(
            f"The model behind {spec.task} takes pictures of at most {limit} px.",
            value=f"{width_px} x {height_px} = {width_px * height_px} px",
            remedy="Send a picture of at most {} x {} px.".format(
                *_largest(width_px, height_px, limit)
            ),
        )


def check_output(picture_px: tuple[int, int], result_px: tuple[int, int], limit: int) -> None:
    """Whether an enlarged picture is within the limit.

    Args:
        picture_px, result_px: width and height of the picture, and of what is asked for.
        limit: width x height of a result, at most.

    Raises:
        TooLarge: it is not; the error names the largest scale and size that are.
    """
    if math.prod(result_px) <= limit:
        return
    width, height = _largest(*picture_px, limit)
    fitting = [scale for scale in (3, 2) if math.prod(picture_px) * scale**2 <= limit]
    scaled = f"scale={fitting[0]} at most, or " if fitting else ""
    remedy = f"Send {scaled}width={width} at most, which gives {width} x {height} px."
    if width < picture_px[0]:  # and a result is no smaller than its picture
        remedy = f"Send a picture of at most {width} x {height} px."
    raise TooLarge(
        f"The result may have at most {limit} px.",
        value=f"{result_px[0]} x {result_px[1]} = {math.prod(result_px)} px",
        remedy=remedy,
    )


def _largest(width_px: int, height_px: int, limit: int) -> tuple[int, int]:
    """The largest width and height of an aspect ratio whose product is within a limit."""
    # The height is rounded, so that a little more than the square root may do.
    width = math.isqrt(limit * width_px // height_px) + width_px // height_px + 1
    while width > 1 and width * max(round(height_px * width / width_px), 1) > limit:
        width -= 1
    return width, max(round(height_px * width / width_px), 1)


def check_picture(call: Call) -> None:
    """Whether the task gets a picture if it needs one, and none if it takes none.

    Raises:
        MalformedRequest: the picture is missing.
        InvalidParameter: the task takes no picture.
    """
    if call.task.needs_picture and call.image is None:
        raise MalformedRequest(
            f"The task {call.task} needs a picture.", value="no picture", remedy="Send one."
        )
    if not call.task.needs_picture and call.image is not None:
        raise InvalidParameter(
            f"The task {call.task} takes no picture.",
            value=f"{len(call.image)} bytes",
            remedy="Leave it out.",
        )


def check_prompt(request: ImageRequest, spec: ModelSpec) -> None:
    """Whether a task that has nothing but a text to go by gets one.

    Raises:
        InvalidParameter: there is none, nor one among the model's defaults.
    """
    if spec.task.needs_picture:
        return
    prompt = getattr(request, "prompt", "")
    if "prompt" not in request.model_fields_set:
        prompt = spec.defaults.get("prompt", prompt)
    if not prompt.strip():
        raise InvalidParameter(
            "prompt must not be empty.", value="no text", remedy="Say what the picture shows."
        )


def check_n(n: int, spec: ModelSpec) -> None:
    """Whether a model's results differ if there are several.

    Raises:
        InvalidParameter: it uses no chance.
    """
    if n > 1 and "seed" not in spec.parameters:
        raise InvalidParameter(
            f"The model {spec.name} uses no chance, so that all results would be the same.",
            value=f"n={n}",
            remedy="Leave n out.",
        )


def check_files(call: Call, request: ImageRequest) -> None:
    """Whether a background and a mask come as files where they should, and only there.

    Raises:
        MalformedRequest: one is missing.
        InvalidParameter: the task takes none, or a mask's fields come without a mask.
    """
    _check_file(
        "background", call.background, call, request, "-F background=@beach.jpg", "a colour"
    )
    _check_file("mask", call.mask, call, request, "-F mask=@mask.png", "mask=alpha")
    changes = getattr(request, "mask_changes", "white")
    if changes != "white" and getattr(request, "mask", None) != PICTURE:
        raise InvalidParameter(
            "mask_changes says how a mask's picture is read, and there is none.",
            value=f"mask_changes={changes}",
            remedy="Send a mask as a picture, or leave mask_changes out.",
        )
    feather_px = getattr(request, "mask_feather_px", 0)
    if feather_px and getattr(request, "mask", None) is None:
        raise InvalidParameter(
            "The edge of no mask can be made soft.",
            value=f"mask_feather_px={feather_px}, and no mask",
            remedy="Send a mask, or leave mask_feather_px out.",
        )


def _check_file(
    name: str, file: bytes | None, call: Call, request: ImageRequest, example: str, other: str
) -> None:
    wanted = getattr(request, name, None) == PICTURE
    if wanted and file is None:
        raise MalformedRequest(
            f"The field {name} says picture, and is no file.",
            value=f"{name}=picture",
            remedy=f"Send the picture itself, in a form as {example}; or send {other}.",
        )
    if file is not None and not wanted:
        raise InvalidParameter(
            f"The task {call.task} takes no {name}.",
            value=f"{len(file)} bytes",
            remedy="Leave it out.",
        )


def not_ready(name: str, state: State, recovery_s: float) -> NotReady:
    """The error for a model that cannot answer now."""
    failed = state == "failed"
    return NotReady(
        f"The model {name} is {state}.",
        value=state,
        remedy="Ask the operator; /readyz says more."
        if failed
        else "Try again after Retry-After seconds.",
        retry_after_s=max(recovery_s, _OPERATOR_S) if failed else recovery_s,
    )


def choose_format(wanted: OutputFormat | None, accept: str, *, transparent: bool) -> OutputFormat:
    """The output format: as the request says, else by the Accept header (RFC 9110), else PNG.

    Args:
        wanted: the `output_format` parameter.
        accept: the header, empty if there is none.
        transparent: the result has an alpha channel, which JPEG lacks.

    Raises:
        NotAcceptable: the header excludes everything we can write.
    """
    if wanted is not None:
        return wanted
    offered = list(_FORMATS)
    if transparent:
        offered.remove("jpeg")
    best = max(offered, key=lambda name: _quality(accept, name))  # the first of equals
    if _quality(accept, best) == 0:
        raise NotAcceptable(
            "No output format fits the Accept header.",
            value=accept,
            remedy="Accept one of " + ", ".join(f"image/{name}" for name in offered) + ".",
        )
    return best


def accepted(accept: str) -> dict[str, float]:
    """The media ranges of an Accept header, and how much each is wanted: 0, not at all, to 1."""
    found: dict[str, float] = {}
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        found.setdefault(kind, _q(parameters))
    return found


def _quality(accept: str, name: str) -> float:
    """How much an Accept header wants `image/<name>`."""
    if not accept.strip():
        return 1.0
    wanted = accepted(accept)
    ranges = (f"image/{name}", "image/*", "*/*")
    return next((wanted[kind] for kind in ranges if kind in wanted), 0.0)


def _q(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                value = float(parameter[2:])
            except ValueError:
                return 0.0
            return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
    return 1.0
