"""The embedded checkpoint behind the server, in this process or on loopback."""

import asyncio
import threading

import pytest
import torch
from loopback import on_loopback


NAME = "d3llm-llada"
QUESTION = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"


@pytest.fixture(scope="session")
def loaded():
    """Model and tokenizer of the embedded checkpoint."""
    from d3llm_hf.hub.loading import load

    return load(NAME, device="cpu", dtype="float32")


class Gate:
    """Holds up every forward of a model while it is closed, and counts the rows of each that it lets pass."""

    def __init__(self, model):
        self.open, self.reached, self.rows, self.fault = threading.Event(), threading.Event(), [], None
        self.open.set()
        self._hook = model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module, args, kwargs):
        self.reached.set()
        assert self.open.wait(30)
        ids = kwargs["input_ids"]
        self.rows.append(len(ids))
        if self.fault is not None:
            self.fault(ids)

    def close(self):
        self.reached.clear()
        self.open.clear()

    def remove(self):
        self.open.set()
        self._hook.remove()


@pytest.fixture
def gate(loaded):
    """A [`Gate`] on the model."""
    held = Gate(loaded[0])
    yield held
    held.remove()


@pytest.fixture
def with_client(loaded):
    """`with_client(use, **limits)`: what `await use(client)` returns, of an app in this process."""
    import httpx

    from d3llm_hf.serving.app import create_app

    def run(use, **limits):
        app = create_app(*loaded, NAME, **limits)

        async def session():
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client,
            ):
                client.app = app
                return await use(client)

        return asyncio.run(session())

    return run


@pytest.fixture(scope="session")
def address(loaded):
    """Address of a real server of the embedded checkpoint."""
    from d3llm_hf.serving.app import create_app

    app = create_app(*loaded, NAME, max_queue=32, max_wait_ms=20)
    with on_loopback(app) as port:
        yield f"http://127.0.0.1:{port}"
    assert not app.state.worker.alive


@pytest.fixture(scope="session")
def alone(loaded):
    """`alone(text, **settings)`: the output of `generate` on one prompt, and its text before the stop token."""
    from d3llm_hf import encode_chat

    model, tokenizer = loaded

    def generate(text, **settings):
        inputs = encode_chat(tokenizer, [{"role": "user", "content": text}])
        with torch.no_grad():
            output = model.generate(**inputs, return_dict_in_generate=True, **settings)
        answer = output.sequences[0, inputs["input_ids"].shape[1] :]
        return output, tokenizer.decode(answer, skip_special_tokens=True)

    return generate
