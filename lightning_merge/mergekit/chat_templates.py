"""The chat template of a merge: one that a recipe names or writes out, or that of most of its models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from lightning_merge.errors import UserError, nearest
from lightning_merge.mergekit.grammar import Recipe
from lightning_merge.mergekit.models import Companions, Model, as_bytes, read_json

# Each turn in the markers its format prescribes; {{ 'text' }} keeps line ends apart from those of the template.
NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set opening = namespace(text='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set opening.text = message['content'] ~ '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' ~ opening.text ~ message['content'] ~ ' [/INST]' }}{% set opening.text = '' %}"
        "{% else %}{{ ' ' ~ message['content'] ~ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] ~ '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' ~ message['content'] ~ '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[|user|]' ~ message['content'] ~ '\\n' }}"
        "{% else %}{{ '[|' ~ message['role'] ~ '|]' ~ message['content'] ~ '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}
LONGEST_NAME = 255


def chat_template_files(recipe: Recipe, models: Sequence[Model], companions: Companions) -> Companions:
    """Return the companions that a chat template changes; none where the recipe has no ``chat_template``.

    Args:
        recipe: Its ``chat_template`` is a name, a template of Jinja, or ``auto`` for the one that most models have.
        models: The models that ``auto`` asks.
        companions: The files of the result so far.

    Raises:
        UserError: It is neither a known name nor a template.
    """
    wanted = recipe.chat_template
    if not wanted:
        return {}
    if wanted == "auto":
        found = [template.strip() for model in models if (template := _template_of(model.companions))]
        if not found:
            return {}
        template = Counter(found).most_common(1)[0][0]
    elif wanted in NAMED:
        template = NAMED[wanted]
    elif "{" in wanted:
        template = wanted
    else:
        raise UserError(
            f"chat_template '{wanted[:LONGEST_NAME]}' is neither a known name ({', '.join(NAMED)}), nor auto, nor a "
            f"template of Jinja.{nearest(wanted, [*NAMED, 'auto'])}"
        )
    files: dict[str, str] = {"chat_template.jinja": template}
    settings = read_json(companions, "tokenizer_config.json")
    if isinstance(settings, dict) and "chat_template" in settings:
        settings = {**settings, "chat_template": template}
        files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return files


def _template_of(companions: Companions) -> str | None:
    if "chat_template.jinja" in companions:
        return as_bytes(companions["chat_template.jinja"]).decode()
    settings = read_json(companions, "tokenizer_config.json")
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None
