"""The forward pass: equal to the reference code, bidirectional, indifferent to padding."""

import pytest
import torch
from families import DREAM, LLADA, VOCABULARY, equal_up_to_rounding, flat, gradients, largest_difference, tokens
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from d3llm_hf.models import modeling_common
from d3llm_hf.models.cache_name import CACHE, CACHE_NAMES
from d3llm_hf.models.layers import can_narrow
from d3llm_hf.models.modeling_common import dense_mask, positions_of


@pytest.fixture(scope="session")
def trained(backend):
    """`trained(family)`: the recorded checkpoint on this backend, loaded once."""
    models = {}

    def load(family):
        if family.name not in models:
            model = family.model_class.from_pretrained(family.checkpoint, attn_implementation=backend)
            models[family.name] = model.eval()
        return models[family.name]

    return load


@pytest.mark.parametrize("case", ["plain1", "batch3", "random2"])
def test_logits_are_those_of_the_reference_code(family, trained, case):
    recorded = family.recorded()
    with torch.no_grad():
        logits = trained(family)(recorded[f"{case}/input_ids"].long()).logits
    assert equal_up_to_rounding(logits, recorded[f"{case}/logits"])


def test_hidden_states_are_those_of_the_reference_code(family, trained):
    recorded = family.recorded()
    with torch.no_grad():
        states = trained(family)(recorded["plain1/input_ids"].long(), output_hidden_states=True).hidden_states
    assert len(states) == trained(family).config.num_hidden_layers + 1
    for index, state in enumerate(states):
        assert equal_up_to_rounding(state, recorded[f"plain1/hidden{index}"])


@pytest.mark.every(3)
@pytest.mark.parametrize("case", ["plain1", "batch3"])
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_the_reference_code(family, backend, case):
    """A logit in bfloat16 moves by 0.5 with the order of a sum, so only the mean distance can be held to the recorded
    one (about 0.03); Dream was recorded with frequencies in bfloat16 as well, which here stay in float32."""
    recorded = family.recorded()
    model = family.model_class.from_pretrained(family.checkpoint, dtype=torch.bfloat16, attn_implementation=backend)
    with torch.no_grad():
        logits = model.eval()(recorded[f"{case}/input_ids"].long()).logits
    assert logits.dtype is torch.bfloat16
    exact = recorded[f"{case}/logits"]
    ours, theirs = ((half.float() - exact).abs() for half in (logits, recorded[f"{case}/logits_bf16"]))
    assert ours.mean() <= 1.5 * theirs.mean()
    assert ours.max() < 1


@pytest.mark.parametrize("kind", ["bool", "integer", "added"])
def test_a_4d_mask_gives_the_logits_of_the_reference_code(trained, backend, kind):
    """Recorded for Dream only: the reference's LLaDA takes no mask. Rows of padding mean nothing."""
    recorded, model = DREAM.recorded(), trained(DREAM)
    seen = recorded["padded_bool4d/attention_mask"].bool()
    mask = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, 1, -1, -1)
    if kind == "integer":
        mask = mask.long()
    elif kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float).min)
    with torch.no_grad():
        logits = model(recorded["padded_bool4d/input_ids"].long(), attention_mask=mask).logits
    assert equal_up_to_rounding(logits[seen], recorded["padded_bool4d/logits"][seen])


def test_a_2d_mask_and_the_same_mask_in_4d_give_the_same_logits(family, trained):
    model, ids = trained(family), tokens(2, 9)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    full = (mask[:, None, None, :] == 1).expand(-1, 1, 9, -1)
    with torch.no_grad():
        flat = model(ids, attention_mask=mask).logits
        deep = model(ids, attention_mask=full, position_ids=positions_of(mask)).logits
    assert equal_up_to_rounding(flat[mask == 1], deep[mask == 1])


