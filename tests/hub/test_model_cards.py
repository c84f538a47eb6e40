"""Cards of published checkpoints: metadata parse, code compiles, figures and settings are those of their sources."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from places import REPOSITORY

from d3llm_hf.evaluation.harness.recipe_plans import read_recipe, recipe_names


CARDS = {
    "d3llm-llada": ("llada", "LLaDA"),
    "d3llm-dream": ("dream", "Dream"),
    "d3llm-dream-coder": ("coder", "Dream-Coder"),
}
PUBLISHED = REPOSITORY / "d3llm_hf" / "evaluation" / "leaderboard" / "published.json"
ALL = sorted(path for path in (REPOSITORY / "model_cards").glob("*.md") if path.stem in CARDS)
ALL += sorted((REPOSITORY / "d3llm_hf" / "checkpoints").glob("*/README.md"))


def text_of(name: str) -> str:
    return (REPOSITORY / "model_cards" / f"{name}.md").read_text(encoding="utf-8")


def table(text: str) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return rows[2:]


def arguments(cell: str) -> dict:
    """`a=1`, `b='c'` -> a dictionary."""
    return {name: eval(value, {}) for name, value in re.findall(r"`(\w+)=([^`]*)`", cell)}


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_metadata_parse_and_python_compiles(path):
    card = ModelCard.load(path)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    kind = {"autoregressive"} if path.parent.name == "d3llm-causal" else {"diffusion-language-model", "d3llm"}
    assert data.license and kind <= set(data.tags)
    blocks = re.findall(r"```(\w*)\n(.*?)```", card.text, re.DOTALL)
    assert any(language == "python" for language, _ in blocks)
    for language, block in blocks:
        if language == "python":
            compile(block, str(path), "exec")
    assert "## Limits" in card.text


def test_every_card_has_published_and_own_figures_apart():
    for name in CARDS:
        text = text_of(name)
        own = text.split("## Own figures\n")[1].split("\n## ")[0]
        assert "None. d3LLM-HF has not measured this model" in own and "|" not in own
        for heading in ("## Use", "## Settings per task", "## Published figures", "## Licence", "## Citation"):
            assert heading in text, (name, heading)


@pytest.mark.parametrize("name", CARDS)
def test_settings_per_task_are_those_of_the_recipes(name):
    found = {
        row[0].strip("`"): row[1:] for row in table(text_of(name).split("## Settings per task")[1].split("\n## ")[0])
    }
    recipes = {recipe: read_recipe(recipe) for recipe in recipe_names()}
    assert set(found) == {recipe for recipe, content in recipes.items() if name in content["models"]}
    for recipe, (shots, prompt, given, cached) in found.items():
        content = recipes[recipe]
        model = content["models"][name]
        assert int(shots) == content["num_fewshot"]
        assert (prompt == "chat") == bool(model.get("apply_chat_template"))
        wanted, extra = model["model_args"] | model["gen_kwargs"], model.get("cached", {})
        assert wanted["block_length"] == 32
        told = arguments(given)
        assert told.pop("max_new_tokens") == wanted["max_gen_toks"]
        assert told.get("do_sample", False) == wanted["do_sample"]
        assert told == {key: wanted[key] for key in told}
        assert {"entropy_threshold", "block_add_threshold", "block_activation_threshold"} <= set(told)
        extra = extra.get("model_args", {}) | extra.get("gen_kwargs", {})
        assert arguments(cached) == {key: value for key, value in extra.items() if key != "temperature"}


@pytest.mark.parametrize("name", CARDS)
def test_published_figures_reproduce_their_aup_and_agree_with_the_collected_data(name):
    from d3llm_hf import aup_score

    group, base = CARDS[name]
    text = text_of(name).split("<!-- published:begin")[1].split("<!-- published:end")[0]
    rows = table(text)
    assert len(rows) == (4 if group == "coder" else 5)
    # The best accuracy of any method of the published table, which its AUP is relative to (data of the leaderboard).
    best = {
        "llada": (74.98, 41.15, 63.6, 67.73, 82.56),
        "dream": (83.94, 49.92, 63.8, 72.25, 82.56),
        "coder": (86.6, 82.3, 83.5, 70.1),
    }[group]
    for row, y_max in zip(rows, best, strict=True):
        slow, fast, tpf, aup = map(float, row[3:])
        assert aup_score([1.0, tpf], [slow, fast], y_max=y_max).aup == pytest.approx(aup, abs=0.06), row
    if not PUBLISHED.is_file():
        pytest.skip("the collected published figures are not part of this tree")
    curves = json.loads(PUBLISHED.read_text(encoding="utf-8"))["curves"]
    for task, _, teacher, slow, fast, tpf, aup in rows:
        of = {curve["method"]: curve for curve in curves if curve["task"] == task and group in curve["tables"]}
        assert of[base]["pairs"] == [[1.0, float(teacher)]]
        assert of["d3LLM"]["pairs"] == [[1.0, float(slow)], [float(tpf), float(fast)]]
        assert of["d3LLM"]["aup"] == float(aup)


def test_the_list_of_cards_names_every_card():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (REPOSITORY / "model_cards" / "README.md").read_text()))
    assert listed == {f"{name}.md" for name in CARDS}
