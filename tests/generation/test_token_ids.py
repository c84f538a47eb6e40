"""Token ids outside the vocabulary are refused by name, whoever set them, before the model runs."""

import json
import shutil

import pytest
import torch
from families import DREAM, LLADA
from tiny import EOS, MASK, PAD, ScriptedModel, answer, constant_script, tiny_model, trained_like
from transformers import AutoModel

from d3llm_hf import D3LLMGenerationConfig, export_checkpoint, is_greedy, log_likelihood


OUTSIDE = [
    {"mask_token_id": 32},
    {"pad_token_id": 32},
    {"pad_token_id": -1},
    {"bos_token_id": 99},
    {"eos_token_id": 32},
    {"eos_token_id": -1},
    {"eos_token_id": [EOS, 40]},
    {"eos_token_id": torch.tensor([EOS, 40])},
    {"forced_bos_token_id": 32},
    {"forced_eos_token_id": 32},
    {"forced_eos_token_id": [EOS, -2]},
]


@pytest.fixture
def scripted():
    """A model that must not be called."""
    return ScriptedModel(constant_script([1] * 16, 2))


@pytest.mark.parametrize("fields", OUTSIDE, ids=str)
def test_a_token_outside_the_vocabulary_is_refused_by_every_way_of_saying_it(fields, scripted):
    name, value = next(iter(fields.items()))
    wrong = next(token for token in torch.as_tensor(value).flatten().tolist() if not 0 <= token < 32)
    message = rf"`{name}` must lie inside the vocabulary of 32 tokens \(got {wrong}\)"
    config = D3LLMGenerationConfig(**fields)
    ids = torch.tensor([[1, 2]])
    for refuse in (
        lambda: scripted.generate(ids, max_new_tokens=4, **fields),
        lambda: scripted.generate(ids, max_new_tokens=4, generation_config=config),
        lambda: scripted.check_settings(max_new_tokens=4, **fields),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert scripted.calls == 0


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "mask_token_id"])
def test_a_models_own_settings_are_called_its_own(name, scripted):
    setattr(scripted.generation_config, name, 77)
    with pytest.raises(ValueError, match=rf"`{name}` of the model's generation config .* 32 .*77.*generation_config"):
        scripted.generate(torch.tensor([[1, 2]]), max_new_tokens=4)
    right = {"pad_token_id": PAD, "eos_token_id": EOS, "mask_token_id": MASK}
    assert scripted.generate(torch.tensor([[1, 2]]), max_new_tokens=4, **{name: right[name]}).shape == (1, 6)


def test_a_checkpoints_first_token_is_asked_only_where_it_is_read(scripted):
    scripted.generation_config.bos_token_id = 77
    assert scripted.generate(torch.tensor([[1, 2]]), max_new_tokens=4).shape == (1, 6)


@pytest.mark.parametrize(
    "fields",
    [{"eos_token_id": "</s>"}, {"eos_token_id": [1.0]}, {"pad_token_id": [PAD, EOS]}, {"forced_bos_token_id": True}],
    ids=str,
)
def test_what_is_no_token_id_is_refused(fields, scripted):
    name = next(iter(fields))
    for refuse in (lambda: D3LLMGenerationConfig(**fields), lambda: answer(scripted, [1, 2], **fields)):
        with pytest.raises(TypeError, match=rf"`{name}` must be a token id"):
            refuse()
    assert scripted.calls == 0


def without(family, folder, *names):
    shutil.copytree(family.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in names:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_ids_that_are_filled_in_from_the_published_model_are_refused_where_they_do_not_fit(tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    model = AutoModel.from_pretrained(without(LLADA, tmp_path / "mask", "mask_token_id"))
    wanted = r"`mask_token_id` of the model's config must lie inside the vocabulary of 512 tokens \(got 126336\)"
    with pytest.raises(ValueError, match=wanted):
        model.generate(ids, max_new_tokens=4)
    assert model.generate(ids, max_new_tokens=4, mask_token_id=511).shape == (1, 7)
    folder = without(DREAM, tmp_path / "pad", "pad_token_id", "eos_token_id", "bos_token_id")
    with pytest.raises(ValueError, match=r"`pad_token_id` of the model's config .* 512 tokens \(got 151643\)"):
        AutoModel.from_pretrained(folder)
    assert AutoModel.from_pretrained(folder, pad_token_id=510).config.pad_token_id == 510


def test_an_end_that_config_json_names_wrongly_is_refused(tmp_path):
    folder = without(LLADA, tmp_path / "eos", "eos_token_id")
    (folder / "generation_config.json").unlink(missing_ok=True)
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"eos_token_id": 600}))
    with pytest.raises(ValueError, match=r"`eos_token_id` of the model's generation config .* 512 tokens \(got 600\)"):
        AutoModel.from_pretrained(folder).generate(torch.tensor([[1, 2]]), max_new_tokens=4)


