"""The shards of an extraction as tasks of a Ray cluster: its workers decode, this process alone writes."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from d3llm_hf.cluster import Share
from d3llm_hf.locks import clear_left, only_writer

from .extract import COUNTS, Extraction, progress_bar, summary_of
from .records import TrajectoryError
from .store import TrajectoryStore, open_store


logger = logging.getLogger(__name__)

RESTARTS = 3
"""Of a worker that ends; the shard that it was at is decoded again, unless it ends a worker each time."""

Make = Callable[[str], Extraction]


class TeacherWorker:
    """One teacher on one share of a machine. It loads with the first call, also when Ray has started it again.

    Args:
        make: the extraction, on a device.
        device (`str`): `"cpu"`, or `"cuda"`.
    """

    def __init__(self, make: Make, device: str):
        self._make, self._device = make, device
        self._made: Extraction | None = None

    def manifest(self) -> dict[str, Any]:
        """What the extraction is of."""
        return self._extraction().manifest

    def records(self, sample_ids: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The records of a shard, and what was counted of them."""
        extraction = self._extraction()
        before = dict(extraction.counts)
        with tqdm(disable=True) as unseen:
            records = extraction.records(sample_ids, unseen)
        return records, {name: count - before[name] for name, count in extraction.counts.items()}

    def _extraction(self) -> Extraction:
        if self._made is None:
            self._made = self._make(self._device)
        return self._made


def extract_on_ray(
    ray: Any, make: Make, folder: str | Path, share: Share, *, progress: bool = True
) -> TrajectoryStore:
    """Stores the trajectories that workers of a cluster decode, a task for each shard, in `folder`.

    1. Every worker makes the extraction, and all must make the same one as the folder's.
    2. A worker that is free gets the next shard that is not complete.
    3. Its records come back, and the shard is written here, whole or not at all: no folder is shared but by what the
       workers read.
    4. A worker that ends is started again by Ray, and so is its task, [`RESTARTS`] times. What is lost then is told
       after all other shards are written, and the next run resumes there.

    Args:
        ray: the module, of a process that has joined a cluster.
        make: the extraction, on a device; called in the workers.
        folder (path): where the shards go.
        share ([`Share`]): how many workers, and what each has.
        progress (`bool`): show a progress bar.

    Returns:
        [`TrajectoryStore`], complete.

    Raises:
        TrajectoryError: for a folder of another run, a worker that has another teacher or other data, and for shards
            that were lost with their workers.
        Exception: what the extraction raises in a worker, as [`extract_trajectories`] does.
    """
    actor = ray.remote(TeacherWorker).options(
        num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
    )
    workers = [actor.remote(make, "cuda" if share.num_gpus else "cpu") for _ in range(share.count)]
    with only_writer(folder, "output_dir"):
        stores = [open_store(folder, _result(ray, asked)) for asked in [each.manifest.remote() for each in workers]]
        store = stores[0]
        shards = range(store.num_shards)
        todo = [shard for shard in shards if not store.is_complete(shard)]
        with progress_bar(store, shards, todo, progress) as bar:
            counts, lost = _place(ray, store, workers, todo, bar)
        clear_left(store.folder, ".*.lock")
    logger.info(
        "%d of %d shards by %d workers: %s", len(todo) - len(lost), len(shards), share.count, summary_of(counts)
    )
    if lost:
        raise TrajectoryError(
            f"Every shard must outlive its worker (got {len(lost)} of {len(shards)} whose workers ended, such as "
            f"number {lost[0]}). See what Ray said of them, and start the extraction again to decode these alone."
        )
    return store


def _place(
    ray: Any, store: TrajectoryStore, workers: Sequence[Any], todo: Sequence[int], bar: tqdm
) -> tuple[Counter[str], list[int]]:
    """Writes the shards of `todo`; what was counted, and the shards that were lost."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    free, waiting, at_work, lost = list(workers), deque(todo), {}, []
    while at_work or (waiting and free):
        while waiting and free:
            worker, shard = free.pop(), waiting.popleft()
            at_work[worker.records.remote(store.sample_ids(shard))] = worker, shard
        (asked,), _ = ray.wait(list(at_work), num_returns=1)
        worker, shard = at_work.pop(asked)
        try:
            records, more = _result(ray, asked)
        except ray.exceptions.RayActorError as error:
            logger.warning("Shard %d is lost with its worker: %s", shard, error)
            lost.append(shard)
            continue  # without this worker
        free.append(worker)
        with only_writer(store.path(shard), "folder"):
            store.write(shard, records)
        counts.update(more)
        bar.set_postfix_str(summary_of(counts), refresh=False)
        bar.update(len(store.sample_ids(shard)))
    return counts, sorted([*lost, *waiting])


def _result(ray: Any, asked: Any) -> Any:
    """What a call has returned, or raised there, in its own words."""
    try:
        return ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
