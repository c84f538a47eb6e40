"""Loads exported folders where nothing of this package, accelerate, peft or datasets can be imported; prints facts.

    python -I fresh_process.py FOLDER CANARY_FOLDER RESAVED_FOLDER CANARY_FILE

The facts are one line of JSON, the last of stdout.
"""

import json
import os
import sys
from pathlib import Path


ABSENT = ("d3llm_hf", "trainers", "accelerate", "peft", "datasets")


class Without:
    """A finder that does not find the packages of `ABSENT`."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in ABSENT else self.finder.find_spec(fullname, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def refusal(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:  # whatever is raised is the fact that is asked for
        return type(error).__name__
    return "nothing"


def main(folder: str, canary: str, resaved: str, ran: str) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
        pipeline,
    )

    facts: dict = {"without the flag": {}}
    for name, call in {
        "AutoConfig": AutoConfig.from_pretrained,
        "AutoModel": AutoModel.from_pretrained,
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
        "AutoModelForMaskedLM": AutoModelForMaskedLM.from_pretrained,
        "pipeline": lambda path: pipeline("text-generation", model=path),
    }.items():
        facts["without the flag"][name] = refusal(call, canary)
    facts["canary lives"] = not Path(ran).exists()

    trusted = {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one two"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    facts["config"] = type(AutoConfig.from_pretrained(folder, **trusted)).__name__
    answers = {}
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        model = auto.from_pretrained(folder, **trusted)
        output = model.generate(**inputs, max_new_tokens=12, return_dict_in_generate=True)
        answers[auto.__name__] = output.sequences.tolist()
        facts[auto.__name__] = f"{type(model).__module__.split('.')[0]}:{type(model).__name__}"
    facts["answers agree"] = len({str(answer) for answer in answers.values()}) == 1
    facts["output"] = [
        type(output).__name__,
        list(output.sequences.shape),
        output.tokens_per_forward.dtype.is_floating_point,
    ]
    facts["prompt kept"] = torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])

    generator = pipeline("text-generation", model=folder, **trusted)
    said = [generator("one two", max_new_tokens=8, return_full_text=False)[0]["generated_text"] for _ in range(2)]
    facts["pipeline"] = [type(said[0]).__name__, said[0] == said[1]]

    model.save_pretrained(resaved)
    again = AutoModel.from_pretrained(resaved, **trusted).generate(**inputs, max_new_tokens=12)
    facts["resaved answers agree"] = again.tolist() == answers["AutoModel"]
    facts["imported"] = sorted(name for name in ABSENT if name in sys.modules)
    return facts


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    sys.stdout.write("\n" + json.dumps(result) + "\n")
