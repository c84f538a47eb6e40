"""Batches, and text that is held back until it cannot become a stop string."""

import threading

import pytest
import torch

from d3llm_hf.serving import groups
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


def test_where_nobody_joins_jobs_of_equal_settings_are_a_batch_up_to_its_size_the_oldest_first(loaded, gate):
    metrics = Metrics()
    worker = new_worker(loaded, max_batch_size=2, metrics=metrics, joining=False)
    lengths, stops = [8, 8, 9, 8, 8, 8], [(), (), (), (), ("x",), ()]
    settings = [{}, {"decoding_method": "dparallel", "block_length": 8}, {}, {}, {}, {}]
    told = jobs_of(worker, [[5], [6, 7], [8], [9], [5], [6]], max_new_tokens=lengths, stops=stops, settings=settings)
    assert all(isinstance(events[-1], Answer) and len(events) == 1 for events in told)
    text = metrics.render({})
    assert "d3llm_batches_total 5\n" in text and "d3llm_batch_rows_total 6\n" in text  # 0+3, 1, 2, 4, 5
    assert gate.rows[0] == 2


class Told:
    """What a job is told, which can be waited for."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if not isinstance(event, Piece):
            self.over.set()

    @property
    def last(self):
        assert self.over.wait(120)
        return self.events[-1]


def job_of(told, prompt=(5, 6), length=24, settings=None, stops=(), seed=0):
    return Job(list(prompt), length, settings or {}, stops, seed, told)


def after_forwards(gate, count, action):
    """Does something in the worker's thread before a forward, once."""
    left = [action]

    def look(ids):
        if len(gate.rows) > count and left:
            left.pop()()

    gate.fault = look


SLOW = {"decoding_method": "llada", "block_length": 8}  # one token a forward


def test_a_job_joins_one_of_another_length_that_is_at_work_and_both_get_what_they_get_alone(loaded, gate):
    model, tokenizer = loaded
    prompts = [tokenizer("Tom has 8 apples.")["input_ids"], tokenizer("Anna")["input_ids"]]
    first, second, metrics = Told(), Told(), Metrics()
    worker = new_worker(loaded, metrics=metrics)
    late = job_of(second, prompts[1], 8, SLOW, stops=("#",), seed=3)
    after_forwards(gate, 3, lambda: worker.submit(late))
    worker.start()
    worker.submit(job_of(first, prompts[0], 16, SLOW))
    texts = [first.last.text, second.last.text]
    worker.close()
    assert gate.rows[:3] == [1, 1, 1] and 2 in gate.rows
    text = metrics.render({})
    assert "d3llm_batches_total 1\n" in text and "d3llm_batch_rows_total 2\n" in text
    assert f"d3llm_steps_total {len(gate.rows)}\n" in text and f"d3llm_step_rows_total {sum(gate.rows)}\n" in text
    gate.fault = None
    for prompt, length, found in zip(prompts, (16, 8), texts, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=length, **SLOW)[0, len(prompt) :]
        alone = tokenizer.decode(ids, skip_special_tokens=True)
        assert found == alone.partition("#")[0] if length == 8 else found == alone


def test_groups_take_turns_and_nobody_who_waits_is_overtaken(loaded, gate, monkeypatch):
    """Two groups at most here: the third kind waits, and with it a fourth job that could join the first."""
    monkeypatch.setattr(groups, "GROUPS", 2)
    worker, told = new_worker(loaded), [Told() for _ in range(4)]
    kinds = [SLOW | {"block_length": length} for length in (1, 2, 3, 1)]
    jobs = [job_of(each, (5,), 8, settings) for each, settings in zip(told, kinds, strict=True)]
    turns, turn = [], worker._take_turn
    worker._take_turn = lambda: (turns.append(worker._groups._groups[0]), turn())
    worker._pending += jobs
    worker.start()
    assert all(isinstance(each.last, Answer) for each in told)
    worker.close()
    assert 0 < jobs[0].began <= jobs[1].began <= jobs[2].began <= jobs[3].began
    assert turns[0] is turns[2] is not turns[1]


def test_what_cannot_join_is_decoded_by_itself_while_the_others_have_their_turns(loaded, gate):
    first, alone = Told(), Told()
    worker = new_worker(loaded)
    reads = SLOW | {"repetition_penalty": 1.5}
    after_forwards(gate, 1, lambda: worker.submit(job_of(first, (5,), 8, SLOW)))
    worker._pending.append(job_of(alone, (6,), 8, reads))
    worker.start()
    assert isinstance(first.last, Answer) and isinstance(alone.last, Answer)
    worker.close()
    assert max(gate.rows) == 1 and len(gate.rows) > 10


def test_a_forward_that_fails_costs_no_neighbour_its_answer(loaded, gate):
    worker, good, bad = new_worker(loaded), Told(), Told()

    def fault(ids):
        if (ids == 9).any():
            raise MemoryError("no room")

    gate.fault = fault
    worker._pending += [job_of(good, (5, 6), 8, SLOW), job_of(bad, (9, 6), 8, SLOW)]
    worker.start()
    assert isinstance(good.last, Answer)
    assert bad.last.status == 500
    worker.close()


def test_a_reader_that_leaves_frees_its_slot_at_the_next_forward(loaded, gate):
    worker, second = new_worker(loaded, max_batch_size=1), Told()
    first = job_of(lambda event: None, (5,), 40, SLOW)
    after_forwards(gate, 2, first.leave)
    worker._pending += [first, job_of(second, (6,), 4, SLOW)]
    worker.start()
    assert isinstance(second.last, Answer)
    worker.close()
    assert len(gate.rows) <= 3 + 1 + 4


def test_a_stop_answers_or_refuses_everyone(loaded, gate):
    worker, told = new_worker(loaded, max_batch_size=2), [Told() for _ in range(4)]
    reads = SLOW | {"repetition_penalty": 1.5}
    worker._pending += [job_of(each, (5,), 40, reads if each is told[3] else SLOW) for each in told]

    def stop():
        with worker._changed:
            worker._closing = True

    after_forwards(gate, 2, stop)
    worker.start()
    assert all(each.last.status == 503 for each in told)
    assert worker.close()


def test_a_request_that_cannot_be_prepared_is_answered(loaded):
    worker, told, other = new_worker(loaded), Told(), Told()
    worker._pending += [job_of(told, settings={"block_length": -1}), job_of(other, (5,), 4, SLOW)]
    worker.start()
    assert told.last.status == 500 and isinstance(other.last, Answer)
    worker.close()


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
