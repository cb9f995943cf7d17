"""The endpoint plugin that vLLM loads into its API process."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

from adaptive_head.checkpoint import read_metadata
from adaptive_head.metadata import HeadMetadata
from adaptive_head.operator_policy import check_marker
from adaptive_head.options import AdaptiveRequest
from adaptive_head.vllm import SCHEDULER_CLS, WORKER_CLS
from adaptive_head.vllm.compat import UnsupportedError, refuse_unsupported
from adaptive_head.vllm.settings import AdaptiveSettings, read_admin_key, read_settings
from server.admin_key import AdminKey
from server.admission import AdaptiveState, serve_adaptive_names
from server.engine_proxy import EngineProxy
from server.errors import ErrorNet, answer_http_error
from server.feature_probe import check_features
from server.handlers import (
    AdaptiveServingChat,
    AdaptiveServingChatBatch,
    AdaptiveServingCompletion,
)
from server.head_control import HeadControl
from server.head_routes import make_head_router
from server.heads import HeadRegistry, choose_default
from server.invocations import make_invocations_router
from server.keys import ApiKeys, list_open_paths, read_api_keys, replace_stock_check
from server.limits.connections import bounded_connections
from server.limits.door import Door
from server.limits.grammars import check_grammars_in_threads
from server.limits.messages import bound_messages
from server.limits.mistakes import blame_clients, watch_engine
from server.limits.queue import Queue, refuse_full
from server.messages import AdaptiveServingMessages
from server.metrics import AdaptiveMetrics
from server.override_routes import make_override_router
from server.phases import find_beginnings
from server.playground import PLAYGROUND_PATH, make_playground_router
from server.record import Observer, Recorder
from server.request_log import RequestLog
from server.responses import AdaptiveServingResponses, let_temperature_be_null
from server.routes import ADAPTIVE_PATHS, Holding, make_router
from server.shutdown import DRAIN, DrainingClient, Gate, bound_closing, note_end
from server.unsent import forget_unsent

# A custom vLLM logger name must start with "vllm" for its configuration to apply.
logger = init_logger("vllm.adaptive")

# Where vLLM listens unless it is told otherwise.
ALL_ADDRESSES = "0.0.0.0"
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]
# vLLM's request handlers by their names in the application's state, and what becomes of them.
HANDLERS: dict[str, type[Any]] = {
    "openai_serving_chat": AdaptiveServingChat,
    "openai_serving_completion": AdaptiveServingCompletion,
    "openai_serving_responses": AdaptiveServingResponses,
    "openai_serving_chat_batch": AdaptiveServingChatBatch,
    "anthropic_serving_messages": AdaptiveServingMessages,
}


class AdaptiveEndpoints:
    """Implements vLLM's `EndpointPlugin`; enabled by `VLLM_PLUGINS=adaptive`."""

    name = "adaptive"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes; vLLM lets them replace its own of the same path."""
        app.include_router(make_router())
        app.include_router(make_invocations_router(app.routes))
        let_temperature_be_null()
        app.include_router(make_head_router())
        app.include_router(make_override_router())
        args = app.state.args
        settings = read_settings(args.additional_config)
        page = make_playground_router() if settings.playground else APIRouter()
        app.include_router(page)
        bound_messages()
        blame_clients()
        app.exception_handler(GracefulHTTPError)(refuse_full)
        app.exception_handler(HTTPException)(answer_http_error)
        app.state.queue = Queue()
        observers = make_observers(args, settings)
        # Inside of all others: refusals are recorded and counted as answers of their routes, and a
        # request is one task from here on. The admin key comes before `Door`, which reads the body.
        door = Middleware(Door, limits=settings.limits, queue=app.state.queue)
        admin_key = Middleware(AdminKey, limits=settings.limits)
        app.user_middleware += [admin_key, door, Middleware(ErrorNet), Middleware(Holding)]
        app.add_middleware(Gate, drain=DRAIN)
        if observers:
            app.add_middleware(Recorder, paths=ADAPTIVE_PATHS, observers=observers)
        if keys := read_api_keys(args):
            paths = [route.path for route in page.routes if isinstance(route, Route)]
            open_paths = list_open_paths(paths, metrics=settings.metrics_without_key)
            app.add_middleware(ApiKeys, keys=keys, open_paths=open_paths, limits=settings.limits)
        # vLLM adds its own check of keys later, which `init_state` replaces.
        app.state.application = app
        app.router.lifespan_context = extend_lifespan(
            app.router.lifespan_context, observers, settings
        )

    async def init_state(self, engine_client: EngineClient, state: State, args: Namespace) -> None:
        """Prepare the routes' state, once the engine is up.

        Raises:
            UnsupportedError: the engine was started without our worker or scheduler.
            HeadError: a head's `head.json` cannot be read, or its feature probe does not fit.
            TimeoutError: the engine has not answered a probe.
            ValueError: heads cannot be changed at run time as configured, see `read_admin_key`; or
                `--adaptive-policy` does not fit the tokenizer.
        """
        config = engine_client.vllm_config
        require_engine_side(
            config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls
        )
        refuse_unsupported(config)
        settings = read_settings(config.additional_config)
        # The engine is up, so its worker has compared their weights and fingerprints.
        metadata = {name: read_metadata(folder) for name, folder in settings.heads.items()}
        heads = HeadRegistry(metadata, settings.default_head or choose_default(metadata))
        await asyncio.gather(*(check_features(engine_client, head) for head in heads))
        served_names = tuple(path.name for path in state.openai_serving_models.base_model_paths)
        tokenizer = getattr(engine_client.renderer, "tokenizer", None)
        tokenize = tokenizer and partial(tokenizer.encode, add_special_tokens=False)
        policy = settings.adaptive_policy or AdaptiveRequest()
        check_marker(policy, tokenize)
        if tokenize is not None:
            find_beginnings(engine_client.renderer, tokenize)
        metrics = AdaptiveMetrics(served_names[0], metadata)
        parallel = config.parallel_config
        admin_key = read_admin_key(
            settings.heads_dir, parallel._api_process_count, parallel.enable_elastic_ep
        )
        replace_stock_check(state.application)
        await check_grammars_in_threads(engine_client, settings.limits)
        watch_engine(engine_client)
        forget_unsent(engine_client)
        state.queue.watch(engine_client)
        control = None
        if admin_key is not None and settings.heads_dir is not None:
            control = HeadControl(
                engine_client,
                heads,
                metrics,
                settings.heads_dir,
                admin_key,
                settings.adaptive_max,
            )
            await control.restore()
        state.adaptive = AdaptiveState(
            heads=heads,
            adaptive_by_default=settings.adaptive_by_default,
            served_names=served_names,
            tokenize_marker=tokenize,
            metrics=metrics,
            control=control,
            policy=policy,
            max_temperature=settings.adaptive_max,
        )
        for name, handler_class in HANDLERS.items():
            extend_handler(getattr(state, name), handler_class, EngineProxy(engine_client))
        serve_adaptive_names(state.openai_serving_models, state.adaptive)
        # Last, and seen by vLLM's launcher and probes only: what stops the server.
        state.engine_client = DrainingClient(engine_client, DRAIN)


def extend_handler(handler: Any, handler_class: type[Any], proxy: EngineProxy) -> None:
    """Let one of vLLM's handlers read temperatures and report them.

    Raises:
        UnsupportedError: it is not of the class that ours extends.
    """
    # The first base is the class that vLLM has.
    wanted, found = handler_class.__bases__[0], handler.__class__
    if found is not wanted:
        raise UnsupportedError(
            f"adaptive temperatures need vLLM's {wanted.__name__}, found {found.__name__}"
        )
    handler.engine_client = proxy
    handler.__class__ = handler_class


def require_engine_side(worker_cls: object, scheduler_cls: object) -> None:
    """Refuse to answer for an engine that would ignore adaptive options.

    Raises:
        UnsupportedError: names the missing option.
    """
    for option, found, wanted in (
        ("--worker-cls", worker_cls, WORKER_CLS),
        ("--scheduler-cls", scheduler_cls, SCHEDULER_CLS),
    ):
        if found != wanted:
            raise UnsupportedError(
                f"the adaptive plugin needs {option} {wanted}, found {found}; "
                "start with adaptive-serve, or add the option"
            )


def make_observers(args: Namespace, settings: AdaptiveSettings) -> list[Observer]:
    """The request log and the tracer, where the command line asks for them.

    Raises:
        OSError: the log cannot be opened.
    """
    observers: list[Observer] = []
    # The tracer first: the log writes its trace's number.
    if args.otlp_traces_endpoint is not None:
        from server.tracing import Tracer

        observers.append(Tracer())
    if settings.request_log is not None:
        observers.append(RequestLog(settings.request_log))
    return observers


def extend_lifespan(
    lifespan: Lifespan, observers: Sequence[Observer], settings: AdaptiveSettings
) -> Lifespan:
    """The application's lifespan: announced at its start, which is the last that a start-up
    prints, and closing the observers at its end."""

    @asynccontextmanager
    async def extended(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            announce(app.state.adaptive, app.state.args)
            bound_closing(app.state)
            async with bounded_connections(app.state.server, settings.limits):
                yield state
            note_end(app.state, DRAIN)
        for observer in observers:
            observer.close()

    return extended


def describe_evidence(metadata: HeadMetadata) -> str:
    """Whether a head is trained, and what the gate said of it, in a few words."""
    if not metadata.trained:
        return "UNTRAINED: near-uniform, shows the path only"
    return f"trained, gate: {metadata.gate or 'not run'}"


def is_local(host: str | None) -> bool:
    """Whether only this machine's own programs reach a server that listens there."""
    try:
        return host == "localhost" or ip_address(host or ALL_ADDRESSES).is_loopback
    except ValueError:
        return False


