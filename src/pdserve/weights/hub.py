"""Models of the Hugging Face hub, by their id, through its own library.

The library keeps them in its own cache (``HF_HOME``), which other programs share. A connection that
drops is made anew and goes on where it stopped; files that are there are not fetched again. The
model's config is fetched first, so that a model that cannot be served costs no gigabytes. Without a
network, what the cache has is served.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pdserve.core.errors import ModelError, PullError
from pdserve.weights.config import ModelConfig
from pdserve.weights.progress import Report, progress_bar
from pdserve.weights.tensor_files import INDEX_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONFIG = "config.json"
_SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX_NAME,
)
_NAME = r"\w[\w.-]*"
_HUB_ID = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})(?:/(?P<file>[\w./+-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)


def is_hub_id(model: str) -> bool:
    """Whether it reads as OWNER/NAME or OWNER/NAME/FILE.gguf, either perhaps with @REVISION."""
    return _HUB_ID.fullmatch(model) is not None


def fetch_from_hub(
    model: str,
    *,
    progress: bool | None = None,
    endpoint: str | None = None,
    hub_cache: Path | str | None = None,
) -> Path:
    """The folder of a model on the hub, or the GGUF file that ``model`` names.

    ``endpoint`` and ``hub_cache`` None: as the hub's library is configured. Raises `ModelError` for
    a model that cannot be served, `PullError` if it cannot be fetched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
    )

    match = _HUB_ID.fullmatch(model)
    assert match is not None, "the caller has asked is_hub_id"
    repository, file, revision = match.group("repository", "file", "revision")
    api = HfApi(endpoint=endpoint)
    cache = None if hub_cache is None else str(hub_cache)
    http_error = cast(
        type[Exception], HfHubHTTPError.__mro__[1]
    )  # of whichever HTTP library it uses
    try:
        with progress_bar(progress) as report:
            hub = _Repository(api, repository, revision, cache, report)
            return hub.file(file) if file else hub.folder()
    except (OSError, http_error, HFValidationError) as error:
        refused = isinstance(error, HfHubHTTPError)  # the hub has answered
        kept = None if refused else _kept(api, repository, revision, cache, file)
        if kept is not None:
            return kept
        raise PullError(
            f"no file or folder here is called {model}, and it cannot be fetched from the Hugging "
            f"Face hub: {_first_line(error)}. If it is a path, check that; if it is on the hub, "
            "check the name and the network (HF_ENDPOINT names a mirror, HF_TOKEN opens what is "
            f"gated), or fetch it elsewhere with `hf download {repository} --local-dir FOLDER` and "
            "give that folder"
        ) from error


class _Repository:
    """One revision of one repository."""

    def __init__(
        self, api: HfApi, repository: str, revision: str | None, cache: str | None, report: Report
    ) -> None:
        report(f"asking for {repository}", 0, 0)
        info = api.model_info(repository, revision=revision, timeout=10)
        self._api, self._repository, self._cache = api, repository, cache
        self._revision = revision or "main"  # the cache remembers what it stands for
        self._names = [entry.rfilename for entry in info.siblings or ()]
        self._report = report

    def file(self, name: str) -> Path:
        """One file, fetched as far as it is missing."""
        if name not in self._names:
            there = [other for other in self._names if other.endswith(".gguf")]
            raise ModelError(
                f"{self._repository} has no {name}" + (f", but {', '.join(there)}" if there else "")
            )
        return Path(
            self._api.hf_hub_download(
                self._repository,
                name,
                revision=self._revision,
                cache_dir=self._cache,
                tqdm_class=_bar_class(self._report, name),
            )
        )

    def folder(self) -> Path:
        """All that a model folder needs."""
        if CONFIG not in self._names:
            files = [name for name in self._names if name.endswith(".gguf")]
            hint = f"; name one of its GGUF files: {', '.join(files)}" if files else ""
            raise ModelError(
                f"{self._repository} has no {CONFIG}: it is no model in Hugging Face layout{hint}"
            )
        folder = self.file(CONFIG).parent
        self._revision = folder.name  # the commit: all files are of the same
        for name in self._names:
            if name in _SMALL_FILES[1:]:
                self.file(name)
        ModelConfig.from_folder(folder)
        for name in self._weights(folder):
            self.file(name)
        return folder

    def _weights(self, folder: Path) -> list[str]:
        index = folder / INDEX_NAME
        if index.exists():
            weight_map: dict[str, Any] = json.loads(index.read_text()).get("weight_map", {})
            return sorted(set(map(str, weight_map.values())))
        found = sorted(name for name in self._names if re.fullmatch(r"[^/]+\.safetensors", name))
        if not found:
            raise ModelError(
                f"{self._repository} has no *.safetensors files; use a model that has, or convert "
                "it with transformers' save_pretrained"
            )
        return ["model.safetensors"] if "model.safetensors" in found else found


def _kept(
    api: HfApi, repository: str, revision: str | None, cache: str | None, file: str | None
) -> Path | None:
    """What the hub's cache has of a model; None if nothing."""
    try:
        kept = api.hf_hub_download(
            repository, file or CONFIG, revision=revision, cache_dir=cache, local_files_only=True
        )
    except OSError:
        return None
    return Path(kept) if file else Path(kept).parent


def _bar_class(report: Report, name: str) -> Any:
    """A bar for the library to move, which only reports."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})
            self._done_bytes = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self._done_bytes += int(n or 0)
            report(f"downloading {name}", self._done_bytes, int(self.total or 0))

    return Bar


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