def test_windows_on_a_cache_give_the_logits_of_the_reference_code(family, trained):
    recorded, model = family.recorded(), trained(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(recorded["cache_a/input_ids"].long(), past_key_values=cache).logits
        assert equal_up_to_rounding(logits, recorded["cache_a/logits"])
        cache.crop(20 - 56)
        assert equal_up_to_rounding(cache.layers[0].keys, recorded["cache_a/layer0_k"])
        assert equal_up_to_rounding(cache.layers[0].values, recorded["cache_a/layer0_v"])
        for case, keep in (("cache_b", 20), ("cache_c", 36), ("cache_d", 36)):
            output = model(recorded[f"{case}/input_ids"].long(), past_key_values=cache)
            assert output[CACHE] is cache
            assert equal_up_to_rounding(output.logits, recorded[f"{case}/logits"])
            cache.crop(keep - 56)
        # Tokens 28 to 35 lie in the cache as well: each then has two keys, at the right position.
        ids = recorded["cache_e_overlap/input_ids"].long()
        logits = model(ids, past_key_values=cache, position_ids=torch.arange(28, 56)[None]).logits
        assert equal_up_to_rounding(logits, recorded["cache_e_overlap/logits"])


@pytest.mark.parametrize("padding", [0, 3], ids=["unpadded", "padded"])
def test_the_last_token_moves_the_first_logit(family, backend, padding):
    model, ids = family.tiny(backend), tokens(1, 8)
    mask = torch.tensor([[0] * padding + [1] * (8 - padding)]) if padding else None
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(x, attention_mask=mask).logits[0, padding] for x in (ids, changed))
    assert largest_difference(before, after) > 1e-3


def test_asking_for_causal_attention_changes_nothing(tiny):
    ids = tokens(1, 8)
    assert torch.equal(tiny(ids).logits, tiny(ids, is_causal=True).logits)


@pytest.mark.slow
def test_flex_attention_gives_the_logits_of_sdpa(family):
    """With heads of 32 and 32 tokens: torch's CPU kernel is wrong (or NaN) for less of both."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family is LLADA:
        shape = {"d_model": 64, "n_heads": 2, "n_kv_heads": 1}
    ids, mask = tokens(2, 32), torch.ones(2, 32, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        sdpa, flex = (
            family.tiny(name, **shape)(ids, attention_mask=mask).logits for name in ("sdpa", "flex_attention")
        )
    assert largest_difference(sdpa[mask == 1], flex[mask == 1]) <= 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_ones(family, backend, side):
    model, ids, lengths = family.tiny(backend), tokens(3, 10), (4, 10, 7)
    pad = [10 - length for length in lengths]
    mask = torch.tensor([[0] * p + [1] * (10 - p) if side == "left" else [1] * (10 - p) + [0] * p for p in pad])
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row, mask[row] == 1][None]).logits[0]
            assert equal_up_to_rounding(batch[row, mask[row] == 1], alone)


def test_a_padded_prefix_in_a_cache_continues_as_the_unpadded_one_does(family, backend):
    model, ids = family.tiny(backend), tokens(2, 10)
    mask = torch.tensor([[0, 0, 0] + [1] * 7, [1] * 10])
    with torch.no_grad():
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)[CACHE]
        batch = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
        for row, start in ((0, 3), (1, 0)):
            cache = model(ids[row : row + 1, start:6], use_cache=True)[CACHE]
            alone = model(ids[row : row + 1, 6:], past_key_values=cache).logits
            assert equal_up_to_rounding(batch[row], alone[0])


@pytest.mark.parametrize("padding", [0, 2], ids=["unpadded", "padded"])
def test_position_ids_never_reach_the_attention_backend(family, padding):
    """Flash-attention takes a row whose positions do not rise one by one for several packed sequences."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = family.tiny("spy")
    with torch.no_grad():
        mask = torch.tensor([[0] * padding + [1] * (6 - padding)])
        cache = model(tokens(1, 6), attention_mask=mask, use_cache=True)[CACHE]
        model(tokens(1, 2), position_ids=torch.tensor([[3, 9]]), past_key_values=cache)
    assert len(seen) == 2 * model.config.num_hidden_layers
    for kwargs in seen:
        assert kwargs["is_causal"] is False
        assert not _is_packed_sequence(kwargs.get("position_ids"), batch_size=1)


