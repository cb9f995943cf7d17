"""What the front end assumes of vLLM's API server. No engine, no socket."""

import ast
import inspect
from importlib.metadata import entry_points
from typing import get_args

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Histogram
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.anthropic import api_router as messages
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.generate import api_router as generate
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.launchers import app as launcher
from vllm.entrypoints.launchers.api_server import app_state, entry
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponseChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses import streaming_events
from vllm.entrypoints.openai.responses.protocol import (
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
)
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import (
    ErrorResponse,
    ModelCard,
    ModelList,
    UsageInfo,
)
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins
from vllm.renderers import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from adaptive_head.options import EXTRA_ARGS_KEY, AdaptiveRequest, Options, resolve_options
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.compat import UnsupportedError
from adaptive_head.vllm.moved import make_arg_parser
from server.cli import PLUGIN
from server.counted_histogram import CountedHistogram
from server.engine_proxy import EngineProxy
from server.handlers import (
    HAS_CHUNK_OBJECTS,
    AdaptiveServingChat,
    AdaptiveServingChatBatch,
    AdaptiveServingCompletion,
)
from server.head_routes import HEADS_PATH
from server.metrics import AdaptiveMetrics
from server.plugin import AdaptiveEndpoints, require_engine_side
from server.protocol import (
    AdaptiveBatchRequest,
    AdaptiveChatCompletionRequest,
    AdaptiveCompletionRequest,
    AdaptiveFields,
    AdaptiveMessagesRequest,
    AdaptiveResponsesRequest,
)
from server.report import Report
from server.responses import AdaptiveServingResponses
from server.routes import (
    BATCH_PATH,
    CHAT_PATH,
    COMPLETION_PATH,
    MESSAGES_PATH,
    MODELS_PATH,
    RESPONSES_PATH,
)
from server.stream import _CHOICE, _END, _FINISHED, _NO_CHOICE, _TOKENS_KEY, _USAGE
from tests.contract.helpers import assert_in_order, assert_parameters, parse, source

