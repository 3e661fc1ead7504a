"""Signed links of buckets: opened by anyone, until they expire; signed as other libraries do."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import httpx
import obstore
import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from google.auth import compute_engine
from google.auth.credentials import AnonymousCredentials
from google.oauth2 import service_account
from obstore.store import GCSStore

from benchmarks.servers.gcs_links import FakeGcsLinks
from benchmarks.servers.s3 import KEY, REGION, SECRET, S3Server
from deployments.errors import ConfigError, Unsignable
from deployments.store import gcs
from deployments.store.bucket import Transient
from deployments.store.provider import make_bucket
from deployments.store.s3 import S3Bucket
from tests.store import common

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.store.bucket import Bucket

PICTURE = b"\x89PNG of a sort"


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcsLinks]:
    with common.google_without_key(monkeypatch) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with common.served(S3Server(), monkeypatch) as server:
        yield server


@pytest.fixture(params=["gs-iam", "gs-key", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        s3.put("jobs/a b/ü.png", PICTURE)
        return make_bucket("s3://models/jobs")
    google: FakeGcsLinks = request.getfixturevalue("google")
    google.put("jobs/a b/ü.png", PICTURE)
    if request.param == "gs-key":
        google.may_sign = False
        key = service_account.Credentials.from_service_account_info(google.key_file)
        monkeypatch.setattr(gcs, "AnonymousCredentials", lambda: key)
    return make_bucket("gs://models/jobs")


def refused(link: str) -> bool:
    return httpx.get(link).status_code == 403


def test_a_link_opens_without_credentials_until_it_expires(bucket: Bucket) -> None:
    link = bucket.sign("a b/ü.png", 2)
    assert httpx.get(link).content == PICTURE
    until = time.monotonic() + 30
    while not refused(link) and time.monotonic() < until:
        time.sleep(0.2)
    assert refused(link)


@pytest.mark.parametrize("part", ["path", "expires", "signature"])
def test_a_link_that_was_altered_is_refused(bucket: Bucket, part: str) -> None:
    link = bucket.sign("a", 60)
    url, query = link.split("?")
    altered = {
        "path": f"{url}b?{query}",
        "expires": link.replace("Expires=60", "Expires=600"),
        "signature": link[:-1] + ("0" if link[-1] != "0" else "1"),
    }[part]
    assert altered != link
    assert refused(altered)


def test_no_signature_no_access(bucket: Bucket) -> None:
    assert refused(bucket.sign("a", 60).split("?")[0])


@pytest.mark.parametrize("life_s", [0, -1, 7 * 86_400 + 1, float("nan")])
def test_a_link_works_for_at_most_seven_days(bucket: Bucket, life_s: float) -> None:
    with pytest.raises(ConfigError, match="cannot work for so long"):
        bucket.sign("a", life_s)
    assert "Expires=604800&" in bucket.sign("a", 7 * 86_400)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_link_says_what_the_file_is(scheme: str, google: FakeGcsLinks, s3: S3Server) -> None:
    bucket = make_bucket(f"{scheme}://models/jobs")
    assert bucket.put("a", PICTURE, "image/png")
    assert bucket.put("b", PICTURE)
    types = [httpx.get(bucket.sign(path, 60)).headers["Content-Type"] for path in ("a", "b")]
    assert types == ["image/png", "application/octet-stream"]


def test_an_s3_link_is_what_botocore_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a+token/of=a role")
    monkeypatch.setenv("AWS_REGION", REGION)
    link = S3Bucket("s3://pictures/jobs").sign("1/a b~ü.png", 600)
    url, query = urlsplit(link), parse_qs(urlsplit(link).query)
    assert url.scheme == "https"
    assert url.netloc.endswith("amazonaws.com")

    request = AWSRequest("GET", link.split("?")[0], headers={})
    credentials = Credentials(KEY, SECRET, "a+token/of=a role")
    auth = S3SigV4QueryAuth(credentials, "s3", REGION, 600)
    request.context["timestamp"] = query["X-Amz-Date"][0]
    auth._modify_request_before_signing(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    assert query["X-Amz-Signature"] == [auth.signature(text, request)]
    assert query["X-Amz-Security-Token"] == ["a+token/of=a role"]


def test_a_google_link_is_what_obstore_signs(
    google: FakeGcsLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    keyless = compute_engine.Credentials()
    monkeypatch.setattr("google.auth.default", lambda **_: (keyless, None))
    other = GCSStore("models", service_account_key=json.dumps(google.key_file))
    bucket = gcs.GcsBucket("gs://models/jobs")
    bucket.sign("a", 600)  # the token is there now, so the next one takes no time
    for _ in range(100):  # until both fall into the same second
        ours = urlsplit(bucket.sign("1/a b~ü.png", 600))
        theirs = urlsplit(obstore.sign(other, "GET", "jobs/1/a b~ü.png", gcs.timedelta(minutes=10)))
        if parse_qs(ours.query)["X-Goog-Date"] == parse_qs(theirs.query)["X-Goog-Date"]:
            break
    assert ours[:3] == theirs[:3]
    assert parse_qs(ours.query) == parse_qs(theirs.query)


def test_an_account_that_may_not_sign_is_told_the_role(google: FakeGcsLinks) -> None:
    google.may_sign = False
    with pytest.raises(Unsignable, match="cannot sign") as caught:
        gcs.GcsBucket("gs://models/jobs").sign("a", 60)
    assert "roles/iam.serviceAccountTokenCreator" in caught.value.remedy


def test_credentials_of_no_service_account_sign_nothing(
    google: FakeGcsLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "AnonymousCredentials", AnonymousCredentials)
    with pytest.raises(Unsignable, match="cannot sign") as caught:
        gcs.GcsBucket("gs://models/jobs").sign("a", 60)
    assert "service account" in caught.value.remedy


def test_a_signing_service_that_fails_may_be_asked_again(
    google: FakeGcsLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("google.auth._exponential_backoff.time.sleep", lambda _: None)
    google.faults.add("503", ":signBlob", times=3)
    bucket = gcs.GcsBucket("gs://models/jobs")
    with pytest.raises(Transient):
        bucket.sign("a", 60)
    assert bucket.sign("a", 60)


def test_without_s3_credentials_the_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeGcsLinks() as server:  # any server that is no metadata server of Amazon's
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)
        with pytest.raises(Transient, match="no credentials"):
            S3Bucket("s3://models/jobs").sign("a", 60)
