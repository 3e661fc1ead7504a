"""Results are signed with the operator's certificate, and anybody sees whether that still holds."""

from __future__ import annotations

import hashlib
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import c2pa
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from deployments import images
from deployments.credentials import Origin, Signing, check
from deployments.errors import ConfigError
from deployments.settings import C2paSettings, LimitSettings
from serve_app.app import build
from tests.certificates import Certificates, make_certificates

if TYPE_CHECKING:
    from pathlib import Path

PIXELS = {"png": b"IDAT", "jpeg": b"\xff\xda", "webp": b"VP8 "}
"""What stands before the coded pixels, by format."""
EDITED = "compositeWithTrainedAlgorithmicMedia"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("The network was touched.")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def signing(certificates: Certificates) -> Signing:
    return Signing(settings_of(certificates))


def settings_of(made: Certificates, **changes: Any) -> C2paSettings:
    files = {"certificates": made.chain, "key": made.key}
    return C2paSettings(**files | changes)


def upload(kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def result(output_format: Any = "png") -> bytes:
    pixels = np.random.default_rng(2).integers(0, 256, (24, 32, 3), np.uint8)
    picture = images.Picture(pixels, None)
    return images.encode(picture, output_format, {"seed": 7}, EDITED)


def origin(picture: bytes | None, **changes: Any) -> Origin:
    media_type = images.media_type_of(picture) if picture else ""
    return Origin("comic", "comic@abc123", EDITED, picture, media_type)._replace(**changes)


def manifests(data: bytes) -> dict[str, Any]:
    with c2pa.Reader(None, io.BytesIO(data)) as reader:
        return json.loads(reader.json())


@pytest.mark.parametrize("output_format", PIXELS)
def test_a_signed_result_says_what_was_done_by_which_model_to_which_picture(
    output_format: str, signing: Signing, certificates: Certificates
) -> None:
    body, sent = result(output_format), upload()
    signed = signing.sign(body, f"image/{output_format}", origin(sent))
    verdict = check(signed, certificates.root.read_bytes())
    assert verdict is not None
    assert (verdict.state, verdict.problems) == ("valid", [])
    assert (verdict.signed_by, verdict.issuer) == ("Test signer", "Test house")
    assert verdict.ingredients == ["image/jpeg"]
    opened, edited = verdict.actions
    assert opened["action"] == "c2pa.opened"
    assert edited["action"] == "c2pa.edited"
    assert edited["digitalSourceType"].endswith(f"/{EDITED}")
    assert edited["softwareAgent"] == {"name": "comic", "version": "abc123"}
    store = manifests(signed)
    action = store["manifests"][store["active_manifest"]]["assertions"][0]["data"]["actions"][1]
    assert action["parameters"]["imagen.upload_sha256"] == hashlib.sha256(sent).hexdigest()
    # The picture and its other metadata are as they were.
    assert images.read_metadata(signed) == images.read_metadata(body)
    pixels = [images.decode(one, LimitSettings()).rgb for one in (signed, body)]
    assert (pixels[0] == pixels[1]).all()
    assert (
        images.decode(signed, LimitSettings()).notes == images.decode(body, LimitSettings()).notes
    )


@pytest.mark.parametrize("output_format", PIXELS)
def test_a_changed_byte_breaks_it(output_format: str, signing: Signing) -> None:
    signed = bytearray(signing.sign(result(output_format), f"image/{output_format}", origin(None)))
    assert check(bytes(signed)).state == "untrusted"  # type: ignore[union-attr]
    signed[signed.index(PIXELS[output_format]) + 30] ^= 1
    verdict = check(bytes(signed))
    assert verdict is not None
    assert verdict.state == "broken"
    assert "assertion.dataHash.mismatch" in verdict.problems


def test_who_signed_is_not_trusted_without_an_anchor(signing: Signing, tmp_path: Path) -> None:
    signed = signing.sign(result(), "image/png", origin(upload()))
    stranger = make_certificates(tmp_path).root.read_bytes()
    for anchors in (b"", stranger):
        verdict = check(signed, anchors)
        assert verdict is not None
        assert verdict.state == "untrusted"
        assert verdict.problems == ["signingCredential.untrusted"]
    assert check(result()) is None


def test_a_picture_from_text_alone_was_created(signing: Signing) -> None:
    verdict = check(signing.sign(result(), "image/png", origin(None)))
    assert verdict is not None
    assert [one["action"] for one in verdict.actions] == ["c2pa.created"]
    assert verdict.ingredients == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_an_upload_of_any_format_is_an_ingredient_and_its_pixels_stay_out(
    kind: str, signing: Signing
) -> None:
    sent, body = upload(kind), result()
    signed = signing.sign(body, "image/png", origin(sent))
    verdict = check(signed)
    assert verdict is not None
    assert (verdict.state, verdict.ingredients) == ("untrusted", [images.media_type_of(sent)])
    assert len(signed) - len(body) < 8000


def test_manifests_of_the_upload_go_on_unless_its_metadata_is_not_wanted(signing: Signing) -> None:
    first = signing.sign(result(), "image/png", origin(upload()))
    again = signing.sign(result(), "image/png", origin(first))
    assert len(manifests(again)["manifests"]) == 2
    bare = signing.sign(result(), "image/png", origin(first, carried=False))
    assert len(manifests(bare)["manifests"]) == 1
    assert check(bare).ingredients == ["image/png"]  # type: ignore[union-attr]


def test_an_upload_whose_manifest_is_broken_is_still_an_ingredient(signing: Signing) -> None:
    first = bytearray(signing.sign(result(), "image/png", origin(upload())))
    for at in range(first.index(b"caBX") + 20, len(first), 97):
        damaged = bytearray(first)
        damaged[at] ^= 0xFF
        verdict = check(signing.sign(result(), "image/png", origin(bytes(damaged))))
        assert verdict is not None
        assert verdict.ingredients == ["image/png"]


def test_threads_sign_at_once(signing: Signing) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = pool.map(lambda _: signing.sign(result(), "image/png", origin(upload())), range(24))
        assert {check(file).state for file in files} == {"untrusted"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mistake", "fact"),
    [
        ("no certificates", "The file of c2pa.certificates cannot be read: No such file"),
        ("no key", "The file of c2pa.key cannot be read: No such file"),
        ("key of another", "The key of c2pa.key is not that of the first certificate"),
        ("no PEM", "The file of c2pa.certificates holds no certificate"),
        ("certificate as key", "The file of c2pa.key holds no private key"),
        ("other algorithm", "The certificate cannot sign: "),
        ("ended", "The certificate cannot sign: .*not valid at time of signing"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(
    mistake: str, fact: str, certificates: Certificates, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "other", days=-1)
    changes: dict[str, Any] = {
        "no certificates": {"certificates": tmp_path / "none.pem"},
        "no key": {"key": tmp_path / "none.pem"},
        "key of another": {"key": other.key},
        "no PEM": {"certificates": certificates.key},
        "certificate as key": {"key": certificates.chain},
        "other algorithm": {"algorithm": "ps256"},
        "ended": {"certificates": other.chain, "key": other.key},
    }[mistake]
    settings = settings_of(certificates, **changes).model_dump(mode="json")
    with pytest.raises(ConfigError, match=fact) as caught:
        build({"c2pa": settings})
    assert caught.value.remedy


def run(*words: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["metadata", *map(str, words)])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done.output


def test_the_command_shows_and_verifies(
    signing: Signing, certificates: Certificates, tmp_path: Path
) -> None:
    file, changed = tmp_path / "result.png", tmp_path / "changed.png"
    signed = signing.sign(result(), "image/png", origin(upload()))
    file.write_bytes(signed)
    code, shown = run(file)
    assert (code, shown["seed"], shown["digital_source_type"]) == (0, 7, EDITED)
    assert shown["content_credentials"]["state"] == "untrusted"
    code, shown = run(file, "--trust", certificates.root)
    assert (code, shown["content_credentials"]["state"]) == (0, "valid")
    # Another seed in the metadata that the signature covers.
    changed.write_bytes(signed.replace(b'"seed": 7', b'"seed": 8'))
    code, shown = run(changed, "--trust", certificates.root)
    assert (code, shown["content_credentials"]["state"]) == (4, "broken")
    file.write_bytes(result())
    code, shown = run(file)
    assert (code, "content_credentials" in shown) == (0, False)
