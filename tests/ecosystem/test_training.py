"""Training the tiny model with Trainer, TRL and PEFT, compared with plain torch."""

import copy

import peft
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tools.training_memory import activations


pytestmark = pytest.mark.ecosystem
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [
    "The lantern keeper counts the waves.",
    "来到湖边，灯塔的守护人数着波浪。",
    "He sleeps.",
    "At dawn the keeper sings.",
]
CHATS = [
    [{"role": "user", "content": "Who keeps the lantern?"}, {"role": "assistant", "content": "Old Tomas does."}],
    [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "谁守着灯塔？"},
        {"role": "assistant", "content": "老托马斯。"},
    ],
]


@pytest.fixture
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)


def arguments(kind, tmp_path, **settings):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "seed": 1,
    }
    return kind(**defaults | settings)


def rows(tokenizer) -> list[dict]:
    """Texts of different lengths, left-padded; padding is masked in the labels."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [{**{key: batch[key][i] for key in batch}, "labels": labels[i]} for i in range(len(TEXTS))]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_step(before, one, other, atol=1e-6):
    """Two models after one step: their weights changed, and by the same amounts."""
    assert any((one[name] - before[name]).abs().max() > 1e-5 for name in before)
    for name in before:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradient_accumulation_is_one_big_batch(model, tiny_tokenizer, tmp_path, checkpointing):
    """Four accumulated rows equal one batch of four, although rows differ in length; also with checkpointing."""
    before, after = weights(model), []
    for size, accumulation in ((4, 1), (1, 4)):
        trained = copy.deepcopy(model)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        settings |= {"gradient_checkpointing": checkpointing and accumulation == 4}
        Trainer(
            trained, arguments(TrainingArguments, tmp_path, **settings), train_dataset=rows(tiny_tokenizer)
        ).train()
        after.append(weights(trained))
    assert_same_step(before, *after)


def test_trainer_step_equals_plain_torch(model, tiny_tokenizer, tmp_path):
    """One step of Trainer is one step of SGD on the mean loss of all unmasked tokens."""
    plain, before = copy.deepcopy(model).train(), weights(model)
    data = rows(tiny_tokenizer)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    stepped = {name: value.detach() - 1e-3 * value.grad for name, value in plain.named_parameters()}
    Trainer(model, arguments(TrainingArguments, tmp_path, per_device_train_batch_size=4), train_dataset=data).train()
    assert_same_step(before, weights(model), stepped)


@pytest.mark.parametrize("wrapped", (False, True), ids=("plain", "LoRA"))
def test_trainer_smooths_labels_of_the_next_token(model, tiny_tokenizer, tmp_path, wrapped):
    """Too little smoothing to matter is none. It was computed for the same token, so a model learned to stutter."""
    if wrapped:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False))
    before, after = weights(model), []
    for factor in (0.0, 1e-9):
        trained, settings = copy.deepcopy(model), {"per_device_train_batch_size": 4, "label_smoothing_factor": factor}
        data = rows(tiny_tokenizer)
        Trainer(trained, arguments(TrainingArguments, tmp_path, **settings), train_dataset=data).train()
        after.append(weights(trained))
    assert_same_step(before, *after)


def test_trainer_predicts_only_logits(model, tiny_tokenizer, tmp_path):
    """Evaluation gathers the logits without the cache."""
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path, use_cache=True))
    predictions = trainer.predict(rows(tiny_tokenizer)).predictions
    assert predictions.shape[::2] == (len(TEXTS), model.config.vocab_size)


def sft(model, tokenizer, tmp_path, data, **settings):
    settings = {"per_device_train_batch_size": 2, "max_length": 200, **settings}
    return SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )


def test_sft_assistant_only_loss(model, tiny_tokenizer, tmp_path):
    """The loss covers replies and the <eoa> that ends each: the model learns to stop, and not to write user turns."""
    trainer = sft(model, tiny_tokenizer, tmp_path, [{"messages": chat} for chat in CHATS], assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {tiny_tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert learned == {"Old Tomas does.<eoa>", "Good day.<eoa>老托马斯。<eoa>"}
    before = weights(model)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("strategy", ("bfd", "wrapped"))
def test_sft_packing(model, tiny_tokenizer, tmp_path, strategy):
    """Texts packed into one row have the logits of separate texts (bfd); wrapped packing splits a stream into rows."""
    data = [{"text": text} for text in TEXTS]
    packed = sft(
        model, tiny_tokenizer, tmp_path, data, packing=True, packing_strategy=strategy, per_device_train_batch_size=1
    )
    batch = next(iter(packed.get_train_dataloader()))
    batch = {key: value for key, value in batch.items() if key != "seq_lengths"}
    assert batch["input_ids"].shape[1] > 2 * len(tiny_tokenizer(TEXTS[0])["input_ids"])
    assert ("position_ids" in batch) is (strategy == "bfd")
    if strategy == "bfd":
        assert (batch["position_ids"] == 0).sum() == len(TEXTS)
        with torch.no_grad():
            logits = model(**{key: batch[key] for key in ("input_ids", "position_ids")}, use_cache=False).logits[0]
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(logits)], strict=True):
            with torch.no_grad():
                alone = model(batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(logits[start:end], alone, atol=1e-4, rtol=1e-4)
    packed.train()
    assert packed.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("target", (PROJECTIONS, "all-linear"), ids=("named", "all-linear"))
def test_lora(model, tiny_dir, tiny_tokenizer, tmp_path, target):
    """An adapter trains only the layers, merges to the same logits, and reloads from its own folder."""
    before = weights(model)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=target, task_type="CAUSAL_LM"))
    trained, total = adapted.get_nb_trainable_parameters()
    assert 0 < trained < 0.2 * total
    settings = {"per_device_train_batch_size": 4, "max_steps": 8, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = Trainer(adapted, arguments(TrainingArguments, tmp_path, **settings), train_dataset=rows(tiny_tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]

    adapted.eval().save_pretrained(tmp_path / "adapter")
    ids = tiny_tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapted(ids).logits
        fresh = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
        reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(reloaded(ids).logits, expected, atol=1e-5, rtol=0)
        merged = adapted.merge_and_unload()
        assert type(merged).__name__ == "InternLMForCausalLM"
        torch.testing.assert_close(merged(ids).logits, expected, atol=2e-4, rtol=0)
    after = weights(merged)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.split(".")[-2] in PROJECTIONS for name in changed)


@pytest.mark.parametrize("rank", (8, 16))
def test_activations_of_lora_in_bfloat16(modeling, rank):
    """What autograd keeps for one more layer is what tools/training_memory.py computes, to the byte."""
    tokens, kept = 64, []
    for layers in (2, 3):
        config = modeling.InternLMConfig(
            vocab_size=100, hidden_size=256, intermediate_size=704, num_attention_heads=2, num_hidden_layers=layers
        )
        lora = LoraConfig(r=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        adapted = get_peft_model(modeling.InternLMForCausalLM(config).bfloat16(), lora).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
        found = {}

        def keep(tensor, own=own, found=found):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            output = adapted.get_base_model().model(ids, use_cache=False)
        kept.append(sum(storage.nbytes() for storage in found.values()))
        del output
    assert kept[1] - kept[0] == activations(config, rank, tokens, checkpointing=False) / config.num_hidden_layers


@pytest.mark.parametrize("kind", ("DoRA", "IA3", "PromptTuning", "PrefixTuning"))
def test_other_adapters(model, tiny_tokenizer, kind):
    """PEFT's other methods build, train and generate."""
    config = {
        "DoRA": lambda: LoraConfig(r=4, use_dora=True, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
        "IA3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "PromptTuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PrefixTuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }[kind]()
    adapted = get_peft_model(model, config)
    inputs = tiny_tokenizer(TEXTS[0], return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    assert adapted.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1] > 5


def test_resize_token_embeddings(model, tiny_dir, tiny_tokenizer, tmp_path):
    """New tokens get rows, old logits stay the same, and the larger model trains, saves and loads."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        old = model(ids).logits
    assert tokenizer.add_tokens(["<lantern>", "<keeper>"]) == 2
    size = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == size + 64
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :size], old, atol=1e-5, rtol=0)
    new = tokenizer("The <lantern> of the <keeper>", return_tensors="pt")["input_ids"]
    assert (new >= size).sum() == 2
    model(new, labels=new).loss.backward()
    assert model.model.embed_tokens.weight.grad[size : size + 2].abs().sum() > 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(new).logits, model(new).logits, atol=1e-5, rtol=0)


def test_the_fingerprint_does_not_depend_on_use(tiny_dir):
    """datasets finds the cached result of `map` by a hash of the function and its tokenizer, used or not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, trust_remote_code=True)
    before = Hasher.hash(tokenizer)
    tokenizer.decode([300])
    tokenizer.apply_chat_template([{"role": "user", "content": "<eoa>"}])
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    assert Hasher.hash(tokenizer) == before
    assert Hasher.hash(copy.deepcopy(tokenizer)) == before
    tokenizer.add_tokens(["<new>"])
    assert Hasher.hash(tokenizer) != before
