"""What `server/limits` assumes of vLLM and uvicorn. No engine, no socket."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import vllm
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from vllm.config import SchedulerConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.serve.exception_handling import utils
from vllm.exceptions import GracefulHTTPError, QueueOverflowError, VLLMError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from server.limits import messages
from server.limits.connections import BoundedProtocol
from tests.contract.helpers import assert_in_order, assert_parameters, source

ENTRYPOINTS = Path(vllm.__file__).parent / "entrypoints"


def test_the_sanitizer_is_a_function_that_modules_call_by_its_name():
    """So that replacing the name replaces it, and a module that has it under another is found."""
    assert_parameters(messages._stock_sanitize, "message")
    for path in ENTRYPOINTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                aliases = [alias for alias in node.names if alias.name == "sanitize_message"]
                assert all(alias.asname is None for alias in aliases), path
    messages.bound_messages()
    assert utils.sanitize_message is messages.sanitize_bounded
    left = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("vllm.")
        and vars(module).get("sanitize_message") is messages._stock_sanitize
    ]
    assert not left


def test_a_full_queue_is_refused_before_an_answer_begins():
    assert "max_num_queued_reqs" in SchedulerConfig.__dataclass_fields__
    for owner in (EngineClient, AsyncLLM):
        assert_parameters(owner.check_admission, "self", "n")
    assert_in_order(AsyncLLM.check_admission, "max_num_queued_reqs", "raise QueueOverflowError()")
    assert_in_order(GenerateBaseServing._preflight, "self.engine_client.check_admission(n)")
    assert issubclass(QueueOverflowError, GracefulHTTPError)
    assert issubclass(GracefulHTTPError, VLLMError)
    assert QueueOverflowError().http_status == 503
    # What `add_request` raises so reaches the route as it is.
    assert_in_order(AsyncLLM.generate, "except (VLLMClientError, GracefulHTTPError", "raise")


def test_every_request_goes_through_add_request():
    for method in (AsyncLLM.generate, AsyncLLM.encode):
        assert "awaitself.add_request(" in source(method)
    names = ("self", "request_id", "prompt", "params")
    assert_parameters(AsyncLLM.add_request, *names)


def test_a_processor_without_a_configuration_checks_no_grammar():
    assert "self.structured_outputs_config" in source(InputProcessor._validate_params)
    # It is read nowhere else: nothing but this check is lost.
    assert source(InputProcessor).count("self.structured_outputs_config") == 2
    names = ("self", "model_config", "structured_outputs_config", "tokenizer")
    assert_parameters(SamplingParams._validate_structured_outputs, *names)
    assert_in_order(
        SamplingParams._validate_structured_outputs,
        "if structured_outputs_config is None or self.structured_outputs is None:",
        "return",
    )


@pytest.mark.parametrize(
    "name",
    [name for name in vars(BoundedProtocol) if hasattr(HttpToolsProtocol, name)],
)
def test_uvicorn_calls_what_a_bounded_connection_overrides(name):
    ours, theirs = getattr(BoundedProtocol, name), getattr(HttpToolsProtocol, name)
    if inspect.isfunction(theirs) and not name.startswith("__"):
        assert_parameters(ours, *inspect.signature(theirs).parameters)


def test_a_bounded_connection_overrides_five_methods():
    methods = {name for name in vars(BoundedProtocol) if name in vars(HttpToolsProtocol)}
    wanted = {"connection_made", "data_received", "on_message_begin"}
    assert wanted | {"on_headers_complete", "on_message_complete"} <= methods
