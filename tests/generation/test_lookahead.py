"""Canvases of one more token run beside the decided one, and the surest stays (LoPA, arXiv:2512.16229)."""

import math
from dataclasses import dataclass
from dataclasses import field as entry
from itertools import pairwise
from random import Random

import pytest
import torch
from every_setting import METHODS, drawn_method
from oracle import Oracle, Rules
from oracle_choices import ranked
from oracle_network import Network
from problems import FAMILIES, STOPS, assert_equal, model_of
from thin import covering
from tiny import EOS, MASK, PAD, ScriptedModel, answer, changing_script, left_padded, tables, tiny_model, tiny_prompt

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.models.methods import LOOKAHEAD_IN_BLOCKS


WHOLE = {"early_stop": False, "seed": 0, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
COUNTS = ("step_map", "num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward")
NAMES = ("fast_dllm", "fast_dllm, factor", "dparallel", "dinfer, threshold", "local_leap", "entropy_bound")
WINDOWS = ("blocks", "slide", "slide_span")


# ---- the slow oracle: every canvas is a list, and each is forwarded by itself ---------------------------------------


@dataclass
class Canvas:
    tokens: list[int]
    committed: dict[int, int] = entry(default_factory=dict)


class LookaheadOracle(Oracle):
    """The oracle for methods that decide in one block or window, with `lookahead` canvases beside the decided one."""

    lookahead, floor = 1, 0.0

    def show(self, canvas: Canvas) -> None:
        """Goes on with a canvas."""
        self.canvas, self.committed = list(canvas.tokens), dict(canvas.committed)

    def candidates(self) -> list[int]:
        if self.rules.window == "blocks" and self.undecided():
            first = self.undecided()[0]
            self.current = next(block for block in self.blocks[1:] if block[0] <= first < block[1])
        return self.inside() if self.undecided() else []

    def sureness(self, looks) -> float:
        """Minus the mean entropy of what is undecided in the window, which in blocks is a span as long as a block."""
        positions = self.candidates()
        if self.rules.window == "blocks":
            positions = self.undecided(positions[0], min(positions[0] + self.rules.block_length, self.length))
        return -sum(looks[position].entropy for position in positions) / len(positions)

    def block_by_block(self, choose, looks_of=None) -> None:
        decided, looks = Canvas(self.canvas), None
        while True:
            self.show(decided)
            if self.answered():
                return
            canvases, now = [], len(self.recomputed) + 1
            for position in self.ahead(looks):
                self.show(decided)
                self.canvas[position], self.committed[position] = looks[position].token, now
                if not self.answered():
                    canvases.append(Canvas(self.canvas, self.committed))
            canvases.append(decided)  # the last of equals
            results = []
            for canvas in canvases:
                self.show(canvas)
                seen = self.look(self.network(self.canvas, list(range(self.length)), self.undecided()))
                sure, inside = self.sureness(seen), self.candidates()
                for position in choose({p: seen[p] for p in inside}, self.eased(inside[0])):
                    self.canvas[position], self.committed[position] = seen[position].token, now
                results.append((sure, Canvas(self.canvas, self.committed), seen))
            self.recomputed.append(list(range(self.length)))
            self.positions_computed += self.length * len(canvases)
            best = max(sure for sure, _, _ in results)
            _, decided, looks = next(result for result in results if result[0] == best)

    def ahead(self, looks) -> list[int]:
        """The positions that are looked ahead with, the surest first."""
        if looks is None:
            return []
        inside = [p for p in self.candidates() if looks[p].probability >= self.floor]
        return ranked({p: looks[p].entropy for p in inside})[: self.lookahead]


def oracle(model, prompt, lookahead: int, floor: float | None, **chosen):
    rules = Rules(eos_token_ids=chosen.pop("eos"), pad_token_id=PAD, mask_token_id=MASK, **chosen)
    rules.strict = model.logit_shift == 1
    slow = LookaheadOracle(Network(model, model.logit_shift, MASK), prompt, rules)
    slow.lookahead, slow.floor = lookahead, floor or (LOOKAHEAD_IN_BLOCKS if rules.window == "blocks" else 0.0)
    return slow.run()


@pytest.mark.every(12)
@pytest.mark.parametrize("name, window, family", covering(NAMES, WINDOWS, FAMILIES, strength=1))
def test_a_row_goes_on_with_the_canvas_with_which_the_oracle_goes_on(name, window, family):
    rng = Random(f"{name} {window} {family} lookahead")
    for lookahead, floor in ((1, None), (rng.randint(2, 5), None), (2, rng.choice([0.2, 0.4, 0.7]))):
        model, prompt = model_of(family, rng.randint(0, 2), 2), tiny_prompt(rng.randint(0, 999), rng.randint(1, 9))
        chosen = drawn_method(rng, name) | {"window": window, "max_new_tokens": rng.randint(1, 20)}
        chosen |= {"early_stop": rng.random() < 0.5}
        eos = rng.choice(STOPS)
        ahead = {"lookahead": lookahead, "lookahead_threshold": floor, "eos_token_id": list(eos)}
        assert_equal(
            answer(model, prompt, **chosen | ahead), oracle(model, prompt, lookahead, floor, eos=eos, **chosen)
        )


# ---- laws -----------------------------------------------------------------------------------------------------------


def batch(family: str, **chosen):
    inputs = left_padded([tiny_prompt(seed, 1 + 2 * seed) for seed in range(3)])
    return model_of(family, 1, 2).generate(**inputs, **WHOLE | {"max_new_tokens": 14} | chosen)


BESIDE = [name for name in METHODS if name not in ("dinfer, credit", "klass")]  # which remember one canvas
AHEAD = {"lookahead": 2, "kv_cache": "none"}


@pytest.mark.every(12)
@pytest.mark.parametrize("name, family", covering(BESIDE, FAMILIES, strength=1))
def test_a_row_is_the_same_alone_and_in_a_batch_with_every_method(name, family):
    prompts = [tiny_prompt(seed, 1 + 2 * seed) for seed in range(3)]
    chosen, model = METHODS[name] | AHEAD | WHOLE | {"max_new_tokens": 12, "early_stop": True}, model_of(family, 2, 2)
    together = model.generate(**left_padded(prompts), **chosen | {"seed": [0] * 3})
    for row, prompt in enumerate(prompts):
        alone = model.generate(**left_padded([prompt]), **chosen)
        assert together.sequences[row, -12:].tolist() == alone.sequences[0, -12:].tolist()
        for field in COUNTS:
            assert together[field][row].tolist() == alone[field][0].tolist(), field
        assert not (alone.sequences == MASK).any()
        assert int(alone.step_map.max()) <= int(alone.num_forwards) <= 12


@pytest.mark.full
def test_without_lookahead_nothing_changes_and_with_it_every_canvas_is_counted():
    chosen = METHODS["fast_dllm"] | {"window": "slide_span"}
    base, none = batch("llada", **chosen), batch("llada", **chosen, lookahead=0)
    assert torch.equal(base.sequences, none.sequences)
    assert torch.equal(base.positions_computed, none.positions_computed)
    # A floor of 1 leaves no token to look ahead with, so that no canvas is added.
    floored = batch("llada", **chosen, lookahead=3, lookahead_threshold=1.0)
    assert torch.equal(base.step_map, floored.step_map)
    assert torch.equal(base.positions_computed, floored.positions_computed)


def test_a_lookahead_decides_one_token_more_in_every_forward_but_the_first():
    # Sure of one answer from left to right, the surer the more is decided, under a threshold that nothing reaches: a
    # token a forward, and one looked ahead with, until one is left, which is not believed unseen.
    wanted = torch.nn.functional.one_hot(torch.full((13,), 7), 32) * (1 - torch.arange(13.0)[:, None] / 1000)

    def script(ids):
        return wanted * (16.0 - (ids == MASK).sum(1)[:, None, None]) / 2

    model = ScriptedModel(script)
    chosen = WHOLE | {"decoding_method": "fast_dllm", "block_length": 12, "confidence_threshold": 1.0}
    output = answer(model, [1], **chosen | {"max_new_tokens": 12, "window": "slide_span", "lookahead": 1})
    assert output.step_map[0].tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert int(output.num_forwards) == model.calls == 7
    assert int(output.positions_computed) == 13 * (1 + 5 * 2 + 1)


def test_in_blocks_only_sure_tokens_are_looked_ahead_with_unless_said_otherwise():
    def floor(**chosen):
        config = D3LLMGenerationConfig(decoding_method="fast_dllm", lookahead=1, **chosen)
        return math.exp(-config.rules(64).lookahead_threshold)

    assert floor() == pytest.approx(0.6)
    assert floor(lookahead_threshold=0.1) == pytest.approx(0.1)
    assert floor(window="slide_span") == 0.0


@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_promises_about_the_text_hold_for_tokens_that_were_looked_ahead_with(family):
    model, prompt = tiny_model(family, 1, spread=1.0), tiny_prompt(1, 6)
    chosen = METHODS["fast_dllm"] | WHOLE | {"window": "slide_span", "lookahead": 3, "max_new_tokens": 12}
    plain = answer(model, prompt, **chosen).sequences[0].tolist()
    words = [plain[i : i + 2] for i in range(len(prompt), len(plain) - 1)]
    found = answer(model, prompt, bad_words_ids=words, **chosen).sequences[0].tolist()
    text = found[len(prompt) :]
    text = text[: text.index(EOS) + 1] if EOS in text else text
    assert not any(text[i : i + 2] in words for i in range(len(text) - 1))
    once = answer(model, prompt, no_repeat_ngram_size=2, **chosen).sequences[0].tolist()
    once = once[: once.index(EOS, len(prompt)) + 1] if EOS in once[len(prompt) :] else once
    pairs = list(pairwise(once))
    assert len(set(pairs)) == len(pairs)


@pytest.mark.full
def test_holes_are_filled_and_samples_repeat():
    inputs = left_padded([tiny_prompt(seed, 9) for seed in range(3)])
    holes = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    chosen, model = METHODS["fast_dllm"] | {"lookahead": 2, "cfg_scale": 0.5}, tiny_model("dream", 1)
    output = model.generate(**inputs, **WHOLE | chosen, infill_mask=holes)
    assert not (output.sequences == MASK).any()
    assert torch.equal(output.sequences[~holes], inputs["input_ids"][~holes])
    sampled = [batch("llada", **chosen, do_sample=True, temperature=0.9) for _ in range(2)]
    assert torch.equal(sampled[0].sequences, sampled[1].sequences)


def test_nan_on_a_canvas_that_is_not_taken_does_no_harm_and_on_one_that_is_does():
    def with_nan(call: int, left: int):
        """A model whose logits are broken in one of its calls, for canvases with so many undecided positions."""
        table, calls = tables(5, 32), []

        def script(ids):
            calls.append(len(ids))
            rows = changing_script(table, MASK)(ids).clone()
            rows[((ids == MASK).sum(1) == left) & (len(calls) == call)] = float("nan")
            return rows

        return ScriptedModel(script)

    chosen = WHOLE | {"decoding_method": "fast_dllm", "block_length": 4, "confidence_threshold": 1.0, "lookahead": 1}
    chosen |= {"window": "slide_span", "max_new_tokens": 8}
    # The second forward has a canvas with seven undecided positions, and one with six.
    output = answer(with_nan(2, 6), [1], **chosen)
    assert int(output.step_map[0].eq(2).sum()) == 1
    message = r"must be finite \(got NaN or inf for row 0 of the batch in forward {}\)"
    with pytest.raises(ValueError, match=message.format(1)):
        answer(with_nan(1, 8), [1], **chosen)


# ---- settings -------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"lookahead": -1}, "`lookahead` must be a non-negative integer"),
    ({"lookahead": 1, "lookahead_threshold": 0.0}, "`lookahead_threshold` must be a probability"),
    ({"lookahead_threshold": 0.5}, "`lookahead_threshold` needs `lookahead`"),
    ({"lookahead": 1, "kv_cache": "dual"}, "`lookahead` does not go together with kv_cache='dual'"),
    (
        {"lookahead": 1, "decoding_method": "llada", "lossless": True},
        "`lookahead` does not go together with lossless=",
    ),
    ({"lookahead": 1, "decoding_method": "dinfer", "decoder": "credit"}, "does not go together with decoder='credit'"),
    ({"lookahead": 1, "decoding_method": "klass"}, "does not go together with kl_threshold="),
    ({"lookahead": 1, "decoding_method": "wino"}, "does not go together with threshold_back="),
]


@pytest.mark.parametrize("chosen, message", REFUSED, ids=str)
def test_what_has_no_meaning_with_lookahead_is_refused(chosen, message):
    model = ScriptedModel(changing_script(tables(2, 32), MASK))
    with pytest.raises(ValueError, match=message):
        answer(model, [1], **{"decoding_method": "fast_dllm"} | chosen)
    assert not model.calls


@pytest.mark.full
def test_a_call_without_lookahead_needs_no_threshold_of_it():
    model = tiny_model("llada", 1)
    model.generation_config = D3LLMGenerationConfig(
        decoding_method="fast_dllm", lookahead=2, lookahead_threshold=0.6, block_length=4
    )
    prompt = left_padded([tiny_prompt(1, 5)])
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, lookahead=0)
    expected = model.generate(**prompt, **WHOLE, max_new_tokens=8, lookahead=0, lookahead_threshold=None)
    assert torch.equal(found.step_map, expected.step_map)
    assert int(found.positions_computed) == 13 * int(found.num_forwards)