# From 0.33 on a chat's chunks are made as objects, and serialised by a method around that one.
CHAT_STREAM = "chat_completion_stream_generator" + ("_raw" if HAS_CHUNK_OBJECTS else "")
HANDLERS = [OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses]
PATHS = {
    CHAT_PATH: AdaptiveChatCompletionRequest,
    COMPLETION_PATH: AdaptiveCompletionRequest,
    RESPONSES_PATH: AdaptiveResponsesRequest,
    BATCH_PATH: AdaptiveBatchRequest,
    MESSAGES_PATH: AdaptiveMessagesRequest,
}
BODIES = [
    (AdaptiveChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    (AdaptiveCompletionRequest, {"prompt": "x"}),
    (AdaptiveResponsesRequest, {"input": "x"}),
]


# --- the plugin and its routes ------------------------------------------------------------------


def test_the_plugin_satisfies_vllms_protocol():
    plugin = AdaptiveEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    for name in ("attach_router", "init_state"):
        wanted = inspect.signature(getattr(EndpointPlugin, name)).parameters
        assert list(inspect.signature(getattr(AdaptiveEndpoints, name)).parameters) == list(wanted)
    assert inspect.iscoroutinefunction(AdaptiveEndpoints.init_state)
    assert plugin.required_tasks == ("generate",)


def test_the_entry_point_has_the_name_that_adaptive_serve_enables():
    (found,) = entry_points(group="vllm.endpoint_plugins", name=PLUGIN)
    assert found.load() is AdaptiveEndpoints and AdaptiveEndpoints.name == PLUGIN


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """vLLM's core routes with our plugin's over them, as `build_app` puts them together."""
    app = FastAPI()
    app.state.args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for module in (chat, completion, models, responses):
        module.attach_router(app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", PLUGIN)
        attach_endpoint_plugins(app, ("generate",))
    return app


def routes_of(app: FastAPI, path: str, method: str) -> list[APIRoute]:
    return [
        route
        for route in app.routes
        if isinstance(route, APIRoute) and route.path == path and method in route.methods
    ]


@pytest.mark.parametrize(
    ("path", "method"),
    [*((path, "POST") for path in PATHS), (MODELS_PATH, "GET"), (HEADS_PATH, "GET")],
)
def test_our_routes_take_the_place_of_vllms(app, path, method):
    """Were both there the first would answer, and that is vLLM's."""
    (route,) = routes_of(app, path, method)
    assert route.endpoint.__module__ in ("server.routes", "server.head_routes")


def test_other_routes_stay_vllms(app):
    (route,) = routes_of(app, "/v1/responses/{response_id}", "GET")
    assert route.endpoint is responses.retrieve_responses


def test_our_routes_keep_the_checks_and_error_forms_of_vllms(app):
    for router, path in (
        (chat.router, CHAT_PATH),
        (completion.router, COMPLETION_PATH),
        (responses.router, RESPONSES_PATH),
        (chat.router, BATCH_PATH),
        (messages.router, MESSAGES_PATH),
    ):
        (stock,) = [route for route in router.routes if route.path == path]
        (ours,) = routes_of(app, path, "POST")
        assert [item.dependency for item in ours.dependencies] == [
            item.dependency for item in stock.dependencies
        ]
        assert ours.responses == stock.responses


@pytest.mark.parametrize("path", PATHS)
def test_openapi_shows_what_a_client_may_send(app, path):
    document = app.openapi()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": f"#/components/schemas/{PATHS[path].__name__}"}
    fields = document["components"]["schemas"][PATHS[path].__name__]["properties"]
    assert fields["temperature"]["anyOf"] == [
        {"type": "number"},
        {"type": "string", "const": "adaptive"},
        {"type": "null"},
    ]
    assert {"$ref": "#/components/schemas/AdaptiveRequest"} in fields["adaptive"]["anyOf"]
    options = document["components"]["schemas"]["AdaptiveRequest"]
    assert {"policy", "head", "level", "report"} <= options["properties"].keys()


def test_plugins_load_only_where_vllm_plugins_names_them():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_PLUGINS", raising=False)
        assert envs.VLLM_PLUGINS is None
        app = FastAPI()
        app.state.args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        chat.attach_router(app)
        attach_endpoint_plugins(app, ("generate",))
        (route,) = routes_of(app, CHAT_PATH, "POST")
        assert route.endpoint is chat.create_chat_completion


def test_plugins_are_attached_after_vllms_routes_and_before_its_error_handlers():
    """A `VLLMValidationError` of ours becomes a 400 in those handlers."""
    assert_in_order(
        launcher.build_app,
        "register_api_routers(",
        "attach_endpoint_plugins(",
        "init_exception_handler(app)",
    )
    # The announcement is made in the lifespan, from the state that `init_state` sets.
    assert_in_order(entry.build_and_serve, "build_app(", "await init_app_state(", "serve_http(")
    error = VLLMValidationError("wrong", parameter="adaptive.head")
    assert error.parameter == "adaptive.head" and "wrong" in str(error)


def test_the_state_is_complete_when_the_plugin_gets_it():
    assert_in_order(
        app_state.init_app_state,
        "state.engine_client = engine_client",
        "state.args = args",
        "state.openai_serving_models = OpenAIServingModels(",
        "await init_generate_state(",
        "await init_endpoint_plugins_state(engine_client, state, args)",
    )
    for name, handler in zip(("chat", "completion", "responses"), HANDLERS, strict=True):
        wanted = f"state.openai_serving_{name} = ({handler.__name__}("
        assert "".join(wanted.split()) in source(generate), name


@pytest.mark.parametrize(
    ("worker", "scheduler", "named"),
    [("auto", SCHEDULER_CLS, "--worker-cls"), (WORKER_CLS, None, "--scheduler-cls")],
)
def test_an_engine_without_our_side_is_refused(worker, scheduler, named):
    require_engine_side(WORKER_CLS, SCHEDULER_CLS)
    with pytest.raises(UnsupportedError, match=named):
        require_engine_side(worker, scheduler)


# --- the handlers -------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_handlers_generate_through_the_attribute_that_we_exchange(handler):
    """A handler that kept the engine elsewhere would answer without temperatures."""
    assert "self.engine_client.generate(" in source(handler)
    assert "self.engine_client=engine_client" in "".join(source(base) for base in vllm_mro(handler))


def vllm_mro(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


@pytest.mark.parametrize("handler", HANDLERS)
def test_handlers_pass_prompt_and_parameters_in_the_order_of_the_proxy(handler):
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(handler))))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.engine_client.generate"
    ]
    assert calls
    for call in calls:
        assert [ast.unparse(argument) for argument in call.args][:2] == [
            "engine_input",
            "sampling_params",
        ]
    for client in (EngineClient, AsyncLLM):
        assert_parameters(client.generate, "self", "prompt", "sampling_params", "request_id")
    assert_parameters(EngineProxy.generate, "self", "prompt", "sampling_params")