def test_a_4d_mask_is_refused_where_flash_attention_would_misread_it(tiny):
    tiny.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`attention_mask` must be 2-D .*'flash_attention_2' \(got 4-D\)\. Pass a"):
        tiny(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_dense_mask_takes_the_form_that_each_backend_reads():
    mask = torch.tensor([[[[1, 0]]]])
    assert dense_mask(mask, torch.float, "sdpa").tolist() == [[[[True, False]]]]
    for name in ("eager", "flex_attention"):
        added = dense_mask(mask.bool(), torch.bfloat16, name)
        assert (
            added.dtype is torch.bfloat16 and added[..., 0] == 0 and added[..., 1] == torch.finfo(torch.bfloat16).min
        )
        assert dense_mask(added, torch.float, name) is added


def test_exactly_one_of_token_ids_and_embeddings_is_required(tiny):
    for given in ({}, {"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}):
        with pytest.raises(
            ValueError, match=r"exactly one of `input_ids` and `inputs_embeds` \(got both or neither\)"
        ):
            tiny(**given)


def test_embeddings_give_the_logits_of_their_token_ids(tiny):
    ids = tokens(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    embeddings = tiny.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = tiny(ids, attention_mask=mask).logits
        assert torch.equal(tiny(inputs_embeds=embeddings, attention_mask=mask).logits, expected)


def test_logits_to_keep_selects_the_same_logits_in_each_of_its_forms(tiny):
    ids = tokens(2, 6)
    marked = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    own = torch.tensor([[4, 0], [1, 5]])
    with torch.no_grad():
        everything = tiny(ids).logits
        forms = [
            (0, everything),
            (2, everything[:, -2:]),
            (torch.tensor([1, 4, 4]), everything[:, [1, 4, 4]]),
            (own, everything[torch.arange(2)[:, None], own]),
            (marked, everything[marked]),
            (torch.zeros_like(marked), everything[:0, 0]),
        ]
        for row in (marked[:1], marked[1:], torch.zeros(1, 6, dtype=torch.bool)):  # a batch of one
            assert equal_up_to_rounding(tiny(ids[:1], logits_to_keep=row).logits, everything[:1][row])
        for form, expected in forms:
            kept = tiny(ids, logits_to_keep=form).logits
            assert equal_up_to_rounding(kept, expected)


def test_the_head_runs_only_at_the_positions_to_keep(tiny):
    rows = []
    tiny.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape))
    tiny(tokens(2, 6), logits_to_keep=torch.eye(2, 6, dtype=torch.bool))
    assert rows == [(2, 32)]


KEPT = {
    "mask": torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool),
    "index": torch.tensor([[5, 2, 3], [5, 5, 6]]),
}


@pytest.mark.parametrize("form", sorted(KEPT))
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_the_last_layer_computes_keys_for_all_and_the_rest_for_the_positions_to_keep(family, backend, form, padding):
    model = family.tiny(attn_implementation=backend)
    kept, ids = KEPT[form], tokens(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]) if padding else None
    with torch.no_grad():
        everything = model(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=kept)
        rows, first, last = {}, model.model.layers[0], model.model.layers[-1]
        for name, module in (
            ("first", first.mlp),
            ("mlp", last.mlp),
            ("query", last.self_attn.q_proj),
            ("key", last.self_attn.k_proj),
        ):
            module.register_forward_hook(lambda _, args, output, name=name: rows.update({name: args[0].shape[1]}))
        found = model(ids, attention_mask=mask, logits_to_keep=kept)
    assert [state.shape[1] for state in everything.hidden_states] == [7] * 3  # what is recorded is of all positions
    assert rows == {"first": 7, "key": 7, "query": 3, "mlp": 3}
    assert equal_up_to_rounding(found.logits, everything.logits)


def test_gradients_do_not_depend_on_what_the_last_layer_leaves_out(family):
    kept, ids = KEPT["mask"], tokens(2, 7)

    def found(**recorded):
        model = family.tiny()
        return gradients(model, lambda: model(ids, logits_to_keep=kept, **recorded).logits.square().sum())

    narrow, whole = found(), found(output_hidden_states=True)
    assert narrow.keys() == whole.keys() == dict(family.tiny().named_parameters()).keys()
    assert equal_up_to_rounding(flat(narrow), flat(whole))


def test_a_mask_that_has_no_rows_of_queries_leaves_the_last_layer_whole(tiny, monkeypatch):
    """Flash-attention's padding mask: which queries it holds depends on how many there are."""
    ids, kept = tokens(2, 7), KEPT["mask"]
    widths = []
    tiny.model.layers[-1].mlp.register_forward_hook(lambda _, args, output: widths.append(args[0].shape[1]))
    with torch.no_grad():
        expected = tiny(ids).logits[kept]
        monkeypatch.setattr(modeling_common, "can_narrow", lambda mask: False)
        assert equal_up_to_rounding(tiny(ids, logits_to_keep=kept).logits, expected)
    assert widths == [7, 7]
    assert not can_narrow(torch.ones(2, 7))
    assert can_narrow(torch.ones(2, 1, 7, 7)) and can_narrow(None)


