"""Sweeps of causal models: the same figures as of diffusion models, drafts beside them, greedy answers compared."""

import copy
import json
from functools import partial

import pytest
import torch
from causal import causal_model, chain_model
from eagle3 import HEAD, recorded_pair
from official import tiny_tokenizer
from outcomes import outcome_of
from sweeping import CAREFUL, sure_model, task_of, without_times

from d3llm_hf import cli
from d3llm_hf.evaluation.leaderboard.board import build_board
from d3llm_hf.evaluation.leaderboard.document import document, markdown
from d3llm_hf.evaluation.leaderboard.write import figures
from d3llm_hf.evaluation.sweep import causal as module
from d3llm_hf.evaluation.sweep.grids import Curve, curves_of
from d3llm_hf.evaluation.sweep.points import check_point, curves, key_of, read_points
from d3llm_hf.evaluation.sweep.sweep import check_settings, sweep


PLAIN, LOOKUP = Curve("ar"), Curve("ar_prompt_lookup")
DRAFTS = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0}
EARLY = Curve("ar_early_exit", "early", {"assistant_early_exit": 1} | DRAFTS)
ASSISTED = Curve("ar_assistant", settings=DRAFTS)
TOKENIZER = tiny_tokenizer()


def writer(layers: int = 2):
    """A causal model that writes "7" behind a prompt, then "8", a stop token, or "7" again for three tokens."""
    seven, eight = (TOKENIZER(text, add_special_tokens=False)["input_ids"][0] for text in "78")
    following = [seven] * 512
    following[seven], following[eight] = eight, TOKENIZER.eos_token_id
    model = chain_model(following, layers)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    return model


@pytest.fixture(scope="module")
def model():
    return writer()


def run(model, output, *curves, task=None, **kwargs):
    task = task or task_of(3, scorer=lambda text, reference: text == "78")
    return sweep(model, TOKENIZER, task, list(curves), output, **({"label": "seven", "chat": False} | kwargs))


def test_figures_are_those_counted_by_hand(model, tmp_path):
    output = tmp_path / "results.jsonl"
    points = run(model, output, PLAIN, LOOKUP, EARLY, ASSISTED, batch_size=2, assistant=(writer(1), TOKENIZER))
    plain, lookup, early, assisted = points
    assert all(point["samples"]["tokens"] == [2] * 3 and point["accuracy"] == 100.0 for point in points)
    assert plain["samples"]["forwards"] == lookup["samples"]["forwards"] == [3] * 3  # two digits and the stop token
    assert plain["tpf"] == plain["tpf_reference"] == round(2 / 3, 4)
    assert plain["positions_per_token"] == (3 + 1 + 1) / 2
    # Three drafts, of which the last is the stop token: one forward.
    for point in (early, assisted):
        assert point["samples"]["forwards"] == [1] * 3 and point["samples"]["draft_forwards"] == [3] * 3
        assert (point["tpf"], point["draft_forwards_per_token"]) == (2.0, 1.5)
        assert point["draft_positions_per_token"] == (3 + 1 + 1) / 2
    assert plain["draft_positions_per_token"] == 0
    assert plain["samples"]["draft_forwards"] == [0] * 3 and "equal_to_plain" not in plain["samples"]
    assert all(point["samples"]["equal_to_plain"] == [1] * 3 for point in points[1:])
    assert [point["provenance"]["batch_size"] for point in points] == [2, 1, 1, 1]
    assert [point["method"] for point in points] == ["ar", "ar_prompt_lookup", "early", "ar_assistant"]
    assert read_points(output) == points and len(curves(points)) == 4
    assert run(model, output, PLAIN, ASSISTED, batch_size=2, assistant=(writer(1), TOKENIZER)) == [plain, assisted]
    # Another assistant is another point; curves of the two are told apart by their labels.
    (other,) = run(model, output, ASSISTED, assistant=(writer(3), TOKENIZER))
    assert key_of(other) != key_of(assisted)
    with pytest.raises(ValueError, match="must have the same `assistant_fingerprint`"):
        curves([assisted, other])
    # The leaderboard marks these rows, and ranks them as all others.
    board = build_board(points)
    assert [entry.method for entry in board.tasks[0].entries] == ["ar_assistant", "early", "ar", "ar_prompt_lookup"]
    text = markdown(document(board, ()))
    assert "| early (AR) | seven |" in text and "Rows marked AR are causal models" in text
    assert "| 1.50 | 2.5 | 100.0 % |" in text and "Draft forwards per token | Draft positions per token" in text
    assert all(entry["autoregressive"] for entry in figures(board)["tasks"][0]["entries"])


