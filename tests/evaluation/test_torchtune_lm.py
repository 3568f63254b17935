"""The lm-evaluation-harness adapter against the harness's HFLM with the same weights."""

import itertools
import json
import shutil
import weakref
from functools import partial

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from near import assert_same_choices, assert_same_greedy, assert_same_texts
from tiny import TEMPLATE, save_tokenizer
from torchtune import training
from torchtune.generation import generate as torchtune_generate
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import KVCache
from torchtune.modules.common_utils import local_kv_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, GenerationConfig

from owlore_evals.generation import Prompts, _Cache, _Chooser, _has_ended, generation_options, sample, sequences_at_once
from owlore_evals.harness import load_tasks
from owlore_evals.shared_prefix import make_rows, tokens_at_once
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.decoder import cached_values
from owlore_tune.models.gemma2 import gemma2
from owlore_tune.models.hf import hf_decoder
from owlore_tune.models.smollm2 import smollm2_135m

QUESTIONS = [
    ("What melts ice?", [" heat", " cold", " darkness and more darkness", " salt"]),
    ("The quick brown", [" fox", " fox jumps over the lazy dog", " dogs answer"]),
    ("Q: Is water wet?\nA:", [" yes", " no"]),
    ("", ["An answer without a question"]),
    ("A context that is longer than the others, which is why it comes first " * 3, [" one", " two", " three and four"]),
]
EXAMPLES = "".join(f"What is {i} plus {i}? It is {2 * i}.\n" for i in range(8))
FEW_SHOT = [  # contexts with a common prefix; one is a prefix of another
    (EXAMPLES + "What is 9 plus 9?", [" It is 18.", " It is 7."]),
    (EXAMPLES + "What is 9 plus 9? Think first.", [" It is 18.", " No", " It is"]),
    (EXAMPLES + "What is left?", [" Right is right."]),
    (EXAMPLES[:-20] + "nothing", [" It is 18.", " It is 7."]),
]
PROMPTS = [
    "The capital of France is",
    "1, 2, 3,",
    "Once upon a time",
    "def add(a, b):",
    "To boil an egg,",
    "Water is",
    "The opposite of hot is",
    "A dog is an animal that",
    "Monday, Tuesday,",
    "import numpy as",
    "Two plus two is",
    "The sun rises in the",
]


def adapter(directory, model_type, build, **options) -> TorchtuneLM:
    with torch.device("meta"):
        model = build()
    checkpointer = HFCheckpointer(str(directory), model_type)
    checkpointer.load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    return TorchtuneLM(model, HFChatTokenizer(str(directory)), **options)


def hf(directory, **options) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=4, **options)


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    def build():
        return llama2(300, 4, 4, 2, 32, max_seq_len=256, intermediate_dim=48)

    return adapter(tiny_dir, "LLAMA2", build, batch_tokens=300), hf(tiny_dir)


@pytest.fixture(scope="module")
def real(smollm2_dir):
    return adapter(smollm2_dir, "LLAMA3_2", smollm2_135m), hf(smollm2_dir)


