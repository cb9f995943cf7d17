"""What request log, traces and stopping assume of vLLM. No engine, no socket."""

import json

import pytest
from vllm.entrypoints.cli import main as vllm_command
from vllm.entrypoints.cli import serve
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.launcher import serve_http, terminate_if_errored
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.instrumentator import health
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.tracing import extract_trace_headers
from vllm.tracing.otel import init_otel_tracer
from vllm.utils.network_utils import zmq_socket_ctx
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.engine.utils import launch_core_engines
from vllm.v1.metrics.stats import RequestStateStats
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tests.contract.helpers import assert_in_order, assert_parameters, source

HANDLERS = (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses)


def test_the_launcher_stops_the_client_that_it_finds_in_the_state():
    assert_in_order(init_app_state, "state.engine_client =", "init_endpoint_plugins_state(")
    assert_in_order(
        serve_http,
        "app.state.server = server",
        "engine_client = app.state.engine_client",
        "server_task = loop.create_task(server.serve(",
        "loop.add_signal_handler(signal.SIGINT",
        "loop.add_signal_handler(signal.SIGTERM",
        "timeout = engine_client.vllm_config.shutdown_timeout",
        "loop.run_in_executor(None, partial(engine_client.shutdown, timeout=timeout))",
        "server.should_exit = True",
        "return server.shutdown()",
    )
    assert_parameters(AsyncLLM.shutdown, "self", "timeout")


def test_the_launcher_ends_with_a_dead_engine_and_calls_it_success():
    """Should vLLM end with another code by itself, `adaptive-serve` has nothing to add."""
    assert_in_order(terminate_if_errored, "engine.errored and", "server.should_exit = True")
    assert "sys.exit" not in source(serve_http)


def test_vllm_sets_its_handlers_then_calls_setup_server_then_starts_processes():
    """Should the last two not hold any more, `server.signals` has nothing to add."""
    assert_in_order(entry.run_server, "signal.signal(signal.SIGTERM", "setup_server(", "await")
    assert_in_order(
        serve.run_multi_api_server,
        "if not shutdown_requested:",
        "raise SystemExit",
        "signal.signal(signal.SIGTERM",
        "signal.signal(signal.SIGINT",
        "setup_server(",
        "launch_core_engines(",
    )
    assert_in_order(zmq_socket_ctx, "except KeyboardInterrupt:", "finally:")
    assert_in_order(launch_core_engines, "with zmq_socket_ctx(", "wait_for_engine_startup(")


def test_vllm_notes_a_request_before_it_sends_it():
    assert_in_order(
        AsyncLLM._add_request,
        "self.output_processor.add_request(",
        "await self.engine_core.add_request_async(request)",
    )
    assert "except" not in source(AsyncLLM._add_request), "server.unsent may be unnecessary"
    assert_parameters(EngineCoreClient.add_request_async, "self", "request")


def test_general_plugins_are_loaded_in_engine_cores_and_workers():
    for thing in (EngineCore.__init__, WorkerWrapperBase.init_worker):
        assert "load_general_plugins()" in source(thing)


def test_probes_ask_where_the_gate_looks():
    assert [route.path for route in health.router.routes] == ["/health"]


def test_a_request_that_is_aborted_delivers_what_it_has():
    assert_in_order(
        OutputProcessor.abort_requests,
        "self.external_req_ids.pop(request_id",
        "self.request_states.pop(request_id",
        "req_state.make_request_output(",
        "finish_reason=FinishReason.ABORT",
        "req_state.queue.put(request_output)",
    )
    assert_in_order(AsyncLLM.abort, "self.output_processor.abort_requests(request_ids, internal)")
    assert_parameters(AsyncLLM.abort, "self", "request_id", "internal")
    assert "self.output_processor=OutputProcessor(" in source(AsyncLLM.__init__)


def test_a_whole_answer_is_one_output():
    assert_in_order(
        RequestState.make_request_output,
        "final_only = self.output_kind == RequestOutputKind.FINAL_ONLY",
        "if not finished and final_only:",
        "return None",
    )
    for handler in HANDLERS:
        assert "output_kind" not in source(handler), "set where the parameters are made"
    assert RequestOutputKind.FINAL_ONLY != RequestOutputKind.DELTA


def test_an_output_says_how_long_the_first_token_took():
    assert "metrics=self.stats" in source(RequestState._new_request_output)
    assert RequestStateStats().first_token_latency == 0.0
    assert_parameters(RequestOutput.__init__, "self", "request_id", "prompt", "prompt_token_ids")


@pytest.mark.parametrize("handler", HANDLERS)
def test_handlers_note_the_responses_id_and_take_the_parent_span_from_the_headers(handler):
    text = source(handler)
    assert "raw_request.state.request_metadata=request_metadata" in text
    assert "self._get_trace_headers(raw_request.headers)" in text
    assert RequestResponseMetadata(request_id="r").request_id == "r"


def test_vllm_traces_by_the_global_provider():
    assert_in_order(init_otel_tracer, "TracerProvider(", "set_tracer_provider(trace_provider)")
    headers = {"traceparent": "a", "tracestate": "b", "other": "c"}
    assert extract_trace_headers(headers) == {"traceparent": "a", "tracestate": "b"}


def test_streams_say_that_they_broke_as_the_record_expects():
    for handler in (OpenAIServingChat, OpenAIServingCompletion):
        assert_in_order(
            handler,
            "except Exception as e:",
            "data = self.create_streaming_error_response(e)",
            r'yield f"data: {data}\n\n"',
        )
    content = BaseServing.create_error_response("boom").model_dump()
    assert json.dumps(content).startswith('{"error"')
    assert_in_order(
        responses._convert_stream_to_sse_events,
        'getattr(event, "type"',
        r'f"event: {event_type}\ndata: "',
        "event.model_dump_json(",
    )


def test_vllms_own_command_applies_the_options_of_logging():
    assert "configure_logging_from_args(args)" in source(vllm_command)
