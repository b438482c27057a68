"""Stop ids: every source that names one, and files that name none of the tokenizer's."""

import json

import pytest

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import load_tokenizer, train_byte_level
from rpt_jax.tokenizer.stops import find_stop_ids

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<|end|>")


def directory_of(path, *, template=None, **files):
    """A tokenizer of 300 entries and three special tokens, with JSON files next to it; and the ids of the marks."""
    backend = train_byte_level(["the cat sat on the mat"] * 5, 300)._backend
    backend.add_special_tokens({"additional_special_tokens": list(MARKS)})
    backend.chat_template = template
    backend.save_pretrained(str(path))
    ids = backend.convert_tokens_to_ids(list(MARKS))
    for name, value in files.items():
        value = json.loads(json.dumps(value).replace('"<|im_end|>"', str(ids[1])).replace('"<|end|>"', str(ids[2])))
        (path / f"{name}.json").write_text(json.dumps(value))
    return load_tokenizer(path), ids


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"template": TURNS}, {"<|im_end|>": ["chat template"]}),
        ({"generation_config": {"eos_token_id": ["<|im_end|>", "<|end|>"]}}, None),
        ({"config": {"eos_token_id": "<|end|>"}}, {"<|end|>": ["config.json"]}),
        ({"generation_config": {"eos_token_id": None}, "config": {}}, {}),
        # A template that ends a turn without a special token, or drops the assistant's message, names none.
        ({"template": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}, {}),
        ({"template": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"}, {}),
        ({"template": "{{ raise_exception('no') }}"}, {}),
        (
            {"template": TURNS, "generation_config": {"eos_token_id": "<|im_end|>"}, "config": {"eos_token_id": 0}},
            {"<|im_end|>": ["generation_config.json", "chat template"]},
        ),
    ],
)
def test_every_source_counts(tmp_path, options, expected):
    tokenizer, ids = directory_of(tmp_path, **options)
    if expected is None:
        expected = {"<|im_end|>": ["generation_config.json"], "<|end|>": ["generation_config.json"]}
    found = dict(tokenizer.stop_sources)
    assert next(iter(found)) == tokenizer.eos_id and found.pop(tokenizer.eos_id)[0] == "tokenizer"
    assert {tokenizer.entry(i): sources for i, sources in found.items() if i} == expected
    assert set(tokenizer.stop_ids) == {tokenizer.eos_id, *found} and set(found) <= {0, *ids}


@pytest.mark.parametrize("value", ["<eos>", [1, "2"], 10**6, -1, True, {"id": 1}, 1.0])
def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path, value):
    tokenizer, _ = directory_of(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id is .* must be ids of the tokenizer"):
        find_stop_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"generation_config.json is a JSON list"):
        find_stop_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config.json is not JSON"):
        find_stop_ids(tokenizer, tmp_path)
