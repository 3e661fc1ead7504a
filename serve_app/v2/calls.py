"""The calls of the service, as Serve finds them: methods of the Ingress, by their names."""

from __future__ import annotations

from typing import Any

from serve_app.v2.door import Context, GrpcDoor


class Calls:
    """Each call has the request's message, and what Serve tells of it."""

    grpc_door: GrpcDoor

    async def ServerLive(self, asked: Any, grpc_context: Context) -> Any:
        """Whether the process answers."""
        return await self.grpc_door.call("ServerLive", asked, grpc_context)

    async def ServerReady(self, asked: Any, grpc_context: Context) -> Any:
        """Whether every model is ready or idle."""
        return await self.grpc_door.call("ServerReady", asked, grpc_context)

    async def ModelReady(self, asked: Any, grpc_context: Context) -> Any:
        """Whether a model is ready or idle."""
        return await self.grpc_door.call("ModelReady", asked, grpc_context)

    async def ServerMetadata(self, asked: Any, grpc_context: Context) -> Any:
        """The service's name, version and extensions."""
        return await self.grpc_door.call("ServerMetadata", asked, grpc_context)

    async def ModelMetadata(self, asked: Any, grpc_context: Context) -> Any:
        """A model's tensors."""
        return await self.grpc_door.call("ModelMetadata", asked, grpc_context)

    async def ModelInfer(self, asked: Any, grpc_context: Context) -> Any:
        """A picture."""
        return await self.grpc_door.call("ModelInfer", asked, grpc_context)
