"""`response_format`: answers of the server that hold a JSON schema, through the `openai` client."""

import json

import httpx
import pytest
from late import Late


openai = Late("openai")
QUESTION = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=60) as opened:
        yield opened


def asked(schema=SCHEMA, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True} | more}


def ask(client, response_format, **more):
    turns = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model="d3llm-llada", messages=turns, response_format=response_format, **more)


def test_an_answer_holds_its_schema_and_is_that_of_the_library(client, loaded):
    from d3llm_hf import fill, form_of_schema

    reply = ask(client, asked(description="of a problem"))
    alone = fill(*loaded, form_of_schema(SCHEMA), prompt=[{"role": "user", "content": QUESTION}])
    choice, found = reply.choices[0], json.loads(reply.choices[0].message.content)
    assert choice.message.content == alone.text and choice.finish_reason == "stop"
    assert 0 <= found["answer"] <= 999 and len(found["steps"]) <= 2
    assert (reply.usage.completion_tokens, reply.usage.forwards) == (alone.num_tokens, alone.num_forwards)
    assert reply.usage.prompt_tokens == alone.prompt_tokens


def test_a_stream_brings_the_whole_form_at_its_end(client):
    chunks = list(ask(client, asked(), stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert json.loads(text)["answer"] >= 0
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_client_s_own_classes_are_schemas(client):
    from pydantic import BaseModel, Field

    class Reply(BaseModel):
        answer: int = Field(ge=0, le=99)
        sure: bool

    reply = client.chat.completions.parse(
        model="d3llm-llada", messages=[{"role": "user", "content": QUESTION}], response_format=Reply
    )
    assert 0 <= reply.choices[0].message.parsed.answer <= 99


def test_forms_of_different_schemas_are_one_batch(address):
    import threading

    other = {"type": "object", "properties": {"kind": {"enum": ["a", "bb"]}}}
    found = {}

    def send(number, schema):
        body = {"model": "d3llm-llada", "prompt": QUESTION, "response_format": asked(schema)}
        found[number] = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()

    threads = [threading.Thread(target=send, args=(n, schema)) for n, schema in enumerate([SCHEMA, other, SCHEMA])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [json.loads(found[number]["choices"][0]["text"]) for number in range(3)]
    assert texts[0] == texts[2] and texts[1]["kind"] in ("a", "bb")


@pytest.mark.parametrize(
    "more, param, message",
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "check the answer yourself"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "any JSON whatever has no form"),
        ({"response_format": asked(more=1)}, "response_format", "`response_format.json_schema.more` is no field"),
        ({"response_format": asked({"type": "string", "pattern": "a"})}, "response_format", "`schema.pattern` must"),
        ({"response_format": asked({"type": "array", "items": {"type": "string"}, "maxItems": 200})},
         "response_format", "at most 1024 tokens on this server"),
        ({"response_format": asked(), "stop": "a"}, "stop", "a form is filled to its end"),
        ({"response_format": asked(), "max_tokens": 4}, "max_tokens", "`max_tokens` must be at least"),
        ({"response_format": asked(), "d3llm": {"suffix_length": 4}}, "d3llm.suffix_length", "Leave one of them out"),
        ({"response_format": asked(), "d3llm": {"decoding_method": "d2f"}}, "response_format", "sees the whole text"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_name(address, more, param, message):
    body = {"model": "d3llm-llada", "prompt": "x"} | more
    reply = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and message in error["message"]


def test_forms_that_nobody_waits_for_end_the_batch():
    from d3llm_hf.serving.follower import Abandoned, FormFollower
    from d3llm_hf.serving.jobs import Job

    job = Job(prompt=[1], max_new_tokens=1, settings={}, stops=(), seed=0, tell=print)
    follower = FormFollower([job], lambda: False)
    follower.end_step()
    job.leave()
    with pytest.raises(Abandoned):
        follower.end_step()
