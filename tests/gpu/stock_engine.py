"""Answers the fixed batch of ordinary requests with stock vLLM, in a process of its own.

python -m tests.gpu.stock_engine MODEL DEVICE RESULT
"""

import json
import os
import sys
from pathlib import Path

from tests.gpu.engine import Engine, Material
from tests.gpu.engine_checks import answer_twice

if __name__ == "__main__":
    model, device, result = sys.argv[1:]
    engine = Engine(Material(Path(model), {}), device, is_stock=True)
    Path(result).write_text(json.dumps(answer_twice(engine, device)))
    sys.stdout.flush()
    os._exit(0)