def test_names_that_the_routes_take_from_vllms_modules():
    for module, names in (
        (chat, ("router", "create_chat_completion")),
        (completion, ("router", "create_completion")),
        (responses, ("router", "create_responses")),
        (models, ("models",)),
    ):
        assert all(hasattr(module, name) for name in names), module.__name__


@pytest.mark.parametrize(
    ("ours", "calls"),
    [
        (
            AdaptiveServingChat,
            {"chat_completion_full_generator": 1, CHAT_STREAM: 1},
        ),
        (
            AdaptiveServingCompletion,
            {"completion_stream_generator": 1, "request_output_to_completion_response": 1},
        ),
        # Whole, streamed, stored and background responses.
        (
            AdaptiveServingResponses,
            {"responses_stream_generator": 2, "responses_full_generator": 3},
        ),
        (AdaptiveServingChatBatch, {"chat_completion_full_generator_batch": 1}),
    ],
)
def test_every_answer_is_made_by_a_method_that_we_override(ours, calls):
    (stock,) = ours.__bases__
    assert stock.__module__.startswith("vllm.")
    for name, count in calls.items():
        assert name in ours.__dict__
        method = getattr(stock, name)
        is_batch = name == "request_output_to_completion_response"
        first = ("self", "final_res_batch", "request") if is_batch else ("self", "request")
        assert_parameters(method, *first)
        assert source(stock).count(f"self.{name}(") == count


def test_handlers_say_whether_they_parse_reasoning():
    assert "self.parser_cls=" in source(OpenAIServingChat.__init__)
    assert "self.parser=" in source(OpenAIServingResponses.__init__)


def test_the_models_handler_has_what_admission_reads():
    init = source(OpenAIServingModels.__init__)
    assert "self.base_model_paths=" in init and "self.lora_requests" in init
    assert inspect.iscoroutinefunction(OpenAIServingModels.show_available_models)
    assert {"id", "parent"} <= ModelCard.model_fields.keys()
    assert "data" in ModelList.model_fields
    assert "code" in ErrorResponse.model_fields["error"].annotation.model_fields
    assert "self.tokenizer" in source(BaseRenderer.__init__)
    assert {"vllm_config", "renderer"} <= EngineClient.__annotations__.keys()


# --- requests and answers -----------------------------------------------------------------------


@pytest.fixture
def report() -> Report:
    options = resolve_options(AdaptiveRequest(policy="entropy"), {}, None)
    return Report(options, "summary", 1, AdaptiveMetrics("m", {}, CollectorRegistry()))


