"""`tests.engine.scenario` on a Ray cluster of this machine, with two pretended GPUs."""

import json
import sys
from pathlib import Path

import ray
from ray_on_cpu import pretend_devices

from tests.engine.scenario import run

if __name__ == "__main__":
    scenarios = json.load(sys.stdin)
    hook = {"worker_process_setup_hook": "ray_on_cpu.pretend_devices"}
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, runtime_env=hook)
    pretend_devices()
    Path(sys.argv[1]).write_text(json.dumps(run(scenarios)))
