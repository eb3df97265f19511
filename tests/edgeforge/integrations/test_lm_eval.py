"""The demo model's artifact in lm-evaluation-harness, on local tasks of each kind of request."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import edgeforge as api
from edgeforge.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason='needs the harness: pip install "edgeforge[lm-eval]"')
pytest.importorskip("onnxruntime")

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
""",
    "answer": """
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}
QUESTION = "The function returns"
# The harness renders texts as templates, which end without the last line break.
TEXT = "\n".join(["The function returns a list. Each string is the name of a file."] * 120)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    (folder,) = api.export("demo", tmp_path_factory.mktemp("lm") / "out", recipe="int4")
    return folder


@pytest.fixture(scope="module")
def evaluated(artifact, tmp_path_factory):
    """The harness's results, and what the session gives for the same texts."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import edgeforge.integrations.lm_eval  # noqa: F401

    root = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        target = api_text(artifact)
        rows = {
            "question": QUESTION,
            "choices": [" a new list", " zebra quantum sandwich"],
            "answer": 0,
            "text": TEXT,
            "target": target,
        }
        (root / "data.jsonl").write_text(json.dumps(rows) + "\n")
        for name, text in TASKS.items():
            (root / f"{name}.yaml").write_text(text.format(file=root / "data.jsonl"))
        found = lm_eval.simple_evaluate(
            "edgeforge",
            {"artifact": str(artifact)},
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(root), include_defaults=False),
            bootstrap_iters=0,
        )
    return found


def api_text(artifact) -> str:
    """Greedy text up to the first full stop, by the session alone."""
    tokenizer = Tokenizer(artifact / "tokenizer.json", str(artifact))
    with api.load(artifact) as session:
        logits = session.extend(np.array(tokenizer.encode(QUESTION), np.int64))
        given: list[int] = []
        for _ in range(16):
            given.append(int(logits.argmax()))
            logits = session.extend(np.array(given[-1:], np.int64))
    return tokenizer.decode(given).partition(".")[0]


def test_choices_are_scored_by_likelihood(evaluated, artifact):
    assert evaluated["results"]["choice"]["acc,none"] == 1.0
    (sample,) = evaluated["samples"]["choice"]
    tokenizer = Tokenizer(artifact / "tokenizer.json", str(artifact))
    whole = tokenizer.encode(f"{QUESTION} a new list")
    start = len(tokenizer.encode(QUESTION))
    with api.load(artifact) as session:
        logits = session.logits(np.array(whole, np.int64)).astype(np.float64)
    normal = np.log(np.exp(logits).sum(-1))
    wanted = sum(logits[at - 1, whole[at]] - normal[at - 1] for at in range(start, len(whole)))
    assert float(sample["filtered_resps"][0][0]) == pytest.approx(wanted, rel=1e-4)


def test_perplexity_is_of_every_token_once_over_more_than_a_context(evaluated, artifact):
    tokenizer = Tokenizer(artifact / "tokenizer.json", str(artifact))
    tokens = tokenizer.encode(TEXT, special=False)
    context = json.loads((artifact / "edgeforge.json").read_text())["context"]
    assert len(tokens) > context
    # A first window after the token that begins a text, then whole windows that end later and
    # later; of each, what was not predicted before is scored.
    prefix = json.loads((artifact / "edgeforge.json").read_text())["model"]["bos"]
    every, done, total = [prefix, *tokens], 0, 0.0
    with api.load(artifact) as session:
        while done < len(tokens):
            end = min(done + context, len(tokens))
            given = every[max(0, end - context) : end]
            logits = session.logits(np.array(given, np.int64)).astype(np.float64)[done - end :]
            normal = np.log(np.exp(logits).sum(-1))
            total += float((logits[np.arange(end - done), tokens[done:end]] - normal).sum())
            done = end
    found = evaluated["results"]["rolling"]["word_perplexity,none"]
    assert math.log(found) == pytest.approx(-total / len(TEXT.split()), rel=1e-4)


def test_greedy_text_ends_at_the_word_that_ends_it(evaluated):
    assert evaluated["results"]["answer"]["exact_match,none"] == 1.0
