"""lm-eval's cache of answers: one file serves several models and settings, and each finds its own answers alone."""

import copy

import pytest
import torch
from thin import some_of


pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from tiny import tiny_model
from transformers import AutoTokenizer

from d3llm_hf.evaluation.harness.answer_cache import identity, keep_apart
from d3llm_hf.evaluation.harness.model import D3LLMLM
from d3llm_hf.fingerprints import model_fingerprint
from d3llm_hf.hub.sources import embedded_checkpoints


PROMPTS = ["Tom has 8 apples.", "How many apples", "are there now?"]
OWN = {"batch_size": 2, "num_samples": 2, "max_gen_toks": 8, "entropy_threshold": 0.3}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_checkpoints()["d3llm-llada"])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llada", vocab_size=745)


KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


def requests_of(kind: str = "generate_until", repeats: int = 1, **asked) -> list[Instance]:
    second = {"generate_until": asked, "loglikelihood": " apples"}.get(kind)
    args = [(prompt,) if second is None else (prompt, second) for prompt in PROMPTS]
    return [Instance(kind, {}, each, 0, ("task", place, repeats)) for place, each in enumerate(args)]


def ask(lm: D3LLMLM, file, requests: list[Instance]) -> tuple[list, int]:
    """The answers as lm-eval gets them with `use_cache`, and how many requests reached the model."""
    asked, kind = [], requests[0].request_type
    function = getattr(lm, kind)
    setattr(lm, kind, lambda some, **kwargs: asked.extend(some) or function(some, disable_tqdm=True))
    cached = CachingLM(lm, str(file))
    try:
        return getattr(cached, kind)(requests), len(asked)
    finally:
        setattr(lm, kind, function)
        cached.dbdict.close()


def changed_weights(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[5, 0] += 1
    return other


def changed_config(model):
    other = copy.deepcopy(model)
    other.generation_config.entropy_threshold = 0.7
    return other


def changed_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] }}"
    return other


OTHERS = {
    "weights": {"model": changed_weights},
    "checkpoint's settings": {"model": changed_config},
    "dtype": {"model": lambda model: copy.deepcopy(model).bfloat16()},
    "attention": {"model": lambda model: (other := copy.deepcopy(model)).set_attn_implementation("eager") or other},
    "family": {"model": lambda model: tiny_model("dream", vocab_size=745)},
    "tokenizer": {"tokenizer": changed_template},
    "threshold": {"entropy_threshold": 0.1},
    "method": {"decoding_method": "llada", "entropy_threshold": None},
    "cache": {"kv_cache": "dual"},
    "length": {"max_gen_toks": 9},
    "positions": {"max_length": 40},
    "bos": {"add_bos_token": True},
    "mask": {"mask_token_id": 3},
    "draws of the likelihood": {"num_samples": 3},
    "seed of the likelihood": {"likelihood_seed": 1},
    "greedy agreement": {"check_greedy": False},
}
SAME = {
    "nothing": {},
    "batch": {"batch_size": 3},
    "canvases of a forward": {"likelihood_batch_size": 7},
    "a copy of the weights": {"model": copy.deepcopy},
    "a copy of the tokenizer": {"tokenizer": copy.deepcopy},
}


def lm_of(model, tokenizer, model_of=lambda model: model, tokenizer_of=lambda tokenizer: tokenizer, **own):
    return D3LLMLM(model_of(model), tokenizer=tokenizer_of(tokenizer), **OWN | own)


def named(change: dict) -> dict:
    return {
        {"model": "model_of", "tokenizer": "tokenizer_of"}.get(name, name): value for name, value in change.items()
    }


