"""What we assume of vLLM for the beginnings of answers, and for routes besides OpenAI's."""

import inspect
from typing import Any

from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.anthropic import serving as anthropic
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages, wrap_data_with_event
from vllm.entrypoints.launchers.api_server import routers
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses import protocol
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.sagemaker import api_router as sagemaker
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine.input_processor import InputProcessor

from server.protocol import carry_options
from server.responses import let_temperature_be_null, without_temperature
from tests.contract.helpers import assert_in_order, assert_parameters, source
from tests.server.fakes import make_report

CHAT = [{"role": "user", "content": "Hi"}]


def test_a_renderer_applies_its_template_by_an_attribute():
    assert "self._apply_chat_template_async=make_async(safe_apply_chat_template" in source(
        HfRenderer.__init__
    )
    assert_in_order(
        HfRenderer.render_messages_async,
        "chat_template_kwargs = params.get_apply_chat_template_kwargs()",
        "self._apply_chat_template_async(",
        "model_config,",
        "tokenizer,",
        "conversation,",
        "**chat_template_kwargs",
    )
    names = list(inspect.signature(safe_apply_chat_template).parameters)
    assert names[:3] == ["model_config", "tokenizer", "conversation"]
    chat = ChatCompletionRequest(messages=CHAT)
    options = chat.build_chat_params(None, "auto").get_apply_chat_template_kwargs()
    assert options["add_generation_prompt"] and not options["continue_final_message"]


def test_a_workers_request_knows_the_length_of_its_prompt():
    assert isinstance(NewRequestData.prompt_len, property)


def test_every_route_looks_for_a_name_in_one_list():
    assert "self.models.is_base_model(model_name)" in source(BaseServing._is_model_supported)
    assert "self.models.base_model_paths" in source(BaseServing._check_model)
    init = source(OpenAIServingModels.__init__)
    assert init.count("base_model_paths=base_model_paths") == 2


def test_messages_are_answered_as_chats_that_carry_options():
    calls = source(AnthropicServingMessages.create_messages)
    assert "self.to_chat_completion_request(request," in calls
    assert "self.create_chat_completion(chat_req,raw_request)" in calls
    assert "self.messages_full_converter(generator)" in calls
    assert source(AnthropicServingMessages).count("self.message_stream_converter(") == 1
    assert "model_dump(exclude_none=True)" in source(messages.create_messages)
    assert "content" in AnthropicMessagesResponse.model_fields


def test_an_event_of_a_message_is_an_object_behind_its_name():
    assert wrap_data_with_event("{}", "message_delta") == "event: message_delta\ndata: {}\n\n"
    stream = inspect.getsource(AnthropicServingMessages.message_stream_converter)
    for name in ("message_delta", "content_block_delta"):
        assert f'wrap_data_with_event(data, "{name}")' in stream
    assert anthropic.AnthropicStreamEvent.model_fields["type"].is_required()


def test_a_batch_makes_a_chat_of_each_conversation_and_generates_in_order():
    assert_in_order(
        OpenAIServingChatBatch.render_batch_chat_request,
        "for messages in request.messages:",
        "request.to_chat_completion_request(messages)",
    )
    assert_in_order(
        OpenAIServingChatBatch.create_batch_chat_completion,
        "for i, engine_prompt in enumerate(engine_prompts):",
        "single_request.to_sampling_params(",
        "self.engine_client.generate(",
        "self.chat_completion_full_generator_batch(",
    )
    batch = BatchChatCompletionRequest(messages=[CHAT, CHAT], temperature=1.0, seed=4)
    report = make_report()
    chat = carry_options(batch.to_chat_completion_request(CHAT), report)
    params = chat.to_sampling_params(9, {})
    assert (params.temperature, params.seed) == (1.0, 4)
    assert params.extra_args == report.extra_args


def test_invocations_are_a_route_that_takes_the_request_as_it_is():
    assert_in_order(
        sagemaker._attach_router,
        '"/invocations",',
        "@sagemaker_standards.stateful_session_manager()",
        '@sagemaker_standards.inject_adapter_id(adapter_path="model")',
        "async def invocations(raw_request: Request):",
        "for request_validator, endpoint in valid_endpoints:",
    )
    assert "register_sagemaker_api_router(app" in source(routers.register_api_routers)


def test_a_response_is_refused_before_it_is_generated():
    """The generator is made, and not begun, before anything is answered or stored."""
    assert_in_order(
        OpenAIServingResponses._create_responses,
        "self._generate_with_builtin_tools(",
        "sampling_params=sampling_params",
        "if request.background:",
        "self.responses_stream_generator(",
    )
    names = inspect.signature(OpenAIServingResponses._generate_with_builtin_tools).parameters
    assert "sampling_params" in names
    assert_parameters(InputProcessor._validate_params, "self", "params", "supported_tasks")
    assert "params.verify(" in source(InputProcessor._validate_params)


def test_a_response_repeats_a_temperature_that_may_be_null():
    for name in ("responses_full_generator", "responses_stream_generator"):
        method = getattr(OpenAIServingResponses, name)
        assert_parameters(method, "self", "request", "sampling_params")
    let_temperature_be_null()
    request = ResponsesRequest(input="Hi")
    shown = without_temperature(SamplingParams(max_tokens=1))
    response = ResponsesResponse.from_request(
        request, shown, model_name="m", created_time=0, output=[], status="queued"
    )
    fields: dict[str, Any] = {"sequence_number": 0, "response": response.model_dump()}
    event = protocol.ResponseCreatedEvent(type="response.created", **fields)
    assert '"temperature":null' in event.model_dump_json()
