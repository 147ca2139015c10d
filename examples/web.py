"""`make web`: chat with InternLM in a browser.

As app.py of a Hugging Face Space, this file needs no other one of this project: set the Space's variable MODEL to a
complete repository.
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, logging


try:
    import gradio as gr
except ImportError:  # --help works without it
    gr: Any = None


TEXTS = {
    "en": {
        "message": "Your message",
        "settings": "Settings",
        "system": "System text",
        "system_info": "What the model is told before the conversation. Empty: the prompt format's own.",
        "greedy": "Always take the likeliest token",
        "temperature": "Temperature",
        "top_p": "Top-p",
        "new_tokens": "Longest answer, in tokens",
        "placeholder": "Ask something. Everything stays on the computer that runs this page.",
    },
    "zh-CN": {
        "message": "输入消息",
        "settings": "设置",
        "system": "系统提示",
        "system_info": "对话开始前告诉模型的内容。留空则使用对话格式自带的提示。",
        "greedy": "总是选择概率最高的词元（贪心解码）",
        "temperature": "温度",
        "top_p": "Top-p",
        "new_tokens": "回答的最大长度（词元数）",
        "placeholder": "请提问。所有内容都留在运行本页面的电脑上。",
    },
}
EXAMPLES = ["Who are you?", "你是谁？", "Where do bees live?"]


def load(name: str | None) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or Hub repository (None: the tiny model), or of an adapter."""
    try:
        from demo import load as load_here
    except ModuleNotFoundError as error:
        if error.name != "demo":  # a package of the project is missing
            raise
    else:
        return load_here(name)
    # In a Space there is only this file.
    if name is None:
        raise SystemExit("Set MODEL to a repository that holds this project's code.")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto", device_map="auto")
    return tokenizer, model.eval()


def page(tokenizer: Any, model: Any, title: str) -> Any:
    """The page, a gradio.ChatInterface: a conversation with its settings below."""
    text = gr.I18n(**TEXTS)

    def answer(
        query: str,
        history: list[dict[str, Any]],
        system: str,
        greedy: bool,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
    ) -> Iterator[str]:
        """The answer so far, at every step."""
        sampling = {} if greedy else {"temperature": temperature, "top_p": top_p}
        turns = [{"role": message["role"], "content": text_of(message)} for message in history]
        while turns and turns[-1]["role"] == "user":  # its answer was stopped before it began, or failed
            turns.pop()
        stream = model.stream_chat(
            tokenizer,
            query,
            turns,
            meta_instruction=system or None,
            max_new_tokens=int(max_new_tokens),
            do_sample=not greedy,
            **sampling,
        )
        try:
            for response, _ in stream:
                yield response
        except (RuntimeError, ValueError) as error:
            raise gr.Error(str(error), title="InternLM", duration=None, print_exception=False) from error
        finally:
            stream.close()  # when the reader stops it or goes away

    return gr.ChatInterface(
        answer,
        title=title,
        chatbot=gr.Chatbot(show_label=False, placeholder=text("placeholder"), scale=1, buttons=["copy"]),
        textbox=gr.Textbox(
            show_label=False, container=False, placeholder=text("message"), submit_btn=True, stop_btn=True
        ),
        additional_inputs_accordion=gr.Accordion(text("settings"), open=False),
        additional_inputs=[
            gr.Textbox(label=text("system"), info=text("system_info"), lines=2),
            gr.Checkbox(label=text("greedy")),
            gr.Slider(0.05, 2, 0.8, step=0.05, label=text("temperature")),
            gr.Slider(0.05, 1, 0.8, step=0.05, label=text("top_p")),
            gr.Slider(1, 4096, 1024, step=1, label=text("new_tokens")),
        ],
        examples=[[text] for text in EXAMPLES],
        save_history=True,
        editable=True,
        concurrency_limit=1,
        analytics_enabled=False,
    )


def text_of(message: dict[str, Any]) -> str:
    """The text of one of Gradio's messages."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL"),
        help="a model folder or Hub repository id (default: the tiny model)",
    )
    parser.add_argument(
        "--host", help="address to listen on (default: this computer only; 0.0.0.0 for all others, too)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    arguments = parser.parse_args()
    if gr is None:
        raise SystemExit("examples/web.py needs Gradio: pip install -r requirements-web.txt")
    logging.set_verbosity_error()
    tokenizer, model = load(arguments.model)
    title = os.path.basename(str(arguments.model or "internlm-tiny").rstrip("/"))
    fonts = ["system-ui", "Noto Sans CJK SC", "sans-serif"]  # none from the network
    page(tokenizer, model, title).launch(
        server_name=arguments.host,
        server_port=arguments.port,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        i18n=gr.I18n(**TEXTS),
        footer_links=["settings"],
    )


if __name__ == "__main__":
    main()
