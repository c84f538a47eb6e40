"""lm-eval's model `d3llm-ar`: a causal model with the prompts, stop strings and counts of `d3llm`."""

import pytest


pytest.importorskip("lm_eval")

from causal import causal_model, chain_model
from eagle3 import HEAD, recorded_pair
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from official import tiny_tokenizer
from tiny import tiny_model

from d3llm_hf.evaluation.harness.answer_cache import identity
from d3llm_hf.evaluation.harness.causal import CausalD3LLMLM
from d3llm_hf.evaluation.harness.generation_stats import read_records
from d3llm_hf.evaluation.harness.model import D3LLMLM


TOKENIZER = tiny_tokenizer()
A, B, C = (TOKENIZER(letter, add_special_tokens=False)["input_ids"][0] for letter in "abc")
DRAFTS = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0}
EARLY = {"decoding_method": "ar_early_exit", "assistant_early_exit": 1} | DRAFTS


def spelling(layers: int = 2):
    """Writes a, b, c, a, b, c, ..."""
    following = [A] * 512
    following[A], following[B], following[C] = B, C, A
    return chain_model(following, layers)


@pytest.fixture(scope="module")
def model():
    return spelling()


def lm_of(model, **arguments) -> CausalD3LLMLM:
    return CausalD3LLMLM(model, tokenizer=TOKENIZER, **arguments)


def asked(*texts: str, **arguments) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text, {"until": ["ca"], "max_gen_toks": 9} | arguments), 0, ("task", place, 1))
        for place, text in enumerate(texts)
    ]


def test_answers_and_counts_of_every_method(model, tmp_path):
    path = tmp_path / "stats.jsonl"
    wanted = {"ar": (4, 0), "ar_early_exit": (1, 4)}  # a, b, c and the letter that ends the stop string
    for arguments in ({"batch_size": 2}, EARLY):
        lm = lm_of(model, stats_path=str(path), **arguments)
        assert lm.generate_until(asked("x", "yz", temperature=0.0), disable_tqdm=True) == ["ab", "ab"]
        for record in read_records(path):
            assert (record.tokens, record.forwards, record.forwards_reference) == (2, *[wanted[lm.method][0]] * 2)
            assert record.draft_forwards == wanted[lm.method][1]
        info = lm.get_model_info()
        assert info["generation_stats"]["draft_forwards"] == 2 * wanted[lm.method][1]
    assert get_model("d3llm-ar") is CausalD3LLMLM


def test_an_assistant_drafts_and_is_part_of_what_an_answer_is_kept_by(model):
    lm = lm_of(model, decoding_method="ar_assistant", assistant=spelling(1), dtype="float32", **DRAFTS)
    assert lm.generate_until(asked("x"), disable_tqdm=True) == ["ab"]
    assert lm.records[0].draft_forwards == 4
    assert "assistant_fingerprint" in lm.decisive and lm.assistant_fingerprint
    assert identity(model, TOKENIZER, {"assistant": lm.assistant_fingerprint}) != identity(model, TOKENIZER, {})


def test_a_draft_head_drafts_and_is_part_of_what_an_answer_is_kept_by():
    target, head = recorded_pair()
    tree = {"decoding_method": "eagle3", "total_tokens": 9, "depth": 1, "draft_top_k": 3}
    texts = {}
    for name, arguments in (
        ("ar", {}),
        ("folder", tree | {"draft_head": str(HEAD)}),
        ("head", tree | {"draft_head": head}),
    ):
        lm = lm_of(target, **arguments)
        texts[name] = lm.generate_until(asked("one two", until=[]), disable_tqdm=True)
    assert texts["ar"] == texts["folder"] == texts["head"]
    record = lm.records[0]
    assert record.draft_forwards == 2 * (record.forwards - 1) and record.draft_positions > record.draft_forwards
    assert "draft_head_fingerprint" in lm.decisive and lm.draft_head_fingerprint
    assert lm.get_model_info()["generation_stats"]["draft_positions"] == record.draft_positions


def test_what_is_drawn_repeats_by_the_seed():
    lm = lm_of(causal_model(vocab_size=512), seed=3)
    texts = [lm.generate_until(asked("x", until=[], do_sample=True, temperature=3.0), True) for _ in range(2)]
    assert texts[0] == texts[1]
    assert lm._draws(lm._asked({"do_sample": True})) and not lm._draws(lm._asked({}))
    assert lm.generate_until(asked("x"), True)  # greedy, whatever the seed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_samples": 4}, "`num_samples` is of the estimated likelihood"),
        ({"block_length": 4}, "`block_length` in `model_args` is no setting of decoding"),
        ({"prompt_lookup_num_tokens": 4}, "`prompt_lookup_num_tokens` must be a setting of ar"),
        ({"decoding_method": "ar_prompt_lookup", "batch_size": 2}, "`batch_size` must be 1 with ar_prompt_lookup"),
        ({"decoding_method": "ar_assistant"}, "`assistant_model` must be given for 'ar_assistant'"),
        ({"assistant": spelling(1)}, "`assistant_model` has no effect with 'ar'"),
        ({"draft_head": str(HEAD)}, "`draft_head` has no effect with 'ar'"),
        ({"decoding_method": "llada"}, r"`method` must be one of \['ar'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(model, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        lm_of(model, **arguments)


def test_other_models_methods_and_likelihoods_are_refused(model):
    with pytest.raises(TypeError, match="got LLaDAModelLM, which decodes by diffusion"):
        lm_of(tiny_model("llada"))
    with pytest.raises(TypeError, match="causal ones are evaluated as they are with `--model d3llm-ar`"):
        D3LLMLM(model, tokenizer=TOKENIZER)
    lm = lm_of(model)
    with pytest.raises(ValueError, match=r"`decoding_method` in `gen_kwargs` must be that of the model, ar \(got"):
        lm.generate_until(asked("x", decoding_method="ar_mtp"), True)
    with pytest.raises(ValueError, match="`tasks` must generate text with `--model d3llm-ar`"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0, ("task", 0, 1))], True)