def test_labels_give_the_unshifted_cross_entropy(tiny):
    ids, labels = tokens(2, 6), tokens(2, 6, seed=1)
    labels[0, :3] = -100
    output = tiny(ids, labels=labels)
    chosen = labels != -100
    expected = cross_entropy(output.logits[chosen], labels[chosen])
    assert torch.allclose(output.loss, expected)
    summed = tiny(ids, labels=labels, num_items_in_batch=torch.tensor(20)).loss
    assert torch.allclose(summed, expected * chosen.sum() / 20)


def test_attentions_are_returned_by_eager_attention_and_reach_every_token(family):
    model = family.tiny("eager")
    attentions = model(tokens(2, 5), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(2, 4, 5, 5)] * 2
    for layer in attentions:
        assert torch.allclose(layer.sum(-1), torch.ones(2, 4, 5))
        assert (layer > 0).all()


def test_hidden_states_are_returned_only_on_request(tiny):
    assert tiny(tokens(1, 4)).hidden_states is None
    states = tiny(tokens(1, 4), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 4, 32)] * 3


def test_outputs_are_a_tuple_on_request(tiny):
    ids = tokens(1, 4)
    assert torch.equal(tiny(ids, use_cache=False, return_dict=False)[0], tiny(ids).logits)


def test_a_cache_is_made_on_request_and_what_is_given_comes_back(tiny):
    assert tiny(tokens(1, 4), use_cache=False).get(CACHE) is None
    assert tiny(tokens(1, 4), use_cache=True)[CACHE].get_seq_length() == 4


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_taken_under_either_of_transformers_names_and_given_back_under_the_one_that_holds(tiny, name):
    cache = DynamicCache(config=tiny.config)
    assert tiny(tokens(1, 4), use_cache=False, **{name: cache})[CACHE] is cache
    assert tiny.model(tokens(1, 2), **{name: cache})[CACHE].get_seq_length() == 6
    assert tiny.model(tokens(1, 2), **{name: None}, use_cache=False).last_hidden_state.shape[1] == 2


def test_a_cache_under_both_names_is_refused(tiny):
    cache = DynamicCache(config=tiny.config)
    with pytest.raises(ValueError, match=rf"two names of one argument.*says `{CACHE}`"):
        tiny(tokens(1, 4), cache=cache, past_key_values=cache)


def test_the_backend_can_be_changed_on_a_loaded_model(tiny):
    ids = tokens(1, 6)
    with torch.no_grad():
        before = tiny(ids).logits
        tiny.set_attn_implementation("eager")
        assert tiny.config._attn_implementation == "eager"
        assert equal_up_to_rounding(tiny(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(family, backend, dtype):
    ids = tokens(2, 7)
    with torch.no_grad():
        wide = family.tiny(backend)(ids).logits
        half = family.tiny(backend).to(dtype)(ids).logits
    assert half.dtype is dtype
    # As a whole, in steps of the data type: how far one logit strays depends on the weights that are drawn.
    assert (half.float() - wide).norm() <= 16 * torch.finfo(dtype).eps * wide.norm()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_float32_when_the_model_is_cast(family, cast):
    rotary = family.tiny().to(cast).model.rotary_emb
    positions = torch.arange(1000, 1003)[None]
    cos, _ = rotary(torch.zeros(1, 3, 32, dtype=torch.float), positions)
    frequencies = family.config().rope_theta ** -(torch.arange(0, 8, 2) / 8)
    assert rotary.inv_freq.dtype is torch.float
    assert torch.allclose(cos[0, :, :4], (positions[0, :, None] * frequencies).cos(), atol=1e-4)


def test_llada_rotates_in_float32_whatever_the_dtype_of_the_model():
    cos, sin = (
        LLADA.tiny().to(torch.bfloat16).model.rotary_emb(torch.zeros(1, 3, 32).bfloat16(), torch.arange(3)[None])
    )
    assert cos.dtype is sin.dtype is torch.float32
