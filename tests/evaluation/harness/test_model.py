"""lm-eval's model `d3llm`: local tasks end to end, stop strings, chat templates, counts, likelihood, errors."""

import copy
import json
import logging

import pytest
import torch
import yaml


pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from tiny import ScriptedModel, constant_script, tiny_model
from transformers import AutoModel, AutoTokenizer

from d3llm_hf import is_greedy, log_likelihood
from d3llm_hf.evaluation.harness.generation_stats import read_records, totals
from d3llm_hf.evaluation.harness.model import D3LLMLM
from d3llm_hf.evaluation.tasks.word_problems import exact_match, generate_problems
from d3llm_hf.hub.sources import embedded_checkpoints


CHECKPOINT = embedded_checkpoints()["d3llm-llada"]
PROBLEMS = generate_problems(5, split="test", seed=4242)
NUMBER = {
    "name": "number",
    "filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9]+)"}, {"function": "take_first"}],
}


@pytest.fixture(scope="module")
def embedded():
    """Model and tokenizer of the embedded checkpoint."""
    return AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(autouse=True)
def no_survey_of_the_machine(monkeypatch):
    """lm-eval asks pip, the compiler and the processor about themselves after each evaluation, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def requests_of(*asked, kind: str = "generate_until", task: str = "task", repeats: int = 1) -> list[Instance]:
    return [Instance(kind, {}, args, 0, (task, place, repeats)) for place, args in enumerate(asked)]


def local_task(folder, documents: list[dict], **config) -> dict:
    """A task over documents in a file: the arguments of `simple_evaluate`."""
    folder.mkdir(exist_ok=True)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "documents.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
    }
    (folder / "local.yaml").write_text(yaml.safe_dump(task | config))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return {"tasks": ["local"], "task_manager": manager, "bootstrap_iters": 0}


def chat_inputs(tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


# ---- end to end ----------------------------------------------------------------------------------------------------


def test_word_problems_end_to_end_give_the_answers_and_counts_of_a_direct_generate(tmp_path, embedded):
    model, tokenizer = embedded
    task = local_task(
        tmp_path / "task",
        [{"question": p.question, "result": str(p.result)} for p in PROBLEMS],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{result}}",
        generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 64},
        filter_list=[NUMBER],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    stats = tmp_path / "new" / "stats.jsonl"
    results = lm_eval.simple_evaluate(
        model="d3llm",
        model_args={
            "pretrained": "d3llm-llada",
            "dtype": "float32",
            "entropy_threshold": 0.2,
            "stats_path": str(stats),
        },
        batch_size=3,
        device="cpu",
        apply_chat_template=True,
        **task,
    )

    inputs = chat_inputs(tokenizer, [p.question for p in PROBLEMS])
    output = model.generate(**inputs, entropy_threshold=0.2, max_new_tokens=64, return_dict_in_generate=True)
    texts = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [exact_match(text, p.answer) for text, p in zip(texts, PROBLEMS, strict=True)]
    tokens = (output.tokens_per_forward * output.num_forwards).round().long()

    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == texts
    assert [bool(sample["exact_match"]) for sample in samples] == right
    assert results["results"]["local"]["exact_match,number"] == sum(right) / len(right) >= 0.6

    records = read_records(stats)
    assert [(record.task, record.doc_id) for record in records] == [("local", place) for place in range(5)]
    assert [record.tokens for record in records] == tokens.tolist()
    assert [record.forwards for record in records] == output.num_forwards.tolist()
    assert [record.forwards_reference for record in records] == output.num_forwards_reference.tolist()
    assert [record.prompt_tokens for record in records] == inputs["attention_mask"].sum(1).tolist()
    # (positions hold the padding of the batch, which is another one here)
    found = results["config"]["generation_stats"]
    assert found["tpf"] == int(tokens.sum()) / int(output.num_forwards.sum())
    assert found == totals(records) | {"tasks": {"local": totals(records)}}
    assert results["config"]["settings"] == {"entropy_threshold": 0.2, "end_at_until": True}
    assert results["config"]["model_dtype"] == "torch.float32"
    assert results["tokenizer_eos_token"] == ["<|endoftext|>", str(tokenizer.eos_token_id)]


def test_a_multiple_choice_task_end_to_end_takes_the_likelier_choice(tmp_path, embedded):
    model, tokenizer = embedded
    problems = PROBLEMS[:3]
    documents = [{"question": p.question, "choices": [f"{p.result + 1}", f"{p.result}"], "right": 1} for p in problems]
    task = local_task(
        tmp_path / "task",
        documents,
        output_type="multiple_choice",
        doc_to_text="{{question}}\n####",
        doc_to_choice="{{choices}}",
        doc_to_target="right",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    lm = D3LLMLM(model, tokenizer=tokenizer, num_samples=4, check_greedy=False, batch_size=4)
    results = lm_eval.simple_evaluate(model=lm, **task)

    expected = []
    for document in documents:
        values = [direct(model, tokenizer, f"{document['question']}\n####", f" {c}")[0] for c in document["choices"]]
        expected.append(float(values[1] > values[0]))
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert [sample["acc"] for sample in samples] == expected
    assert results["results"]["local"]["acc,none"] == sum(expected) / 3


def test_lm_evals_own_models_stay_known():
    from lm_eval.api.registry import get_model

    assert get_model("d3llm") is D3LLMLM
    assert get_model("dummy").__name__ == "DummyLM"


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(embedded):
    return D3LLMLM(embedded[0], tokenizer=embedded[1], batch_size=3)


@pytest.fixture(scope="module")
def prompts(embedded) -> list[str]:
    tokenizer = embedded[1]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p.question}], tokenize=False, add_generation_prompt=True
        )
        for p in PROBLEMS
    ]


def new(lm, **changed):
    """The same model with other arguments."""
    return D3LLMLM(lm.model, tokenizer=lm.tokenizer, **({"batch_size": 3} | changed))


def test_no_answer_holds_a_stop_string_or_what_follows_it_and_rows_that_end_at_it_take_fewer_forwards(lm, prompts):
    whole = lm.generate_until(requests_of(*((prompt, {"until": []}) for prompt in prompts)), disable_tqdm=True)
    assert all(text.count("\n") > 1 for text in whole)
    asked = requests_of(*((prompt, {"until": ["\n"]}) for prompt in prompts))
    early, late = new(lm), new(lm, end_at_until=False)
    first_lines = [text.split("\n")[0] for text in whole]
    assert early.generate_until(asked, disable_tqdm=True) == first_lines
    assert late.generate_until(asked, disable_tqdm=True) == first_lines
    assert [r.tokens for r in early.records] == [r.tokens for r in late.records]
    assert all(
        0 < record.tokens <= len(lm.tokenizer(line)["input_ids"])
        for record, line in zip(early.records, first_lines, strict=True)
    )
    assert sum(r.forwards for r in early.records) < sum(r.forwards for r in late.records)
    assert [r.forwards for r in late.records] == [r.forwards for r in lm.records[-5:]]


def test_a_stop_string_that_the_prompt_begins_does_not_end_the_answer(lm, prompts, embedded):
    beginning = lm.generate_until(requests_of((prompts[0], {"until": []})), disable_tqdm=True)[0][:1]
    assert prompts[0].endswith("\n")
    answer = lm.generate_until(requests_of((prompts[0], {"until": ["\n" + beginning]})), disable_tqdm=True)[0]
    assert answer.startswith(beginning)


def test_a_control_token_among_the_stop_strings_ends_the_answer(tmp_path, embedded):
    tokenizer = embedded[1]
    word, control = tokenizer("apples")["input_ids"][0], tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    answer = [word, word, control, word]
    model = ScriptedModel(constant_script(answer, 1, vocab_size=745), vocab_size=745, eos_token_id=None)
    for end_at_until in (True, False):
        lm = D3LLMLM(model, tokenizer=tokenizer, end_at_until=end_at_until, max_gen_toks=4)
        texts = lm.generate_until(requests_of(("a", {"until": "<|end_header_id|>"})), disable_tqdm=True)
        assert texts == [tokenizer.decode([word, word])]
        assert (lm.records[0].tokens, lm.records[0].forwards) == (2, 1)


def test_requests_of_different_arguments_come_back_in_their_order(lm, prompts):
    kwargs = [{"until": [], "max_gen_toks": 16}, {"until": ["\n"]}, {"until": [], "max_new_tokens": 48}, {}]
    asked = [(prompt, kwargs[place % 4]) for place, prompt in enumerate(prompts)]
    together = lm.generate_until(requests_of(*asked), disable_tqdm=True)
    alone = [new(lm, batch_size=1).generate_until(requests_of(one), disable_tqdm=True)[0] for one in asked]
    assert together == alone


def test_a_seeded_request_draws_the_same_in_any_batch_and_another_for_each_repeat(lm, prompts):
    sampled = {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 24}
    request = requests_of((prompts[0], sampled), repeats=3)[0]
    asked = [request] * 3
    answers = [new(lm, batch_size=size, seed=5).generate_until(asked, disable_tqdm=True) for size in (1, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3


def test_repeats_are_counted_and_what_fills_up_a_process_is_not(lm, prompts):
    request = requests_of((prompts[0], {"max_gen_toks": 8}), repeats=2)[0]
    found = new(lm)
    found.generate_until([request] * 4, disable_tqdm=True)
    assert [(r.doc_id, r.repeat) for r in found.records] == [(0, 0), (0, 1)]


def test_the_template_is_applied_once_and_its_bos_is_the_only_one(lm):
    text = lm.apply_chat_template([{"role": "user", "content": "two"}])
    bos = lm.tokenizer.bos_token_id
    assert lm.tok_encode(text)[0] == bos
    for added in (None, True):
        assert new(lm, add_bos_token=added).tok_encode(text).count(bos) == 1
    begun = lm.apply_chat_template(
        [{"role": "user", "content": "two"}, {"role": "assistant", "content": "So there"}], add_generation_prompt=False
    )
    assert begun.endswith("So there")
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert "d3llm-llada" in lm.tokenizer_name


def test_an_empty_prompt_and_one_that_is_too_long_are_answered(lm, caplog):
    short = new(lm, max_length=40)
    with caplog.at_level(logging.WARNING):
        texts = short.generate_until(
            requests_of(("", {"max_gen_toks": 8}), ("two " * 99, {"max_gen_toks": 8})), disable_tqdm=True
        )
    assert len(texts) == 2
    assert sorted(r.prompt_tokens for r in short.records) == [1, 32]
    assert "cut on its left to 32" in caplog.text


def test_an_empty_prompt_is_answered_with_a_tokenizer_that_has_neither_bos_nor_eos(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    bare = D3LLMLM(lm.model, tokenizer=tokenizer)
    assert len(bare.generate_until(requests_of(("", {"max_gen_toks": 8})), disable_tqdm=True)) == 1
    assert [r.prompt_tokens for r in bare.records] == [1]


def test_a_request_takes_precedence_and_says_so(lm, prompts, caplog):
    own = new(lm, max_gen_toks=8, temperature=1.0, do_sample=True)
    with caplog.at_level(logging.WARNING):
        own.generate_until(requests_of((prompts[0], {"do_sample": False, "max_gen_toks": 16})), disable_tqdm=True)
    assert own.records[0].max_new_tokens == 16
    assert "'do_sample': True" in caplog.text
    assert "'max_gen_toks': 8" in caplog.text


def test_answers_are_cached_and_taken_from_the_cache(tmp_path, lm, prompts):
    cached = CachingLM(new(lm), str(tmp_path / "cache.db"))
    asked = requests_of(*((prompt, {"until": ["\n"]}) for prompt in prompts[:2]))
    first = cached.generate_until(asked)
    assert cached.generate_until(asked) == first
    assert len(cached.lm.records) == 2
    hook = dict(cached.dbdict)
    assert sorted(hook.values()) == sorted(first)


# ---- likelihood ----------------------------------------------------------------------------------------------------


def direct(model, tokenizer, condition: str, completion: str, **chosen) -> tuple[float, bool]:
    """The estimate of one pair, alone; `condition` ends in no space."""
    whole, length = tokenizer(condition + completion)["input_ids"], len(tokenizer(condition)["input_ids"])
    mask = torch.tensor([[place >= length for place in range(len(whole))]])
    ids = torch.tensor([whole])
    value = log_likelihood(model, ids, mask, num_samples=chosen.pop("num_samples", 4), **chosen).mean.item()
    return value, bool(is_greedy(model, ids, mask))


@pytest.fixture(scope="module")
def likelihoods(embedded):
    model = tiny_model("dream", vocab_size=745)
    return D3LLMLM(model, tokenizer=embedded[1], num_samples=4, batch_size=2, likelihood_batch_size=5)


PAIRS = [("Tom has 8 apples.", " He buys 7 more."), ("Tom", " has"), ("How many apples", " are there now?"), ("a", "")]


def test_likelihoods_are_those_of_the_estimator_in_the_order_of_the_requests(likelihoods, embedded):
    found = likelihoods.loglikelihood(requests_of(*PAIRS, kind="loglikelihood"), disable_tqdm=True)
    expected = [direct(likelihoods.model, embedded[1], *pair) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[3] == (0.0, True)


def test_greedy_completions_are_recognised_unless_that_is_not_asked(embedded):
    model, tokenizer = embedded
    script = constant_script([5, 6, 7], 1, vocab_size=745)
    model = ScriptedModel(script, vocab_size=745)
    pair = (tokenizer.decode([4]), tokenizer.decode([5, 6, 7]))
    for check, expected in ((True, True), (False, False)):
        lm = D3LLMLM(model, tokenizer=tokenizer, num_samples=2, check_greedy=check, mask_token_id=744)
        found = lm.loglikelihood(requests_of(pair, kind="loglikelihood"), disable_tqdm=True)
        assert found[0][1] is expected


def test_guidance_and_seed_of_the_likelihood_are_the_models(likelihoods, embedded):
    lm = D3LLMLM(likelihoods.model, tokenizer=embedded[1], num_samples=4, likelihood_seed=3, cfg_scale=0.5)
    found = lm.loglikelihood(requests_of(PAIRS[0], kind="loglikelihood"), disable_tqdm=True)[0][0]
    assert found == pytest.approx(direct(likelihoods.model, embedded[1], *PAIRS[0], seed=3, cfg_scale=0.5)[0])


def test_a_whole_text_is_the_sum_of_its_windows(likelihoods, embedded):
    tokenizer = embedded[1]
    text = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend."
    ids = tokenizer(text)["input_ids"]
    lm = D3LLMLM(likelihoods.model, tokenizer=tokenizer, num_samples=4, max_length=9)
    found = lm.loglikelihood_rolling(requests_of((text,), kind="loglikelihood_rolling"), disable_tqdm=True)[0]
    expected, covered = 0.0, []
    for start in range(0, len(ids), 8):
        stop = min(start + 8, len(ids))
        first = max(0, stop - 8)
        window = [tokenizer.bos_token_id, *ids][first : stop + 1]
        mask = torch.tensor([[place >= len(window) - (stop - start) for place in range(len(window))]])
        expected += log_likelihood(likelihoods.model, torch.tensor([window]), mask, num_samples=4).mean.item()
        covered += window[len(window) - (stop - start) :]
    assert covered == ids
    assert found == pytest.approx(expected)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"entropy_treshold": 0.5}, "`entropy_treshold` in `model_args` .*Did you mean `entropy_threshold`"),
        ({"batchsize": 4}, "Did you mean `batch_size`"),
        ({"zzzz": 4}, "Settings of decoding: "),
        ({"infill": True}, "`infill` in `model_args` cannot be chosen"),
        ({"output_scores": True}, "`output_scores` in `model_args` cannot be chosen: positions are scored"),
        ({"batch_size": "auto"}, "`batch_size` must be a positive integer"),
        ({"num_samples": 0}, "`num_samples` must be a positive integer"),
        ({"max_gen_toks": "many"}, "`max_gen_toks` must be a positive integer"),
        ({"dtype": "float33"}, "`dtype` must be a data type of torch"),
        ({"device": "tpu9"}, "`device` must be a device of torch"),
    ],
)
def test_wrong_arguments_are_refused_by_name(chosen, message, embedded):
    with pytest.raises(ValueError, match=message):
        D3LLMLM(embedded[0], tokenizer=embedded[1], **chosen)


def test_a_model_that_cannot_be_evaluated_is_refused(embedded):
    with pytest.raises(TypeError, match="`tokenizer` must be given with a loaded model"):
        D3LLMLM(embedded[0])
    with pytest.raises(TypeError, match=r"`pretrained` must be a LLaDA, Dream or d3LLM checkpoint.*Linear"):
        D3LLMLM(torch.nn.Linear(1, 1), tokenizer=embedded[1])
    with pytest.raises(TypeError, match="`seed` must be one integer"):
        D3LLMLM(embedded[0], tokenizer=embedded[1], seed=[1, 2])


def test_a_request_that_cannot_be_answered_is_refused(lm):
    for kwargs, message in (
        ({"untill": ["a"]}, "`untill` in `gen_kwargs` .*Did you mean `until`"),
        ({"max_gen_toks": 10**6}, "`max_gen_toks` must leave room for a prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until(requests_of(("a", kwargs)), disable_tqdm=True)
    with pytest.raises(TypeError, match="`until` must be a string or a list"):
        lm.generate_until(requests_of(("a", {"until": [1]})), disable_tqdm=True)


def test_the_gpu_that_lm_eval_asks_for_by_default_is_replaced_by_the_cpu_where_there_is_none(
    embedded, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert D3LLMLM(embedded[0], tokenizer=embedded[1], device="cuda:0", batch_size="4").device.type == "cpu"
    assert "There is no GPU" in caplog.text


def test_a_learnt_prompt_stays_in_front_of_the_model(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32)
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    adapted.prompt_encoder["default"].embedding.weight.data.normal_(0, 5, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path)
    lm = D3LLMLM("d3llm-llada", dtype="float32", peft=str(tmp_path), device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(lm.model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert len(lm.generate_until(requests_of(("a", {"until": ["b"], "max_gen_toks": 4})), disable_tqdm=True)) == 1


def test_an_adapter_is_merged(tmp_path, embedded):
    from peft import LoraConfig, get_peft_model

    model = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        lm = D3LLMLM("d3llm-llada", dtype="float32", peft=str(tmp_path), device="cpu", attn_implementation="eager")
        torch.testing.assert_close(lm.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert lm.get_model_info()["peft"] == str(tmp_path)
