"""Loads the metric by name as a program does that never heard of this package, without a network; prints facts.

    python metric_process.py FOLDER_OF_THE_METRIC docs/measuring.md

To be run in some empty folder. The facts are one line of JSON, the last of stdout.
"""

import doctest
import json
import re
import socket
import sys
import time
from pathlib import Path


def refused(*args, **kwargs):
    raise ConnectionError("no network")


def message(function, **inputs) -> str:
    try:
        function(**inputs)
    except Exception as error:  # whatever is raised is the fact that is asked for
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(text: str, name: str) -> list[int]:
    """Failed and tried examples of a text."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    result = doctest.DocTestRunner(verbose=False).run(test)
    return [result.failed, result.attempted]


def main(folder: str, page: str) -> dict:
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
    time.sleep = lambda seconds: None  # between attempts to reach the Hub
    import evaluate

    aup = evaluate.load("aup")
    facts: dict = {"name": aup.name, "package loaded": "d3llm_hf" in sys.modules}
    facts["file"] = sys.modules[type(aup).__module__].__file__
    points = {"tpf": [9.11, 1.0], "accuracy": [73.09, 74.02]}
    facts["points"] = aup.compute(**points, y_max=74.98)
    samples = {"tokens": [[8, 9]] * 2, "forwards": [[8, 9], [4, 5]], "correct": [[1, 1], [1, 0]]}
    facts["samples"] = aup.compute(**samples, slack=60, seed=1, num_resamples=50, confidence=0.9)

    aup.add_batch(**points)
    aup.add(tpf=3.0, accuracy=60.0)
    facts["both kinds"] = message(aup.compute, **samples)
    facts["added"] = aup.compute(y_max=74.98, alpha=1.0)
    facts["combined"] = evaluate.combine([aup]).compute(**points)
    facts["errors"] = {
        "nothing": message(aup.compute),
        "half": message(aup.compute, tpf=[1.0]),
        "predictions": message(aup.compute, predictions=[1.0], references=[1.0]),
        "some samples": message(aup.compute, tokens=[[8]], forwards=[[8]]),
        "points and samples": message(aup.compute, **points, **samples),
        "fractions": message(aup.compute, tpf=[1.0], accuracy=[0.74]),
        "no tokens": message(aup.compute, tpf=[0.0], accuracy=[74.0]),
        "NaN": message(aup.compute, tpf=[1.0], accuracy=[float("nan")]),
        "empty": message(aup.compute, tpf=[], accuracy=[]),
        "unknown option": message(aup.compute, **points, gamma=1.0),
    }
    facts["after errors"] = aup.compute(**points, y_max=74.98)["aup"]

    by_path = evaluate.load(folder)
    facts["by path"] = by_path.compute(**points, y_max=74.98)["aup"]
    facts["card"] = failures((Path(folder) / "README.md").read_text(encoding="utf-8"), "card")
    facts["usage"] = failures(aup.inputs_description, "usage")
    mark = r"<!-- run in: tests/support/metric_process\.py -->\n```python\n(.*?)```"
    example = re.search(mark, Path(page).read_text(encoding="utf-8"), re.DOTALL)
    exec(example.group(1), {})
    return facts


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    sys.stdout.write("\n" + json.dumps(result) + "\n")