@pytest.fixture(scope="module")
def filled(model, tokenizer, tmp_path_factory):
    """A file that a model has filled, with its requests."""
    file, lm = tmp_path_factory.mktemp("cache") / "answers.db", lm_of(model, tokenizer)
    return file, {kind: ask(lm, file, requests_of(kind))[0] for kind in KINDS}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_the_same_model_and_settings_are_given_their_answers_back(change, filled, model, tokenizer):
    file, answers = filled
    for kind, expected in answers.items():
        assert ask(lm_of(model, tokenizer, **named(change)), file, requests_of(kind)) == (expected, 0)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", some_of(OTHERS, every=3))
def test_another_model_or_other_settings_are_given_none_of_its_answers(name, filled, model, tokenizer, tmp_path):
    change = OTHERS[name]
    file, answers = filled
    mine = tmp_path / "copy.db"
    mine.write_bytes(file.read_bytes())
    lm = lm_of(model, tokenizer, **named(change))
    for kind, theirs in answers.items():
        found, asked = ask(lm, mine, requests_of(kind))
        assert asked == len(PROMPTS)
        assert ask(lm, mine, requests_of(kind)) == (found, 0)
        assert ask(lm_of(model, tokenizer), mine, requests_of(kind)) == (theirs, 0)  # and those are still there


def test_weights_that_change_between_two_evaluations_count_as_they_are(model, tokenizer, tmp_path):
    lm = lm_of(copy.deepcopy(model), tokenizer)
    assert ask(lm, tmp_path / "answers.db", requests_of())[1] == 3
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(-1)
    assert ask(lm, tmp_path / "answers.db", requests_of())[1] == 3
    lm.settings["entropy_threshold"] = 0.01
    assert ask(lm, tmp_path / "answers.db", requests_of())[1] == 3


def test_an_evaluation_without_a_cache_leaves_no_answers_of_a_changed_model_in_that_of_the_last_one(
    model, tokenizer, tmp_path
):
    lm = lm_of(copy.deepcopy(model), tokenizer)
    first = {kind: ask(lm, tmp_path / "answers.db", requests_of(kind)) for kind in KINDS}
    cached = CachingLM(lm, str(tmp_path / "answers.db"))  # as an evaluation leaves it behind
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(-1)
    for kind in KINDS:
        getattr(lm, kind)(requests_of(kind), disable_tqdm=True)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(-1)
    cached.dbdict.close()
    for kind in KINDS:
        assert ask(lm, tmp_path / "answers.db", requests_of(kind)) == (first[kind][0], 0)


def adapted(model, **own):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **own)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(copy.deepcopy(model), config)


