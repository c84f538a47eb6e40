"""An OpenAI-compatible server of one model: `d3llm serve`, or `create_app` in [`app`](app.py) for a program.

connection.py uvicorn's connection, of which every wait has an end
schemas.py   what a request may say, and what is refused; bodies.py its JSON, unsupported.py what others offer and a
             diffusion model cannot keep, wording.py how a refusal reads
admission.py a request becomes a job: token ids, settings of `generate`, a seed; desk.py the thread that does it
worker.py    one thread decodes waiting jobs in batches; follower.py tells each job of its row
replies.py   what is sent back; metrics.py counts it; app.py is HTTP, keys.py who may ask, recipe.py makes it
replicas.py  the same app in several processes, on Ray Serve; gateway.py passes requests on to them, sums.py adds up
             what they count
"""
