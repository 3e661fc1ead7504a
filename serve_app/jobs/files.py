"""Stand-in until storage is merged."""

from __future__ import annotations
import asyncio, hashlib, hmac, json, time, shutil
from pathlib import Path
from typing import Any
from deployments.errors import LinkRefused, NoSuchJob, Missing
from deployments.settings import JobSettings
from deployments.store.folder_bucket import FolderBucket
from deployments.store.bucket import find


class JobFiles:
    def __init__(self, bucket: FolderBucket, link_key: bytes | None) -> None:
        self._b = bucket
        self._k = link_key or b""

    def _read(self, path: str) -> bytes:
        f = self._b.stat([path])[0]
        out = bytearray()
        self._b.read(f, 0, f.size, out.extend)
        return bytes(out)

    async def put_input(self, job_id: str, image: bytes) -> None:
        await asyncio.to_thread(self._b.put, f"inputs/{job_id}/image", image)

    async def input(self, job_id: str) -> bytes:
        try:
            return await asyncio.to_thread(self._read, f"inputs/{job_id}/image")
        except Missing as e:
            raise NoSuchJob("The picture is gone.", value=job_id, remedy="Submit it again.") from e

    async def put_result(self, job_id: str, k: int, image: bytes, document: dict[str, Any]) -> None:
        ext = document["media_type"].removeprefix("image/")
        await asyncio.to_thread(self._b.put, f"outputs/{job_id}/result-{k}.{ext}", image)
        await asyncio.to_thread(
            self._b.put, f"outputs/{job_id}/result-{k}.json", json.dumps(document).encode()
        )

    async def result_document(self, job_id: str, k: int) -> dict[str, Any] | None:
        p = f"outputs/{job_id}/result-{k}.json"
        if find(self._b, p) is None:
            return None
        return json.loads(await asyncio.to_thread(self._read, p))

    async def result(self, job_id: str, k: int) -> tuple[bytes, str]:
        d = await self.result_document(job_id, k)
        assert d
        ext = d["media_type"].removeprefix("image/")
        return await asyncio.to_thread(self._read, f"outputs/{job_id}/result-{k}.{ext}"), d[
            "media_type"
        ]

    async def link(self, job_id: str, k: int, expires_s: float) -> str:
        d = await self.result_document(job_id, k)
        assert d
        ext = d["media_type"].removeprefix("image/")
        p = f"outputs/{job_id}/result-{k}.{ext}"
        e = str(int(time.time() + expires_s))
        return f"/files/{p}?expires={e}&signature={self._sig(p, e)}"

    def _sig(self, p: str, e: str) -> str:
        return hmac.new(self._k, f"{p} {e}".encode(), hashlib.sha256).hexdigest()

    async def open_link(self, path: str, expires: str, signature: str) -> tuple[bytes, str]:
        if (
            not hmac.compare_digest(self._sig(path, expires), signature)
            or float(expires) < time.time()
        ):
            raise LinkRefused("The link is not valid.", value="x", remedy="Get a fresh one.")
        return await asyncio.to_thread(self._read, path), "image/" + path.rpartition(".")[2]

    async def delete(self, job_id: str) -> None:
        for d in ("inputs", "outputs"):
            shutil.rmtree(Path(self._b._folder) / d / job_id, ignore_errors=True)

    async def sweep(self, older_than_s: float) -> int:
        return 0


def open_job_files(settings: JobSettings) -> JobFiles:
    return JobFiles(FolderBucket(f"file://{settings.place / 'files'}"), b"key")
