"""The leaderboard's figures, order and refusals, and the command."""

import json
import subprocess
import sys
from math import exp

import pytest
from awaited import AWAITED
from boards import point, three_curves, write
from foreign_locks import foreign_lock
from places import REPOSITORY
from recorded_blocks import OF_BLOCKS

from d3llm_hf import cli
from d3llm_hf.evaluation.leaderboard.document import document, markdown
from d3llm_hf.evaluation.leaderboard.write import build_board, figures, write_leaderboard
from d3llm_hf.evaluation.sweep.points import read_points
from d3llm_hf.evaluation.tables import fill as tables
from d3llm_hf.hub.sources import embedded_checkpoints
from d3llm_hf.models.methods import METHODS


# The curves' best accuracies are 90, 80 and 60, so that under the common y_max of 90 the weights are W(90) = 1,
# W(80) = exp(-3 (1 - 80 / 90)) and W(60) = exp(-3 (1 - 60 / 90)). The first point counts in full.
COMMON = {"bold": 80 + 4 * 80 * exp(-1 / 3), "steady": 90 + 2 * 90, "rash": 60 + 8 * 60 * exp(-1)}
OWN = {"bold": 80 + 4 * 80, "steady": 90 + 2 * 90, "rash": 60 + 8 * 60}


def test_aups_under_both_choices_of_y_max_are_those_computed_by_hand():
    (task,) = build_board(three_curves()).tasks
    assert task.y_max == 90
    assert [entry.method for entry in task.entries] == ["bold", "steady", "rash"]
    for entry in task.entries:
        assert entry.common.aup == pytest.approx(COMMON[entry.method])
        assert entry.own.aup == pytest.approx(OWN[entry.method])
        low, high = entry.common.interval
        assert low <= entry.common.aup <= high


def test_points_that_fall_too_far_are_shown_as_not_counted_and_are_not_the_fastest():
    (task,) = build_board(three_curves()).tasks
    rash = task.entries[2]
    assert [p["tpf"] for p in rash.points] == [1, 9, 10] and rash.counted == (True, True, False)
    assert rash.fastest["tpf"] == 9 and rash.best["tpf"] == 9


def test_pairs_that_the_own_y_max_puts_in_another_order_are_named_and_no_others():
    (task,) = build_board(three_curves()).tasks
    assert list(task.swaps) == [
        "bold (309.3) is ahead of rash (236.6), but behind under each curve's own `y_max` (400.0 and 540.0).",
        "steady (270.0) is ahead of rash (236.6), but behind under each curve's own `y_max` (270.0 and 540.0).",
    ]
    (alone,) = build_board([point("a", 2, 90), point("b", 1, 80)]).tasks
    assert alone.swaps == ()
    assert "Another one changes no order." in markdown(document(build_board([point("a", 2, 90)]), ()))


