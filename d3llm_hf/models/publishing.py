"""Pushing a model to the Hub with its code and with a card that says what it is and how to run it."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any


_CARD = """# {name}

A masked diffusion language model ({architecture}): it decides several positions of a canvas of mask tokens in each
forward. This repository carries its own code, so that plain transformers (5.16 or later) runs it:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("tokens per forward:", output.tokens_per_forward.tolist())
```

`trust_remote_code=True` runs the Python files of this repository: pin a `revision` that you have read. With
`pip install d3llm-hf` and `import d3llm_hf` the flag is not needed.

Generated text can be wrong, biased or harmful, as with the model that this one was made from; its card applies.
"""


if TYPE_CHECKING:  # what it is mixed into
    from transformers.modeling_utils import PreTrainedModel
else:
    PreTrainedModel = object


class PublishingMixin(PreTrainedModel):
    """`push_to_hub` for a model that carries code; its `save_pretrained` writes code and generation config."""

    def push_to_hub(  # type: ignore[override]  # what follows is passed by name
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        """As transformers', in one commit that also removes weights which these replace, and with a card.

        A card that the repository has is kept, and its metadata completed. The tokenizer is pushed by itself.

        Args:
            repo_id (`str`): `"owner/name"`, or a name in your own namespace; made if need be.
            commit_message, commit_description (`str`, *optional*): of the commit.
            private (`bool`, *optional*): whether a repository that is made now is private.
            token (`bool` or `str`, *optional*): of the Hub; the stored one when unset.
            revision (`str`, *optional*): branch to commit to, made if need be.
            create_pr (`bool`): open a pull request instead of committing.
            max_shard_size (`int` or `str`): of a file of weights.
            tags (`list[str]`, *optional*): for the Hub, besides the model's own.
            metadata (`dict`, *optional*): arguments of `huggingface_hub.ModelCardData`, such as `license`, `datasets`,
                `base_model` (the Hub id that the model was loaded from when unset) or `eval_results`.

        Returns:
            `huggingface_hub.CommitInfo`: a string with the address, and `commit_url`, `pr_url`, `oid`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="transformers")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            self._hub_card(repo_id, token, tags or [], metadata or {}).save(Path(folder) / "README.md")
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )

    def _hub_card(self, repo_id: str, token: bool | str | None, tags: list[str], metadata: dict[str, Any]):
        """The repository's card with its metadata completed, or a new one."""
        from huggingface_hub import ModelCard, ModelCardData
        from huggingface_hub.errors import EntryNotFoundError

        name = repo_id.split("/")[-1]
        try:
            card = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]  # `hf_hub_download` takes a bool
        except EntryNotFoundError:
            text = _CARD.format(name=name, repo_id=repo_id, architecture=type(self).__name__)
            card = ModelCard(f"---\n{{}}\n---\n\n{text}")
        own = ["diffusion-language-model", "masked-diffusion", "d3llm", self.config.model_type.lower()]
        defaults: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        origin = self.config._name_or_path or ""
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", origin) and origin != repo_id and not Path(origin).exists():
            defaults["base_model"] = origin
        if "eval_results" in metadata:
            defaults["model_name"] = name
        found = card.data.to_dict()
        known = [*(found.pop("tags", None) or []), *own, *(self.model_tags or []), *tags]
        card.data = ModelCardData(**(defaults | found | metadata), tags=list(dict.fromkeys(known)))
        return card