@pytest.fixture(scope="module")
def transformers(smollm2_dir, real):
    """SmolLM2 as a decoder of transformers."""
    return adapter(smollm2_dir, "HF", partial(hf_decoder, str(smollm2_dir))), real[1]


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A random Gemma 2 with windows of 16 positions, which are shorter than the texts."""
    directory = tmp_path_factory.mktemp("models") / "gemma2"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=256,
        initializer_range=0.3, rms_norm_eps=1e-5, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    build = partial(
        gemma2, vocab_size=300, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=48,
        max_seq_len=256, head_dim=8, query_pre_attn_scalar=8, sliding_window_size=16, norm_eps=1e-5,
    )  # fmt: skip
    return adapter(directory, "GEMMA2", build), hf(directory)


def test_a_window_is_right_in_the_larger_caches_of_torchtunes_generate(windows):
    """There, a mask is as wide as the cache, which is longer than the text and than the window."""
    model = windows[0].model
    prompt = torch.arange(40, 70)[None]
    with local_kv_cache(model, batch_size=1, device=prompt.device, dtype=torch.float32, decoder_max_seq_len=128):
        tokens, logits = torchtune_generate(model, prompt, max_generated_tokens=8, top_k=1)
    expected = windows[1].model(tokens).logits[:, len(prompt[0]) - 1 : -1]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def scored() -> list[Instance]:
    pairs = [(context, answer) for context, answers in QUESTIONS + FEW_SHOT for answer in answers]
    return instances("loglikelihood", pairs[::2] + pairs[1::2])  # answers of one context are not adjacent


@pytest.fixture(scope="module")
def transformers_windows(tmp_path_factory):
    """A random Gemma 3, with such windows in some layers, as a decoder of transformers."""
    directory = tmp_path_factory.mktemp("models") / "gemma3"
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=256,
        initializer_range=0.3, pad_token_id=0, dtype="float32",
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return adapter(directory, "HF", partial(hf_decoder, str(directory))), hf(directory)


@pytest.mark.parametrize("which", ["tiny", "real", "transformers", "windows", "transformers_windows"])
def test_log_likelihoods_equal_the_harness(which, request):
    ours, theirs = request.getfixturevalue(which)
    (values, greedy), (expected, expected_greedy) = (
        zip(*lm.loglikelihood(scored(), disable_tqdm=True), strict=True) for lm in (ours, theirs)
    )
    assert values == pytest.approx(expected, abs=1e-3)
    assert_same_greedy(greedy, expected_greedy, [instance.args for instance in scored()], theirs)


def test_results_do_not_depend_on_how_rows_are_batched(tiny, tiny_dir, monkeypatch):
    """Nor on how many positions get logits at once."""
    ours, _ = tiny
    expected = ours.loglikelihood(scored(), disable_tqdm=True)
    for batch_tokens in (1, 100, 300, 10_000):
        monkeypatch.setattr("owlore_evals.shared_prefix._HEAD_POSITIONS", 5 if batch_tokens == 300 else 512)
        alone = TorchtuneLM(ours.model, ours.tokenizer, batch_tokens=batch_tokens)
        for (a, _), (b, _) in zip(alone.loglikelihood(scored(), disable_tqdm=True), expected, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_a_context_of_spaces_does_not_depend_on_its_neighbours(tiny):
    """Regression: it has no tokens of its own, so the last position of another row was read."""
    ours, _ = tiny
    pairs = [("the quick brown fox", " the"), ("  ", "lazy dog"), ("\n", "fox"), ("answers questions", " the dog")]
    together = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for pair, (value, greedy) in zip(pairs, together, strict=True):
        ((alone, greedy_alone),) = ours.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
        assert alone == pytest.approx(value, abs=1e-4) and greedy == greedy_alone


def test_contexts_that_begin_alike_are_read_once(tiny):
    ours, _ = tiny
    encoded = [
        tuple(map(ours.tok_encode, pair)) for context, answers in FEW_SHOT for pair in [(context, a) for a in answers]
    ]
    rows = make_rows(encoded, 1000)
    contexts = {tuple(context) for context, _ in encoded}
    assert len(rows) < len(contexts) and max(len(row.branches) for row in rows) >= 3
    assert sum(map(len, rows)) < sum(map(len, contexts))
    assert sorted(index for row in rows for index in row.requests) == list(range(8))
    for row in rows:
        for alone, branch in zip(row.split(), row.branches, strict=True):
            assert tuple(alone.branches[0].context) in contexts
            assert alone.requests == branch.requests
    unlike = [([i] * 40 + [7], [1]) for i in range(4)]
    assert len(make_rows(unlike, 256)) == 4


def test_contexts_too_long_lose_their_beginning_as_in_the_harness(tiny, tiny_dir, caplog):
    ours, _ = tiny
    short = TorchtuneLM(ours.model, ours.tokenizer, max_length=24)
    theirs = hf(tiny_dir, max_length=24)
    pairs = instances("loglikelihood", [("lazy dog " * 20, " fox"), ("lazy dog " * 20, " quick brown"), ("a", " b")])
    for (a, _), (b, _) in zip(
        short.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-4)
    assert "2 of 3 prompts have no room in 24 tokens, and lose their beginning" in caplog.text
    short.generate_until([Instance("generate_until", {}, ("lazy dog " * 20, {"until": [], "max_gen_toks": 4}), 0)])
    assert "1 of 1 prompts have no room in 24 tokens" in caplog.text
    with pytest.raises(ValueError, match="a continuation of .* tokens is longer than 24"):
        short.loglikelihood(instances("loglikelihood", [("a", "b" * 40)]), disable_tqdm=True)


@pytest.mark.parametrize("which", ["tiny", "real", "transformers"])
def test_rolling_log_likelihoods_equal_the_harness(which, request):
    ours, theirs = request.getfixturevalue(which)
    texts = instances("loglikelihood_rolling", [("The lazy dog answers questions. " * 30,), ("A fox.",)])
    for a, b in zip(
        ours.loglikelihood_rolling(texts, disable_tqdm=True),
        theirs.loglikelihood_rolling(texts, disable_tqdm=True),
        strict=True,
    ):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    ("which", "chat"),
    [
        pytest.param("real", False, marks=pytest.mark.slow), ("real", True),
        pytest.param("transformers", True, marks=pytest.mark.slow), ("windows", False),
        ("transformers_windows", False),
    ],
)  # fmt: skip
def test_greedy_text_equals_the_harness(which, chat, request, monkeypatch):
    ours, theirs = request.getfixturevalue(which)
    monkeypatch.setattr(theirs, "batch_size_per_gpu", len(PROMPTS))
    options = {"until": ["\n\n", "Question:"], "max_gen_toks": 24, "do_sample": False}
    contexts = PROMPTS
    if chat:
        contexts = [ours.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        assert contexts == [theirs.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    requests = instances("generate_until", [(context, options) for context in contexts])
    got = ours.generate_until(requests, disable_tqdm=True)
    assert_same_texts(got, theirs.generate_until(requests, disable_tqdm=True), contexts, theirs)
    assert not ours.model.caches_are_setup()


@pytest.mark.parametrize("which", ["real", pytest.param("transformers", marks=pytest.mark.slow)])
def test_rows_that_are_done_leave_the_batch(which, request):
    ours, theirs = request.getfixturevalue(which)
    options = {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False}
    requests = instances("generate_until", [(prompt, options) for prompt in PROMPTS[:8]])
    alone = [ours.generate_until([one], disable_tqdm=True)[0] for one in requests]
    rows = []
    hook = ours.model.tok_embeddings.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    together = ours.generate_until(requests, disable_tqdm=True)
    hook.remove()
    assert_same_texts(together, alone, PROMPTS[:8], theirs)
    assert rows == sorted(rows, reverse=True) and rows[0] == 8 > rows[-1]


def test_generation_stops_at_stop_strings_and_keeps_gen_kwargs_apart(real):
    ours, _ = real
    one = {"until": [","], "max_gen_toks": 24, "do_sample": False}
    other = {"until": [], "max_gen_toks": 3, "do_sample": False}
    requests = instances("generate_until", [("1, 2, 3", other), ("1, 2, 3,", one), ("4, 5, 6,", one)])
    texts = ours.generate_until(requests, disable_tqdm=True)
    assert len(ours.tok_encode(texts[0])) == 3
    assert "," in texts[0]
    assert all(text and "," not in text for text in texts[1:])
    with pytest.raises(ValueError, match="max_gen_toks=9000 leaves no room in 8192 tokens"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 9000})]), True)


def test_an_answer_is_the_text_after_the_reasoning(real, monkeypatch):
    ours, _ = real
    request = Instance("generate_until", {}, ("Hi", {"until": [], "max_gen_toks": 4}), 0)
    text = "<think>answer1? No.</think>\n\nanswer2"
    monkeypatch.setattr(ours, "_generate", lambda batch: [ours.tok_encode(text)])
    assert ours.generate_until([request], disable_tqdm=True) == [text]
    monkeypatch.setattr(ours.tokenizer, "enable_thinking", True)
    assert ours.generate_until([request], disable_tqdm=True) == ["answer2"]


def test_chat_without_generation_prompt_ends_in_the_last_message(real):
    ours, theirs = real
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The best answer is "}]
    for last in ("The best answer is ", " The best answer is", "B\n", "B"):
        chat[-1]["content"] = last
        got, expected = (lm.apply_chat_template(chat, add_generation_prompt=False) for lm in (ours, theirs))
        assert got == expected


def test_system_messages_go_where_the_template_refuses_them(tiny_dir, tmp_path):
    directory = tmp_path / "gemma"
    shutil.copytree(tiny_dir, directory)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": refusing}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    lm = TorchtuneLM(llama2(300, 1, 4, 2, 32, max_seq_len=64), HFChatTokenizer(str(directory)))
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(chat) == "<|user|>Hi<|end|>\n<|assistant|>"


def test_what_ends_a_turn_ends_generation(tiny_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    assert HFChatTokenizer(str(directory)).stop_tokens == [0, 7]
    (directory / "generation_config.json").write_text("{}")
    assert HFChatTokenizer(str(directory)).stop_tokens == [0]
    tokenizer = HFChatTokenizer(str(tiny_dir))
    prompts = Prompts([[1]], max_new=8, until=["<|user|>"], temperature=0.0, seeds=[0])
    assert _has_ended([5, tokenizer.special_tokens["<|user|>"]], prompts, tokenizer)
    assert not _has_ended([5, 6], prompts, tokenizer)


def test_key_value_caches_that_do_not_fit_halve_the_batch(tiny, monkeypatch):
    """Simulate a small GPU: the caches of the last layers do not fit for more than 2 rows."""
    ours, _ = tiny
    prompts = [("2 and 2", {"max_gen_toks": 5, "until": []}), ("it is", {"max_gen_toks": 5, "until": []})] * 3
    requests = [Instance("generate_until", {}, prompt, i) for i, prompt in enumerate(prompts)]
    monkeypatch.setattr(ours, "batch_size", 2)
    expected = ours.generate_until(requests, disable_tqdm=True)
    monkeypatch.setattr(ours, "batch_size", 6)
    attempts, failed = [], []

    class SmallCache(KVCache):
        def __init__(self, batch_size, *args, **kwargs):
            super().__init__(batch_size, *args, **kwargs)
            assert not any(cache() for cache in failed if batch_size < attempts[-1]), "a failed attempt is in memory"
            attempts.append(batch_size)
            if batch_size > 2:
                failed.append(weakref.ref(self))
                if len(failed) % 3 == 0:
                    raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("torchtune.modules.attention.KVCache", SmallCache)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
    assert attempts[:4] == [6, 6, 6, 3] and ours.batch_size == 1
    assert not ours.model.caches_are_setup()


@pytest.mark.parametrize("family", [llama3_2, gemma2])
def test_the_counted_cache_is_the_one_that_generation_allocates(family):
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
    head = {"head_dim": 8} if family is gemma2 else {}
    model = family(vocab_size=100, max_seq_len=16, **shape, **head)
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=1)
    allocated = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(("k_cache", "v_cache")))
    assert allocated == cached_values(model)


def test_batches_follow_the_free_memory_of_a_gpu():
    with torch.device("meta"), training.set_default_dtype(torch.bfloat16):
        model = llama3_2(vocab_size=100, num_layers=4, num_heads=8, num_kv_heads=2, embed_dim=512, max_seq_len=64)
    a_cache = 4 * 2 * 2 * 64 * 1000 * 2  # layers, keys and values, heads, head_dim, tokens, bytes
    a_pass = (8 * 512 + 4 * 1536) * 1000 * 2  # activations of a layer: larger than the cache, as queries are grouped
    assert sequences_at_once(model, 1000, free=2 * 10 * (a_cache + a_pass)) == 10
    assert sequences_at_once(model, 1000, free=1) == 1
    assert sequences_at_once(model, 1000, free=None) == 8
    one, two = (tokens_at_once(model, free) for free in (10**8, 2 * 10**8))
    assert 2_048 < one < 65_536 and two == pytest.approx(2 * one, abs=1)
    assert tokens_at_once(model, 10**12) == 65_536
    assert tokens_at_once(model, None) == 2_048


def test_generation_batches_are_sized_for_the_longest_request_not_for_the_longest_possible(tiny, monkeypatch):
    ours, _ = tiny
    prompts = [(text, {"max_gen_toks": 5, "until": []}) for text in PROMPTS[:7]]
    requests = [Instance("generate_until", {}, prompt, i) for i, prompt in enumerate(prompts)]
    expected = ours.generate_until(requests, disable_tqdm=True)
    longest = max(len(ours.tok_encode(text)) for text, _ in prompts) + 5
    assert longest < ours.max_length
    sizes = []
    generate = ours._generate
    monkeypatch.setattr(ours, "_generate", lambda batch: sizes.append(len(batch.tokens)) or generate(batch))
    one = next(free for free in itertools.count(1000, 1000) if sequences_at_once(ours.model, longest, free) > 1) // 2
    monkeypatch.setattr(ours, "_free", 3 * one + 1000)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
    assert sizes == [3, 3, 1]


def test_a_cache_is_filled_without_reading_its_position():
    """Reading a value of a meta tensor is an error; on a GPU, the host would wait for it."""
    with torch.device("meta"):
        theirs = KVCache(2, 8, 2, 4, torch.float32)
        keys = torch.empty(2, 2, 3, 4)
    with pytest.raises(RuntimeError):
        theirs.update(keys, keys)
    theirs.__class__ = _Cache
    assert theirs.update(keys, keys)[0].shape == (2, 2, 3, 4)
    assert theirs.update(keys, keys)[0].shape == (2, 2, 6, 4)


def test_generation_options():
    assert generation_options({"do_sample": True, "until": []}, 99, 9)["temperature"] == 1.0
    assert generation_options({"until": []}, 99, 9)["temperature"] == 0.0
    assert generation_options({"temperature": 0.7, "do_sample": False, "top_p": 1.0}, 99, 9)["temperature"] == 0.0
    own = generation_options({"do_sample": True, "top_p": 0.95}, 99, 9, {"temperature": 0.6, "top_k": 20, "top_p": 0.8})
    assert (own["temperature"], own["top_k"], own["top_p"], own["repetition_penalty"]) == (0.6, 20, 0.95, 1.0)
    for bad in ({"top_k": -1}, {"top_p": 0.0}, {"repetition_penalty": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=rf"generation with {next(iter(bad))}=.*; it is out of range"):
            generation_options({"do_sample": True, **bad}, 99, 9)
    greedy = generation_options({"until": []}, 99, 9, {"top_k": -1, "top_p": 0.0})  # which have no effect
    assert greedy["temperature"] == 0.0
    with pytest.raises(ValueError, match=r"generation with min_p=0\.1 is not supported"):
        generation_options({"do_sample": True, "temperature": 1.0, "min_p": 0.1}, 99, 9)


def test_a_model_brings_its_own_repetition_penalty_as_in_the_harness(smollm2_dir, tmp_path, real):
    directory = tmp_path / "model"
    shutil.copytree(smollm2_dir, directory)
    config = GenerationConfig.from_pretrained(directory)
    config.repetition_penalty = 1.3
    config.save_pretrained(directory)
    ours, theirs = TorchtuneLM(real[0].model, HFChatTokenizer(str(directory))), hf(directory)
    options = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    requests = instances("generate_until", [(prompt, options) for prompt in PROMPTS[:6]])
    alone = [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]  # no penalty on padding
    assert_same_texts(ours.generate_until(requests, disable_tqdm=True), alone, PROMPTS[:6], theirs)
    assert alone != real[0].generate_until(requests, disable_tqdm=True)


def test_samples_are_of_the_most_likely_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    counts = {}
    for seed in range(200):
        prompts = Prompts([[0]], 1, [], temperature=1.0, seeds=[seed], top_k=3, top_p=0.9)
        token = _Chooser(prompts, torch.tensor([[0]]), torch.tensor([[True]]))(logits).item()
        counts[token] = counts.get(token, 0) + 1
    # The first two of the three most likely tokens have a probability of 0.91.
    assert counts.keys() == {0, 1} and 120 < counts[0] < 170  # 146 expected, standard deviation 6


def test_tokens_are_sampled_with_their_probabilities():
    uniform = (torch.arange(1000) + 0.5) / 1000
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0]).expand(1000, -1)
    assert sample(probabilities, uniform).bincount(minlength=6).tolist() == [0, 100, 0, 600, 300, 0]
    edges = torch.tensor([0.0, 1 - 2**-24])
    for size in (1.0, 0.9999, 1.0001):  # sums of rounded probabilities
        assert sample(size * probabilities[:2], edges).tolist() == [1, 4]


def test_what_is_sampled_depends_on_seed_and_context_alone(real):
    ours, _ = real
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    together = instances("generate_until", [(prompt, options) for prompt in [*PROMPTS[:3], PROMPTS[0]]])
    texts = ours.generate_until(together, disable_tqdm=True)
    alone = [ours.generate_until([request], disable_tqdm=True)[0] for request in together[:3]]
    assert texts[:3] == alone
    assert texts[3] != texts[0]  # a repeated request gets a new sample
    other = TorchtuneLM(ours.model, ours.tokenizer, seed=1)
    assert other.generate_until(together, disable_tqdm=True) != texts


def test_bos_is_added_once_if_asked_for(real):
    ours, theirs = real
    with_bos = TorchtuneLM(ours.model, ours.tokenizer, add_bos=True)
    assert ours.tok_encode("Hi") == theirs.tok_encode("Hi")
    assert with_bos.tok_encode("Hi") == [1, *ours.tok_encode("Hi")]
    assert with_bos.tok_encode("<|im_start|>Hi") == [1, *ours.tok_encode("Hi")]
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    assert ours.chat_template(True) == theirs.tokenizer.chat_template


@pytest.mark.slow
def test_300_log_likelihoods_of_real_questions_equal_the_harness(real, transformers):
    """MMLU dev questions in ARC format, the shortest ones of all subjects, and in MMLU format with 5 examples.

    All choices agree, with both decoders.
    """
    (ours, theirs), (of_transformers, _) = real, transformers
    (task,) = load_tasks(["mmlu_dev"])
    docs = sorted(task.test_docs(), key=lambda doc: len(doc["question"] + "".join(doc["choices"])))[:75]
    pairs = [(f"Question: {d['question']}\nAnswer:", f" {choice}") for d in docs for choice in d["choices"]]
    task.set_config("num_fewshot", 5)
    task.build_all_requests(limit=8, rank=0, world_size=1)
    requests = instances("loglikelihood", pairs) + task.instances
    assert len(pairs) == 300 and len(task.instances) == 32
    got, also, expected = (
        torch.tensor([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]).view(-1, 4)
        for lm in (ours, of_transformers, theirs)
    )
    for found in (got, also):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        assert_same_choices(found, expected)
