"""A folder of heads that a running server may load from, and what it remembers there."""

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptive_head.files import read_bounded, replace_file
from adaptive_head.metadata import HeadError
from adaptive_head.parameters import Temperature

LOADED_FILE = "loaded-heads.json"
_MAX_LOADED_BYTES: Final = 1 << 20

Percent = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]


class LoadedHeads(BaseModel):
    """What was changed while a server ran, and is to be so again after a restart.

    Attributes:
        heads: folders below the library, by the names under which their heads serve.
        default: the head of requests that name none; None where it was not changed.
        canaries: by head, the other one that answers a share of its requests, and that share.
        override: the temperature of every adaptive request; None where that is off.
    """

    model_config = ConfigDict(extra="forbid")

    heads: dict[str, str] = {}
    default: str | None = None
    canaries: dict[str, tuple[str, Percent]] = {}
    override: Temperature | None = None


class HeadLibrary:
    """A folder with heads in folders below it.

    Attributes:
        roots: folders of which one must hold a head's files. A snapshot in the Hugging Face hub's
            cache is made of links to the blobs of its repository, which lie outside of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        places = self._folder, *self._folder.parents
        repositories = [place for place in places if place.name.startswith("models--")]
        self.roots = self._folder, *(place / "blobs" for place in repositories)

    def find(self, folder: str) -> Path:
        """The folder of a head, without links in its path.

        Raises:
            HeadError: it is not below this one.
        """
        try:
            path = (self._folder / folder).resolve()
        except (OSError, ValueError, RuntimeError):
            # Too long a name, a NUL in it, a loop of links.
            path = self._folder
        if path == self._folder or not path.is_relative_to(self._folder):
            raise HeadError(f"folder must be one below the folder of heads, got {folder!r:.80}")
        return path

    def read_loaded(self) -> LoadedHeads:
        """What was written last; nothing where that was never.

        Raises:
            HeadError: it cannot be read.
        """
        path = self._folder / LOADED_FILE
        try:
            return LoadedHeads.model_validate_json(
                read_bounded(path, _MAX_LOADED_BYTES, self.roots)
            )
        except FileNotFoundError:
            return LoadedHeads()
        except ValidationError as error:
            raise HeadError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
        except OSError as error:
            raise HeadError(f"{path} cannot be read: {error}") from None

    def write_loaded(self, loaded: LoadedHeads) -> None:
        """Remember what is loaded.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(self._folder / LOADED_FILE, loaded.model_dump_json(indent=2) + "\n")
