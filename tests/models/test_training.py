"""Training: gradients, checkpointing of activations, adapters."""

import pytest
import torch
from families import DREAM, LLADA, SDAR, equal_up_to_rounding, flat, gradients, largest_difference, tokens


peft = pytest.importorskip("peft")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=[LLADA, DREAM, SDAR], ids=lambda family: family.name)
def family(request):
    return request.param


def loss_of(model):
    return model(tokens(2, 6), labels=tokens(2, 6, seed=1)).loss


def test_every_weight_gets_a_gradient(tiny):
    tiny.train()
    found = gradients(tiny, lambda: loss_of(tiny))
    assert found.keys() == dict(tiny.named_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tiny, reentrant):
    tiny.train()
    plain = gradients(tiny, lambda: loss_of(tiny))
    tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiny.enable_input_require_grads()
    runs = []
    tiny.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients(tiny, lambda: loss_of(tiny))
    assert len(runs) == 2  # forwards, and once more on the way back
    assert checkpointed.keys() == plain.keys()
    assert equal_up_to_rounding(flat(checkpointed), flat(plain))


def test_padding_gets_no_share_in_the_gradient(tiny):
    """What stands in the padding must not change what is learnt."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    found = []
    for filler in (3, 4):
        ids, labels = tokens(1, 6), tokens(1, 6, seed=1)
        ids[0, :2], labels[0, :2] = filler, -100
        found.append(
            gradients(tiny, lambda ids=ids, labels=labels: tiny(ids, attention_mask=mask, labels=labels).loss)
        )
    assert equal_up_to_rounding(flat(found[0]), flat(found[1]))


def adapted(model, target_modules):
    """The model with an adapter that is not the identity, as it is after some training."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("target_modules", ["all-linear", list(PROJECTIONS)], ids=["all-linear", "named"])
def test_an_adapter_reaches_every_projection_and_learns_in_each(tiny, target_modules):
    model = adapted(tiny, target_modules)
    layers = model.config.num_hidden_layers
    reached = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert sorted(name.rpartition(".")[2] for name in reached) == sorted(PROJECTIONS * layers)
    found = gradients(model.train(), lambda: loss_of(model))
    assert len(found) == 2 * len(PROJECTIONS) * layers
    assert all("lora_" in name and gradient.abs().sum() > 0 for name, gradient in found.items())


def test_an_adapter_learns_under_gradient_checkpointing(tiny):
    tiny.gradient_checkpointing_enable({"use_reentrant": True})
    tiny.enable_input_require_grads()
    model = adapted(tiny, "all-linear").train()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, lambda: loss_of(model)).values())


def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_model(family, tmp_path):
    model = adapted(family.tiny(), "all-linear")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(family.tiny(), tmp_path).eval()
    ids = tokens(1, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert largest_difference(model(ids).logits, family.tiny()(ids).logits) > 1e-3


def test_a_merged_adapter_is_saved_as_an_official_checkpoint(family, tmp_path):
    model = adapted(family.tiny(), "all-linear")
    ids = tokens(1, 6)
    with torch.no_grad():
        expected = model(ids).logits
        model.merge_and_unload().save_pretrained(tmp_path)
        again = family.model_class.from_pretrained(tmp_path).eval()
        assert largest_difference(again(ids).logits, expected) <= 1e-4


def test_attention_dropout_acts_in_training_only(family):
    model = family.tiny(attention_dropout=0.5)
    ids = tokens(1, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