def test_a_vocabulary_that_was_made_smaller_than_its_mask_token_is_told(tmp_path):
    for family in ("llada", "dream"):
        model = tiny_model(family)
        model.resize_token_embeddings(24)
        chosen = {"max_new_tokens": 4, "eos_token_id": 20, "pad_token_id": 20}
        with pytest.raises(ValueError, match=rf"`mask_token_id` of the model's config .* 24 tokens \(got {MASK}\)"):
            model.generate(torch.tensor([[1, 2]]), **chosen)
        assert model.generate(torch.tensor([[1, 2]]), mask_token_id=21, **chosen).shape == (1, 6)


@pytest.mark.parametrize("tokens", [[1, 32], [-100, 2]], ids=str)
def test_a_prompt_of_another_vocabulary_is_refused(tokens, scripted):
    with pytest.raises(
        ValueError, match=rf"`input_ids` must lie inside the vocabulary of 32 tokens.*{min(tokens)}|32"
    ):
        scripted.generate(torch.tensor([tokens]), attention_mask=torch.tensor([[0, 1]]), max_new_tokens=4)
    assert scripted.calls == 0


def test_no_stop_tokens_are_an_empty_list():
    model = ScriptedModel(constant_script([EOS] * 8, 2))
    output = answer(model, [1, 2], max_new_tokens=8, eos_token_id=[])
    assert output.sequences[0, 2:].tolist() == [EOS] * 8
    assert model.check_settings(max_new_tokens=8, eos_token_id=()).eos_token_id is None


@pytest.mark.parametrize("ask", [log_likelihood, is_greedy])
def test_likelihoods_refuse_them_as_well(ask):
    model, ids = trained_like("llada"), torch.tensor([[1, 2, 3]])
    completion = torch.tensor([[False, True, True]])
    with pytest.raises(ValueError, match=r"`mask_token_id` must lie inside the vocabulary of 32 tokens \(got 40\)"):
        ask(model, ids, completion, mask_token_id=40)
    with pytest.raises(TypeError, match="`mask_token_id` must be a token id"):
        ask(model, ids, completion, mask_token_id="[MASK]")
    with pytest.raises(ValueError, match=r"`input_ids` must lie inside the vocabulary of 32 tokens \(got 32\)"):
        ask(model, torch.tensor([[1, 2, 32]]), completion)


@pytest.mark.parametrize(
    "family, name, default",
    [(LLADA, "mask_token_id", 126336), (DREAM, "pad_token_id", 151643)],
    ids=["llada", "dream"],
)
def test_export_refuses_a_config_that_names_tokens_of_another_model(family, name, default, tmp_path):
    folder = without(family, tmp_path / "source", name)
    with pytest.raises(ValueError, match=rf"`{name}` of the model's config .* 512 tokens \(got {default}\)"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_generation_config_that_does(tmp_path):
    folder = shutil.copytree(LLADA.checkpoint, tmp_path / "source")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [510, 600]}))
    with pytest.raises(ValueError, match=r"`eos_token_id` of the model's generation config .* 512 tokens \(got 600\)"):
        export_checkpoint(folder, tmp_path / "out")


@pytest.mark.every(2)
@pytest.mark.parametrize("value", [3, [3], (3,), torch.tensor([3]), torch.tensor(3)], ids=repr)
def test_one_token_may_be_suppressed_in_every_form(value):
    chosen = {"suppress_tokens": value, "decoding_method": "llada", "early_stop": False}
    model = trained_like("llada")
    assert torch.equal(
        answer(model, [1, 2], **chosen).sequences,
        answer(model, [1, 2], **(chosen | {"suppress_tokens": [3]})).sequences,
    )


@pytest.mark.parametrize("value", [[3.5], "3", {3}, [[3]], [True]], ids=repr)
@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens"])
def test_what_is_suppressed_are_token_ids(name, value, scripted):
    with pytest.raises(TypeError, match=f"`{name}` must be a token id or a list of them"):
        answer(scripted, [1, 2], **{name: value})
