"""An export pushed to the Hugging Face hub. The token is huggingface_hub's own: from its login or HF_TOKEN, never an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from sft_dist.errors import ConfigError, DataError

_Result = TypeVar("_Result")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # what a push replaces: shards of an earlier one must not stay


@dataclass(frozen=True, slots=True)
class Hub:
    """The repository ORG/NAME on the hub.

    >>> Hub("my-org/my-model").repo
    'my-org/my-model'
    """

    repo: str
    is_private: bool = False
    api: Any = field(default_factory=HfApi, repr=False)

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1 or not all(self.repo.split("/")):
            raise ConfigError(f"--push-to {self.repo}: not of the form ORG/NAME; write for example my-org/my-model")

    def require_access(self) -> None:
        """Find, or make, the repository that can be written to, before anything is exported.

        Raises ConfigError without a login or the rights, and where a public one is there and a private one was asked for;
        DataError where the hub is out of reach.
        """
        namespace = self.repo.split("/")[0]
        who = self._asked(self.api.whoami)
        names = [who["name"], *(org["name"] for org in who.get("orgs", []))]
        if namespace not in names:
            raise ConfigError(
                f"--push-to {self.repo}: {who['name']} is not in {namespace}; push to one of {', '.join(names)}"
            )
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConfigError(
                f"--push-to {self.repo}: the token of {who['name']} may only read; log in with one that may write, by `hf auth login`"
            )
        self._asked(self.api.create_repo, self.repo, private=self.is_private or None, exist_ok=True)
        if self.is_private and not self._asked(self.api.repo_info, self.repo).private:
            raise ConfigError(
                f"--push-to {self.repo}: is there already, and public; make it private on the hub first, or leave --private out"
            )

    def push(self, folder: Path, step: int) -> str:
        """Upload a folder as one commit; weights of an earlier one go. Returns its address. Raises as `require_access`."""
        try:
            done = self._asked(
                self.api.upload_folder,
                repo_id=self.repo,
                folder_path=folder,
                commit_message=f"step {step}, exported by sft-dist",
                delete_patterns=_WEIGHTS,
            )
        except (ConfigError, DataError) as error:
            raise type(error)(
                f"{error}. The export is whole in {folder}: `hf upload {self.repo} {folder}` pushes it"
            ) from None
        return str(done.commit_url)

    def _asked(self, call: Callable[..., _Result], *arguments: Any, **more: Any) -> _Result:
        try:
            return call(*arguments, **more)
        except (LocalTokenNotFoundError, HFValidationError) as error:
            remedy = (
                "log in with `hf auth login`, or set HF_TOKEN"
                if isinstance(error, LocalTokenNotFoundError)
                else "mend the name"
            )
            raise ConfigError(f"--push-to {self.repo}: {_first_line(error)}; {remedy}") from None
        except OfflineModeIsEnabled:
            raise ConfigError(
                f"--push-to {self.repo}: HF_HUB_OFFLINE is set; unset it, or export without --push-to"
            ) from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                raise ConfigError(
                    f"--push-to {self.repo}: the hub says {status} ({_first_line(error)}); log in with a token that may write there, "
                    "by `hf auth login` or HF_TOKEN"
                ) from None
            raise DataError(
                f"--push-to {self.repo}: the hub says {status} ({_first_line(error)}); try again later"
            ) from None
        except (HTTPError, OSError) as error:
            raise DataError(
                f"--push-to {self.repo}: the hub is out of reach ({_first_line(error)}); try again with a network, or export without --push-to"
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
