"""A folder of trajectories: shards that are complete or absent, and a manifest that says what they are of.

    manifest.json                        schema version, teacher, tokenizer, settings, data set, its own checksum
    trajectories-00000.parquet           the records of samples 0 to shard_size - 1
    trajectories-00000.sha256            its checksum, written last: a shard without it is not finished

Which sample lies in which shard depends on its index alone, so that runs can be broken off, resumed, and split over
processes. Nothing is pickled; `datasets.load_dataset(folder)` reads the shards without this module.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d3llm_hf.files import write_whole
from d3llm_hf.fingerprints import tokenizer_fingerprint
from d3llm_hf.locks import only_writer

from .records import SCHEMA, TrajectoryError


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 1 << 20  # bytes; a larger file is none of ours
_METADATA_KEY = b"d3llm_trajectories"
# What may differ when a run is resumed: names, whose contents are compared by fingerprint.
_DESCRIPTIVE = re.compile(r"teacher\.name|teacher\.revision|dataset\.name|checksum|versions\..*")
# What reading relies on: path in the manifest -> type and least value.
_REQUIRED = {
    "teacher.vocab_size": (int, 1),
    "tokenizer_fingerprint": (str, ""),
    "settings.max_new_tokens": (int, 1),
    "settings.shard_size": (int, 1),
    "dataset.num_samples": (int, 0),
}


@dataclass(frozen=True)
class TrajectoryStore:
    """The shards of one extraction; see the module for the files.

    Args:
        folder (`Path`): where they lie.
        manifest (`dict`): what they are of, as [`open_store`] and [`load_manifest`] return it.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """Samples of the data set, including those that are filtered out."""
        return self.manifest["dataset"]["num_samples"]

    @property
    def num_shards(self) -> int:
        """Shards of a finished extraction."""
        return -(-self.num_samples // self.manifest["settings"]["shard_size"])

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"trajectories-{shard:05d}.parquet"

    def sample_ids(self, shard: int) -> range:
        """Indices of the samples that belong to a shard."""
        size = self.manifest["settings"]["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.num_samples))

    def is_complete(self, shard: int) -> bool:
        """Whether a shard is there and undamaged."""
        if not _seal(self.path(shard)).exists():
            return False
        try:
            self.read(shard)
        except TrajectoryError as error:
            logger.warning("A shard is computed again. %s", error)
            return False
        return True

    def write(self, shard: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a shard; it is complete once its checksum is there."""
        metadata = {_METADATA_KEY: self.manifest["checksum"].encode()}
        table = pa.Table.from_pylist(list(records), schema=SCHEMA.with_metadata(metadata))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content, path = sink.getvalue().to_pybytes(), self.path(shard)
        _seal(path).unlink(missing_ok=True)
        write_whole(path, content)
        write_whole(_seal(path), _sealed(path, content))
        for left in self.folder.glob(f".{path.stem}.*.partial"):  # of a process that was killed
            left.unlink(missing_ok=True)

    def read(self, shard: int) -> pa.Table:
        """The records of a shard, verified.

        Raises:
            TrajectoryError: for a shard that is absent, damaged, of another run, or whose records contradict the
                manifest.
        """
        path = self.path(shard)
        content, seal = _read_bytes(path), _read_bytes(_seal(path), limit=1 << 10)
        if seal != _sealed(path, content):
            raise _damaged(path, "agree with its checksum", "other bytes")
        try:
            # One thread: a table this small is not worth a pool.
            file = pq.ParquetFile(pa.BufferReader(content))
            too_long = file.metadata.num_rows > len(self.sample_ids(shard))
            table = SCHEMA.empty_table() if too_long else file.read(use_threads=False)
            names = table.schema.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, "be a Parquet file", error) from None
        if too_long:
            raise _damaged(path, f"hold {len(self.sample_ids(shard))} records at most", file.metadata.num_rows)
        if not table.schema.equals(SCHEMA):
            raise _damaged(path, f"have the columns {SCHEMA.names}", names)
        owner = (table.schema.metadata or {}).get(_METADATA_KEY, b"")
        if owner != self.manifest["checksum"].encode():
            raise _damaged(path, f"belong to the run of {MANIFEST}", "a shard of another one")
        self._check_records(path, shard, table)
        return table.replace_schema_metadata(None)

    def _check_records(self, path: Path, shard: int, table: pa.Table) -> None:
        """Lengths and ranges, a column at a time."""
        length, vocab_size = self.manifest["settings"]["max_new_tokens"], self.manifest["teacher"]["vocab_size"]
        for name in SCHEMA.names:
            column = table[name].combine_chunks()
            nulls = column.null_count + (column.flatten().null_count if pa.types.is_list(column.type) else 0)
            if nulls and not SCHEMA.field(name).nullable:
                raise _damaged(path, f"have a `{name}` in every record", f"{nulls} nulls")
        ids = table["sample_id"].to_numpy()
        expected = self.sample_ids(shard)
        if len(ids) and not (expected.start <= ids[0] and ids[-1] < expected.stop and (np.diff(ids) > 0).all()):
            raise _damaged(path, f"hold each of the samples {expected.start} to {expected.stop - 1} once at most", ids)
        for name in ("response_ids", "step_map"):
            lengths = np.unique(table[name].combine_chunks().value_lengths().to_numpy(zero_copy_only=False))
            if lengths.tolist() not in ([], [length]):
                raise _damaged(path, f"have a `{name}` of {length} entries", lengths)
        for name in ("prompt_ids", "response_ids", "target_ids"):
            tokens = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if ((tokens < 0) | (tokens >= vocab_size)).any():
                raise _damaged(path, f"have `{name}` within the vocabulary of {vocab_size}", tokens.max())
        steps = table["step_map"].combine_chunks().flatten().to_numpy()
        forwards = np.repeat(table["num_forwards"].to_numpy(), length)
        if ((steps > forwards) | (steps < -1) | (steps == 0)).any():
            raise _damaged(path, "have a `step_map` of -1, or 1 to `num_forwards`", steps.max())


def open_store(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> TrajectoryStore:
    """Starts an extraction in `folder`, or takes up the one that is there.

    Args:
        folder (path): made if need be.
        manifest: teacher, tokenizer, settings and data set; version and checksum are added here.

    Raises:
        TrajectoryError: when the folder's extraction has other settings, naming the first that differs, or its
            manifest is damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"format": "d3llm trajectories", "schema_version": SCHEMA_VERSION, **manifest}
    wanted["checksum"] = _manifest_checksum(wanted)
    path = folder / MANIFEST
    with only_writer(path, "folder", wait=True):  # of processes that begin together one writes it, and all compare
        if not path.exists():
            if any(folder.glob("trajectories-*.parquet")):
                raise TrajectoryError(
                    f"`{folder}` must hold {MANIFEST} beside its shards (got none). Use another folder."
                )
            write_whole(path, _canonical(wanted))
    found = load_manifest(folder)
    old, new = _leaves(found), _leaves(json.loads(_canonical(wanted)))
    for name in sorted(old.keys() | new.keys()):
        if not _DESCRIPTIVE.fullmatch(name) and old.get(name) != new.get(name):
            raise TrajectoryError(
                f"`{name}` must be what the extraction in `{folder}` was started with (got {new.get(name)!r}, which "
                f"is not {old.get(name)!r}). Pass the same, or use another folder."
            )
    return TrajectoryStore(folder, found)


def load_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a folder, verified.

    Raises:
        TrajectoryError: when it is absent, damaged, or of another schema version.
    """
    path = Path(folder) / MANIFEST
    content = _read_bytes(path, limit=_MANIFEST_LIMIT)
    try:
        manifest = json.loads(content)
        canonical = _canonical(manifest)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise _damaged(path, "hold a JSON object", "something else")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TrajectoryError(
            f"`{path}` must have the schema version {SCHEMA_VERSION} (got {version!r}). Read it with the release that "
            "wrote it, or extract the trajectories again."
        )
    if manifest.get("checksum") != _manifest_checksum(manifest) or content != canonical:
        raise _damaged(path, "agree with its checksum", "other bytes")
    leaves = _leaves(manifest)
    for name, (kind, least) in _REQUIRED.items():
        value = leaves.get(name)
        if type(value) is not kind or value < least:
            raise _damaged(path, f"have a `{name}` of type {kind.__name__}, at least {least!r}", value)
    return manifest


def read_trajectories(folder: str | os.PathLike, tokenizer=None, *, partial: bool = False) -> datasets.Dataset:
    """Reads and verifies the trajectories of a folder, into memory.

    Args:
        folder (path): what [`extract_trajectories`] wrote.
        tokenizer (*optional*): of the model to train; its prompts must have the ids that are stored.
        partial (`bool`): also read an extraction that is not finished.

    Returns:
        [`~datasets.Dataset`] in the order of `sample_id`; see `records.SCHEMA` for the columns.

    Raises:
        TrajectoryError: for every kind of damage, another schema version, a shard that is missing, or a tokenizer that
            is not the one that the trajectories were made with.
    """
    folder = Path(folder)
    store = TrajectoryStore(folder, load_manifest(folder))
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != store.manifest["tokenizer_fingerprint"]:
        raise TrajectoryError(
            f"`tokenizer` must be the one that `{folder}` was made with, chat template included (got another "
            "fingerprint): ids and prompts would not match. Pass the teacher's tokenizer."
        )
    there = []
    for path in sorted(folder.glob("trajectories-*")):
        match = re.fullmatch(r"trajectories-(\d{5,9})\.(parquet|sha256)", path.name)
        if match is None or int(match[1]) >= store.num_shards or store.path(int(match[1])).stem != path.stem:
            raise _damaged(path, f"be one of the {store.num_shards} shards of the run", "a file of another name")
        if match[2] == "sha256":
            there.append(int(match[1]))
    if len(there) < store.num_shards and not partial:
        raise TrajectoryError(
            f"`{folder}` must hold all {store.num_shards} shards (got {len(there)}). Start the extraction again to "
            "finish it, or pass `partial=True`."
        )
    tables = [store.read(shard) for shard in there]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sealed(path: Path, content: bytes) -> bytes:
    """The checksum file of `content`, in the form of `sha256sum`."""
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()


def _read_bytes(path: Path, limit: int | None = None) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise TrajectoryError(
            f"`{path}` must be a readable file (got {error.strerror}). Start the extraction again."
        ) from None
    if not content or (limit is not None and len(content) > limit):
        raise _damaged(path, "be neither empty nor huge", f"{len(content)} bytes")
    return content


def _damaged(path: Path, rule: str, got: object) -> TrajectoryError:
    return TrajectoryError(f"`{path}` must {rule} (got {got}). Delete it and start the extraction again.")


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(_canonical(rest)).hexdigest()


def _leaves(manifest: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    leaves = {}
    for name, value in manifest.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
