"""Batches, and text that is held back until it cannot become a stop string."""

import threading

import pytest

from d3llm_hf.serving.admission import with_settings
from d3llm_hf.serving.follower import free_of_stops
from d3llm_hf.serving.jobs import Answer, Job, Piece
from d3llm_hf.serving.metrics import Metrics
from d3llm_hf.serving.worker import Worker


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two", (), "one two"),
        ("one two", ("two",), "one "),
        ("one tw", ("two", "x"), "one "),
        ("one t", ("two", "tt"), "one "),
        ("tone", ("one", "ton"), ""),  # "ton" is complete first
        ("abab", ("ababc",), ""),
        ("xab", ("abab", "b!"), "x"),
        ("one", ("onerous", "nerd"), ""),
        ("ab", ("b",), "a"),
    ],
)
def test_what_may_yet_become_a_stop_string_is_held_back(text, stops, shown):
    assert text[: free_of_stops(text, stops)] == shown


def jobs_of(worker, prompts, **more):
    """Submits jobs before the worker starts, and gives the events of each when all have ended."""
    told, ended = [[] for _ in prompts], threading.Semaphore(0)

    def tell_to(events):
        def tell(event):
            events.append(event)
            if not isinstance(event, Piece):
                ended.release()

        return tell

    for index, (events, prompt) in enumerate(zip(told, prompts, strict=True)):
        own = {"settings": {}, "stops": (), "max_new_tokens": 8} | {k: v[index] for k, v in more.items()}
        worker._pending.append(Job(prompt=prompt, seed=index, tell=tell_to(events), **own))
    worker.start()
    for _ in prompts:
        assert ended.acquire(timeout=60)
    worker.close()
    return told


def new_worker(loaded, **limits):
    return Worker(*loaded, **({"max_batch_size": 8, "max_wait": 0.0, "max_queue": 9} | limits))


def test_jobs_of_equal_settings_share_a_batch_up_to_its_size_the_oldest_first(loaded, gate):
    metrics = Metrics()
    worker = new_worker(loaded, max_batch_size=2, metrics=metrics)
    lengths, stops = [8, 8, 9, 8, 8, 8], [(), (), (), (), ("x",), ()]
    settings = [{}, {"decoding_method": "dparallel", "block_length": 8}, {}, {}, {}, {}]
    told = jobs_of(worker, [[5], [6, 7], [8], [9], [5], [6]], max_new_tokens=lengths, stops=stops, settings=settings)
    assert all(isinstance(events[-1], Answer) and len(events) == 1 for events in told)
    text = metrics.render({})
    assert "d3llm_batches_total 5\n" in text and "d3llm_batch_rows_total 6\n" in text  # 0+3, 1, 2, 4, 5
    assert gate.rows[0] == 2


def test_a_row_is_answered_when_it_ends_and_not_when_its_batch_does(loaded, gate, alone):
    """One row ends at its first stop string, the other needs all of its forwards."""
    model, tokenizer = loaded
    prompts = [tokenizer("Tom has 8")["input_ids"], tokenizer("Anna has 12 pens")["input_ids"]]
    order = []
    worker = new_worker(loaded)
    settings = {"decoding_method": "llada", "block_length": 1}
    ended = threading.Semaphore(0)

    def tell_to(index):
        def tell(event):
            order.append((index, len(gate.rows)))
            ended.release()

        return tell

    text = tokenizer.decode(
        model.generate(
            input_ids=loaded[1]("Tom has 8", return_tensors="pt")["input_ids"], max_new_tokens=12, **settings
        )[0, len(prompts[0]) :]
    )
    stop = text[:3]
    for index, prompt in enumerate(prompts):
        worker._pending.append(Job(prompt, 12, settings, (stop,), 0, tell_to(index)))
    gate.rows.clear()
    worker.start()
    for _ in prompts:
        assert ended.acquire(timeout=60)
    worker.close()
    assert order[0][0] == 0
    assert order[0][1] < order[1][1]


def test_rows_whose_readers_have_left_are_not_begun_and_a_batch_without_readers_ends(loaded, gate):
    worker = new_worker(loaded)
    told = []
    settings = {"decoding_method": "llada"}
    never = Job([5, 6], 8, settings, (), 0, told.append)
    never.leave()
    going = Job([5, 6], 40, settings, (), 0, told.append)
    gate.fault = lambda ids: going.leave()
    last = threading.Event()
    worker._pending += [never, going, Job([5], 4, {}, (), 0, lambda event: last.set())]
    worker.start()
    assert last.wait(60)
    worker.close()
    assert not any(isinstance(event, Answer) for event in told)
    assert len(gate.rows) < 8


def test_settings_of_the_command_line_take_the_place_of_the_checkpoints(loaded):
    model, _ = loaded
    assert with_settings(model, {"max_new_tokens": 9}).entropy_threshold == model.generation_config.entropy_threshold
    config = with_settings(model, {"decoding_method": "fast_dllm", "do_sample": True, "temperature": 0.5})
    assert config.entropy_threshold is None and config.top_k is None and config.eos_token_id
    with pytest.raises(ValueError, match="is not used by"):
        with_settings(model, {"confidence_threshold": 0.9})


def test_the_histogram_counts_what_is_at_most_its_bounds():
    metrics = Metrics()
    for seconds in (0.05, 0.06, 1000):
        metrics.request("ok", seconds)
    text = metrics.render({"d3llm_queue_length": 3})
    assert 'bucket{le="0.05"} 1\n' in text and 'bucket{le="0.1"} 2\n' in text and 'bucket{le="120.0"} 2\n' in text
    assert 'bucket{le="+Inf"} 3\n' in text and "d3llm_request_seconds_sum 1000.110000\n" in text
    assert "d3llm_queue_length 3\n" in text
