"""Tasks of EleutherAI's lm-eval in a sweep: its prompts, filters and metrics, sample by sample.

The harness's own evaluation sums over samples; a sweep needs tokens, forwards and the verdict of each. So its task
objects are used, and its loop is not.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contexts import Contexts


DEFAULT_NEW_TOKENS = 256  # the harness's, where a task says nothing
FEWSHOT_SEED = 1234  # the harness's, so that its examples are these


class LMEvalTask:
    """A task of lm-eval that generates text; the attributes are those of `tasks.load.Task`.

    Args:
        task: the harness's object.
        num_samples: how many documents, the first ones; all where nothing is given.
        seed: of what is drawn while decoding.
        metric, filter_name: which of its scores says that an answer is right; the first of each unless given.

    Raises:
        ValueError: for a task that generates no text or that has no such metric, filter or number of documents.
    """

    def __init__(
        self,
        task: Any,
        *,
        num_samples: int | None,
        seed: int,
        metric: str | None = None,
        filter_name: str | None = None,
    ):
        self.task, self.name, self.seed = task, task.task_name, seed
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(
                f"`task` must generate text (got {self.name!r}, of lm-eval's type {task.OUTPUT_TYPE}, which decodes "
                "nothing). Run it with lm-eval itself."
            )
        filters = [one.name for one in task._filters]
        self.filter_name = _chosen("filter", filter_name, filters, self.name)
        self.metric = _chosen("metric", metric, list(task.aggregation()), self.name)
        self.scored_by = f"{self.metric},{self.filter_name}"
        available = len(task.eval_docs)
        if num_samples is not None and num_samples > available:
            raise ValueError(f"`num_samples` must be at most the {available} of {self.name!r} (got {num_samples}).")
        self.num_samples = available if num_samples is None else num_samples
        settings = task.config.generation_kwargs or {}
        until = settings.get("until") or []
        self.stop_strings = [until] if isinstance(until, str) else list(until)
        self.max_new_tokens = next(
            (settings[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if settings.get(name)),
            DEFAULT_NEW_TOKENS,
        )
        self.instances: list[Any] = []

    @property
    def about(self) -> Any:
        config = self.task.dump_config()
        scored = {name: config.get(name) for name in ("metric_list", "filter_list", "repeats")}
        documents = [instance.doc for instance in self.instances]
        about = ["lm-eval", self.task.VERSION, self.scored_by, self.stop_strings, scored, documents]
        return json.loads(json.dumps(about, default=lambda value: getattr(value, "__name__", str(value))))

    def encode(self, tokenizer: Any, chat: bool) -> list[list[int]]:
        known = Contexts(tokenizer)
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        contexts, self.instances = [], []
        for index, doc in self.task.doc_iterator(limit=self.num_samples):
            context = self.task.fewshot_context(
                doc,
                num_fewshot=self.task.config.num_fewshot or 0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=known.write if chat else None,
                gen_prefix=self.task.doc_to_prefix(doc),
            )
            metadata = (self.name, index, self.task.config.repeats)
            instance = self.task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=metadata,
                apply_chat_template=chat,
                chat_template=known.write if chat else None,
            )
            contexts.append(instance.args[0])
            self.instances.append(instance)
        return [known.encode(context, add_special_tokens=not chat) for context in contexts]

    def judge(self, index: int, text: str) -> bool:
        for stop in self.stop_strings:
            text = text.split(stop)[0] if stop else text
        instance = self.instances[index]
        instance.resps = [text] * (self.task.config.repeats or 1)
        chosen = next(one for one in self.task._filters if one.name == self.filter_name)
        chosen.apply([instance])
        scores = self.task.process_results(instance.doc, [instance.filtered_resps[self.filter_name]])
        score = scores.get(self.metric)
        if score is None or isinstance(score, (tuple, list)) or float(score) not in (0.0, 1.0):
            raise ValueError(
                f"`metric` must be 0 or 1 for each sample (got {self.metric}={score!r} of {self.name!r}). Choose "
                f"another, of {sorted(scores)}."
            )
        return bool(score)


def _chosen(what: str, name: str | None, known: Sequence[str], task: str) -> str:
    if name is None:
        return known[0]
    if name not in known:
        raise ValueError(f"`{what}` must be one of {list(known)} for {task!r} (got {name!r}).")
    return name


def load_lm_eval_tasks(
    name: str,
    *,
    num_samples: int | None = None,
    seed: int = 4242,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    metric: str | None = None,
    filter_name: str | None = None,
    confirm_run_unsafe_code: bool = False,
) -> list[LMEvalTask]:
    """The tasks of a name of lm-eval, several for a group or a tag.

    Args:
        name: task, group or tag.
        include_path: folder with further task files.
        num_fewshot: examples before the question; the task's own number where nothing is given.
        confirm_run_unsafe_code: required by tasks that run what the model wrote on this machine.
        num_samples, seed, metric, filter_name: see [`LMEvalTask`].

    Raises:
        ImportError: without lm-eval.
        ValueError: for an unknown name, or what [`LMEvalTask`] refuses.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"`task` must be word_problems or gsm8k without lm-eval (got {name!r}). Install it: `pip install "
            "'d3llm-hf[eval]'`."
        ) from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if name not in manager.all_tasks:
        near = manager.match_tasks([f"*{name}*"])[:5]
        hint = f" Did you mean one of {near}?" if near else " List them with `lm-eval ls tasks`."
        raise ValueError(f"`task` must be word_problems, gsm8k or a task of lm-eval (got {name!r}).{hint}")
    loaded = list(manager.load([name])["tasks"].values())
    for task in loaded:
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise ValueError(
                f"`confirm_run_unsafe_code` must be set for {task.task_name!r}, which runs what the model writes on "
                "this machine (got False). Set it in a sandbox."
            )
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
    return [
        LMEvalTask(task, num_samples=num_samples, seed=seed, metric=metric, filter_name=filter_name) for task in loaded
    ]
