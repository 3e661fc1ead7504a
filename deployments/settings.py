"""Typed settings: the `args` of a Serve config file, and the environment of our own processes."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from deployments.errors import ConfigError

S = TypeVar("S", bound=BaseModel)
ROOT = Path(__file__).resolve().parents[1]
"""Relative paths in configuration files are relative to the project, whatever the cwd."""
ROOT_VARIABLE = "IMAGEN_MODELS"
"""Names the model store's root; every cache of every framework lies below it."""
JOBS_VARIABLE = "IMAGEN_JOBS"
"""Names the folder of jobs where `jobs.folder` is unset."""
_JOBS = "~/.cache/imagen-jobs"
KEYS_VARIABLE = "IMAGEN_KEYS"
"""Names the file of API keys where `access.keys` is unset."""
_KEYS = "~/.config/imagen/keys.yaml"
_HUB_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
"""The hub's cache by its present name, and by those that older versions of its libraries read."""
SEATS = 16
"""Requests a model replica works on at a time: each holds a decoded picture."""
SEAT_PX = 12_500_000
"""Pixels of a picture for each of these places, width x height; a larger one takes several."""
MOST_AT_A_TIME = 10_000
"""Requests that one Ingress replica may have at a time, beside those that are short."""


class Strict(BaseModel):
    """Refuses unknown keys, so that a typo does not silently keep a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSettings(Strict):
    """How large a request, a picture and a result may be."""

    max_body_bytes: int = Field(
        default=32 * 2**20, ge=1024, le=2**30, description="whole request body, bytes"
    )
    max_input_px: int = Field(
        default=50_000_000, ge=1, le=2**30, description="width x height of an upload"
    )
    max_output_px: int = Field(
        default=50_000_000, ge=16, le=2**30, description="width x height of an upscaled image"
    )


class UploadSettings(Strict):
    """Limits of the uploads of one Ingress replica.

    Attributes:
        pause_s: a body that brings nothing for so many seconds is refused.
        min_bytes_per_s: a body that is slower for `pause_s` is refused too.
        max_arriving: bodies that arrive at a time. One more takes the room of the body that has
            stood still longest, or gets 429 if none has.
        max_held_bytes: of all bodies in memory. Beyond it the same rule applies.
    """

    pause_s: float = Field(default=10, gt=0)
    min_bytes_per_s: int = Field(default=1024, ge=1)
    max_arriving: int = Field(default=1000, ge=1)
    max_held_bytes: int = Field(default=2**30, ge=1024)


class StoreSettings(Strict):
    """The model store of a node, and how it is filled.

    Attributes:
        root: folder of the store, on one local disk; None takes $IMAGEN_MODELS, else
            ~/.cache/imagen-models.
        mirror: gs://, s3:// or file:// folder that `imagen models publish` filled. Models come
            from there rather than from their origins.
        hub_cache: folder that Hugging Face's own library keeps on this machine. Files of hf:// that
            it has come from there rather than from the hub.
        verify: what loading checks: every byte by CRC32C, or (full) by SHA-256 too.
        prefetch: names of models that each node pulls besides the one that a replica waits for;
            None pulls all that are served.
        threads: ranges of one model that are fetched at a time.
        models_at_once: models pulled at a time on a node.
        range_bytes: size of one request.
        max_bytes_per_s: of one process, all threads together; None for no limit.
        attempts: failures in a row, without a byte between them, after which a pull gives up.
        backoff_s: base of the exponential pause between attempts.
        lock_timeout_s: how long the holder of a model's lock may make no progress.
        max_bytes: of the store, if that is less than its disk, such as the sizeLimit of an
            emptyDir; None for all of the disk.
        gc_start_percent, gc_stop_percent: use of the disk, or of `max_bytes`. Before a pull above
            the first, unused models are removed down to the second.
    """

    root: Path | None = None
    mirror: str | None = Field(default=None, pattern=r"^(gs|s3|file)://.+")
    hub_cache: Path | None = None
    verify: Literal["crc32c", "full"] = "crc32c"
    prefetch: tuple[str, ...] | None = None
    threads: int = Field(default=8, ge=1, le=64)
    models_at_once: int = Field(default=2, ge=1, le=16)
    range_bytes: int = Field(default=32 * 2**20, ge=64 * 2**10)
    max_bytes_per_s: float | None = Field(default=None, gt=0)
    attempts: int = Field(default=6, ge=1, le=100)
    backoff_s: float = Field(default=0.25, ge=0, le=30)
    lock_timeout_s: float = Field(default=120, ge=0)
    max_bytes: int | None = Field(default=None, ge=1)
    gc_start_percent: float = Field(default=80, gt=0, le=100)
    gc_stop_percent: float = Field(default=70, gt=0, le=100)

    @model_validator(mode="after")
    def _stops_below_its_start(self) -> Self:
        if self.gc_stop_percent > self.gc_start_percent:
            raise ValueError("gc_stop_percent must not be above gc_start_percent")
        return self

    @property
    def folder(self) -> Path:
        """The root, absolute.

        Raises:
            ConfigError: $IMAGEN_MODELS is relative, or the home folder it lies in is unknown.
        """
        given = self.root or os.environ.get(ROOT_VARIABLE) or "~/.cache/imagen-models"
        try:
            path = Path(given).expanduser()
        except RuntimeError as error:
            raise ConfigError(
                "The model store has no folder: this user's home folder is unknown.",
                value=given,
                remedy=f"Set {ROOT_VARIABLE} to an absolute path.",
            ) from error
        if self.root is None and not path.is_absolute():
            raise ConfigError(
                f"${ROOT_VARIABLE} is relative, and means another folder in each process.",
                value=path,
                remedy="Give an absolute path.",
            )
        return resolve(path)


class WebhookSettings(Strict):
    """How webhooks are delivered (docs/jobs.md, "Webhooks").

    Attributes:
        allow_http: whether plain http:// URLs are taken.
        allow_private: whether addresses of private networks and of this machine are taken.
        timeout_s: of one attempt, from the resolution of the name to the answer.
        give_up_s: how long an event is tried again after its first attempt.
    """

    allow_http: bool = False
    allow_private: bool = False
    timeout_s: float = Field(default=10, gt=0)
    give_up_s: float = Field(default=86_400, gt=0)


class ClientJobSettings(Strict):
    """What clients may do with jobs: read by the Ingress alone.

    Attributes:
        respond_async_by_default: whether a request without a preference becomes a job.
        link_s: how long a signed link to a result works.
        max_queued: jobs in the queue; more get 429.
        max_streams: event streams of one Ingress replica at a time, and as many downloads of
            pictures in a folder; more get 429.
        max_waits: requests with `Prefer: wait` of one Ingress replica; more get their 202 at once.
        max_urls: pictures of one API key that are kept at a time for `response_format=url` of
            OpenAI's clients, each until its address stops working (`link_s`); more get 429.
        stream_s: after which an event stream ends and the client reconnects. Keep it below Serve's
            own request_timeout_s.
    """

    respond_async_by_default: bool = False
    link_s: int = Field(default=900, ge=1, le=7 * 86_400)
    max_queued: int = Field(default=10_000, ge=1)
    max_streams: int = Field(default=200, ge=1)
    max_waits: int = Field(default=100, ge=1)
    max_urls: int = Field(default=1000, ge=8)
    stream_s: float = Field(default=50, gt=0)


class FetchSettings(Strict):
    """Pictures that a request names by address (docs/protocols.md, "Pictures by address").

    Attributes:
        enabled: whether they are fetched.
        allow_http: whether plain http:// is taken.
        allow_private: whether addresses of private networks and of this machine are taken.
        timeout_s: of one picture, redirects included.
    """

    enabled: bool = False
    allow_http: bool = False
    allow_private: bool = False
    timeout_s: float = Field(default=10, gt=0)


class GrpcSettings(Strict):
    """KServe V2 over gRPC (docs/protocols.md, "gRPC").

    Attributes:
        enabled: whether calls are taken. Serve's gRPC proxy listens on every interface, so that it
            needs `access.auth: keys`.
    """

    enabled: bool = False


class JobSettings(Strict):
    """Jobs: requests that outlive their client (docs/jobs.md); what clients may do with them is in
    `ClientJobSettings`.

    Attributes:
        enabled: whether image routes take `Prefer: respond-async`.
        namespace: begins every Redis key, so that applications can share a Redis.
        folder: where the Redis that the application starts keeps its data, and where pictures are
            if `storage` is unset; None takes $IMAGEN_JOBS, else ~/.cache/imagen-jobs.
        storage: file://, gs:// or s3:// folder of pictures and results; None takes `folder`/files.
            `imagen storage init` and `check` prepare and prove it.
        keep_s: how long jobs, pictures and results are kept after a job's end.
        max_kept: ended jobs of one API key that are kept; the oldest go early. One takes about 4 KB
            of Redis.
        run_timeout_s: of one attempt of a job on a model.
        lease_s: a worker that does not renew its claim for so long has lost the job.
        attempts: of a model at a job, after which one that loses its worker or its model again and
            again has failed.
        per_model: jobs that one worker carries at a time for each model.
        max_held_bytes: of pictures in one worker's memory, divided equally among the models. A job
            waits with its picture in storage until there is room; one is always allowed.
        gpu_second_price: for the `cost` of a job; None leaves it out.
        webhooks: how they are delivered.
    """

    enabled: bool = True
    namespace: str = Field(default="imagen", pattern=r"^[a-z0-9-]{1,40}$")
    folder: Path | None = None
    storage: str | None = Field(default=None, pattern=r"^(file|gs|s3)://.+")
    keep_s: int = Field(default=7 * 86_400, ge=1, le=7 * 86_400)
    max_kept: int = Field(default=10_000, ge=1)
    run_timeout_s: float = Field(default=600, gt=0)
    lease_s: float = Field(default=8, gt=0)
    attempts: int = Field(default=5, ge=1)
    per_model: int = Field(default=8, ge=1, le=64)
    max_held_bytes: int = Field(default=512 * 2**20, ge=2**20)
    gpu_second_price: float | None = Field(default=None, ge=0)
    webhooks: WebhookSettings = WebhookSettings()

    @property
    def place(self) -> Path:
        """The folder, absolute."""
        return resolve(Path(self.folder or os.environ.get(JOBS_VARIABLE) or _JOBS).expanduser())


class KeyLimits(Strict):
    """What one API key may use (docs/access.md); None is no limit.

    Attributes:
        requests_per_s: requests of every kind. One second's worth, and at least one, may come at
            once.
        pictures: requests to image routes that are in hand at a time.
        megapixels_per_minute: of the pictures that are sent, in 1,000,000 px. One minute's worth
            may come at once.
        queue_share: of `jobs.max_queued` that the jobs of the key may fill, in [0, 1].
        wait_share: of `jobs.max_streams`, and of `jobs.max_waits`, that the key may take on each
            Ingress replica, in [0, 1]; one of each is always allowed.
    """

    requests_per_s: float | None = Field(default=20, gt=0, le=1e5)
    pictures: int | None = Field(default=32, ge=1, le=100_000)
    megapixels_per_minute: float | None = Field(default=2000, gt=0, le=1e7)
    queue_share: float = Field(default=0.5, ge=0, le=1)
    wait_share: float = Field(default=0.5, ge=0, le=1)


# YAML reads a bare `off` as False.
_Auth = Annotated[
    Literal["off", "keys"], BeforeValidator(lambda value: "off" if value is False else value)
]


class AccessSettings(Strict):
    """Who may call (docs/access.md).

    Attributes:
        auth: keys asks every client for an API key; off asks none, and is only for a service that
            listens on this machine alone.
        keys: the file of keys, which `imagen keys` writes; None takes $IMAGEN_KEYS, else
            ~/.config/imagen/keys.yaml.
        limits: of a key that states none of its own.
        cors_origins: such as https://app.example.com, whose pages may call from a browser; * for
            all. Empty is off.
        trusted_proxies: addresses or networks of the proxies in front, whose X-Forwarded-For and
            X-Forwarded-Proto are believed. Empty believes none.
    """

    auth: _Auth = "keys"
    keys: Path | None = None
    limits: KeyLimits = KeyLimits()
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/?#\s]+)$")], ...] = ()
    trusted_proxies: tuple[str, ...] = ()

    @property
    def keys_file(self) -> Path:
        """The file of keys, absolute."""
        return resolve(Path(self.keys or os.environ.get(KEYS_VARIABLE) or _KEYS).expanduser())

    def check_host(self, host: str) -> None:
        """Refuse a service without keys that others than this machine can reach.

        Raises:
            ConfigError: `auth` is off, and `host` is no loopback address.
        """
        if self.auth == "off" and not _is_loopback(host):
            raise ConfigError(
                f"access.auth is off, and the service listens on {host}, where others reach it.",
                value=host,
                remedy="Set access.auth to keys (docs/access.md), or http_options.host to"
                " 127.0.0.1.",
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _files(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)]


class C2paSettings(Strict):
    """Whose Content Credentials results carry (docs/provenance.md).

    Attributes:
        certificates: PEM file: the signing certificate first, then those above it, without the
            root.
        key: PEM file of its private key (PKCS #8), without a password.
        algorithm: that suits the key, as C2PA names it.
        timestamp_url: of a time-stamping authority (RFC 3161), which is asked for each result;
            None asks none, and signatures then end with the certificate.
    """

    certificates: Path
    key: Path
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    timestamp_url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")


class ClientSettings(Strict):
    """The Ingress's `user_config`: who may call, how much, and how long. A change is taken within
    seconds and replaces no replica; requests at hand end by the settings that they began with.

    Attributes:
        request_timeout_s: deadline of a request. Keep it below Serve's own request_timeout_s.
        max_uploads: complete uploads that one Ingress replica works on at a time; more get 429.
        retry_after_s: the shortest `Retry-After` of a refused client.
        limits: sizes of requests, pictures and results.
        uploads: limits of uploads while they arrive.
        jobs: what clients may do with jobs.
        fetch: pictures that a request names by address.
        grpc: KServe V2 over gRPC.
        access: who may call, and how much.
    """

    request_timeout_s: float = Field(default=60, gt=0)
    max_uploads: int = Field(default=150, ge=1)
    retry_after_s: int = Field(default=2, ge=1)
    limits: LimitSettings = LimitSettings()
    uploads: UploadSettings = UploadSettings()
    jobs: ClientJobSettings = ClientJobSettings()
    fetch: FetchSettings = FetchSettings()
    grpc: GrpcSettings = GrpcSettings()
    access: AccessSettings = AccessSettings()

    @model_validator(mode="after")
    def _asks_for_keys_over_grpc(self) -> Self:
        if self.grpc.enabled and self.access.auth != "keys":
            raise ValueError("grpc.enabled needs access.auth: keys, because others can reach it")
        return self

    @model_validator(mode="after")
    def _holds_the_largest_body(self) -> Self:
        # Over gRPC a body is held beside the message that it came in.
        times, word = (2, "twice ") if self.grpc.enabled else (1, "")
        if self.uploads.max_held_bytes < times * self.limits.max_body_bytes:
            raise ValueError(
                f"uploads.max_held_bytes must not be below {word}limits.max_body_bytes"
            )
        return self

    @model_validator(mode="after")
    def _refuses_before_serve_does(self) -> Self:
        at_a_time = self.max_uploads + self.uploads.max_arriving + self.jobs.max_waits
        at_a_time += 2 * self.jobs.max_streams
        if at_a_time > MOST_AT_A_TIME:
            raise ValueError(
                f"max_uploads + uploads.max_arriving + jobs.max_waits + 2 x jobs.max_streams is"
                f" {at_a_time}, above {MOST_AT_A_TIME}"
            )
        return self


class Settings(Strict):
    """Everything `serve_app.app:build` needs. A change of any of it replaces every replica.

    Attributes:
        models: registries, YAML files of models. The first file that has a model for a task decides
            the task's default. A task without a model is not served.
        serve: names of models by task, as a list or with commas; the first is the task's default,
            which a request gets that names none. A task of null is not served, and other tasks
            are served by their default alone.
        device: auto takes CUDA where there is one.
        torch_threads: CPU threads of each model replica, which share the rows of a pass. A GPU
            needs none.
        pixel_threads: threads of each replica that decode and encode image files.
        model_num_cpus: CPUs that each model replica reserves. With the default, six models and the
            Ingress fit two cores. A GPU share is the model's own (`num_gpus` in the registry).
        store: the model store of a node.
        jobs: requests that outlive their client.
        c2pa: whose Content Credentials results carry; None signs nothing.
    """

    models: Annotated[tuple[Path, ...], BeforeValidator(_files), Field(min_length=1)] = (
        Path("configs/models/starter.yaml"),
        Path("configs/models/production.yaml"),
        Path("configs/models/own.yaml"),
    )
    serve: dict[str, _Names | None] = Field(default={})
    device: Literal["auto", "cpu", "cuda"] = "auto"
    torch_threads: int = Field(default=1, ge=1, le=256)
    pixel_threads: int = Field(default=2, ge=1, le=64)
    model_num_cpus: float = Field(default=0.2, ge=0)
    store: StoreSettings = StoreSettings()
    jobs: JobSettings = JobSettings()
    c2pa: C2paSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _leaves_clients_to_the_ingress(cls, args: Any) -> Any:
        given: dict[str, Any] = args if isinstance(args, dict) else {}
        jobs = given.get("jobs")
        inside: dict[str, Any] = jobs if isinstance(jobs, dict) else {}
        moved = [name for name in given if name in ClientSettings.model_fields and name != "jobs"]
        moved += [f"jobs.{name}" for name in inside if name in ClientJobSettings.model_fields]
        if moved:
            raise ValueError(
                f"{', '.join(moved)}: what clients may do is in the user_config of the deployment"
                " Ingress, where a change replaces no replica; move it there"
            )
        return args


class Tuning(Strict):
    """A model deployment's `user_config`: changes without a restart.

    Attributes:
        batch_window_s: how long admission waits for further requests; 0 admits at once.
        max_batch_size: most rows in one forward pass; None keeps the model's own.
        budget_px: most network pixels in one forward pass, so that it stays inside the replica's
            share of the GPU: width x height of each picture, twice with guidance. None for no
            limit. `imagen plan` computes it (docs/gpu.md).
        determinism: bounded lets rows share passes, which may change a result in its last bits;
            exact steps every row alone, so that the same request always gives the same bits.
        defaults: parameter values for fields a request leaves out, over the model's own.
        digest: which content of the model to serve, 16 to 64 hex digits; None takes the lock
            file's.
    """

    batch_window_s: float = Field(default=0.0, ge=0, le=10)
    max_batch_size: int | None = Field(default=None, ge=1, le=256)
    budget_px: int | None = Field(default=None, ge=1)
    determinism: Literal["bounded", "exact"] = "bounded"
    defaults: dict[str, Any] = Field(default={})
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{16,64}$")


def resolve(path: Path) -> Path:
    """An absolute path. Relative ones start at the project's root."""
    return path if path.is_absolute() else ROOT / path


def file_fault(error: Exception) -> str:
    """What keeps a YAML file from being read, in one line: of its text, with the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def parse_settings(kind: type[S], values: Any, where: str) -> S:
    """Typed settings from plain YAML values.

    Args:
        kind: the settings class.
        values: as YAML gives them.
        where: what holds them, for the error.

    Raises:
        ConfigError: naming each wrong key.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()
        )
    raise ConfigError(f"{where} is wrong: {found}.", remedy="Correct the named keys.")