def convert(request: AdaptiveFields) -> SamplingParams:
    return request.to_sampling_params(16, {"temperature": 0.3})


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_an_ordinary_request_is_converted_as_vllm_would(model, body):
    stock = next(base for base in model.__mro__ if base.__module__.startswith("vllm."))
    assert stock in (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
    for extra in ({}, {"temperature": 0.6}, {"temperature": "0.6"}):
        fields = {"model": "m", "seed": 3} | body | extra
        ours, theirs = convert(model(**fields)), convert(stock(**fields))
        assert ours == theirs


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_an_adaptive_request_travels_at_temperature_1_with_its_options(model, body, report):
    request = model(model="m", temperature="adaptive", **body)
    request.begin_report(report)
    params = convert(request)
    assert params.temperature == 1.0, "and not the default of the model"
    assert Options.from_extra_args(params.extra_args) == report.options
    assert Options.from_extra_args(params.clone().extra_args) == report.options


def test_a_handler_generates_a_prompt_with_the_parameters_that_the_request_made():
    """By them the proxy knows a request's own prompts; the task's context says which request."""
    for handler, method in (
        (OpenAIServingChat, "_create_chat_completion"),
        (OpenAIServingCompletion, "_create_completion"),
        (OpenAIServingResponses, "_create_responses"),
    ):
        assert_in_order(
            getattr(handler, method, None) or getattr(handler, method[1:]),
            "sampling_params = request.to_sampling_params(",
            "sampling_params",
        )
    for handler in HANDLERS:
        assert "self.engine_client.generate(" in source(handler)
    # One prompt of a chat and of a response, which tools may continue.
    assert "assert len(generators) == 1".replace(" ", "") in source(OpenAIServingChat)
    assert "assert len(generators) == 1".replace(" ", "") in source(OpenAIServingResponses)
    assert "asyncio.create_task(self._run_background_request(" in source(OpenAIServingResponses)


def test_xargs_cannot_carry_options(report):
    """vLLM makes `extra_args` of them; they would reach the worker unresolved."""
    assert "self.vllm_xargs" in source(ChatCompletionRequest.to_sampling_params)
    for model, body in BODIES:
        with pytest.raises(VLLMValidationError, match="own field `adaptive`"):
            model(model="m", vllm_xargs={EXTRA_ARGS_KEY: {}}, **body)


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_field_names_are_cached_per_class(model, body):
    """vLLM caches them on the class; on a shared one ours would be reported as unknown."""
    assert "field_names" in vars(model)
    model(model="m", **body)
    assert {"temperature", "adaptive"} <= model.field_names
    stock = next(base for base in model.__mro__ if base.__module__.startswith("vllm."))
    assert "adaptive" not in (stock.field_names or ())


@pytest.mark.parametrize(
    "model",
    [
        ChatCompletionResponseChoice,
        CompletionResponseChoice,
        ResponsesResponse,
        UsageInfo,
        ResponseUsage,
    ],
)
def test_answers_take_a_field_of_ours(model):
    """`adaptive` is set on vLLM's own objects, and must come out of `model_dump`."""
    assert model.model_config["extra"] == "allow"
    answer = model.model_construct()
    answer.adaptive = {"mean": 0.5}
    assert answer.model_extra == {"adaptive": {"mean": 0.5}}


def test_events_take_a_field_of_ours():
    """The delta events of a responses stream are objects of the openai package."""
    deltas = {
        name: event
        for name, event in vars(streaming_events).items()
        if name.endswith("DeltaEvent") and isinstance(event, type)
    }
    assert {"ResponseTextDeltaEvent", "ResponseReasoningTextDeltaEvent"} <= deltas.keys()
    for event in deltas.values():
        (kind,) = get_args(event.model_fields["type"].annotation)
        assert kind.endswith(".delta")
        made = event.model_construct()
        made.adaptive = {"temperatures": [0.5]}
        assert '"adaptive":{"temperatures":[0.5]}' in made.model_dump_json(warnings=False)


@pytest.mark.parametrize(
    ("model", "content"),
    [
        (ChatCompletionStreamResponse, {"delta": {"content": '"choices":[{"index":7,'}}),
        (CompletionStreamResponse, {"text": '"choices":[{"index":7,'}),
    ],
)
def test_chunks_are_compact_json_with_the_index_of_their_choice_first(model, content):
    """A choice is found by the text that begins it, its end by that of its `finish_reason`."""
    choice = content | {"finish_reason": "stop", "index": 12, "token_ids": None}
    name = '"choices":[{"index":8,'
    line = model.model_validate({"model": name, "choices": [choice]}).model_dump_json(
        exclude_unset=True
    )
    assert _FINISHED in line and _TOKENS_KEY in line
    assert [found[1] for found in _CHOICE.finditer(line)] == ["12"]
    no_choice = model.model_validate({"model": name, "choices": []})
    assert not _CHOICE.search(no_choice.model_dump_json(exclude_unset=True))
    for handler in (OpenAIServingChat, OpenAIServingCompletion):
        assert 'f"data:{' in source(handler)
        is_text = handler is OpenAIServingCompletion or not HAS_CHUNK_OBJECTS
        assert ("chunk.model_dump_json(exclude_unset=True)" in source(handler)) == is_text


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (ChatCompletionStreamResponse, getattr(OpenAIServingChat, CHAT_STREAM)),
        (CompletionStreamResponse, OpenAIServingCompletion.completion_stream_generator),
    ],
)
def test_the_usage_has_a_chunk_without_choices_and_nulls_in_our_field_stay(model, method):
    """A chunk ends with its last field, and the usage is found by the text that begins it."""
    assert_in_order(method, "choices=[],", "usage=final_usage", "yield")
    chunk = model(model='"choices":[],"usage":{', choices=[], usage=UsageInfo())
    chunk.usage.model_extra["adaptive"] = {"head": None}
    line = chunk.model_dump_json(exclude_unset=False, exclude_none=True)
    assert line.count(_NO_CHOICE) == line.count(_USAGE) == 1
    assert '"adaptive":{"head":null}' in line
    assert f"{line}\n\n".endswith(_END)


