"""How much one request may ask for."""

from pydantic import BaseModel, ConfigDict, Field

# Requests in the engine, running and waiting, per data-parallel replica: the default of vLLM's
# --max-num-queued-reqs. vLLM runs at most 1024 at once by default, and an autoscaler that counts
# both must see a queue before requests are refused.
DEFAULT_MAX_QUEUED = 2048


class Limits(BaseModel):
    """The `limits` of `AdaptiveSettings`. Each field is an option of `adaptive-serve`.

    Sizes are in bytes, times in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(16_000_000, gt=0, description="bytes of a request's body")
    max_header_bytes: int = Field(
        32_000, gt=0, description="bytes of a request's headers, with its address"
    )
    max_read_seconds: float = Field(
        60.0, gt=0, description="seconds until a request has arrived, from its first byte"
    )
    max_name_length: int = Field(
        256,
        gt=0,
        description="characters of a name: a model, a tool, a user, a field, a stop string",
    )
    max_choices: int = Field(256, gt=0, description="answers to one request: its prompts times n")
    max_list_items: int = Field(
        1024, gt=0, description="items of a list or an object, such as stop_token_ids or tools"
    )
    max_messages: int = Field(4096, gt=0, description="messages of a conversation")
    max_token_ids: int = Field(1_000_000, gt=0, description="tokens of a prompt sent as numbers")
    max_grammar_bytes: int = Field(
        16_000, gt=0, description="bytes of structured_outputs or response_format, as JSON"
    )
    max_grammar_seconds: float = Field(
        1.0, gt=0, description="seconds that checking a grammar may take"
    )


def option_name(field: str) -> str:
    """The option of `adaptive-serve` that sets a field of `Limits`."""
    return "--" + field.replace("_", "-")