def announce(state: AdaptiveState, args: Namespace) -> None:
    """Say in a few lines what is served, where, with which heads."""
    name = state.served_names[0]
    scheme = "https" if args.ssl_certfile else "http"
    url = args.uds or f"{scheme}://{args.host or ALL_ADDRESSES}:{args.port}/v1"
    default = "adaptive" if state.adaptive_by_default else "the model's default"
    lines = [
        f"adaptive temperatures for {name}",
        f'  at      {url} (temperature: "adaptive", or model "{state.adaptive_name(name)}")',
        f"  default {default}, where a request names no temperature",
        f"  API key {'needed' if read_api_keys(args) else 'none: whoever reaches it may use it'}",
    ]
    for head in state.heads:
        is_default = ", default" if head.name == state.heads.default else ""
        temperatures = " ".join(f"{value:g}" for value in head.metadata.temperatures)
        notes = describe_evidence(head.metadata)
        lines.append(f"  head    {head.name} ({head.level}{is_default}) [{temperatures}] {notes}")
    if not state.heads:
        lines.append("  heads   none; the learning-free policies work without")
    if state.policy != AdaptiveRequest():
        policy = state.policy.model_dump_json(exclude_none=True)
        lines.append(f"  policy  {policy}, where a request chooses neither policy nor head")
    if state.max_temperature is not None:
        lines.append(f"  max     {state.max_temperature:g}: no adaptive temperature is above it")
    if read_settings(args.additional_config).playground and not args.uds:
        lines.append(f"  page    {url.removesuffix('/v1')}{PLAYGROUND_PATH}")
    if state.control is not None:
        lines.append("  control on: heads can be loaded, replaced and removed with the admin key")
    if (temperature := state.heads.override_temperature) is not None:
        lines.append(f"  OVERRIDE: every adaptive request gets {temperature:g}")
    for line in lines:
        logger.info("%s", line)
    if not (read_api_keys(args) or args.uds or is_local(args.host)):
        logger.warning(
            "The server has no API key and listens beyond this machine: set VLLM_API_KEY, or see "
            "to it that only those reach it who may use it"
        )
    default_head = state.heads.by_name.get(state.heads.default or "")
    if default_head is not None and default_head.metadata.gate == "failed":
        logger.warning(
            "The default head %s has failed the gate: name another one with --default-head",
            default_head.name,
        )
