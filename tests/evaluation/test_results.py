"""Measuring, and the tables that documents take from results files."""

import json
from pathlib import Path

import pytest
from places import REPOSITORY

from d3llm_hf.evaluation.tables import fill as tables


RESULTS = {
    "rows": [
        {
            "name": "multi-block",
            "settings": {"decoding_method": "d3llm", "entropy_threshold": 0.3},
            "accuracy": 91.2,
            "tpf": 4.567,
            "positions_per_token": 21.4,
        }
    ],
    "task": "held-out problems",
    "problems": 500,
    "command": "python -m x",
    "parameters": 920000,
    "provenance": {"device": "cpu", "torch": "2.13.0", "transformers": "5.23.0"},
}
ROW = "| multi-block | `decoding_method='d3llm'`, `entropy_threshold=0.3` | 91.2 % | 4.57 | 21 |"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:begin results.json -->\nstale\n<!-- results:end -->\nafter\n")
    return path


def test_a_marked_table_is_made_from_the_results_file_and_then_passes_the_check(document):
    assert tables.main(["--check", str(document)]) == 1
    assert tables.main([str(document)]) == 0
    text = document.read_text()
    assert ROW in text and "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert tables.main(["--check", str(document)]) == 0


def test_a_document_without_markers_is_refused(document):
    document.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must hold `<!-- results:begin"):
        tables.main([str(document)])


def test_a_marker_that_names_no_file_is_refused(document):
    document.write_text("<!-- results:begin gone.json -->\n<!-- results:end -->\n")
    with pytest.raises(ValueError, match="must name a results file"):
        tables.main([str(document)])


def compared(name: str, settings: dict, base: str, **figures) -> dict:
    zeros = dict.fromkeys(("accuracy", "tpf", "positions_per_token", "seconds", "cpu_seconds", "forwards"), 0)
    return {"name": name, "settings": settings, "against": base} | zeros | figures


def test_a_row_that_is_compared_shows_what_it_adds_and_the_columns_are_those_of_its_suite():
    figures = {"differing_answers": 0, "forwards_saved": 41.6, "relative_cpu": 1.234}
    base = {"decoding_method": "llada", "block_length": 16}
    rows = [
        compared("plain", base, "plain", **figures),
        compared("drafts 2", base | {"lossless": True, "draft_length": 2}, "plain", forwards=7, **figures),
    ]
    lines = tables.table(RESULTS | {"suite": "lossless", "rows": rows}).splitlines()
    assert lines[0] == (
        "| decoding | arguments of `generate` | accuracy | answers that differ | forwards | forwards saved | "
        "positions per token | s | CPU s | relative |"
    )
    assert lines[1] == "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    assert lines[2].startswith("| plain | `decoding_method='llada'`, `block_length=16` | 0.0 % | 0 | 0 | 42 % |")
    assert lines[3].startswith("| drafts 2 | `lossless=True`, `draft_length=2` | 0.0 % | 0 | 7 | 42 % |")
    assert lines[3].endswith("| 0 | 0.0 | 0.0 | 1.23 |")


def test_a_suite_with_a_larger_model_has_a_second_table():
    row = compared("plain", {}, "plain", relative_cpu=1.0, equal_tokens=99.94)
    sizes = {"layers": 6, "width": 256, "vocabulary": 1000, "parameters": 5_600_000}
    larger = sizes | {"prompt_tokens": 192, "new_tokens": 64, "rounds": 3, "rows": [row | {"batch": 8}]}
    text = tables.table(RESULTS | {"suite": "caches", "rows": [row], "larger": larger})
    assert "| 99.9 % |" in text
    assert "\n| plain | 8 |  | 0 | 0 | 0.0 | 0.0 | 1.00 |\n" in text
    assert "5.6 M parameters (6 layers of width 256, 1000 tokens), 192 tokens of prompt, 64 new ones" in text


def test_points_of_a_sweep_are_a_table_with_the_columns_that_any_of_them_has(document):
    made = {"device": "cpu", "torch": "2.13.0", "transformers": "5.23.0", "threads": 1, "dtype": "float32"}
    made |= {"batch_size": 1, "max_new_tokens": 8, "command": "d3llm sweep x"}
    samples = {"tokens": [4, 6], "forwards": [5, 5]}
    plain = {
        "model": "m", "method": "ar", "parameter": None, "value": None, "accuracy": 50.0, "tpf": 1.0, "task": "sums",
        "positions_per_token": 2.5, "tokens_per_second": 7.0, "num_samples": 2, "samples": samples, "provenance": made,
        "draft_forwards_per_token": 0.0,
    }  # fmt: skip
    lookup = plain | {
        "method": "lookup",
        "parameter": "n",
        "value": 3,
        "samples": samples | {"equal_to_plain": [1, 0]},
    }
    path = document.parent / "results.jsonl"
    path.write_text("".join(json.dumps(point) + "\n" for point in (plain, lookup)))
    document.write_text(document.read_text().replace("results.json ", "results.jsonl "))
    assert tables.main([str(document)]) == 0
    lines = document.read_text().splitlines()[2:]
    assert lines[0] == (
        "| decoding | accuracy | tokens | forwards | tokens per forward | positions per token | tokens/s | "
        "answers as plain greedy's |"
    )
    assert lines[2] == "| m, ar | 50.0 % | 10 | 10 | 1.00 | 2.5 | 7.0 |  |"
    assert lines[3] == "| m, lookup, `n=3` | 50.0 % | 10 | 10 | 1.00 | 2.5 | 7.0 | 1 of 2 |"
    assert lines[5].startswith(
        "2 samples of sums, at most 8 new tokens, batches of 1, float32, threads: 1, CPU, torch "
    )
    assert lines[5].endswith(" Regenerate: `d3llm sweep x`.")
    batched = tables.table({"suite": "sweep", "points": [plain, plain | {"provenance": made | {"batch_size": 8}}]})
    assert "| decoding | batch | accuracy |" in batched and "\n| m, ar | 8 | 50.0 % |" in batched


def test_a_results_file_of_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"`suite` of a results file must be one of .* \(got 'speed'\)"):
        tables.table(RESULTS | {"suite": "speed"})


def test_the_tables_of_the_project_match_its_results_files():
    root = REPOSITORY
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("d3llm_hf/checkpoints/*/README.md")]
    documents = [page for page in pages if "<!-- results:begin" in page.read_text(encoding="utf-8")]
    assert root / "docs" / "methods.md" in documents and len(documents) > 1
    assert tables.main(["--check", *map(str, documents)]) == 0
