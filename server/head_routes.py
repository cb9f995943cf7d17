"""`/v1/adaptive/heads`: what serves adaptive requests, and, with the admin key, changing it."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import EllipsisType
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.params import Depends
from pydantic import BaseModel, ConfigDict, Field
from vllm.exceptions import VLLMError, VLLMValidationError

from server.admission import AdaptiveState
from server.head_control import HeadConflictError, HeadControl, WorkerError
from server.heads import Canary, HeadRegistry, ServedHead

HEADS_PATH = "/v1/adaptive/heads"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LoadRequest(_Strict):
    """Load a head, also instead of the one of its name."""

    name: str = Field(description="The name by which requests pick it.")
    folder: str | None = Field(None, description="Below --heads-dir; null: the name.")
    default: bool = Field(False, description="Whether requests that name no head get it.")


class CanaryShare(_Strict):
    """Another head's share of a head's requests."""

    head: str = Field(description="The head that answers the share.")
    percent: float = Field(ge=0.0, le=100.0, allow_inf_nan=False)


class ChangeRequest(_Strict):
    """Change what a loaded head is for."""

    default: bool | None = Field(None, description="true: requests that name no head get it.")
    canary: CanaryShare | None = Field(None, description="null ends it.")


def make_head_router() -> APIRouter:
    """The routes; those that change heads work behind `server.admin_key` only."""
    router = APIRouter()
    router.get(HEADS_PATH)(show_heads)
    router.get(HEADS_PATH + "/{name}/training")(show_training)
    router.post(HEADS_PATH)(load_head)
    router.patch(HEADS_PATH + "/{name}")(change_head)
    router.delete(HEADS_PATH + "/{name}")(remove_head)
    return router


async def show_heads(raw_request: Request) -> dict[str, Any]:
    """The loaded heads with their metadata, and what the operator decides for all requests."""
    state: AdaptiveState = raw_request.app.state.adaptive
    return {
        "object": "list",
        "data": [describe(head, state.heads) for head in state.heads],
        "policy": state.policy.model_dump(mode="json", exclude_none=True),
        "max": state.max_temperature,
        "override": state.heads.override_temperature,
    }


async def show_training(name: str, raw_request: Request) -> Response:
    """How a head was trained, which may be long."""
    metadata = find_registry(raw_request).find(name).metadata
    return Response(metadata.model_dump_json(include={"training"}), media_type="application/json")


def require_control(raw_request: Request) -> HeadControl:
    """The control of the heads, which `server.admin_key` gives a request with the admin key."""
    control: HeadControl = raw_request.state.control
    return control


Control = Annotated[HeadControl, Depends(require_control)]


async def load_head(request: LoadRequest, raw_request: Request, control: Control) -> dict[str, Any]:
    """Load a head, or replace one: the old one serves until the new one is verified."""
    with counting(raw_request, "load"):
        head = await control.load(request.name, request.folder, is_default=request.default)
    return describe(head, find_registry(raw_request))


async def change_head(
    name: str, request: ChangeRequest, raw_request: Request, control: Control
) -> dict[str, Any]:
    """Make a head the default; give it a canary, or end its canary."""
    if request.default is False:
        raise VLLMValidationError(
            "default can only be true: make another head the default", parameter="default"
        )
    asked = [action for action in ("default", "canary") if action in request.model_fields_set]
    canary: Canary | EllipsisType | None = ...
    if "canary" in asked:
        share = request.canary
        canary = None if share is None else Canary(share.head, share.percent)
    with counting(raw_request, *asked):
        await control.change(name, make_default=bool(request.default), canary=canary)
    heads = find_registry(raw_request)
    return describe(heads.by_name[name], heads)


async def remove_head(name: str, raw_request: Request, control: Control) -> dict[str, Any]:
    """Serve a head no longer."""
    with counting(raw_request, "remove"):
        await control.remove(name)
    return {"id": name, "object": "adaptive.head", "deleted": True}


@contextmanager
def counting(raw_request: Request, *actions: str) -> Iterator[None]:
    """Count an attempt to change something, and answer 409 and 500 where they are due."""
    result = "failed"
    try:
        yield
        result = "done"
    except VLLMError:
        result = "refused"
        raise
    except HeadConflictError as error:
        result = "refused"
        raise HTTPException(HTTPStatus.CONFLICT, str(error)) from None
    except WorkerError as error:
        raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None
    finally:
        for action in actions:
            raw_request.app.state.adaptive.metrics.count_change(action, result)


def find_registry(raw_request: Request) -> HeadRegistry:
    state: AdaptiveState = raw_request.app.state.adaptive
    return state.heads


def describe(head: ServedHead, heads: HeadRegistry) -> dict[str, Any]:
    """A head as the routes show it."""
    canary = heads.canaries.get(head.name)
    return {
        "id": head.name,
        "object": "adaptive.head",
        "default": head.name == heads.default,
        "generation": head.generation,
        "canary": canary and {"head": canary.name, "percent": canary.percent},
        "temperatures": head.metadata.temperatures,
        **head.metadata.model_dump(mode="json", exclude={"probe", "training"}),
    }