def test_the_table_in_markdown_has_the_figures_of_the_curves():
    points = [p | {"method": "bo|d <b>"} if p["method"] == "bold" else p for p in three_curves()]
    text = markdown(document(build_board(points), ()))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == (
        "| Method | Model | AUP, common y\\_max | AUP, own y\\_max | Best accuracy | Most TPF | Accuracy there | "
        "Tokens/s there | Points counted |"
    )
    assert lines[1] == "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    assert lines[2].startswith("| bo\\|d &lt;b&gt; | tiny | 309.3 (")
    assert lines[2].endswith(") | 80.0 % | 5.00 | 80.0 % | 500 | 2 of 2 |")
    assert lines[4].startswith("| rash | tiny | 236.6 (") and lines[4].endswith("| 9.00 | 60.0 % | 900 | 2 of 3 |")
    assert "| rash | tiny | entropy\\_threshold = 1.0 | 10.00 (10.00\N{EN DASH}10.00) | 50.0 % (" in text
    assert "| tiny | sums | 10 (seed 4242) | cpu | float32 | 64 | 5 | d3llm\\_hf 0.1, torch 2.13.0," in text


def test_published_curves_share_a_table_with_measured_ones_only_with_a_mark_and_without_intervals():
    board = build_board([point("d3llm", 4, 80, task="GSM8K-CoT")], published=True)
    task = board.tasks[0]
    assert task.name == "GSM8K-CoT" and task.y_max == 83.94 and len(task.entries) == 17
    for entry in task.entries:
        assert entry.label.endswith(" †") == entry.published == (entry.common.interval is None)
        assert (entry.as_published is not None) == (entry.published and not entry.method.startswith("TAD"))
    text = markdown(document(board, ()))
    assert "| d3LLM † | LLaDA-8B-Instruct | published | 485.7 | 659.6 | 637.7 |" in text
    assert "| d3llm | tiny | measured | 320.0 (" in text
    assert "Do not read a rank of † against measured curves as a result." in text
    assert "published" not in markdown(document(build_board([point("d3llm", 4, 80)]), ()))


def test_an_order_that_only_the_published_y_max_gives_is_named():
    task = build_board([], published=True).tasks[0]
    swaps = [sentence for sentence in task.swaps if "TAD" not in sentence]
    assert task.name == "GSM8K-CoT" and len(swaps) == 3 == len(task.swaps) - 2
    assert swaps[0] == (
        "EAGLE-3 · Llama-3.1-8B-Instruct † (319.0) is ahead of dParallel · LLaDA-8B-Instruct † (281.7), but behind as "
        "published (319.0 and 358.1)."
    )
    assert "`y_max` (179.9 and 213.8) and as published (176.1 and 213.8)." in swaps[1]
    assert "- EAGLE-3 · Llama-3.1-8B-Instruct † (319.0) is ahead" in markdown(
        document(build_board([], published=True), ())
    )


def test_curves_that_cover_the_same_tasks_are_averaged_and_others_are_not():
    points = [p for task in ("sums", "words") for p in three_curves(task)] + [point("alone", 2, 90)]
    (group,) = build_board(points).groups
    assert group.tasks == ("sums", "words") and list(group.entries) == ["bold", "steady", "rash"]
    assert group.mean("rash") == pytest.approx(COMMON["rash"]) and group.mean("rash", "own") == 540
    published = build_board([], published=True).groups
    assert [len(group.tasks) for group in published] == [4, 5, 5, 4, 4]
    assert published[0].mean("d3LLM · LLaDA-8B-Instruct †", "own") > 0


def test_tasks_whose_names_give_the_same_file_name_get_different_ones():
    board = build_board([point("a", 2, 90, task=task) for task in ("MBPP", "mbpp", "MBPP+", "?")])
    assert [task.slug for task in board.tasks] == ["mbpp", "mbpp-2", "mbpp-plus", "task"]


def test_a_curve_without_a_right_answer_has_no_area():
    (task,) = build_board([point("a", 2, 90), point("b", 3, 0)]).tasks
    assert task.entries[1].common.aup == task.entries[1].own.aup == 0


def test_a_board_without_points_is_refused():
    with pytest.raises(ValueError, match=r"`results` must hold at least one point \(got none\)"):
        build_board([])


def test_a_task_that_no_curve_gets_right_is_refused():
    with pytest.raises(ValueError, match=r"accuracy above 1 % for each task \(got 0 % as the best of 'sums'\)"):
        build_board([point("a", 2, 0)])


def test_one_label_for_several_models_is_refused():
    other = point("b", 2, 90)
    other["provenance"] = other["provenance"] | {"model_fingerprint": "others"}
    with pytest.raises(
        ValueError, match=r"label must stand for one model \(got 'tiny' for 'weights of tiny' and 'oth"
    ):
        build_board([point("a", 2, 90), other])


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    taken = write(tmp_path / "taken", [])
    with pytest.raises(ValueError, match="`output` must be a folder"):
        write_leaderboard([], taken)


def test_without_matplotlib_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'd3llm-hf\[eval\]'"):
        write_leaderboard([write(tmp_path / "r.jsonl", [point("a", 2, 90)])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "pattern"),
    [(None, "must name results files"), ("", "must hold at least one point"), ("{}\nnot json", "r.jsonl, line 1")],
)
def test_the_command_refuses_unusable_results_in_one_line(tmp_path, capsys, content, pattern):
    results = tmp_path / "r.jsonl"
    if content is not None:
        results.write_text(content)
    assert cli.main(["leaderboard", str(results), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("d3llm: error: ") and pattern in err and err.count("\n") == 1


@pytest.mark.full
def test_the_command_writes_every_file_and_equal_input_gives_equal_bytes(tmp_path):
    results = write(tmp_path / "r.jsonl", three_curves())
    command = [
        sys.executable,
        "-m",
        "d3llm_hf",
        "leaderboard",
        str(results),
        "-o",
        str(tmp_path / "a"),
        "--title",
        "T",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.rstrip().endswith("index.html")
    write_leaderboard([results], tmp_path / "b", title="T")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    pictures = [f"{name}-sums.{kind}" for name in ("bars", "curves") for kind in ("png", "svg")]
    assert names == sorted([*pictures, "index.html", "leaderboard.json", "leaderboard.md"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    found = json.loads((tmp_path / "a" / "leaderboard.json").read_text())
    assert found == figures(build_board(three_curves(), title="T"))
    first = found["tasks"][0]["entries"][0]
    assert (first["method"], first["common"]["aup"], first["own"]["aup"]) == ("bold", 309.2900, 400.0)


@pytest.mark.full
def test_a_leaderboard_that_another_process_is_writing_is_left_to_it(tmp_path):
    results, folder = write(tmp_path / "r.jsonl", three_curves()), tmp_path / "out"
    with (
        foreign_lock(folder),
        pytest.raises(ValueError, match=r"`output` must be written by one process .*out', which"),
    ):
        write_leaderboard([results], folder)
    assert not folder.exists()


@pytest.mark.full
def test_results_to_which_two_sweeps_have_written_make_the_leaderboard_of_one(tmp_path):
    once, twice = write(tmp_path / "a.jsonl", three_curves()), write(tmp_path / "b.jsonl", three_curves() * 2)
    pages = [write_leaderboard([results], tmp_path / results.stem) for results in (once, twice)]
    assert (pages[0] / "leaderboard.json").read_bytes() == (pages[1] / "leaderboard.json").read_bytes()


def test_a_document_can_show_the_ranks_of_a_leaderboard():
    lines = tables.table(figures(build_board(three_curves()))).splitlines()
    assert lines[0] == "| | method | model | AUP | most accurate | fastest that counts |"
    low, high = build_board(three_curves()).tasks[0].entries[0].common.interval
    assert lines[2] == f"| 1 | bold | tiny | 309 ({low:.0f} to {high:.0f}) | 80.0 % at 5.00 | 80.0 % at 5.00 |"
    assert lines[4].endswith("| 60.0 % at 9.00 | 60.0 % at 9.00 |")
    assert lines[6].startswith("Task sums, 10 samples; `y_max` 90.0 % for all.")
    assert "Task GSM8K" in (text := tables.table(figures(build_board([], published=True)))) and "(None" not in text


def test_the_committed_leaderboard_is_made_of_its_points():
    folder = REPOSITORY / "docs" / "leaderboard"
    title = "Embedded checkpoints: accuracy under parallelism"
    board = build_board(read_points(folder / "points.jsonl"), title=title)
    assert json.loads((folder / "leaderboard.json").read_text()) == json.loads(json.dumps(figures(board)))
    pictures = [path.name for path in folder.glob("*.svg")]
    assert (folder / "leaderboard.md").read_text() == markdown(document(board, pictures))
    (task,) = board.tasks
    assert {entry.method for entry in task.entries} == set(METHODS) - OF_BLOCKS - AWAITED | {"d2f"}
    assert {entry.model for entry in task.entries} == set(embedded_checkpoints()) - {"d3llm-causal"}
    assert all(point["num_samples"] >= 500 for entry in task.entries for point in entry.points)
