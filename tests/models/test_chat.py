from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sharewell.models import ChatTemplate, ModelError, TemplateError, export_hf

MESSAGES = [
    {"role": "user", "content": "Hi <b> & you"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Again"},
]


def _folder(tmp_path: Path, template: Any, **more: Any) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | more))
    return tmp_path


def test_the_prompt_equals_what_transformers_renders(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(export_hf(smollm2, tmp_path / "hf"))
    ours = ChatTemplate(smollm2)
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief"}, *MESSAGES]):
        for open_turn in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
            assert ours.render(messages, add_generation_prompt=open_turn) == expected


def test_a_folder_without_a_template_speaks_chatml(tmp_path: Path) -> None:
    text = ChatTemplate(tmp_path).render(MESSAGES[:1])
    assert text == "<|im_start|>user\nHi <b> & you<|im_end|>\n<|im_start|>assistant\n"


def test_a_jinja_file_wins_over_the_settings_and_named_templates_are_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert ChatTemplate(_folder(tmp_path, named)).render([]) == "plain"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert ChatTemplate(tmp_path).render([]) == "from file"


def test_special_tokens_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ tools | tojson }}{{ style }}"
    template += "{% for t in tools %}{% break %}{% endfor %}"
    chat = ChatTemplate(_folder(tmp_path, template, bos_token={"content": "<s>"}, eos_token="</s>"))
    assert chat.supports_tools
    assert chat.render([], tools=[{"name": "é"}], style="x") == '<s></s>[{"name": "é"}]x'


def test_a_template_may_refuse_the_messages_in_its_own_words(tmp_path: Path) -> None:
    chat = ChatTemplate(_folder(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(TemplateError, match="roles must alternate"):
        chat.render(MESSAGES)
    chat = ChatTemplate(_folder(tmp_path, "{{ messages[9].content }}"))
    with pytest.raises(TemplateError, match="refused the messages"):
        chat.render(MESSAGES)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"):
        with pytest.raises(TemplateError):
            ChatTemplate(_folder(tmp_path, attack)).render(MESSAGES)
    with pytest.raises(TemplateError):
        ChatTemplate(_folder(tmp_path, "{{ messages.append(1) }}")).render(MESSAGES)


def test_a_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"chat template of .* cannot be compiled"):
        ChatTemplate(_folder(tmp_path, "{% for %}"))
