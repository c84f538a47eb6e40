"""A real server on loopback and the `openai` client."""

import asyncio
import re
import threading
import time

import httpx
import pytest
from late import Late
from places import REPOSITORY

from d3llm_hf.watch.terminal import MASK_SIGN


openai = Late("openai")
QUESTION = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
OTHER = "Anna has 12 pens. She loses 5. How many pens does Anna have now?"


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=60) as opened:
        yield opened


def turns(text):
    return [{"role": "user", "content": text}]


def ask(client, text=QUESTION, **more):
    return client.chat.completions.create(model="d3llm-llada", messages=turns(text), **({"max_tokens": 48} | more))


def test_the_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["d3llm-llada"]
    assert client.models.retrieve("d3llm-llada").owned_by == "d3llm-hf"
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.models.retrieve("another/model")


def test_a_chat_gets_the_answer_and_the_counts_of_generate(client, alone):
    reply = ask(client)
    output, text = alone(QUESTION, max_new_tokens=48)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "stop")
    assert text.endswith("#### 11")
    usage, forwards = reply.usage, int(output.num_forwards[0])
    assert usage.completion_tokens == round(float(output.tokens_per_forward[0]) * forwards)
    assert usage.prompt_tokens == output.sequences.shape[1] - 48
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.forwards == forwards
    assert usage.tokens_per_forward == pytest.approx(float(output.tokens_per_forward[0]))


def test_a_canvas_that_is_full_ends_an_answer_for_its_length(client, alone):
    reply = ask(client, max_tokens=8)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == alone(QUESTION, max_new_tokens=8)[1]
    assert reply.usage.completion_tokens == 8


def test_a_stream_holds_the_same_answer_in_pieces_and_then_its_usage(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_drafts_come_between_the_pieces_when_they_are_asked_for(client):
    chunks = list(ask(client, stream=True, extra_body={"d3llm": {"drafts": True}}))
    drafts = [chunk.d3llm["draft"] for chunk in chunks if not chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert any(MASK_SIGN in draft for draft in drafts)
    assert text == ask(client).choices[0].message.content
    assert not any("d3llm" in (chunk.model_extra or {}) for chunk in ask(client, stream=True))


def test_a_completion_continues_a_plain_prompt(client, loaded):
    from d3llm_hf import encode_text

    model, tokenizer = loaded
    reply = client.completions.create(model="d3llm-llada", prompt="Tom has 8 apples.", max_tokens=16)
    inputs = encode_text(tokenizer, "Tom has 8 apples.")
    sequences = model.generate(**inputs, max_new_tokens=16)
    expected = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply.choices[0].text == expected
    chunks = client.completions.create(model="d3llm-llada", prompt="Tom has 8 apples.", max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_stop_strings_end_an_answer_and_are_no_part_of_it(client):
    whole = ask(client).choices[0].message.content
    reply = ask(client, stop=["\n"])
    assert reply.choices[0].message.content == whole.partition("\n")[0]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < ask(client).usage.completion_tokens
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stop="\nNow", stream=True)]
    assert "".join(pieces) == whole.partition("\nNow")[0]


def test_settings_of_decoding_are_those_of_generate(client, alone):
    settings = {"decoding_method": "llada", "steps": 12, "block_length": 24}
    reply = ask(client, max_tokens=24, extra_body={"d3llm": settings})
    output, text = alone(QUESTION, max_new_tokens=24, **settings)
    assert reply.choices[0].message.content == text
    assert reply.usage.forwards == int(output.num_forwards[0])


@pytest.mark.full
@pytest.mark.parametrize("rule", ["rho_eos", "rho_eos_tail", "daedal"])
def test_an_answer_whose_length_finds_itself_is_streamed_as_generate_gives_it(client, alone, rule):
    settings = {"decoding_method": "fast_dllm", "block_length": 16, "length": "adaptive", "length_rule": rule}
    settings |= {"initial_length": 32}
    chunks = list(ask(client, max_tokens=64, stream=True, extra_body={"d3llm": settings | {"drafts": True}}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(QUESTION, max_new_tokens=64, **settings)[1]


@pytest.mark.full
def test_a_seed_makes_sampling_repeatable_and_equal_to_generate(client, alone):
    text = ask(client, temperature=1.5, top_p=0.9, seed=7).choices[0].message.content
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 48}
    assert text == alone(QUESTION, seed=7, **settings)[1]
    hot = {ask(client, temperature=2.0).choices[0].message.content for _ in range(4)}  # 24 seeds gave 24 texts
    assert len(hot) > 1
    assert ask(client, temperature=0, top_p=0.5).choices[0].message.content == alone(QUESTION, max_new_tokens=48)[1]


@pytest.mark.full
def test_many_requests_at_once_are_all_answered_as_if_each_came_alone(address, alone, gate):
    names = ["Tom", "Anna", "Ben", "Eva"]
    texts = [
        f"{names[i % 4]} has {i + 3} pens. {'He buys 7 more. ' * (i % 3)}How many pens does {names[i % 4]} have now?"
        for i in range(24)
    ]
    seeds = [None if i % 2 else i for i in range(24)]  # half of them sampled, some of them streamed

    def arguments(i):
        sampled = {} if seeds[i] is None else {"temperature": 0.8, "seed": seeds[i]}
        return {"model": "d3llm-llada", "messages": turns(texts[i]), "max_tokens": 24, **sampled}

    async def one(client, i):
        if i % 3:
            return (await client.chat.completions.create(**arguments(i))).choices[0].message.content
        stream = await client.chat.completions.create(**arguments(i), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def every():
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(24)))

    together = asyncio.run(every())
    assert max(gate.rows) > 1  # some were decoded together
    for i, text in enumerate(together):
        sampled = {} if seeds[i] is None else {"do_sample": True, "temperature": 0.8, "seed": seeds[i]}
        assert text == alone(texts[i], max_new_tokens=24, **sampled)[1], i


def wait_for_departures(address, count):
    """Until the server has noticed that so many clients have left in all."""
    for _ in range(3000):
        found = re.search(r'outcome="left"} (\d+)', httpx.get(f"{address}/metrics").text)
        if found and int(found[1]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("not noticed")


@pytest.mark.full
def test_a_client_that_leaves_ends_its_decoding_and_nobody_elses(client, gate, address, alone):
    slow = {"d3llm": {"decoding_method": "llada"}}  # 48 forwards
    stream = ask(client, stream=True, extra_body=slow)
    next(iter(stream))
    gate.close()
    stream.close()
    answers = []
    other = threading.Thread(target=lambda: answers.append(ask(client, OTHER)))
    other.start()
    wait_for_departures(address, 1)
    passed = len(gate.rows)
    gate.open.set()
    other.join(60)
    with pytest.raises(openai.APITimeoutError):  # and one that waits for no stream
        gate.close()
        ask(client.with_options(timeout=0.5), extra_body=slow)
    wait_for_departures(address, 2)
    gate.open.set()
    assert ask(client, OTHER).choices[0].message.content == answers[0].choices[0].message.content
    assert len(gate.rows) - passed < 48
    assert answers[0].choices[0].message.content == alone(OTHER, max_new_tokens=48)[1]


def test_the_example_of_the_documentation_runs(address, monkeypatch, capsys):
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    mark = r"<!-- run in: tests/serving/test_openai\.py -->\n```python\n(.*?)```"
    (example,) = re.findall(mark, page, flags=re.DOTALL)
    names = {}
    exec(example.replace("http://127.0.0.1:8000", address), names)
    assert "\n#### " in capsys.readouterr().out and names["draft"]
