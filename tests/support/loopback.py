"""A real server of an app, on this machine alone."""

import contextlib
import socket
import threading
import time


@contextlib.contextmanager
def on_loopback(app, **options):
    """Port of a real server of an app."""
    import uvicorn

    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(120)  # a busy machine takes long