def test_a_sweep_that_was_interrupted_goes_on(model, tmp_path):
    output, judged = tmp_path / "results.jsonl", []

    def judge(text, reference, stop=True):
        judged.append(text)
        if stop and len(judged) == 2:
            raise KeyboardInterrupt
        return text == "78"

    judge.__name__ = patient.__name__
    with pytest.raises(KeyboardInterrupt):
        run(model, output, EARLY, task=task_of(3, scorer=judge))
    (point,) = run(model, output, EARLY, task=task_of(3, scorer=patient))
    assert point["samples"]["draft_forwards"] == [3] * 3 and point["samples"]["equal_to_plain"] == [1] * 3
    assert point["draft_positions_per_token"] == (3 + 1 + 1) / 2


def patient(text, reference):
    return text == "78"


def test_drafts_that_change_the_answer_end_the_sweep(model, tmp_path, monkeypatch):
    generate = module.generate

    def wrong(*args, **kwargs):
        output = generate(*args, **kwargs)
        if kwargs.get("method") == "ar_prompt_lookup":
            output.sequences[:, -2] = 5
        return output

    monkeypatch.setattr(module, "generate", wrong)
    with pytest.raises(ArithmeticError, match="ar_prompt_lookup must give the tokens of plain greedy decoding"):
        run(model, tmp_path / "results.jsonl", LOOKUP)


def test_what_is_drawn_repeats_by_the_seed_of_the_task(tmp_path):
    model = causal_model(vocab_size=512)
    drawn = Curve("ar_prompt_lookup", settings={"do_sample": True, "temperature": 2.0})
    (one,), (two,) = (
        run(model, tmp_path / f"{name}.jsonl", drawn, task=task_of(3, lambda *_: True), max_new_tokens=4)
        for name in ("a", "b")
    )
    assert without_times(one) == without_times(two)
    assert one["provenance"]["batch_size"] == 1 and "equal_to_plain" not in one["samples"]


def test_a_stop_string_ends_the_answer_of_every_method_alike(model, tmp_path):
    task = copy.copy(task_of(2, lambda text, _: text == "7"))
    type_of = type("WithStops", (type(task),), {"stop_strings": ("7",)})
    stopped = type_of(**vars(task))
    points = run(model, tmp_path / "results.jsonl", PLAIN, EARLY, task=stopped)
    assert [point["samples"]["tokens"] for point in points] == [[1, 1]] * 2
    assert [point["samples"]["forwards"] for point in points] == [[1, 1]] * 2
    assert all(point["accuracy"] == 100.0 for point in points)


def test_an_assistant_of_another_vocabulary(model, tmp_path):
    other = causal_model(vocab_size=520)
    points = run(model, tmp_path / "results.jsonl", ASSISTED, assistant=(other, TOKENIZER), max_new_tokens=2)
    assert points[0]["samples"]["equal_to_plain"] == [1] * 3
    renamed = copy.deepcopy(TOKENIZER)
    renamed.add_tokens(["<another>"])
    with pytest.raises(ValueError, match="`assistant` must have the target's tokenizer, or a vocabulary of another"):
        run(model, tmp_path / "other.jsonl", ASSISTED, assistant=(writer(1), renamed))


