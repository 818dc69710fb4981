"""Routes for operators: list adapters, replace them, drain the server. They need a key with `admin: true`.

    GET    /admin/status            requests and tokens under way, by key and by adapter
    GET    /admin/adapters          model name -> version, folder, and requests that still run on older versions
    POST   /admin/adapters          {"name": "aft", "path": "/runs/new/model/aft"}: copy, try, move the name; the path
                                    is a folder, a URL (s3://, gs://) or an adapter of the hub, OWNER/NAME#REVISION
    DELETE /admin/adapters/{name}   stop serving the name; requests under way finish with the adapter they have
    POST   /admin/drain             refuse new requests (`{"drain": false}`: accept them again)

A request keeps the adapter version it began with to its end, so moving a name interrupts none.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from aft_ray.errors import ConfigError, EngineError, StorageError
from aft_ray.serving.adapters import (
    VERSIONS,
    Adapter,
    AdapterStamp,
    check_name,
    found_in,
    keep_version,
    prune_versions,
    stamp_of,
    touch,
)
from aft_ray.serving.errors import HttpError
from aft_ray.serving.http.route import OpenAIRoute
from aft_ray.serving.openai.request import LONGEST_REQUEST_S
from aft_ray.serving.service import Service
from aft_ray.storage import Folder

logger = logging.getLogger("ray.serve.aft_ray")

TRY_S = 120.0
"""How long engines may take to load an adapter and write one token with it."""
WATCH_S = 2.0
"""Interval between two looks at the watched folder. An adapter is served when two looks in a row find it unchanged."""
WATCH_URL_S = 5.0
"""The same for a watched folder on object storage, where looking costs money."""


class AdapterBody(BaseModel):
    """A model name and the place of its new adapter."""

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str = Field(pattern=r"^[^\x00]+$")


class DrainBody(BaseModel):
    """Whether to refuse new requests."""

    model_config = ConfigDict(extra="forbid")

    drain: bool = True


async def install(service: Service, name: str, reference: str) -> Adapter:
    """Serve the adapter at a path, at a URL or on the hub under `name` from now on, at every ingress replica.

    It is copied to a folder named by its content and tried by one replica of each pool (the others load it with their
    first request, each on its own node); then the name moves. Raises ConfigError or StorageError where the adapter
    cannot be read or kept, or EngineError where the engines cannot serve it; the name has not moved then.
    """
    config = service.config
    check_name(name, config.base_name)
    store = None if config.adapters_dir is None else Folder.at(config.adapters_dir).child(VERSIONS)
    adapter = await asyncio.to_thread(keep_version, reference, store)
    await service.gate.renew()  # another ingress replica may have moved the name a moment ago
    known = service.gate.table.adapters.get(name)
    if known == adapter:
        return adapter
    try:
        async with asyncio.timeout(TRY_S):
            await service.answers.probe(adapter.path)
    except TimeoutError:
        raise EngineError(f"the engines wrote no token with the adapter {reference} in {TRY_S:g} s") from None
    await service.gate.change(move={name: adapter})
    logger.warning("model %s: now version %s (before: %s)", name, adapter.version, known.version if known else "none")
    await retire(service, known)
    await prune(service, Path(adapter.path).parent)
    return adapter


async def retire(service: Service, adapter: Adapter | None) -> None:
    """Note that a name no longer stands for an adapter, which requests may use until they end."""
    if adapter is not None and service.config.keep_adapter_versions is not None:
        await asyncio.to_thread(touch, adapter.path)


async def prune(service: Service, store: Path) -> None:
    """Remove versions that nobody needs, where the server is to keep a number of them. What fails is logged.

    What lies on object storage or comes from the hub is left.
    """
    keep = service.config.keep_adapter_versions
    if keep is None or not await asyncio.to_thread(store.is_dir):
        return
    open_by_path: dict[str, int] = (await service.gate.open_requests())["requests_by_adapter"]
    named = [adapter.path for adapter in service.gate.table.adapters.values()]
    in_use = {*named, *open_by_path, *(service.config.adapters or {}).values()}
    try:
        removed = await asyncio.to_thread(
            prune_versions, store, keep=keep, in_use=in_use, grace_s=LONGEST_REQUEST_S + TRY_S
        )
    except OSError as error:
        logger.error("cannot remove old adapter versions in %s: %s", store, error)
        return
    for folder in removed:
        logger.warning("removed the adapter version %s, which nothing uses", folder)


async def keep_watching(service: Service) -> None:
    """Serve new and changed adapters of the watched folder, for as long as the replica lives."""
    if service.config.adapters_dir is None:
        return
    folder = Folder.at(service.config.adapters_dir)
    seen: dict[str, AdapterStamp] = {}
    while True:
        try:
            if await service.gate.may_watch():
                seen = await _take_changed(service, folder, seen)
        except (HttpError, StorageError) as error:  # the control or the storage does not answer: try at the next look
            logger.error("cannot look for adapters in %s: %s", folder.location, error)
        except Exception as error:  # process boundary: this task must not end before its replica
            logger.error("cannot look for adapters in %s: %s", folder.location, type(error).__name__)
        await asyncio.sleep(WATCH_S if folder.is_local else WATCH_URL_S)


async def _take_changed(service: Service, folder: Folder, seen: Mapping[str, AdapterStamp]) -> dict[str, AdapterStamp]:
    """Install adapters that are unchanged since the last look (`seen`) and not yet taken. Return what is there now."""
    places = await asyncio.to_thread(found_in, folder)
    now = {name: await asyncio.to_thread(stamp_of, place) for name, place in places.items()}
    for name, stamp in now.items():
        if seen.get(name) != stamp or service.gate.table.taken.get(name) == stamp:
            continue
        try:
            await install(service, name, places[name].location)
        except HttpError:
            raise
        except (ConfigError, StorageError, EngineError) as error:
            logger.error("cannot serve the adapter %s: %s", places[name].location, error)
        except Exception as error:  # process boundary: the other adapters must not wait for this one
            logger.error("cannot serve the adapter %s: %s", places[name].location, type(error).__name__)
        await service.gate.change(taken={name: stamp})
    if await asyncio.to_thread(folder.exists):  # a folder that is out of reach for a moment removes nothing
        await _remove_gone(service, now)
    return now


async def _remove_gone(service: Service, there: Mapping[str, AdapterStamp]) -> None:
    """Stop serving the adapters that were taken from the watched folder and are no longer there."""
    config, table = service.current_config, service.gate.table
    gone = [name for name, stamp in table.taken.items() if stamp and name not in there]
    needed = (config.default_model, config.proposer_adapter)
    for name in gone:
        if name in table.adapters and name not in needed:
            await retire(service, table.adapters[name])
            await service.gate.change(move={name: None}, taken={name: ()})
            logger.warning("model %s: its folder is gone, and it is served no longer", name)


def admin_routes(service: Service) -> APIRouter:
    """Return the `/admin` routes."""

    async def need_admin(request: Request) -> None:
        if not service.keys.is_required:
            message = (
                "nobody may use /admin on a server without keys: set serving.keys_file to a file with an admin key"
            )
            raise HttpError(403, message, code="admin_key_required", type="permission_error")
        if not service.caller(request.headers.get("authorization")).is_admin:
            message = "this key may not use /admin: set admin: true for it in the keys file"
            raise HttpError(403, message, code="admin_key_required", type="permission_error")

    router = APIRouter(
        prefix="/admin", route_class=OpenAIRoute, dependencies=[Depends(need_admin)], include_in_schema=False
    )

    async def overview() -> dict[str, Any]:
        found = await service.gate.open_requests()
        await service.gate.renew()
        table = service.gate.table.adapters
        current = {adapter.path for adapter in table.values()}
        open_by_path: dict[str, int] = found["requests_by_adapter"]
        adapters = [
            {"name": name, **dataclasses.asdict(adapter), "num_requests": open_by_path.get(adapter.path, 0)}
            for name, adapter in table.items()
        ]
        older = {path: number for path, number in open_by_path.items() if path not in current}
        return {"adapters": adapters, "draining_adapters": older}

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return await service.gate.open_requests()

    @router.get("/adapters")
    async def adapters() -> dict[str, Any]:
        return await overview()

    @router.post("/adapters")
    async def move(body: AdapterBody) -> dict[str, Any]:
        try:
            adapter = await install(service, body.name, body.path)
        except StorageError as error:
            raise HttpError(400, str(error), param="path", code="adapter_storage_error") from None
        except EngineError as error:
            message = f"the engines cannot serve this adapter: {error}"
            raise HttpError(400, message, param="path", code="adapter_refused") from None
        return {"name": body.name, **dataclasses.asdict(adapter), **await overview()}

    @router.delete("/adapters/{name}")
    async def remove(name: str) -> dict[str, Any]:
        config = service.config
        await service.gate.renew()
        if name not in service.gate.table.adapters:
            raise HttpError(404, f"no adapter is named '{name[:100]}'", param="name", code="model_not_found")
        if name in (service.current_config.default_model, config.proposer_adapter):
            message = f"'{name}' is serving.default_model or serving.proposer_adapter: give it another adapter instead"
            raise HttpError(400, message, param="name", code="adapter_in_use")
        await retire(service, service.gate.table.adapters[name])
        await service.gate.change(move={name: None})
        return await overview()

    @router.post("/drain")
    async def drain(body: DrainBody) -> dict[str, Any]:
        await service.gate.change(drain=body.drain)
        return await service.gate.open_requests()

    return router
