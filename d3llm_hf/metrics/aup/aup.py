"""AUP, accuracy under parallelism, as a metric of Hugging Face's `evaluate`."""

import dataclasses

import datasets
import evaluate

from .curve import AUPResult, aup_score, bootstrap_aup


_DESCRIPTION = """\
Accuracy under parallelism (AUP) scores a decoder that trades accuracy for speed by deciding several tokens in each
forward. It is the area under accuracy (in percent) over tokens per forward, where accuracy loses weight as it falls
under the best accuracy of the compared methods, and points that fall more than a slack are left out.
"""

_KWARGS_DESCRIPTION = """
Args:
    tpf (`list` of `float`): tokens per forward of each point of the curve, positive, in any order.
    accuracy (`list` of `float`): accuracy of each point in percent.
    tokens, forwards, correct (`list` of `list`): instead of `tpf` and `accuracy`, for each point the answer tokens,
        the forwards and the correctness (0 or 1) of each sample; all points on the same samples. Adds an interval.
    y_max (`float`, *optional*): accuracy of full weight in percent: the best of all methods that are compared.
        Defaults to the best of this curve.
    alpha (`float`, defaults to 3.0): how fast accuracy under `y_max` loses weight.
    slack (`float`, defaults to 5.0): percentage points that accuracy may fall below that of the slowest point.
    confidence (`float`, defaults to 0.95), num_resamples (`int`, defaults to 1000), seed (`int`, defaults to 0): of
        the bootstrap interval; with `tokens`, `forwards` and `correct` only.

Returns:
    `dict`: `aup`, the score; `y_max` and `y_min`; `used` and `dropped`, the points `[tpf, accuracy]` over and under
    `y_min` by ascending tpf; `areas`, what each used point adds to the score. With results of samples also `low` and
    `high`, the ends of the interval, and `tpf` and `accuracy` of each point.

Examples:

    >>> import evaluate
    >>> aup = evaluate.load("aup")
    >>> result = aup.compute(tpf=[1.0, 9.11], accuracy=[74.02, 73.09], y_max=74.98)
    >>> round(result["aup"], 1)
    637.7
"""

_CITATION = """\
@article{qian2026d3llm,
    title = {d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation},
    author = {Qian, Yu-Yang and Su, Junda and Hu, Lanxiang and Zhang, Peiyuan and Deng, Zhijie and Zhao, Peng and
        Zhang, Hao},
    journal = {arXiv preprint arXiv:2601.07568},
    year = {2026},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AUP(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"tpf": datasets.Value("float64"), "accuracy": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2601.07568", "https://github.com/hao-ai-lab/d3LLM"],
            license="Apache-2.0",
        )

    def compute(self, *, tpf=None, accuracy=None, tokens=None, forwards=None, correct=None, **options):
        """The score of the points given, of those that were added before, or of results of samples."""
        for name in ("predictions", "references"):  # `evaluate.combine` passes them as None
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"`{name}` must not be given: this metric compares points of a curve. Pass `tpf` and `accuracy`."
                )
        samples = {"tokens": tokens, "forwards": forwards, "correct": correct}
        given = [name for name, values in samples.items() if values is not None]
        if given:
            self._check_samples(given, tpf, accuracy)
            return _of_samples(**samples, **options)
        if len(self) or self.num_process > 1:
            return super().compute(tpf=tpf, accuracy=accuracy, **options)
        if tpf is None or accuracy is None:
            raise ValueError(
                "`tpf` and `accuracy` must be given or added before (got neither, or one of them). Pass both, or "
                "`tokens`, `forwards` and `correct`."
            )
        # Points that come in one call need no file to be gathered in, which is what the base class would do; it would
        # also stay locked after an error.
        return self._compute(tpf, accuracy, **options)

    def _check_samples(self, given: list[str], tpf, accuracy) -> None:
        if len(given) < 3:
            raise ValueError(f"`tokens`, `forwards` and `correct` must be given together (got {', '.join(given)}).")
        if tpf is not None or accuracy is not None or len(self):
            raise ValueError(
                "`tokens`, `forwards` and `correct` must not be given with `tpf` and `accuracy`, which follow from "
                "them. Pass either, to a metric that no points were added to."
            )

    def _compute(self, tpf, accuracy, *, y_max=None, alpha=3.0, slack=5.0) -> dict:
        return _as_dict(aup_score(tpf, accuracy, y_max=y_max, alpha=alpha, slack=slack))


def _of_samples(tokens, forwards, correct, **options) -> dict:
    found = bootstrap_aup(tokens, forwards, correct, **options)
    interval = {"low": found.low, "high": found.high, "tpf": list(found.tpf), "accuracy": list(found.accuracy)}
    return _as_dict(found.score) | interval


def _as_dict(score: AUPResult) -> dict:
    """Of what JSON knows: lists, not tuples."""
    return {
        name: [list(item) if isinstance(item, tuple) else item for item in value]
        if isinstance(value, tuple)
        else value
        for name, value in dataclasses.asdict(score).items()
    }