@pytest.mark.full
def test_a_draft_head_drafts_and_is_part_of_what_a_point_is_known_by(tmp_path):
    (target, head), tree = recorded_pair(), {"total_tokens": 14, "depth": 2, "draft_top_k": 3}
    curve, output = Curve("eagle3", settings=tree), tmp_path / "results.jsonl"
    plain, drafted = run(target, output, PLAIN, curve, draft_head=head, batch_size=2, max_new_tokens=12)
    assert drafted["samples"]["equal_to_plain"] == [1] * 3
    assert drafted["samples"]["tokens"] == plain["samples"]["tokens"]
    forwards, drafts = (drafted["samples"][name] for name in ("forwards", "draft_forwards"))
    assert drafts == [3 * (count - 1) for count in forwards]  # of each tree
    tokens = sum(plain["samples"]["tokens"])
    assert drafted["positions_per_token"] == round((3 * 3 + 14 * (sum(forwards) - 3)) / tokens, 2)
    assert drafted["draft_positions_per_token"] > drafted["draft_forwards_per_token"] > 0
    assert drafted["provenance"]["batch_size"] == 1
    head = copy.deepcopy(head)
    head.norm.weight.mul_(2)
    (other,) = run(target, output, curve, draft_head=head, max_new_tokens=12)
    assert key_of(other) != key_of(drafted)
    with pytest.raises(ValueError, match="must have the same `draft_head_fingerprint`"):
        curves([drafted, other])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (CAREFUL, "llada: `model` must decode by diffusion for 'llada' .got LlamaForCausalLM"),
        (Curve("ar_mtp"), "ar_mtp: The method 'ar_mtp' needs a checkpoint with `num_mtp_layers`"),
        (ASSISTED, "ar_assistant: `assistant_model` must be given"),
        (Curve("eagle3"), "eagle3: `model` must have at least 7 layers, of which EAGLE-3 reads three .got 2"),
        (Curve("ar", "x", {"block_length": 4}), "x: `block_length` must be a setting of ar"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_is_decoded(model, tmp_path, curve, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        run(model, tmp_path / "results.jsonl", PLAIN, curve)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_diffusion_model_and_an_idle_assistant_are_refused(model, tmp_path):
    with pytest.raises(TypeError, match=r"ar: `model` must be a causal model for the method 'ar' \(got ScriptedModel"):
        run(sure_model(), tmp_path / "results.jsonl", PLAIN)
    for option, method in (("assistant", "ar_assistant"), ("draft_head", "eagle3")):
        with pytest.raises(ValueError, match=rf"`{option}` drafts with '{method}' \(got it with \['ar'\]\)"):
            run(model, tmp_path / "results.jsonl", PLAIN, **{option: (model, TOKENIZER)})
    with pytest.raises(ValueError, match=r"leave room for the longest prompt in the model's 512 positions"):
        run(model, tmp_path / "results.jsonl", PLAIN, max_new_tokens=512)


def test_curves_have_a_grid_only_where_one_is_asked_for():
    assert PLAIN.points(8) == [(None, None, {"decoding_method": "ar"})]
    (found,) = curves_of([("x", "ar_prompt_lookup", {})], grids={"prompt_lookup_num_tokens": [3, 10]})
    assert [(name, value) for name, value, _ in found.points(8)] == [
        ("prompt_lookup_num_tokens", 3), ("prompt_lookup_num_tokens", 10)
    ]  # fmt: skip
    plain, threshold = curves_of([("ar", "ar", {}), ("d", "d3llm", {})], thresholds=[0.3])
    assert (plain.swept, threshold.values) == (None, (0.3,))
    assert curves_of([("ar", "ar", {})], no_grid=True)[0].points(8) == PLAIN.points(8)
    with pytest.raises(ValueError, match="`parameter` must be a setting of ar_prompt_lookup"):
        Curve("ar_prompt_lookup", parameter="block_length", values=(1,))
    check_settings({"decoding_method": "ar"}, 8)
    with pytest.raises(ValueError, match="p: `prompt_lookup_num_tokens` must be a positive integer"):
        check_settings({"decoding_method": "ar_prompt_lookup", "prompt_lookup_num_tokens": 0}, 8, what="p")


def test_samples_that_are_none_are_damage(model, tmp_path):
    (point,) = run(model, tmp_path / "results.jsonl", LOOKUP)
    for name, values in (("equal_to_plain", [0, 1, 2]), ("draft_forwards", [0, 0])):
        damaged = point | {"samples": point["samples"] | {name: values}}
        with pytest.raises(ValueError, match=f"samples of {name}"):
            check_point(damaged)


@pytest.fixture
def command(capsys):
    return partial(outcome_of, cli.main, capsys, "sweep")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    found = tmp_path_factory.mktemp("causal") / "seven"
    model.save_pretrained(found)
    TOKENIZER.save_pretrained(found)
    return found


@pytest.mark.full
def test_one_command_measures_a_diffusion_model_and_a_causal_one(command, folder, tmp_path):
    output = tmp_path / "results.jsonl"
    argv = ["d3llm-llada", f"seven={folder}", "--methods", "d3llm", "ar", "early=ar_early_exit:assistant_early_exit=1"]
    argv += ["ar_assistant", "--assistant", folder, "--grid", "entropy_threshold=0.3", "--num-samples", 2]
    argv += ["--max-new-tokens", 8, "--dtype", "float32", "-o", output]
    code, _, err = command(*argv)
    assert code == 0, err
    points = read_points(output)
    assert [(point["model"], point["method"]) for point in points] == [
        ("d3llm-llada", "d3llm"), ("seven", "ar"), ("seven", "early"), ("seven", "ar_assistant")
    ]  # fmt: skip
    assert "draft forwards and " in err.splitlines()[-1]
    assert len({json.dumps(point["num_samples"]) for point in points}) == 1


@pytest.mark.full
def test_one_command_measures_a_diffusion_model_and_a_draft_head(command, tmp_path):
    folder, output = tmp_path / "target", tmp_path / "results.jsonl"
    recorded_pair()[0].save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    argv = ["d3llm-llada", f"llama={folder}", "--methods", "d3llm", "ar", "tree=eagle3:total_tokens=9,depth=2"]
    argv += ["--draft-head", HEAD, "--grid", "entropy_threshold=0.3", "--grid", "draft_top_k=2,3", "--num-samples", 2]
    code, _, err = command(*argv, "--max-new-tokens", 8, "--dtype", "float32", "--batch-size", 1, "-o", output)
    assert code == 0, err
    points = read_points(output)
    assert [(point["model"], point["method"], point["value"]) for point in points] == [
        ("d3llm-llada", "d3llm", 0.3), ("llama", "ar", None), ("llama", "tree", 2), ("llama", "tree", 3)
    ]  # fmt: skip
    assert all(point["positions_per_token"] > 0 and point["tokens_per_second"] > 0 for point in points)
    assert err.splitlines()[-1].endswith("draft positions per token")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["FOLDER", "--methods", "ar", "d3llm"],
            "`--methods` must fit the models (got ['d3llm'] for diffusion models",
        ),
        (["d3llm-llada", "--methods", "ar", "d3llm"], "`--methods` must fit the models (got ['ar'] for causal models"),
        (["d3llm-llada", "--methods", "ar"], "got LLaDAModelLM, which decodes by diffusion"),
        (["FOLDER", "--methods", "d3llm"], "must be a LLaDA, Dream or d3LLM checkpoint (got LlamaModel"),
        (["FOLDER", "--methods", "ar", "--assistant", "FOLDER"], "`--assistant` drafts with 'ar_assistant' (got it"),
        (["FOLDER", "--methods", "ar", "--draft-head", "FOLDER"], "`--draft-head` drafts with 'eagle3' (got it"),
        (["FOLDER", "--methods", "eagle3", "--draft-head", "FOLDER"], "The config of a draft head must name"),
    ],
)
def test_models_and_methods_that_do_not_fit_are_refused(command, folder, tmp_path, argv, expected):
    words = [str(folder) if word == "FOLDER" else word for word in argv]
    code, _, err = command(*words, "--num-samples", 1, "-o", tmp_path / "results.jsonl")
    assert code == 2 and expected in err


def test_the_embedded_task_is_decoded_by_a_tiny_model_from_the_first_to_the_last_word(tmp_path):
    from d3llm_hf.evaluation.tasks.load import word_problems

    torch.manual_seed(0)
    model = causal_model(vocab_size=512)
    points = run(model, tmp_path / "results.jsonl", PLAIN, LOOKUP, task=word_problems(2), max_new_tokens=12)
    assert points[0]["samples"]["tokens"] == points[1]["samples"]["tokens"]
    assert points[1]["tpf"] >= points[0]["tpf"]
