"""Environment variables of the stacks that Imagen replaces, and what takes their place.

docs/migration.md has the same table, and a test compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments.settings import ROOT_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping


class Former(NamedTuple):
    """A variable that Imagen does not read.

    Attributes:
        name: of the variable.
        successor: what has its meaning now; empty if nothing has.
        remedy: what to do, one sentence.
        shared: whether other programs of the same machine read it too, so that it may well be
            meant for them.
    """

    name: str
    successor: str
    remedy: str
    shared: bool = False


_STORE = "`IMAGEN_MODELS`"
_STORE_REMEDY = "Set IMAGEN_MODELS to the folder of the models."
_HUB_REMEDY = (
    "Set IMAGEN_MODELS to the folder of the models; `imagen models pull --hub-cache` takes files"
    " from a Hugging Face cache."
)
_SPEECH_REMEDY = (
    "Imagen runs no speech models, and keeps their files for the service that does:"
    " `imagen models pull whisper-large-v3-ct2 mms-lid-126`."
)
_SPEECH_ONLY_REMEDY = "Leave it to the service that runs the speech model."
_OTHER_REMEDY = "Imagen has no such model; keep the service that reads it."

FORMER = (
    Former("MODEL_CACHE_DIR", _STORE, _STORE_REMEDY),
    Former("HF_HOME", _STORE, _HUB_REMEDY, shared=True),
    Former("HF_HUB_CACHE", _STORE, _HUB_REMEDY, shared=True),
    Former("HUGGINGFACE_HUB_CACHE", _STORE, _HUB_REMEDY, shared=True),
    Former("TRANSFORMERS_CACHE", _STORE, _HUB_REMEDY, shared=True),
    Former("XDG_CACHE_HOME", _STORE, _STORE_REMEDY, shared=True),
    Former(
        "MODEL_SOURCE",
        "`args.store.mirror`",
        "Publish the models with `imagen models publish`, and set args.store.mirror.",
    ),
    Former("MODEL_DOWNLOAD_MAX_RETRIES", "`args.store.attempts`", "Set args.store.attempts."),
    Former("MODEL_DOWNLOAD_RETRY_DELAY", "`args.store.backoff_s`", "Set args.store.backoff_s."),
    Former(
        "MODEL_BATCH_SIZE",
        "`user_config.max_batch_size` of a model",
        "Set max_batch_size in the user_config of each model; `imagen plan` computes it.",
    ),
    Former(
        "GCS_BUCKET",
        "`args.jobs.storage`",
        "Set args.jobs.storage to gs://BUCKET/jobs, and args.store.mirror for models.",
    ),
    Former("TRITON_URL", "", "Remove it: models run in Ray Serve's own replicas."),
    Former("WHISPER_CACHE_DIR", _STORE, _SPEECH_REMEDY),
    Former("WHISPER_MODEL_NAME", "the entry `whisper-large-v3-ct2`", _SPEECH_REMEDY),
    Former("WHISPER_DEVICE", "", _SPEECH_ONLY_REMEDY),
    Former("WHISPER_COMPUTE_TYPE", "", _SPEECH_ONLY_REMEDY),
    Former("LID_MODEL_ID", "the entry `mms-lid-126`", _SPEECH_REMEDY),
    Former(
        "LID_MODEL_REVISION",
        "the commit in the entry's `source`",
        "Write the commit into the `source` of the registry's entry, hf://org/repo@COMMIT.",
    ),
    Former("ASR_MODEL", "the entry `whisper-large-v3-ct2`", _SPEECH_REMEDY),
    Former("VISION_MODEL_NAME", "", _OTHER_REMEDY),
    Former("LOAD_BGE_M3", "", _OTHER_REMEDY),
    Former("FEATURE_FACE", "", _OTHER_REMEDY),
)


def unheeded(environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is set and not read: what it is, and what to do.

    Caches that other programs use too are left out once IMAGEN_MODELS says where models are:
    whoever set both knows that they are different folders.

    Args:
        environment: variables by name, such as `os.environ`.
    """
    placed = bool(environment.get(ROOT_VARIABLE))
    return [
        f"{one.name} is set, and Imagen does not read it. {one.remedy}"
        for one in FORMER
        if environment.get(one.name) and not (one.shared and placed)
    ]
