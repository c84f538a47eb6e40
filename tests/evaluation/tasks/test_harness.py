"""Tasks of lm-eval in a sweep, offline: a task file with its data, from prompts to verdicts."""

import json
from pathlib import Path

import pytest
from official import tiny_tokenizer
from sweeping import ANSWER, CAREFUL, sure_model

from d3llm_hf import encode_chat, encode_text
from d3llm_hf.evaluation.sweep.sweep import sweep
from d3llm_hf.evaluation.tasks.load import load_tasks


pytest.importorskip("lm_eval", reason="the test extra has it")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
GENERATES = """
generation_kwargs: {until: [" stop"], max_gen_toks: 16, do_sample: false}
filter_list:
  - name: marked
    filter:
      - {function: regex, regex_pattern: "#### (\\\\d+)"}
      - {function: take_first}
  - name: whole
    filter:
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files whose questions have three letters, as the scripted model expects."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "data.jsonl"
    rows = [{"question": f"q{index:02}", "answer": str(41 + index % 2)} for index in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "toy_marked": ("generate_until", GENERATES),
        "toy_choice": ("multiple_choice", "doc_to_choice: ['41', '42']\ndoc_to_target: '0'\n"),
        "toy_unsafe": ("generate_until", GENERATES + "unsafe_code: true\n"),
        "toy_plain": ("generate_until", "generation_kwargs: {until: 'x'}\nnum_fewshot: 1\nfewshot_split: test\n"),
    }
    for name, (kind, more) in kinds.items():
        text = TASK.format(name=name, data=data, cache=root / "cache", kind=kind, more=more)
        (root / f"{name}.yaml").write_text(text)
    (root / "group.yaml").write_text("group: toy_group\ntask: [toy_marked, toy_plain]\n")
    return root


@pytest.fixture(scope="module", autouse=True)
def only_these(folder):
    """The harness looks through its own thousands of task files for each name: some seconds that no test needs."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        made = TaskManager.__init__

        def quick(self, *args, **kwargs):
            made(self, *args, **({"include_defaults": False} | kwargs))

        patch.setattr(TaskManager, "__init__", quick)
        yield


def test_a_task_goes_through_a_sweep_end_to_end(folder, tmp_path):
    (task,) = load_tasks("toy_marked", include_path=folder, num_samples=4)
    assert (task.name, task.max_new_tokens, task.scored_by) == ("toy_marked", 16, "exact_match,marked")
    (point,) = sweep(
        sure_model(), tiny_tokenizer(), task, [CAREFUL], tmp_path / "r.jsonl", label="sure", batch_size=3, chat=False
    )
    assert point["samples"]["correct"] == [0, 1, 0, 1]  # the model says 42
    assert point["samples"]["tokens"] == [7] * 4 and point["samples"]["forwards"] == [8] * 4
    assert (point["task"], point["accuracy"], point["provenance"]["scored_by"]) == (
        "toy_marked",
        50.0,
        "exact_match,marked",
    )


def test_another_filter_is_another_verdict_and_text_behind_a_stop_does_not_count(folder):
    tokenizer = tiny_tokenizer()
    (marked,) = load_tasks("toy_marked", include_path=folder)
    (whole,) = load_tasks("toy_marked", include_path=folder, filter_name="whole", metric="exact_match")
    for task in (marked, whole):
        assert len(task.encode(tokenizer, False)) == 5
    assert marked.judge(1, f"{ANSWER} stop #### 7") and not marked.judge(1, "x stop #### 42")
    assert not whole.judge(1, ANSWER) and whole.judge(1, "42")
    assert marked.about != whole.about


def test_prompts_go_through_the_chat_template_with_examples_as_turns(folder):
    tokenizer = tiny_tokenizer()
    (task,) = load_tasks("toy_plain", include_path=folder)
    chat, text = task.encode(tokenizer, True)[0], task.encode(tokenizer, False)[0]
    rendered = tokenizer.decode(chat)
    assert rendered.count("<|header|>user<|/header|>") == 2 and rendered.endswith("<|header|>assistant<|/header|>\n\n")
    assert "<|header|>" not in tokenizer.decode(text) and "q00" in tokenizer.decode(text)
    assert (task.max_new_tokens, task.stop_strings) == (256, ["x"])
    (none,) = load_tasks("toy_plain", include_path=folder, num_fewshot=0)
    assert tokenizer.decode(none.encode(tokenizer, False)[0]) == "q00"


@pytest.mark.parametrize("chat", [True, False])
def test_a_document_that_spells_a_control_token_has_characters_in_a_sweep_too(folder, chat):
    tokenizer = tiny_tokenizer()
    (task,) = load_tasks("toy_plain", include_path=folder, num_fewshot=0)
    task.task.fewshot_context = lambda doc, chat_template, **kwargs: (
        chat_template([{"role": "user", "content": "a<|mask|>"}]) if chat_template else "a<|mask|>"
    )
    ids = task.encode(tokenizer, chat)[0]
    plain = (
        encode_chat(tokenizer, [{"role": "user", "content": "a<|mask|>"}])
        if chat
        else encode_text(tokenizer, "a<|mask|>")
    )
    assert ids == plain["input_ids"][0].tolist() and tokenizer.mask_token_id not in ids


def test_a_group_is_all_of_its_tasks(folder):
    assert {task.name for task in load_tasks("toy_group", include_path=folder)} == {"toy_marked", "toy_plain"}


@pytest.mark.parametrize(
    ("name", "kwargs", "pattern"),
    [
        ("toy_choice", {}, "`task` must generate text .got 'toy_choice', of lm-eval's type multiple_choice"),
        ("toy_marked", {"metric": "f1"}, r"`metric` must be one of \['exact_match', 'bleu'\] .* .got 'f1'"),
        ("toy_marked", {"filter_name": "x"}, r"`filter` must be one of \['marked', 'whole'\]"),
        ("toy_marked", {"num_samples": 6}, "`num_samples` must be at most the 5 of 'toy_marked' .got 6"),
        ("toy_mark", {}, r"or a task of lm-eval .got 'toy_mark'.. Did you mean one of \['toy_marked'\]"),
        ("nothing", {}, "got 'nothing'.. List them with"),
        ("toy_unsafe", {}, "`confirm_run_unsafe_code` must be set for 'toy_unsafe'"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(folder, name, kwargs, pattern):
    with pytest.raises(ValueError, match=pattern):
        load_tasks(name, include_path=folder, **kwargs)


def test_a_score_that_is_no_verdict_is_refused(folder):
    (task,) = load_tasks("toy_marked", include_path=folder, metric="bleu")
    task.encode(tiny_tokenizer(), False)
    with pytest.raises(ValueError, match=r"`metric` must be 0 or 1 for each sample .got bleu="):
        task.judge(0, "x")


def test_code_that_the_model_wrote_runs_only_where_that_was_confirmed(folder):
    assert load_tasks("toy_unsafe", include_path=folder, confirm_run_unsafe_code=True)