@pytest.mark.parametrize(
    ("method", "before"),
    [
        (OpenAIServingChat.chat_completion_stream_generator, "result_generator request_id"),
        (getattr(OpenAIServingChat, CHAT_STREAM), "result_generator request_id"),
        (OpenAIServingChat.chat_completion_full_generator, "result_generator request_id"),
        (
            OpenAIServingCompletion.completion_stream_generator,
            "engine_inputs result_generator request_id created_time",
        ),
        (
            OpenAIServingResponses.responses_stream_generator,
            "sampling_params result_generator context",
        ),
        (
            OpenAIServingResponses.responses_full_generator,
            "sampling_params result_generator context",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_vllm_hands_the_models_name_to_what_makes_an_answer(method, before):
    assert_parameters(method, "self", "request", *before.split(), "model_name")


def test_vllm_hands_the_models_name_to_what_makes_a_whole_completion():
    method = OpenAIServingCompletion.request_output_to_completion_response
    before = ("final_res_batch", "request", "request_id", "created_time")
    assert_parameters(method, "self", *before, "model_name")


def test_a_chats_chunks_take_a_field_of_ours_before_they_are_serialised():
    """From 0.33 on, where vLLM makes them as objects."""
    if HAS_CHUNK_OBJECTS:
        stream = OpenAIServingChat.chat_completion_stream_generator
        assert_in_order(stream, f"self.{CHAT_STREAM}(", "chunk.model_dump_json(")
    choice = ChatCompletionResponseStreamChoice(index=0, delta=DeltaMessage(), token_ids=None)
    choice.model_extra["adaptive"] = {"temperatures": [0.5]}
    line = choice.model_dump_json(exclude_unset=True)
    assert '"adaptive":{"temperatures":[0.5]}' in line


@pytest.mark.parametrize(
    "method",
    [
        getattr(OpenAIServingChat, CHAT_STREAM),
        OpenAIServingCompletion.completion_stream_generator,
    ],
    ids=lambda method: method.__name__,
)
def test_vllm_asks_for_an_output_when_the_chunks_of_the_one_before_are_made(method):
    """What it has been given before a chunk is what that chunk or an earlier one contains; and
    chunks of tokens have `token_ids`, which those before them have not."""
    assert_in_order(method, "in result_generator:", "for output in res.outputs:", "yield")
    (loop,) = [node for node in ast.walk(parse(method)) if isinstance(node, ast.AsyncFor)]
    calls = [node for node in ast.walk(loop) if isinstance(node, ast.Call)]
    made = {
        frozenset(keyword.arg for keyword in call.keywords)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id.endswith("ResponseStreamChoice")
    }
    is_chat = "chat" in method.__name__
    assert sum("token_ids" in fields for fields in made) == (2 if is_chat else 1)
    assert sum("token_ids" not in fields for fields in made) == (1 if is_chat else 0)


def test_one_prompt_is_not_read_ahead_and_several_are():
    """Which is why the tokens of several are counted behind the merging."""
    assert_in_order(
        merge_async_iterators, "if len(iterators) == 1:", "async for item in", "yield 0, item"
    )
    assert_in_order(merge_async_iterators, "loop.create_task(anext(it))] = pair", "yield i, item")


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_has_the_options_that_adaptive_serve_sets():
    parser = make_arg_parser(FlexibleArgumentParser())
    defaults = vars(parser.parse_args([]))
    assert defaults["model_tag"] is None and defaults["served_model_name"] is None
    assert defaults["worker_cls"] == "auto" and defaults["scheduler_cls"] is None
    assert not defaults["additional_config"]
    assert {"enforce_eager", "dtype", "kv_cache_memory_bytes", "host", "port"} <= defaults.keys()
    assert "sse_keep_alive_interval" in defaults
    assert defaults["max_num_queued_reqs"] is None and defaults["data_parallel_size"] == 1
    assert defaults["shutdown_timeout"] == 0 and defaults["otlp_traces_endpoint"] is None
    # What `adaptive-serve` looks at to refuse it before the engine starts.
    refused = {"return_sampling_mask", "runner", "enable_batch_sharded_sampling"}
    refused |= {"distributed_executor_backend", "speculative_config", "watermark_config", "model"}
    assert refused <= defaults.keys()
    assert_in_order(ServeSubcommand.cmd, "args.model_tag", "args.model = args.model_tag")


def test_the_environment_variables_exist():
    """vLLM ignores one that it does not know."""
    names = ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", "VLLM_USE_V2_MODEL_RUNNER")
    assert set(names) <= envs.environment_variables.keys()


# --- feature probes ------------------------------------------------------------------------------


def test_a_prompt_of_token_ids_needs_no_tokenizer_and_no_template():
    assert tokens_input([1, 2]) == {"type": "token", "prompt_token_ids": [1, 2]}
    assert_in_order(
        InputProcessor.process_inputs,
        'if isinstance(prompt, dict) and "type" in prompt:',
        "engine_input: EngineInput = prompt",
        "else:",
        "Passing raw prompts to InputProcessor is deprecated",
    )


# --- prometheus-client --------------------------------------------------------------------------


def test_counting_many_is_observing_one_by_one():
    """`CountedHistogram` writes to private fields of prometheus-client's `Histogram`."""
    values = {0.0: 3, 0.3: 2, 0.7: 5, 1.0: 1, 9.0: 4}
    samples = []
    for cls in (Histogram, CountedHistogram):
        registry = CollectorRegistry()
        histogram = cls("t", "T", ("a",), buckets=(0.0, 0.3, 1.0), registry=registry).labels("x")
        for value, count in values.items():
            if cls is CountedHistogram:
                histogram.observe_many(value, count)
            else:
                for _ in range(count):
                    histogram.observe(value)
        (metric,) = registry.collect()
        samples.append(
            {
                (sample.name, sample.labels.get("le")): sample.value
                for sample in metric.samples
                if not sample.name.endswith("_created")
            }
        )
    assert samples[0] == pytest.approx(samples[1])
    assert samples[1]["t_count", None] == 15
