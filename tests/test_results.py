"""Measuring, and the tables that documents take from results files."""

import json
from pathlib import Path

import pytest

from d3llm_hf.evaluation import tables


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


def test_the_tables_of_the_project_match_its_results_files():
    root = Path(__file__).parents[1]
    documents = [root / "README.md", *root.glob("d3llm_hf/checkpoints/*/README.md")]
    assert len(documents) > 1
    assert tables.main(["--check", *map(str, documents)]) == 0
