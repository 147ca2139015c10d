"""README, docs and the other pages: their code runs, their links and paths exist, their numbers are right."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.report import RESULTS
from tools.matrix import TORCH_VERSIONS, VERSIONS
from tools.measure_quantising import NAME, ORIGINAL, table
from tools.training_memory import memory

from support.pages import blocks, run_blocks
from support.paths import ROOT


PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
PAGES |= {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))}
README = PAGES["README.md"]
_, FRONT_MATTER, _CARD = README.split("---\n", 2)
ENGLISH, CHINESE = _CARD.split("\n# 中文说明\n")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

# Each program has one namespace: the blocks of a page build on each other, those of the two languages do not.
PROGRAMS = {"README.md (English)": ENGLISH, "README.md (Chinese)": CHINESE}
PROGRAMS |= {name: text for name, text in PAGES.items() if "\n```python\n" in text and name != "README.md"}


def _programs() -> list:
    """Those that need bitsandbytes run where it is installed; test_serving.py runs those that need a server."""
    marks = {name: pytest.mark.ecosystem if "BitsAndBytes" in text else () for name, text in PROGRAMS.items()}
    return [pytest.param(name, marks=marks[name]) for name in PROGRAMS if "OPENAI_BASE_URL" not in PROGRAMS[name]]


@pytest.mark.parametrize("program", _programs())
def test_python_blocks_run(program: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]):
    run_blocks(program, PROGRAMS[program], str(tiny_dir), capsys)


def test_snippets_are_the_modern_and_the_official_one():
    """First the modern snippet, then the unchanged official one; and nothing chats through AutoModel."""
    for text in (ENGLISH, CHINESE):
        modern, official = (block.code for block in blocks(text)[:2])
        for needed in ('dtype="auto"', 'device_map="auto"', "revision=revision", "trust_remote_code=True"):
            assert needed in modern
        assert ".cuda()" not in modern and "dtype" not in official
        for needed in (".cuda()", ".eval()", "v.cuda()", "skip_special_tokens=True", '"repetition_penalty": 1.05'):
            assert needed in official
    for name, text in PAGES.items():
        assert not re.search(r"\bAutoModel\b", "".join(block.code for block in blocks(text))), name


class _WithoutText(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("text") if isinstance(node.value, str) and not node.value.isascii() else node


def test_both_languages_show_the_same():
    """English and Chinese have the same sections, links, programs (except for prompts) and shell commands."""
    for pattern in (r"^## ", r"\]\([^)#]+\)", r"^```", r"^- \S"):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (ENGLISH, CHINESE)]
        assert counts[0] == counts[1], f"{pattern}: {counts[0]} in English, {counts[1]} in Chinese"
    english, chinese = (blocks(text) for text in (ENGLISH, CHINESE))
    for ours, theirs in zip(english, chinese, strict=True):
        words = re.sub(r'"[A-Z][^"]* [^"]*"', '"文"', ours.code)  # English sentences
        trees = [ast.dump(_WithoutText().visit(ast.parse(code))) for code in (words, theirs.code)]
        assert trees[0] == trees[1], f"line {ours.line} differs from its Chinese counterpart"
    commands = [
        re.findall(r"^(?:make|python) [^#\n]*?(?= *(?:#|$))", text, re.MULTILINE) for text in (ENGLISH, CHINESE)
    ]
    assert commands[0] == commands[1] != []


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/zh/")])
def test_pages_in_chinese_show_the_same_as_their_originals(name: str):
    """The same code, however it is broken into lines, headings and items; no line break inside a paragraph."""
    original = PAGES[name.replace("zh/", "")]
    snippet = re.compile(r"^```.*?^```$|`[^`]+`", re.MULTILINE | re.DOTALL)  # fenced blocks and code spans
    code = [sorted(re.sub(r"\s", "", text) for text in snippet.findall(page)) for page in (original, PAGES[name])]
    assert code[0] == code[1]
    for pattern in (r"^#+ ", r"^(?:- |\d\. )", r"^\|"):
        assert len(re.findall(pattern, original, re.M)) == len(re.findall(pattern, PAGES[name], re.M)), pattern
    assert not re.search(r"[\u4e00-\u9fff，。；：]\n(?! *-)[\u4e00-\u9fff]", PAGES[name])


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")]
    code = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))  # joined as by Python
    messages = re.findall(r'`"([^"`]+)"`', PAGES["docs/troubleshooting.md"])
    assert len(messages) >= 6
    assert not [message for message in messages if message not in code]


def test_front_matter():
    """The metadata that the Hub reads."""
    assert yaml.safe_load(FRONT_MATTER) == {
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "language": ["en", "zh"],
    }


def _table(text: str, header: str) -> list[list[str]]:
    """The rows of the table whose first line contains `header`, including the first line."""
    lines = text[: text.index(header)].count("\n"), text.split("\n")
    table = [line for line in "\n".join(lines[1][lines[0] :]).split("\n\n")[0].split("\n") if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert all(len(row) == len(rows[0]) for row in rows), header
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize(("header", "rows"), [("InternLM-20B | Llama-33B", 6), ("| MMLU |", 17)])
def test_evaluation_tables(header: str, rows: int):
    """Seven models, no missing numbers, the best from 13B to 33B in bold, Chinese equal to English."""
    if "MMLU" in header:
        found = [_table(text[text.index(header) - 200 :], "| | ") for text in (ENGLISH, CHINESE)]
    else:
        found = [_table(text, header) for text in (ENGLISH, CHINESE)]
    numbers = []
    for head, *body in found:
        assert head[-7:] == [
            "Llama-13B", "Llama2-13B", "Baichuan2-13B", "InternLM-20B", "Llama-33B", "Llama-65B", "Llama2-70B",
        ]  # fmt: skip
        assert len(body) == rows
        for row in body:
            scores = [float(cell.strip("*")) for cell in row[-7:]]
            bold = [cell.startswith("**") and cell.endswith("**") for cell in row[-7:]]
            assert bold == [score == max(scores[:5]) for score in scores[:5]] + [False, False], row
        numbers.append([row[-7:] if rows == 6 else row[1:] for row in body])
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_memory_table(text: str, modeling):
    """Parameters, bytes per dtype, keys and values: counted on the full-size models, on the meta device."""
    rows = {row[0]: row[1:] for row in _table(text, "| float32 | bfloat16")}
    for name, variant in {"20B": "internlm-20b", "7B": "internlm-7b"}.items():
        config = modeling.InternLMConfig(**json.loads((ROOT / "variants" / variant / "config.json").read_text()))
        with torch.device("meta"):
            model = modeling.InternLMForCausalLM(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        linear = sum(
            parameter.numel() for name, parameter in model.model.layers.named_parameters() if parameter.dim() == 2
        )
        rest = 2 * (parameters - linear)
        token = 2 * config.num_hidden_layers * config.hidden_size * 2
        sizes = [
            4 * parameters,
            2 * parameters,
            linear + rest,
            linear * (0.5 + 4 / 64) + rest,
            token * 1000,
            token * 16384,
        ]
        shown = [f"{size / 1e9:.{2 if size == token * 1000 else 1}f}" for size in sizes]
        assert rows[name] == [f"{parameters:,}", *shown]


def test_finetuning_memory_table(modeling):
    """Computed by tools/training_memory.py, whose weights and adapter are those of the full-size models."""
    rows = {(row[0], row[1]): row[2:] for row in _table(PAGES["docs/finetuning.md"], "| adapter and optimizer |")[1:]}
    found = {}
    for name, variant in {"7B": "internlm-7b", "20B": "internlm-20b"}.items():
        config = modeling.InternLMConfig(**json.loads((ROOT / "variants" / variant / "config.json").read_text()))
        with torch.device("meta"):
            model = modeling.InternLMForCausalLM(config)
        linear = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
        adapter = sum(16 * (module.in_features + module.out_features) for module in linear)
        size, quantised = (
            sum(parameter.numel() for parameter in model.parameters()),
            sum(m.weight.numel() for m in linear),
        )
        for method, qlora in {"LoRA, bfloat16": False, "QLoRA, nf4": True}.items():
            parts, checkpointed = (memory(config, 16, 2048, qlora, checkpointing=each) for each in (False, True))
            assert parts["weights"] == 2 * size - (2 - 0.5 - 4 / 64) * quantised * qlora
            assert parts["adapter"] == adapter * (8 if qlora else 16)
            small = checkpointed["activations"]
            fixed = parts["weights"] + parts["adapter"]
            totals = (fixed + parts["activations"], fixed + small)
            found[name, method] = [f"{value / 1e9:.1f}" for value in (*parts.values(), small, *totals)]
    assert rows == found


def test_the_memory_of_a_card_follows_from_the_table():
    """Weights, one KV cache and 1 GB."""
    readme = {row[0]: row for row in _table(ENGLISH, "KV cache, 1,000 tokens")[1:]}
    columns = {"bfloat16, float16": 3, "int8": 4, "nf4": 5}
    for model, precision, window, long in _table(PAGES["docs/memory.md"], "| model | precision |")[1:]:
        weights, cache = float(readme[model][columns[precision]]), float(readme[model][6]) / 1000
        tokens = {"20B": 4096, "7B": 2048}[model]
        assert float(window) == pytest.approx(weights + cache * tokens + 1, abs=0.06)
        assert float(long) == pytest.approx(weights + float(readme[model][7]) + 1, abs=0.06)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_variants_table(text: str):
    """Every variant has a row with the numbers of its config.json and the prompt format of its template."""
    rows = {row[0]: row[1:] for row in _table(text, "| MLP")[1:]}
    folders = {path.parent.name: path.parent for path in ROOT.glob("variants/*/config.json")}
    assert set(rows) == set(folders)
    fields = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "bias",
        "max_position_embeddings",
    )
    words = {"yes": True, "no": False, "有": True, "无": False}
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        assert [words[cell] if cell in words else int(cell) for cell in rows[name][:6]] == [
            config[key] for key in fields
        ]
        form = "–" if "chat" not in name else "early" if (folder / "variant.json").exists() else "later"
        assert rows[name][6] in {"–": ("–",), "early": ("early", "早期"), "later": ("later", "后期")}[form]


def _slug(heading: str) -> str:
    """The anchor that GitHub and the Hub generate for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_links_have_targets(name: str):
    """Every relative link names a file of the repository, and every anchor a heading of that page."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", _without_code(PAGES[name])):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", _without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(_slug, headings), f"{name} links to #{anchor}, which {path.name} lacks"


@functools.cache
def _options(command: str) -> set[str]:
    """The options that `python COMMAND --help` lists."""
    run = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
    return set(re.findall(r"--[a-z-]+", run.stdout)) if run.returncode == 0 else set()


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_paths_exist(name: str):
    """Every make target, script, option and repository path that a page names in code exists."""
    found = re.findall(r"^```(?:shell|bash)\n(.*?)^```$|(?<!`)`([^`\n]+)`", PAGES[name], re.MULTILINE | re.DOTALL)
    code = "\n".join(fence or inline for fence, inline in found)
    missing = {
        f"make {target}"
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code)
        if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    }
    paths = re.findall(r"\b(?:tests|tools|docs|examples|benchmarks|checkpoints|variants|evaluation)/[\w./-]*", code)
    missing |= {path for path in paths if not (ROOT / path).exists()}
    commands: dict[str, set[str]] = {}
    for command, arguments in re.findall(r"\bpython ([\w/]+\.py(?: [a-z]+\b)?)([^\n#]*)", code):
        commands.setdefault(command, set()).update(re.findall(r"--[a-z-]+", arguments))
    for command, options in commands.items():
        missing |= {f"{command} {option}" for option in (options | {"--help"}) - _options(command)}
    assert not missing, f"{name} names what does not exist: {sorted(missing)}"


def _test_names(paths: str) -> set[str]:
    """The test functions of one file, or of all files below tests/, and the strings that may be their parameters."""
    files = [ROOT / paths] if paths else [*ROOT.glob("tests/**/test_*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return {name or string for name, string in re.findall(r'^def (test_\w+)|"([\w ]+)"', text, re.MULTILINE)}


@pytest.mark.parametrize("name", PAGES)
def test_pytest_selections_match_a_test(name: str):
    """Every word of a quoted `pytest ... -k "one or other"` is part of the name or a parameter of a test."""
    for command in re.findall(r"\bpytest [^`\n]*-k [^`\n]*", PAGES[name]):
        paths = re.search(r"tests/\S+\.py", command)
        tests = _test_names(paths[0] if paths else "")
        words = set(re.findall(r"\w+", command.split("-k ")[1])) - {"or"}
        assert words and not [word for word in words if not any(word in test for test in tests)], command


def test_generated_blocks_are_marked():
    """Each block that a tool rewrites is marked exactly once."""
    marks = [("README.md", "matrix"), ("README.md", "speed"), ("docs/compatibility.md", "torch")]
    for page, mark in (*marks, ("docs/compatibility.md", "quantised")):
        assert re.findall(rf"<!-- (/?{mark}) -->", PAGES[page]) == [mark, f"/{mark}"]


def test_the_table_of_quantised_models_is_that_of_its_results():
    """Generated from the result file of the real model."""
    rows = json.loads((RESULTS / NAME).read_text(encoding="utf-8"))["rows"]
    assert rows[0]["case"] == ORIGINAL
    assert f"<!-- quantised -->\n{table(rows)}\n<!-- /quantised -->" in PAGES["docs/compatibility.md"]


def test_every_page_names_the_range_of_torch_that_the_table_shows():
    """Its ends are those that tools/matrix.py runs, each with the oldest and the newest transformers."""
    rows = _table(PAGES["docs/compatibility.md"], "| torch | transformers |")[1:]
    ends = [(torch, transformers) for torch in TORCH_VERSIONS for transformers in (VERSIONS[0], VERSIONS[-1])]
    assert [tuple(row[:2]) for row in rows] == ends
    oldest, newest = (version.removesuffix(".0") for version in TORCH_VERSIONS)
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for text in (ENGLISH, CHINESE, PAGES["docs/compatibility.md"], PAGES["CHANGELOG.md"], requirements):
        assert re.search(rf"torch\D*{oldest}\D.*?\D{newest}\b", text, re.DOTALL), text[:80]
