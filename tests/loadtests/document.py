"""The commands of docs/load-testing.md, in their order."""

import re
from pathlib import Path

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "load-testing.md").read_text()
SMOKE, ADJUSTED, WEB, LOCUST, COMPARE, MOCK, FRONTEND, BENCH = re.findall(
    r"^```bash\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL
)
