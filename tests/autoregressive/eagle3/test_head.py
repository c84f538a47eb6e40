"""Loading draft heads: the published format, and all that is no head."""

import json
import shutil

import pytest
import torch
from eagle3 import HEAD, tiny_head
from safetensors.torch import save_file

from d3llm_hf import Eagle3Head
from d3llm_hf.autoregressive.eagle3.checkpoint import HeadConfig
from d3llm_hf.autoregressive.eagle3.head import HeadCache


CONFIG = json.loads((HEAD / "config.json").read_text())


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return torch.load(HEAD / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def folder(tmp_path):
    """Writes a head: the recorded one's config, some of it replaced, and tensors."""

    def write(content, *, name="pytorch_model.bin", **config):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
        return tmp_path

    return write


def same(one: Eagle3Head, other: Eagle3Head) -> bool:
    tables = one.state_dict(), other.state_dict()
    return tables[0].keys() == tables[1].keys() and all(
        torch.equal(tables[0][key], tables[1][key]) for key in tables[0]
    )


def test_both_files_of_weights_are_read(folder, tensors):
    recorded = Eagle3Head.from_pretrained(HEAD)
    assert recorded.config.rope_theta == 10_000 and not recorded.training
    assert not any(weight.requires_grad for weight in recorded.parameters())
    assert same(Eagle3Head.from_pretrained(str(folder(tensors, name="model.safetensors"))), recorded)


def test_the_file_that_cannot_hold_code_comes_first(folder, tensors):
    folder(tensors, name="model.safetensors")
    assert Eagle3Head.from_pretrained(folder({"other": torch.zeros(1)})).dtype == torch.float32


def test_weights_have_one_dtype(folder, tensors):
    mixed = {key: value.bfloat16() if key == "fc.weight" else value for key, value in tensors.items()}
    head = Eagle3Head.from_pretrained(folder(mixed))
    assert {weight.dtype for weight in head.parameters()} == {torch.bfloat16}
    assert (head.dtype, head.device.type, head.d2t.dtype, head.t2d.dtype) == (
        torch.bfloat16, "cpu", torch.long, torch.bool,
    )  # fmt: skip


def test_draft_tokens_have_ids_of_the_target():
    head = Eagle3Head.from_pretrained(HEAD)
    ids = head.to_target(torch.arange(head.config.draft_vocab_size))
    assert torch.equal(ids, head.t2d.nonzero()[:, 0])
    tokens = torch.tensor([[1, 2]])
    assert torch.equal(tiny_head(draft_vocab_size=12).to_target(tokens), tokens)


def test_an_embedding_in_the_file_is_the_heads_own(folder, tensors):
    table = torch.arange(512.0 * 48).view(512, 48)
    head = Eagle3Head.from_pretrained(folder(tensors | {"embed_tokens.weight": table}))
    assert torch.equal(head.embed_tokens.weight, table)
    assert Eagle3Head.from_pretrained(HEAD).embed_tokens is None


@pytest.mark.parametrize(
    ("given", "theta", "factor"),
    [
        ({"rope_theta": 500.0}, 500, 1),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10_000, 4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7, 1),
    ],
)
def test_rotations_are_read(given, theta, factor):
    config = HeadConfig.from_dict(CONFIG | given)
    assert (config.rope_theta, config.rope_factor) == (theta, factor)


def test_a_linear_rotation_divides_the_positions():
    plain, scaled = tiny_head(), tiny_head(rope_scaling={"type": "linear", "factor": 4.0})
    x, visible = torch.randn(3, 16), torch.ones(3, 3, dtype=torch.bool)
    with torch.no_grad():
        found = scaled(x, x, torch.tensor([0, 4, 8]), visible, HeadCache())
        assert torch.equal(found, plain(x, x, torch.arange(3), visible, HeadCache()))


def test_what_is_fed_at_once_is_what_is_fed_one_by_one():
    head, cache = tiny_head(), HeadCache()
    hidden, embedded = torch.randn(2, 5, 16)
    with torch.no_grad():
        whole = head(hidden, embedded, torch.arange(5), torch.ones(5, 5).tril().bool(), HeadCache())
        assert cache.length == 0
        cache.keep(0)
        for place in range(5):
            head(embedded[:1], hidden[:1], torch.tensor([9]), torch.ones(1, place + 1).bool(), cache)
            cache.keep(place)  # a tree that is dropped again
            visible = torch.ones(1, place + 1, dtype=torch.bool)
            one = head(hidden[place, None], embedded[place, None], torch.tensor([place]), visible, cache)
            assert (one[0] - whole[place]).abs().max() <= 1e-5 * whole.abs().max()


# ---- bad input -----------------------------------------------------------------------------------------------------


class Anything:
    """What a pickle may hold."""


def test_a_pickle_with_more_than_tensors_is_refused(folder):
    with pytest.raises(ValueError, match="The weights of a draft head must be whole, and tensors alone"):
        Eagle3Head.from_pretrained(folder({"fc.weight": Anything()}))
    with pytest.raises(ValueError, match="must be a table of tensors"):
        Eagle3Head.from_pretrained(folder({"fc.weight": 1.0}))
    with pytest.raises(ValueError, match="must be a table of tensors"):
        Eagle3Head.from_pretrained(folder([torch.zeros(1)]))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("length", [0, 100])
def test_a_damaged_file_is_refused(folder, tensors, name, length):
    path = folder(tensors, name=name) / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"must be whole, .*{name}"):
        Eagle3Head.from_pretrained(path.parent)


def test_tensors_that_do_not_fit_are_refused(folder, tensors):
    def refused(content, message, **config):
        with pytest.raises(ValueError, match=message):
            Eagle3Head.from_pretrained(folder(content, **config))

    few = {key: value for key, value in tensors.items() if key != "norm.weight"}
    refused(few, r"must hold the tensors of EAGLE-3 .* without norm\.weight")
    refused(tensors | {"layers.0.x": torch.zeros(1)}, r"with layers\.0\.x, which has no place")
    refused(tensors, "with d2t, t2d, which has no place", vocab_size=40)
    refused(tensors, "must have the shape", draft_vocab_size=41)
    refused(tensors | {"d2t": tensors["d2t"] * 0}, "`d2t` and `t2d` must name the same tokens")
    refused(tensors, "must hold `embed_tokens.weight`", target_hidden_size=64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_vocab_size": None}, "must name .* without draft_vocab_size"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers` of a draft head must be 1 .got 2"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "must be plain or linear .got 'dynamic'"),
    ],
)
def test_configs_of_other_heads_are_refused(folder, tensors, given, message):
    with pytest.raises(ValueError, match=message):
        Eagle3Head.from_pretrained(folder(tensors, **given))


def test_folders_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"A draft head must have a config\.json"):
        Eagle3Head.from_pretrained(tmp_path)
    shutil.copy(HEAD / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must have its weights in model\.safetensors or pytorch_model\.bin"):
        Eagle3Head.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`revision` has no effect on a folder .got 'main'"):
        Eagle3Head.from_pretrained(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["no/such-head", "/no/such/folder"])
def test_names_of_nothing_are_refused(name):
    with pytest.raises(FileNotFoundError, match=f"`name` must be the folder of a draft head .*got '{name}'"):
        Eagle3Head.from_pretrained(name)
