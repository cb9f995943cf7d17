"""What runs inside vLLM's worker and scheduler processes, and nowhere else.

`--worker-cls` and `--scheduler-cls` name `WORKER_CLS` and `SCHEDULER_CLS`; the heads travel in
`--additional-config` (see `adaptive_head.vllm.settings`).
"""

WORKER_CLS = "adaptive_head.vllm.worker.AdaptiveWorker"
SCHEDULER_CLS = "adaptive_head.vllm.scheduler.make_scheduler"

# What `AdaptiveWorker.add_head` returns while it reads a head's files.
LOADING = "loading"