def twice_adapted(model):
    wrapped = adapted(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped.add_adapter("second", copy.deepcopy(wrapped.peft_config["default"]))
    return wrapped


def layers_of(wrapped):
    return [module for module in wrapped.modules() if hasattr(module, "set_scale")]


ADAPTERS = {
    "none": lambda wrapped: wrapped.disable_adapter_layers(),
    "another one": lambda wrapped: wrapped.set_adapter("second"),
    "a weaker one": lambda wrapped: [
        m.set_scale("default", 0.5) for m in wrapped.modules() if hasattr(m, "set_scale")
    ],
}


@pytest.mark.every(3)
@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
def test_the_adapters_that_act_decide_which_answers_are_given_back(change, model, tokenizer, tmp_path):
    pytest.importorskip("peft")
    wrapped = twice_adapted(model)
    file, lm = tmp_path / "answers.db", lm_of(wrapped, tokenizer)
    first = ask(lm, file, requests_of())
    change(wrapped)
    assert ask(lm, file, requests_of())[1] == 3
    assert ask(lm_of(twice_adapted(model), tokenizer), file, requests_of()) == (first[0], 0)


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"use_rslora": True}])
def test_adapters_of_equal_weights_and_another_config_are_other_models(other, model):
    pytest.importorskip("peft")
    mine, same, theirs = adapted(model), adapted(model), adapted(model, **other)
    assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
    assert model_fingerprint(mine) == model_fingerprint(same) != model_fingerprint(theirs)


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_count_as_they_are(model):
    def quantised(own):
        return torch.ao.quantization.quantize_dynamic(own, {torch.nn.Linear})

    if not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none":
        pytest.skip("torch has no quantised layers here")
    assert model_fingerprint(quantised(model)) == model_fingerprint(quantised(copy.deepcopy(model)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert model_fingerprint(quantised(model)) != model_fingerprint(quantised(other))


def test_weights_that_are_elsewhere_are_never_taken_for_the_same(model):
    away = copy.deepcopy(model).to("meta")
    assert model_fingerprint(away) != model_fingerprint(away)


def test_answers_that_another_model_of_lm_eval_left_are_none_of_ours(model, tokenizer, tmp_path):
    from lm_eval.models.dummy import DummyLM

    file, requests = tmp_path / "answers.db", requests_of()
    theirs = CachingLM(DummyLM(), str(file))
    left = theirs.generate_until(requests)
    theirs.dbdict.close()
    answers, asked = ask(lm_of(model, tokenizer), file, requests)
    assert (len(answers), asked) == (3, 3) and answers != left
    theirs = CachingLM(DummyLM(), str(file))
    assert theirs.generate_until(requests) == left
    theirs.dbdict.close()


@pytest.mark.every(16)
@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ({"do_sample": True, "temperature": 1.5}, {}),
        ({"temperature": 1.5}, {}),
        ({}, {"temperature": 1.5}),
        ({}, {"do_sample": True}),
        ({"remasking": "random"}, {}),
        ({}, {"remasking": "random"}),
        ({"decoding_method": "dream", "alg_temp": 0.5, "entropy_threshold": None}, {}),
    ],
)
def test_an_answer_that_is_drawn_is_not_given_back(own, asked, model, tokenizer, tmp_path):
    file = tmp_path / "answers.db"
    lm = lm_of(model, tokenizer, seed=3, **own)
    requests = [each for each in requests_of(repeats=2, **asked) for _ in range(2)]
    first = ask(lm, file, requests)
    assert first[1] == len(requests)
    assert ask(lm, file, requests) == first
    assert ask(lm_of(model, tokenizer, seed=4, **own), file, requests)[1] == len(requests)


def test_what_a_request_draws_does_not_hang_on_how_many_others_come_from_the_cache(model, tokenizer, tmp_path):
    file, own = tmp_path / "answers.db", {"seed": 3}
    decided, drawn = requests_of(), requests_of(do_sample=True, temperature=3.0)
    whole = ask(lm_of(model, tokenizer, **own), file, decided + drawn)
    again = ask(lm_of(model, tokenizer, **own), file, decided + drawn)
    assert (whole[1], again[1]) == (6, 3)
    assert whole[0] == again[0]


def test_an_evaluation_without_a_cache_digests_no_weights(model, tokenizer, monkeypatch):
    monkeypatch.setattr("d3llm_hf.evaluation.harness.model.identity", None)
    assert len(lm_of(model, tokenizer).generate_until(requests_of(), disable_tqdm=True)) == 3


def test_a_setting_without_a_canonical_form_is_never_found_again(model, tokenizer):
    assert identity(model, tokenizer, {"a": 1.0}) == identity(model, tokenizer, {"a": 1.0})
    assert identity(model, tokenizer, {"a": object}) != identity(model, tokenizer, {"a": object})
    assert identity(model, tokenizer, {"a": model.config}) == identity(model, tokenizer, {"a": model.config})


def test_a_sqlitedict_whose_names_cannot_be_changed_is_refused():
    with pytest.raises(ImportError, match=r"`use_cache` needs sqlitedict 2\.1"):
        keep_apart({}, "owner", ())


def test_lm_evals_files_of_prompts_are_named_by_the_template_that_made_them(model, tokenizer):
    names = [lm_of(model, each).tokenizer_name for each in (tokenizer, copy.deepcopy(tokenizer))]
    other = lm_of(model, changed_template(tokenizer)).tokenizer_name
    assert names[0] == names[1] != other
    assert "d3llm-llada" in other and "/" not in other
