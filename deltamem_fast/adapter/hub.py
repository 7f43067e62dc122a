"""push_to_hub: an adapter as a repository of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from ..arguments import check_type
from ..errors import ArgumentError, FileAccessError
from ..storage.files import write_text
from .card import adapter_card
from .files import export_adapter
from .fingerprints import hub_id
from .record import identity_of
from .wrappers import unwrap


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    format: str = "safetensors",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a δ-mem adapter",
    create_pr: bool = False,
) -> str:
    """Upload the adapter of a patched model, its configuration and a card; ``patch_model(model, repo_id)`` loads it.

    The repository is made if there is none. A card that is in it already stays.

    Args:
        repo_id: owner/name, or a name = the token's owner's.
        format: ``safetensors``, or ``released`` (what the released code reads).
        private: of a new repository; None = as the owner's settings say.
        token, revision, create_pr: as huggingface_hub has them.
        commit_message: the first line of the commit.

    Returns:
        The commit's URL.

    Raises:
        ValueError, TypeError: the model is not patched, an unknown format, or no repository's name.
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    check_type(repo_id, "repo_id", str, "a string, owner/name")
    base_model = hub_id(getattr(unwrap(model).config, "_name_or_path", None))
    config = identity_of(model).config
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        # Everything that can be wrong here is found before the hub is asked for anything.
        directory = export_adapter(model, Path(folder) / "adapter", format)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, "README.md", revision=revision):
                write_text(directory / "README.md", adapter_card(config, base_model, repo_id), private=False)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except HFValidationError as error:
            raise ArgumentError(f"repo_id: got {repo_id!r}, allowed owner/name: {error}") from error
        except Exception as error:  # of the hub, of the HTTP library that its version uses, of the system
            raise FileAccessError(f"repo_id: {repo_id}: the hub refuses, or cannot be reached: {error}") from error
    return str(commit.commit_url)
