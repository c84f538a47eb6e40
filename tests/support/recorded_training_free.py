"""The recorded runs of training-free methods: one row each, greedy, decided to the end (`tests/golden/README.md`)."""

import json
from dataclasses import dataclass

import torch
from places import GOLDEN
from recorded import checkpoint


@dataclass(frozen=True)
class Run:
    """One run, with the arguments of the code that was recorded."""

    id: str
    model: str
    prompt: tuple[int, ...]
    args: dict
    sequence: list[int]
    commit_step: list[int]  # of the new tokens
    forwards: int
    revoked: int  # how often a decided position was masked again
    canvas_lengths: list[int]  # of the answer's canvas in each forward and at the end, where that changes

    @property
    def length(self) -> int:
        """New tokens."""
        return self.args.get("gen_length", self.args.get("max_new_tokens"))

    def generate(self, **chosen):
        """What the library makes of the prompt, decided to the end."""
        whole = {"early_stop": False, "eos_token_id": [], "pad_token_id": 510, "max_new_tokens": self.length}
        ids = torch.tensor([self.prompt])
        chosen = whole | {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True} | chosen
        return checkpoint(self.model).generate(ids, **chosen)

    def assert_matches(self, output) -> None:
        assert output.sequences[0].tolist() == self.sequence
        assert output.step_map[0].tolist() == self.commit_step
        assert int(output.num_forwards) == int(output.num_forwards_reference) == self.forwards


def recorded_runs(suite: str, without: tuple[str, ...] = ()) -> list[Run]:
    """The runs of a folder of `tests/golden`, but those with the ids `without`."""
    cases = json.loads((GOLDEN / suite / "cases.json").read_text())["cases"]
    return [
        Run(
            id=case["id"],
            model=case["model"],
            prompt=tuple(case["prompt"]),
            args=case["args"],
            sequence=case["expected"]["sequence"],
            commit_step=case["expected"]["commit_step"],
            forwards=case["expected"]["n_forwards"],
            revoked=len(case["expected"].get("revoked", [])),
            canvas_lengths=case["expected"].get("canvas_lengths", []),
        )
        for case in cases
        if case["robust"] and case["id"] not in without
    ]
