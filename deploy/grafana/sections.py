"""The rows of the dashboard, the most urgent first."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.timeseries import Panel as Lines
from grafana_foundation_sdk.models.common import LineInterpolation

from deploy.grafana.panels import (
    RUNBOOKS_URL,
    draw_heatmap,
    draw_lines,
    draw_number,
    link_cells,
    list_series,
    stack,
)

MODEL = 'model=~"$model"'
HEAD = f'{MODEL}, head=~"$head"'
VLLM_MODEL = 'model_name=~"$model"'
VLLM = f'job="adaptive", {VLLM_MODEL}'
# What Grafana puts in: a range in which every curve has points enough for a rate.
RATE = "[$__rate_interval]"


def add_now(dashboard: Dashboard) -> None:
    tokens = f"sum(rate(vllm:generation_tokens_total{{{VLLM}}}{RATE}))"
    adaptive = f"sum(rate(adaptive_temperature_count{{{MODEL}}}{RATE}))"
    active = 'ALERTS{alertname=~"Adaptive.+"}'
    info = "model, head, level, select, trained, temperatures, base_model"
    columns = {label: label.replace("_", " ") for label in info.split(", ")}
    alerts = list_series(
        "Alerts",
        "Firing and pending. An alert's name leads to the run-books.",
        active,
        {"alertname": "alert", "alertstate": "state"}
        | {label: label for label in ("severity", "model", "model_name", "head", "instance")},
        "none",
        width=10,
    )
    dashboard.with_row(Row("Now"))
    for panel in (
        draw_number(
            "Servers up",
            "Servers that answer Prometheus.",
            'sum(up{job="adaptive"})',
            alert="AdaptiveServerDown",
            good_from=1,
        ),
        draw_number(
            "Alerts firing",
            "The table below names them.",
            'count(ALERTS{alertname=~"Adaptive.+", alertstate="firing"}) or vector(0)',
            bad_from=1,
        ),
        draw_number(
            "Errors",
            "5xx of 2xx and 5xx in five minutes, of the worst server.",
            "max(instance:http_errors:ratio5m)",
            unit="percentunit",
            alert="AdaptiveErrorRatioHigh",
        ),
        draw_number(
            "First token, p95",
            "Over ten minutes, of the slowest model.",
            f"max(model:time_to_first_token_seconds:p95_10m{{{VLLM_MODEL}}})",
            unit="s",
            alert="AdaptiveFirstTokenSlow",
        ),
        draw_number(
            "Waiting",
            "Requests in the longest queue.",
            f"max(sum by (instance) (vllm:num_requests_waiting{{{VLLM}}}))",
            alert="AdaptiveQueueLong",
        ),
        draw_number(
            "KV cache",
            "How full the fullest is.",
            f"max(vllm:kv_cache_usage_perc{{{VLLM}}})",
            unit="percentunit",
            alert="AdaptiveKvCacheFull",
        ),
        draw_number("Tokens", "Generated a second, adaptive or not.", tokens, unit="tokens/s"),
        draw_number(
            "Adaptive",
            "Share of the generated tokens whose temperature was chosen.",
            f"({adaptive} or vector(0)) / ({tokens} > 0)",
            unit="percentunit",
        ),
        link_cells(alerts, "alert", "Run-books", RUNBOOKS_URL),
        list_series(
            "Heads",
            "The loaded heads, and how many servers have each.",
            f"count by ({info}) (adaptive_head_info{{{HEAD}}})",
            columns | {"Value": "servers"},
            "none",
            width=14,
            alerts=["AdaptiveHeadMissing", "AdaptiveHeadsDisagree", "AdaptiveNoHead"],
        ),
    ):
        dashboard.with_panel(panel)


def add_temperatures(dashboard: Dashboard) -> None:
    tokens = f"sum by (le) (rate(adaptive_temperature_bucket{{{HEAD}}}{RATE}))"
    answers = f"sum by (le) (rate(adaptive_request_temperature_bucket{{{HEAD}}}{RATE}))"
    abstained = f"sum by (head) (rate(adaptive_abstained_tokens_total{{{HEAD}}}{RATE}))"
    total = f"(sum by (head) (rate(adaptive_temperature_count{{{HEAD}}}{RATE})) > 0)"
    dashboard.with_row(Row("Temperatures"))
    for panel in (
        draw_heatmap(
            "$head: tokens",
            "Tokens generated at each temperature.",
            tokens,
            alerts=["AdaptiveTemperatureCollapsed"],
        ),
        draw_lines(
            "$head: answers",
            "Quantiles of the answers' mean temperatures, interpolated between those of the heads.",
            *list_quantiles((0.1, 0.5, 0.9), answers),
            unit="none",
            width=24,
        ),
    ):
        dashboard.with_panel(panel.repeat("head").repeat_direction("h").max_per_row(4))
    for panel in (
        draw_lines(
            "Share at 0",
            "Greedy choices among those of the last ten minutes.",
            (f"head:adaptive_greedy_share:ratio10m{{{HEAD}}}", "{{head}}"),
            unit="percentunit",
            maximum=1,
            alerts=["AdaptiveGreedyShareHigh"],
            width=6,
        ),
        draw_lines(
            "Share at the highest temperature",
            "Choices of the head's own highest temperature, or of nearly that where it selects the "
            "mean, among those of the last ten minutes.",
            (f"head:adaptive_top_share:ratio10m{{{HEAD}}}", "{{head}}"),
            unit="percentunit",
            maximum=1,
            alerts=["AdaptiveTopShareHigh"],
            width=6,
        ),
        draw_lines(
            "Drift from training",
            "Kolmogorov–Smirnov distance between the last hour's choices and those in training; "
            "only of heads that came with shares of training.",
            (f"head:adaptive_drift:ks1h{{{HEAD}}}", "{{head}}"),
            unit="none",
            maximum=1,
            alerts=["AdaptiveDrift"],
            width=6,
        ),
        draw_lines(
            "Share of fallbacks",
            "Tokens that got the fallback of a head that was too unsure to choose, among all of "
            "its tokens; only of heads that may abstain.",
            (f"{abstained} / {total}", "{{head}}"),
            unit="percentunit",
            maximum=1,
            width=6,
        ),
    ):
        dashboard.with_panel(panel)


def add_traffic(dashboard: Dashboard) -> None:
    ended = f"sum by (finished_reason) (rate(vllm:request_success_total{{{VLLM}}}{RATE}))"
    by_status = f'sum by (status) (rate(http_requests_total{{job="adaptive"}}{RATE}))'
    dashboard.with_row(Row("Traffic"))
    for panel in (
        split_fixed(
            "Tokens", "adaptive_temperature_count", "vllm:generation_tokens_total", "tokens/s"
        ),
        split_fixed(
            "Answers",
            "adaptive_request_temperature_count",
            "vllm:request_success_total",
            "answers/s",
        ),
        draw_lines(
            "Responses",
            "Over HTTP, of all models. 5xx are the server's errors, 4xx the client's.",
            (by_status, "{{status}}"),
            unit="requests/s",
            alerts=["AdaptiveErrorRatioHigh"],
            threshold=False,
        ),
        draw_lines(
            "Answers by end",
            "abort: the client went away. error: the engine failed.",
            (f"{ended} > 0", "{{finished_reason}}"),
            unit="answers/s",
        ),
    ):
        dashboard.with_panel(panel)


def split_fixed(title: str, adaptive: str, total: str, unit: str) -> Lines:
    """What heads and policies made, and the rest."""
    ours = f"sum(rate({adaptive}{{{MODEL}}}{RATE}))"
    rest = f"sum(rate({total}{{{VLLM}}}{RATE})) - ({ours} or vector(0))"
    return stack(
        draw_lines(
            title,
            "By the head or policy that chose; fixed: at a temperature from the request.",
            (f"sum by (head) (rate({adaptive}{{{HEAD}}}{RATE}))", "{{head}}"),
            (f"clamp_min({rest}, 0)", "fixed"),
            unit=unit,
        )
    )


def add_canaries(dashboard: Dashboard) -> None:
    pairs = f"max by (model, head, canary) (adaptive_canary_share{{{MODEL}}})"
    canaries = f'label_replace({pairs}, "head", "$1", "canary", "(.+)")'
    total, count = (
        f"sum by (model, head) (rate(adaptive_temperature_{part}{RATE}))"
        for part in ("sum", "count")
    )
    requests = f"sum by (model, head) (rate(adaptive_requests_total{RATE}))"
    dashboard.with_row(Row("Canaries"))
    for title, description, values, unit in (
        ("Temperature of head and canary", "Means over tokens.", f"{total} / {count}", "none"),
        ("Requests of head and canary", "What each of the two answers.", requests, "requests/s"),
    ):
        dashboard.with_panel(
            draw_lines(
                title,
                description,
                (f"{values} and on (model, head) {pairs}", "{{head}}"),
                (f"{values} and on (model, head) {canaries}", "{{head}} (canary)"),
                unit=unit,
                width=8,
            )
            .height(5)
            .no_value("no canary")
        )
    dashboard.with_panel(
        list_series(
            "Canaries",
            "The share of a head's requests that its canary is to answer.",
            pairs,
            {"model": "model", "head": "head", "canary": "canary", "Value": "share"},
            "no canary",
            width=8,
            unit="percentunit",
        )
    )


def add_latency(dashboard: Dashboard) -> None:
    dashboard.with_row(Row("Latency and capacity"))
    for title, metric, alerts in (
        ("Time to first token", "time_to_first_token_seconds", ["AdaptiveFirstTokenSlow"]),
        ("Time between tokens", "inter_token_latency_seconds", []),
        ("Time of a request", "e2e_request_latency_seconds", []),
    ):
        buckets = f"sum by (le) (rate(vllm:{metric}_bucket{{{VLLM}}}{RATE}))"
        quantiles = list_quantiles((0.5, 0.95, 0.99), buckets)
        dashboard.with_panel(
            draw_lines(title, "Of all servers together.", *quantiles, unit="s", alerts=alerts)
        )
    for panel in (
        draw_lines(
            "Running and waiting",
            "Requests in the batch and in the queue.",
            (f"sum by (instance) (vllm:num_requests_running{{{VLLM}}})", "{{instance}} running"),
            (f"sum by (instance) (vllm:num_requests_waiting{{{VLLM}}})", "{{instance}} waiting"),
            alerts=["AdaptiveQueueLong", "AdaptiveEngineStuck"],
        ),
        draw_lines(
            "KV cache",
            "How full it is.",
            (f"max by (instance) (vllm:kv_cache_usage_perc{{{VLLM}}})", "{{instance}}"),
            unit="percentunit",
            maximum=1,
            alerts=["AdaptiveKvCacheFull"],
        ),
        draw_lines(
            "Preemptions",
            "Requests put back because the cache was full, to be computed again.",
            (
                f"sum by (instance) (rate(vllm:num_preemptions_total{{{VLLM}}}{RATE}))",
                "{{instance}}",
            ),
            unit="requests/s",
        ),
        draw_lines(
            "Throughput",
            "Tokens of all servers together.",
            (f"sum(rate(vllm:prompt_tokens_total{{{VLLM}}}{RATE}))", "prompts"),
            (f"sum(rate(vllm:generation_tokens_total{{{VLLM}}}{RATE}))", "answers"),
            unit="tokens/s",
        ),
        draw_lines(
            "Servers and engines",
            "1 or 0. An engine that sleeps answers nothing until it is woken.",
            ('up{job="adaptive"}', "{{instance}} up"),
            (f'vllm:engine_sleep_state{{{VLLM}, sleep_state="awake"}}', "{{instance}} awake"),
            maximum=1,
            alerts=["AdaptiveServerDown"],
        ).line_interpolation(LineInterpolation.STEP_AFTER),
    ):
        dashboard.with_panel(panel)


def list_quantiles(quantiles: tuple[float, ...], buckets: str) -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({quantile}, {buckets})", f"p{100 * quantile:.0f}")
        for quantile in quantiles
    ]