def framework_caches(root: Path) -> dict[str, str]:
    """Environment variables that keep every framework's own cache below one root.

    Also those by which older versions go, because one that is set elsewhere would win over the
    present name. XDG_CACHE_HOME is for all that have no variable of their own.
    """
    caches = root / ".cache"
    return {
        ROOT_VARIABLE: str(root),
        "XDG_CACHE_HOME": str(caches),
        "HF_HOME": str(caches / "huggingface"),
        **dict.fromkeys(_HUB_CACHES, str(caches / "huggingface" / "hub")),
        "TORCH_HOME": str(caches / "torch"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


def set_thread_limits() -> None:
    """Let torch's idle threads sleep rather than spin, because models share a node's cores.

    Call it before the first import of torch: OpenMP reads the variable when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def enforce_offline(root: Path | None = None) -> None:
    """Keep every library from asking a model hub.

    Call it before the first import of a hub library: huggingface_hub reads HF_HUB_OFFLINE when it
    is imported.

    Args:
        root: where frameworks may keep what they compile. If it is not writable, they use a
            temporary folder.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "1"
    # These libraries print advice for notebooks when they are imported.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    temporary = Path(tempfile.gettempdir()) / f"imagen-caches-{os.getuid()}"
    writable = root is not None and os.access(root, os.W_OK)
    caches = framework_caches(root if root and writable else temporary)
    # Models are loaded by absolute path: the hub's own cache stays empty.
    caches["HF_HOME"] = str(temporary / "empty-hub")
    caches |= dict.fromkeys(_HUB_CACHES, str(temporary / "empty-hub" / "hub"))
    if not root:
        del caches[ROOT_VARIABLE]
    elif not writable:
        caches[ROOT_VARIABLE] = str(root)
    os.environ.update(caches)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
