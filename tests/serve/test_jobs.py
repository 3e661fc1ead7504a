"""Jobs on the whole application: real models, the application's own Redis, the Python client."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image

from imagen_client import Imagen, JobCanceled, PreviewEvent, ProgressEvent, StateEvent
from tests.serve.conftest import FURTHER
from tests.serve.test_http import jpeg

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def imagen(address: str) -> Iterator[Imagen]:
    with Imagen(address) as client:
        yield client


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


def test_results_of_a_job_are_the_pictures_of_direct_calls_with_their_seeds(imagen: Imagen) -> None:
    job = imagen.submit("style/comic", jpeg(), n=3, seed=20, steps=12, strength=0.5).wait(60)
    assert [one.seed for one in job.outputs] == [20, 21, 22]
    for k, seed in enumerate((20, 21, 22)):
        direct = imagen.run("style/comic", jpeg(), seed=seed, steps=12, strength=0.5)
        difference = pixels(direct.data) - pixels(job.result(k).data)
        assert np.abs(difference).max() <= 2  # rows that share passes: docs/engine.md
    # Whether they share passes is the engine's choice, by what it has timed.
    assert all(1 <= one.metadata["batch_size"] <= 3 for one in job.outputs)


def test_a_job_runs_on_the_model_that_it_names(imagen: Imagen) -> None:
    job = imagen.submit("upscale", jpeg(), model=FURTHER).wait(timeout_s=60)
    assert (job.task, job.model) == ("upscale", FURTHER)
    assert job.result().model.startswith(f"{FURTHER}@")
    assert imagen.run("upscale", jpeg()).model.startswith("upscale-starter@")


def test_events_show_the_steps_and_what_they_make(imagen: Imagen) -> None:
    job = imagen.submit("style/comic", jpeg(), seed=1, steps=60, strength=0.9, preview=True)
    events = list(job.events())
    states = [event.status for event in events if isinstance(event, StateEvent)]
    assert (states[0], states[-1]) == ("queued", "completed")
    steps = [event.steps_done for event in events if isinstance(event, ProgressEvent)]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    [last, *_] = [event for event in reversed(events) if isinstance(event, PreviewEvent)]
    assert max(Image.open(io.BytesIO(last.image)).size) == 192


def test_cancel_reaches_the_engine(imagen: Imagen, address: str) -> None:
    job = imagen.submit("style/comic", jpeg(), seed=1, steps=150, strength=1.0)
    while not job.refresh().steps_done:
        time.sleep(0.1)
    done = job.cancel().steps_done
    assert done < 150
    with pytest.raises(JobCanceled):
        job.wait()
    for _ in range(100):
        details = httpx.get(f"{address}/readyz", timeout=30).json()["replicas"]["comic"]
        if all(replica["requests"] == 0 for replica in details):
            return
        time.sleep(0.1)
    pytest.fail(f"a row is still there: {details}")


def test_bad_input_fails_as_a_direct_call_does(imagen: Imagen, address: str) -> None:
    cut = jpeg()[:-40]
    answers = [
        httpx.post(
            f"{address}/api/v1/images/upscale",
            files={"image": ("cut.jpg", cut)},
            headers=headers,
            timeout=60,
        )
        for headers in ({}, {"Prefer": "wait=60"})
    ]
    assert answers[0].status_code == answers[1].status_code
    if answers[0].status_code != 200:
        assert answers[0].json()["code"] == answers[1].json()["code"]
