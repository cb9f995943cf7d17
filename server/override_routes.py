"""`/v1/adaptive/override`: one constant instead of every adaptive temperature, and back."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from adaptive_head.parameters import Temperature
from server.head_routes import Control, counting, find_registry

OVERRIDE_PATH = "/v1/adaptive/override"


class OverrideRequest(BaseModel):
    """Switch the override on, or to another temperature."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: Temperature = Field(description="What every adaptive request gets.")


def make_override_router() -> APIRouter:
    """The routes; those that change it work behind `server.admin_key` only."""
    router = APIRouter()
    router.get(OVERRIDE_PATH)(show_override)
    router.put(OVERRIDE_PATH)(set_override)
    router.delete(OVERRIDE_PATH)(end_override)
    return router


async def show_override(raw_request: Request) -> dict[str, Any]:
    """The temperature of every adaptive request; null while the override is off."""
    return {
        "object": "adaptive.override",
        "temperature": find_registry(raw_request).override_temperature,
    }


async def set_override(
    request: OverrideRequest, raw_request: Request, control: Control
) -> dict[str, Any]:
    """Answer every adaptive request with one constant temperature, from the next one on."""
    with counting(raw_request, "override"):
        await control.set_override(request.temperature)
    return await show_override(raw_request)


async def end_override(raw_request: Request, control: Control) -> dict[str, Any]:
    """Let requests choose their temperatures again."""
    with counting(raw_request, "override"):
        await control.set_override(None)
    return await show_override(raw_request)
