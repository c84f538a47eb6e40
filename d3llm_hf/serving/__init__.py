"""An OpenAI-compatible server of one model: `d3llm serve`, or `create_app` in [`app`](app.py) for a program.

schemas.py   what a request may say, and what is refused
admission.py a request becomes a job: token ids, settings of `generate`, a seed
worker.py    one thread decodes waiting jobs in batches; follower.py tells each job of its row
replies.py   what is sent back; metrics.py counts it; app.py is HTTP
"""
