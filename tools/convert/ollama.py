"""A Modelfile, from which Ollama makes a model of a GGUF file: the prompt format as a Go template, and settings.

The prompt format is read off what the folder's own chat template renders, so that it has one definition.
"""

from typing import Any


_TURN = "<|User|>:{0}{end}<|Bot|>:{1}<eoa>\n<|User|>:{2}{end}<|Bot|>:"  # of both formats
_ROLES = {
    # By the end of a user's turn: the later format has system turns; in the early one, system text precedes the query.
    "\n": (
        '{{ if and (eq $i 0) (ne .Role "system") }}HEAD{{ end }}'
        '{{ if eq .Role "system" }}{{ if .Content }}<|System|>:{{ .Content }}\n{{ end }}'
        '{{ else if eq .Role "user" }}<|User|>:{{ .Content }}\n'
    ),
    "<eoh>\n": (
        '{{ if eq .Role "system" }}{{ $system = printf "%s%s\\n" $system .Content }}'
        '{{ else if eq .Role "user" }}<|User|>:{{ $system }}{{ .Content }}<eoh>\n{{ $system = "" }}'
    ),
}
# Without <s>, which Ollama adds as the GGUF file says. A last message of the assistant is continued.
_TEMPLATE = (
    '{{ $system := "" }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}ROLES'
    '{{ else if eq .Role "assistant" }}<|Bot|>:{{ .Content }}{{ if not $last }}<eoa>\n{{ end }}{{ end }}'
    '{{ if and $last (ne .Role "assistant") }}<|Bot|>:{{ end }}{{ end }}'
)
# What `chat` generates with (docs/chat.md, and transformers' defaults), by the name in generation_config.json.
_SAMPLING = {
    "temperature": ("temperature", 0.8),
    "top_p": ("top_p", 0.8),
    "top_k": ("top_k", 50),
    "repetition_penalty": ("repeat_penalty", 1.0),
}


def go_template(tokenizer: Any) -> str | None:
    """A tokenizer's chat template in Ollama's template language; None if it is in neither of InternLM's two formats.

    Args:
        tokenizer: With a chat template.
    """
    texts, roles = ("1", "2", "3"), ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for end, cases in _ROLES.items():
        turns = _TURN.format(*texts, end=end)
        if prompt.startswith(tokenizer.bos_token) and prompt.endswith(turns):
            head = prompt[len(tokenizer.bos_token) : -len(turns)]  # the default system turn
            return _TEMPLATE.replace("ROLES", cases).replace("HEAD", head)
    return None


def modelfile(name: str, window: int, template: str | None, generation: dict[str, Any] | None) -> str:
    """The text of a Modelfile.

    Args:
        name: The GGUF file, in the same folder.
        window: Tokens to serve.
        template: See `go_template`.
        generation: A chat model's generation_config.json; None for a base model.
    """
    lines = [f"FROM ./{name}", f"PARAMETER num_ctx {window}"]
    if generation is not None:
        lines += [f"PARAMETER {theirs} {generation.get(ours, value)}" for ours, (theirs, value) in _SAMPLING.items()]
        lines.append('PARAMETER stop "<eoa>"')
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"
