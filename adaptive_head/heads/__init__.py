"""The heads that ship, for the embedded model; the first is the default."""

from pathlib import Path

SHIPPED_HEADS = {name: Path(__file__).parent / name for name in ("sequence", "token")}
