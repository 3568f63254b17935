"""Pairs of fields that are right alone and wrong together, or wrong in a way that one check could hide from another."""

# ruff: noqa: E501  (a row of a table is a line)

import json

import pytest
from places import refused

import owlore_eval
import owlore_full_finetune

INT8 = "owlore.weights=int8"
TRAINING: dict[tuple[str, ...], str] = {
    # fields of the owlore block
    ("owlore.products=int8", "owlore.weights=nf4"): "owlore.products=int8 needs owlore.weights=int8, not nf4",
    ("owlore.products=int8", "owlore.weights=full"): "owlore.products=int8 needs owlore.weights=int8, not full",
    ("optimizer=torch.optim.Adam", "optimizer.weight_decay=0.1"): "optimizer: weight_decay=0.1; that of Adam is not known to be decoupled",
    ("optimizer=torch.optim.Adagrad", "~optimizer.betas", "~optimizer.fused"): "optimizer: Adagrad makes its state before A has values; use one that makes it in its first step, such as AdamW",
    ("optimizer=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "~optimizer.fused", "optimizer.momentum=0.9", "owlore.moments=project"): "optimizer._component_=torch.optim.SGD cannot be used: moments=project; SGD has no exp_avg and exp_avg_sq to project",
    ("owlore.draw=bernoulli", "device_memory_limit=20"): "device_memory_limit cannot be guaranteed with owlore.draw=bernoulli, which may draw all layers",
    ("owlore.num_active_layers=5", "owlore.draw=sequential"): "owlore.num_active_layers=5; the model has 4 layers",
    ("owlore.scores_file=~nosuchuser/scores.json", "owlore.score=uniform"): "~nosuchuser/scores.json: there is no user nosuchuser",
    ("owlore.score=outlier", "owlore.outlier_threshold=2000000000"): "owlore.outlier_threshold=2000000000; it must be above 0, and at most 1,000,000,000",
    # model and model directory
    ("model=torchtune.models.llama3_2.llama3_2", "checkpointer.model_type=LLAMA3_2"): "the model's builder has rope_theta=500000, and config.json has 10000.0",
    ("model.num_heads=8", "model.num_kv_heads=4"): "the model's builder has num_attention_heads=8, and config.json has 4",
    ("model.num_heads=2", "model.num_kv_heads=1"): "the model's builder has num_attention_heads=2, and config.json has 4",
    ("model.num_kv_heads=4", "owlore.score=uniform"): "the model's builder has num_key_value_heads=4, and config.json has 2",
    ("model.norm_eps=0.01", INT8): "the model's builder has rms_norm_eps=0.01, and config.json has 1e-05",
    ("model.rope_base=20000", "owlore.weights=nf4"): "the model's builder has rope_theta=20000, and config.json has 10000.0",
    ("model.num_layers=3", "owlore.num_active_layers=3"): "the model's builder has num_hidden_layers=3, and config.json has 4",
    ("model.vocab_size=299", "tokenizer.max_seq_len=32"): "the model's builder has vocab_size=299, and config.json has 300",
    ("model.embed_dim=64", "model.num_heads=8"): "the model's builder has hidden_size=64, and config.json has 32",
    ("model.intermediate_dim=40", INT8): "the model's builder has intermediate_size=40, and config.json has 48",
    ("model=torchtune.models.mistral.mistral", "checkpointer.model_type=MISTRAL"): "checkpointer.model_type=MISTRAL is for config.json's model_type mistral, and the model's is llama",
    ("model=owlore_tune.models.hf_decoder", "model.path=/nope"): "model: vocab_size is given, and path too, whose config.json describes the model",
    ("model.max_seq_len=1000000000000", "tokenizer.max_seq_len=32"): "model.max_seq_len=1000000000000; it must be 1 to 16,777,216",
    ("model.max_seq_len=10**12", "tokenizer.max_seq_len=32"): "model: arange() received an invalid combination of arguments",
    ("model.max_seq_len=8", "tokenizer.max_seq_len=null"): "dataset.data_files=train.json: row 0 has 28 tokens, and the model takes 8; set tokenizer.max_seq_len",
    ("model.max_seq_len=8", "dataset.packed=true"): "dataset has 3 samples, less than one optimizer step of batch_size=4 × gradient_accumulation_steps=1",
    ("checkpointer.checkpoint_dir=model/", "checkpointer.checkpoint_files=[config.json]"): "checkpointer: model/config.json cannot be read",
    # tokenizer and data
    ("tokenizer.max_seq_len=null", "dataset.packed=true"): "dataset.packed=true needs tokenizer.max_seq_len, the length of a packed row",
    ("tokenizer.path=~nosuchuser/model", "tokenizer.chat_template=plain"): "~nosuchuser/model: there is no user nosuchuser",
    ("dataset.data_files=~nosuchuser/train.json", "dataset.packed=true"): "~nosuchuser/train.json: there is no user nosuchuser",
    ("dataset.data_files=null", "dataset.source=json"): "dataset.source=json cannot be loaded",
    ("dataset.data_files=null", "dataset.source=model"): "dataset.source=model cannot be loaded",
    ("dataset.data_files=null", "dataset.source=5"): "dataset.source=5; it must be the name of a dataset, or a directory",
    ("dataset.data_files=[train.json,/nope.json]", "dataset.packed=true"): "dataset.data_files=/nope.json does not exist",
    ("dataset=torchtune.datasets.instruct_dataset", "dataset.source=/nope"): "dataset: Couldn't find any data file at /nope.",
    ("dataset=torchtune.datasets.instruct_dataset", "dataset.source=json", "dataset.column_map={input: nope, output: output}"): "dataset: its first row does not fit the dataset's component",
    ("dataset=owlore_tune.data.mmlu_dev_dataset", "dataset.split=train"): "or remove it with ~dataset.data_files",
    ("dataset=owlore_tune.data.mmlu_dev_dataset", "~dataset.data_files", "dataset.split=test"): "dataset.split='test'; choose train or held_out",
    ("dataset=owlore_tune.data.mmlu_dev_dataset", "~dataset.data_files", "dataset.num_held_out=282"): "dataset.num_held_out=282; choose 1 to 281",
    ("batch_size=8", "gradient_accumulation_steps=6"): "dataset has 40 samples, less than one optimizer step of batch_size=8 × gradient_accumulation_steps=6",
    ("collate_fn=torchtune.data.padded_collate_dpo", "dataset.packed=false"): "collate_fn=torchtune.data.padded_collate_dpo cannot make a batch of dataset's samples: KeyError('chosen_input_ids')",
    # optimizer and schedule
    ("optimizer.betas=[0.9,0.999,0.9]", "optimizer.eps=1e-8"): "cannot be used: too many values to unpack (expected 2)",
    ("lr_scheduler.num_warmup_steps=0", "lr_scheduler.num_cycles=.inf"): "'num_cycles': inf}: math domain error",
    ("lr_scheduler.num_warmup_steps=0", "lr_scheduler.num_cycles=abc"): "lr_scheduler: can't multiply sequence by non-int of type 'float' (with num_warmup_steps=0, num_cycles='abc')",
    ("lr_scheduler=torch.optim.lr_scheduler.StepLR", "~lr_scheduler.num_warmup_steps"): "lr_scheduler: missing a required argument: 'step_size' of torch.optim.lr_scheduler.StepLR",
    ("optimizer=torch.optim.SGD", "~optimizer.betas"): "unknown key optimizer.eps",
    ("loss=torchtune.modules.loss.CEWithChunkedOutputLoss", "loss.num_output_chunks=0"): "loss.num_output_chunks=0; it must be a whole number of at least 1",
    ("loss=torchtune.modules.loss.CEWithChunkedOutputLoss", "loss.num_output_chunks=true"): "loss.num_output_chunks=True",
    ("loss=torch.nn.CrossEntropyLoss", "loss.ignore_index=0"): "loss.ignore_index=0; torchtune's datasets mark ignored tokens with -100",
    # the run
    ("device=cuda", "dtype=bf16"): "device=cuda, dtype=bf16: torch finds no cuda device on this machine",
    ("device=mps", "dtype=fp32"): "device=mps, dtype=fp32: torch finds no mps device on this machine",
    ("device=cpu", "fsdp_cpu_offload=true"): "fsdp_cpu_offload=true; it needs FSDP2: launch with tune run --nproc_per",
    (INT8, "fsdp=true"): "cannot be sharded: leave fsdp out",
    ("output_dir=~nosuchuser/run", "metric_logger.log_dir=logs"): "~nosuchuser/run: there is no user nosuchuser",
    ("output_dir=run", "metric_logger.log_dir=/proc/logs"): "metric_logger.log_dir=/proc/logs is not writable",
    ("output_dir=run", "metric_logger.log_dir=train.json/logs"): "metric_logger.log_dir=train.json/logs is not writable",
    ("profiler.enabled=true", "profiler.output_dir=/proc/profile"): "profiler.output_dir=/proc/profile is not writable",
    ("resume_from_checkpoint=true", "output_dir=train.json"): "output_dir=train.json is not writable",
    ("owlore.train_output=true", "owlore.train_embeddings=maybe"): "owlore.train_embeddings='maybe'",
}  # fmt: skip
EVALUATION: dict[tuple[str, ...], str] = {
    ("model.num_heads=8", "model.num_kv_heads=4"): "the model's builder has num_attention_heads=8, and config.json has 4",
    ("model.norm_eps=0.01", "dtype=fp32"): "the model's builder has rms_norm_eps=0.01, and config.json has 1e-05",
    ("tasks=[mmlu_dev]", "num_fewshot=1000"): "num_fewshot=1000; mmlu_dev has 280 examples",
    ("tasks=[mmlu_dev,mmlu_dev]", "limit=2"): "tasks: mmlu_dev would run twice",
    ("tasks=[mmlu_dev]", "max_length=1"): "max_length=1; it must be at least 16, or no question would be read",
    ("tasks=[mmlu_dev_worked]", "max_length=100"): "tasks: mmlu_dev_worked: max_gen_toks=128 leaves no room in 100 tokens for a prompt",
    ("tasks=[]", "data_files={a/b: choices.json}"): "tasks: 'a/b' cannot be the name of a task: files are named after it, so it must have no / and at most 200 bytes",
    ("tasks=[]", "data_files={" + 250 * "x" + ": choices.json}"): "cannot be the name of a task: files are named after it",
    ("tasks=[]", "data_files={a: train.json}", "scoring=last_number"): "data_files: train.json: row 0: answer=None is not a number",
    ("tasks=[mmlu_dev]", "data_root=~nosuchuser/data"): "~nosuchuser/data: there is no user nosuchuser",
    ("tokenizer.chat_template=plain", "apply_chat_template=true"): "this model has no chat template, or tokenizer.chat_template=plain",
    ("device=cuda", "dtype=bf16"): "device=cuda, dtype=bf16: torch finds no cuda device on this machine",
    ("model.max_seq_len=8", "max_length=8"): "max_length=8; it must be at least 16, or no question would be read",
}  # fmt: skip


def test_an_expected_message_says_more_than_the_input():
    for overrides, message in (*TRAINING.items(), *EVALUATION.items()):
        assert len(message) > 12 and not [each for each in overrides if message in each], overrides


@pytest.mark.parametrize("overrides", TRAINING, ids=" ".join)
def test_a_wrong_pair_of_fields(overrides, place, capsys, monkeypatch):
    line = refused(owlore_full_finetune.recipe_main, ["--config", "train.yaml", *overrides], capsys, monkeypatch)
    assert TRAINING[overrides] in line
    assert not list(place.glob("run/step_*")) and not (place / "run" / "run.json").exists()


@pytest.mark.parametrize("overrides", EVALUATION, ids=" ".join)
def test_a_wrong_pair_of_fields_of_an_evaluation(overrides, place, capsys, monkeypatch):
    choices = [{"instruction": "Which? Answer format: a/b", "answer": "a"}]
    (place / "choices.json").write_text(json.dumps(choices))
    line = refused(owlore_eval.recipe_main, ["--config", "eval.yaml", *overrides], capsys, monkeypatch)
    assert EVALUATION[overrides] in line
