"""What a server says of its memory before any request comes."""

from d3llm_hf.serving.room import room


def test_rows_positions_keys_and_logits_are_named(loaded):
    model, _ = loaded
    text = room(model, 8, 100, 28)
    assert text.startswith("at most 8 rows at work, of 128 positions each: keys and values ")
    config = model.config
    kept = 2 * config.n_layers * (config.d_model // config.n_heads) * (config.n_kv_heads or config.n_heads) * 4
    assert f"keys and values {8 * 128 * kept / 2**20:.1f} MiB with a cache" in text


def test_the_models_positions_are_a_limit(loaded):
    limit = loaded[0].max_positions
    assert f"of {limit} positions each" in room(loaded[0], 2, limit, limit)
