"""The Python-backend model of every task. Triton runs a copy of this file per task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from benchmarks.peers.work import load

if TYPE_CHECKING:
    from benchmarks.peers.work import Upload


class TritonPythonModel:
    """One model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        self._work = load(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request of a batch that Triton formed."""
        pictures = self._work.serve([_upload(request) for request in requests])
        return [_response(picture) for picture in pictures]


def _upload(request: Any) -> Upload:
    image, parameters = (
        pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0]
        for name in ("IMAGE", "PARAMETERS")
    )
    fields = json.loads(parameters)
    return image, {name: str(value) for name, value in fields.items()}


def _response(picture: bytes) -> Any:
    tensor = pb_utils.Tensor("IMAGE", np.array([[picture]], dtype=np.object_))
    return pb_utils.InferenceResponse(output_tensors=[tensor])
