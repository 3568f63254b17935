import json

import pytest
from tiny import TEMPLATE, save_tokenizer, tiny_llama
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from torchtune.data import Message
from transformers import AutoTokenizer

from owlore_tune.data.tokenizer import HFChatTokenizer, check_vocabulary

CONVERSATIONS = [
    [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ciao 👋 né")],
    [("user", "  spaces \n\n and\ttabs "), ("assistant", " leading, and trailing \n")],
    [("user", "<|im_start|> in the text"), ("assistant", "def f(x):\n    return x")],
    [("user", "日本語の質問"), ("assistant", "日本語の答え")],
]


@pytest.fixture
def directory(tmp_path):
    """The directory of a tokenizer that a test changes."""
    save_tokenizer(tmp_path)
    return tmp_path


def trained_text(tokenizer, turns) -> str:
    """The tokens of ``turns``, messages or pairs of role and text, that are trained on."""
    tokens, mask = tokenizer.tokenize_messages(messages(turns) if isinstance(turns[0], tuple) else turns)
    trained = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    return tokenizer.decode(trained, skip_special_tokens=False)


def messages(turns) -> list[Message]:
    return [Message(role=role, content=text, masked=role != "assistant") for role, text in turns]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("which", ["smollm2", "tiny"])
def test_tokens_equal_transformers(which, turns, request):
    directory = request.getfixturevalue(f"{which}_dir")
    reference = AutoTokenizer.from_pretrained(directory)
    tokenizer = HFChatTokenizer(str(directory))
    chat = [{"role": role, "content": text} for role, text in turns]
    tokens, mask = tokenizer.tokenize_messages(messages(turns))
    assert tokens == reference.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert len(mask) == len(tokens)
    prompt, _ = tokenizer.tokenize_messages(messages(turns[:-1]), add_end_tokens=False)
    expected = reference.apply_chat_template(chat[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt == expected
    assert tokens[: len(prompt)] == prompt
    empty = messages([*turns[:-1], ("assistant", "")])
    assert tokenizer({"messages": empty}, inference=True)["tokens"] == prompt


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_mask_leaves_the_assistants_turns_and_their_end(turns, smollm2_dir):
    trained = trained_text(HFChatTokenizer(str(smollm2_dir)), turns)
    assert trained == "".join(f"{text}<|im_end|>" for role, text in turns if role == "assistant")


def test_masked_answers_are_not_trained_on(smollm2_dir):
    turns = messages(CONVERSATIONS[1])
    turns[2].masked = True
    assert trained_text(HFChatTokenizer(str(smollm2_dir)), turns) == "Ciao 👋 né<|im_end|>"


def test_longer_conversations_are_cut_without_an_invented_end(smollm2_dir):
    full, full_mask = HFChatTokenizer(str(smollm2_dir)).tokenize_messages(messages(CONVERSATIONS[1]))
    tokens, mask = HFChatTokenizer(str(smollm2_dir), max_seq_len=20).tokenize_messages(messages(CONVERSATIONS[1]))
    assert (tokens, mask) == (full[:20], full_mask[:20])


def test_special_tokens_and_plain_text(smollm2_dir):
    tokenizer = HFChatTokenizer(str(smollm2_dir))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)  # not HF's pad token, which ends turns
    assert tokenizer.stop_tokens == [2]
    assert tokenizer.vocab_size == 49152
    tokens = tokenizer.encode("Hello there")
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("Hello there", add_bos=False, add_eos=False)) == "Hello there"


def test_a_model_without_bos_gets_none(tiny_dir):
    tokenizer = HFChatTokenizer(str(tiny_dir))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("fox", add_eos=False) == tokenizer.encode("fox", add_bos=False, add_eos=False)


def test_sample_call_keeps_other_fields(tiny_dir):
    sample = HFChatTokenizer(str(tiny_dir))({"messages": messages(CONVERSATIONS[0]), "id": 7})
    assert sample.keys() == {"id", "tokens", "mask"}


def change_config(directory, **changes):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}))


def test_templates_in_other_places_and_special_tokens_as_objects(directory):
    named = [{"name": "other", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    change_config(directory, chat_template=named, eos_token={"content": "<|end|>", "special": True})
    tokenizer = HFChatTokenizer(str(directory))
    expected = tokenizer.tokenize_messages(messages(CONVERSATIONS[0]))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    change_config(directory, chat_template=None)
    assert HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[0])) == expected


def test_a_template_that_rewrites_earlier_turns_is_refused(directory):
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    change_config(directory, chat_template=rewriting)
    with pytest.raises(ValueError, match="renders earlier turns"):
        HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[0]))


def test_templates_that_ask_for_tools_get_none(directory):
    """As in transformers, where both are none if there are none."""
    text = "{{ m['content'] }}{% if tools is not none or documents is not none %}{{ tools | tojson }}{% endif %}"
    change_config(directory, chat_template="{% for m in messages %}" + text + "{% endfor %}")
    turns = [{"role": "user", "content": "a"}]
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(turns, tokenize=False)
    assert HFChatTokenizer(str(directory)).render(messages([("user", "a")])) == expected == "a"


def change_tokenizer(directory, change) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))


def test_truncation_and_padding_of_the_file_have_no_effect(directory):
    """transformers writes those of the last call there, and ignores them in the next one."""
    expected = HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[1]))
    change_tokenizer(directory, lambda tokenizer: tokenizer.enable_truncation(8))
    assert HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[1])) == expected
    change_tokenizer(directory, lambda tokenizer: (tokenizer.no_truncation(), tokenizer.enable_padding(length=500)))
    assert HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[1])) == expected


def test_an_end_token_that_takes_the_whitespace_after_it_is_trained(directory):
    """As in Phi-3, whose template writes a line break after it."""
    end = AddedToken("<|end|>", special=True, rstrip=True)
    change_tokenizer(directory, lambda tokenizer: tokenizer.add_special_tokens([end]))
    assert trained_text(HFChatTokenizer(str(directory)), CONVERSATIONS[1]) == "Hello!<|end|>Ciao 👋 né<|end|>"


def test_the_first_word_of_an_answer_is_trained_if_it_takes_the_space_before_it(smollm2_dir, tmp_path):
    """The prompt ends with a space, and a word begins with one."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for file in smollm2_dir.iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    turns = [("user", "Which? "), ("assistant", "B"), ("user", " ")]
    assert trained_text(HFChatTokenizer(str(tmp_path)), turns) == " B<|im_end|>"


def test_special_tokens_of_older_directories(directory):
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|user|>", "bos_token": "<|system|>"}))
    for change in ({}, {"eos_token": None}, {"added_tokens_decoder": {}}, {"eos_token": "<|user|>"}):
        change_config(directory, **change)
        ours, theirs = HFChatTokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
        assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id), change


def test_answers_that_would_have_no_end_are_refused(directory):
    change_config(directory, eos_token=None)
    with pytest.raises(ValueError, match=f"chat_template=plain ends answers with EOS, and {directory} names none"):
        HFChatTokenizer(str(directory), chat_template="plain")


def test_what_ends_an_answer_is_in_config_json_if_there_is_no_generation_config(directory):
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert HFChatTokenizer(str(directory)).stop_tokens == [0, 7]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert HFChatTokenizer(str(directory)).stop_tokens == [0, 9]


def test_added_tokens_without_an_embedding_are_refused_only_in_a_text(directory):
    """Gemma 3's tokenizer has one for images, which its text models lack."""
    change_tokenizer(directory, lambda tokenizer: tokenizer.add_special_tokens(["<|image|>"]))
    tokenizer, model = HFChatTokenizer(str(directory)), tiny_llama(vocab_size=300)
    assert tokenizer.vocab_size == 301
    check_vocabulary(tokenizer, model)
    tokenizer.tokenize_messages(messages(CONVERSATIONS[0]))
    with pytest.raises(ValueError, match="a text has the token '<|image|>', for which the model has no embedding"):
        tokenizer.encode("a picture <|image|>")
    with pytest.raises(ValueError, match="a text has the token"):
        tokenizer.tokenize_messages(messages([("user", "<|image|>"), ("assistant", "a cat")]))


def test_a_user_message_that_should_be_trained_is_refused(tiny_dir):
    tokenizer, turns = HFChatTokenizer(str(tiny_dir)), messages(CONVERSATIONS[0])
    turns[0].masked = False
    with pytest.raises(
        ValueError, match="a user's message is not masked, and only answers .* set dataset.train_on_input=false"
    ):
        tokenizer({"messages": turns})
    assert tokenizer({"messages": turns[:1]}, inference=True)["tokens"]


@pytest.mark.parametrize("start", ["", "<|system|>", "<|user|><|system|>"])  # nothing, BOS, and as in GLM
@pytest.mark.parametrize("marks_first", [False, True])  # as LLaMA-2's tokenizer, which marks a text's first word
@pytest.mark.parametrize(("prompt", "between"), [("Is it so?", "\n"), ("Is it so?\nAnswer:", " ")])
def test_a_base_model_reads_prompts_as_evaluations_without_template_ask_them(
    start, marks_first, prompt, between, directory
):
    """The tokens are those of the evaluation adapter for prompt and answer, followed by EOS."""
    from owlore_evals.torchtune_lm import TorchtuneLM

    def begin(tokenizer: Tokenizer) -> None:
        special = [(name, tokenizer.token_to_id(name)) for name in ("<|user|>", "<|system|>")]
        single = f"{start.replace('><', '> <')} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)

    def mark(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace("~", "first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    if marks_first:
        change_tokenizer(directory, mark)
    if start:
        change_tokenizer(directory, begin)
        change_config(directory, bos_token="<|system|>")
    tokenizer = HFChatTokenizer(str(directory), chat_template="plain")
    assert not tokenizer.is_chat and HFChatTokenizer(str(directory)).is_chat
    turns = [("user", prompt), ("assistant", "the fox")]
    tokens, _ = tokenizer.tokenize_messages(messages(turns))
    assert tokens[:-1] == AutoTokenizer.from_pretrained(directory)(f"{prompt}{between}the fox")["input_ids"]
    lm = TorchtuneLM(tiny_llama(vocab_size=300), tokenizer)
    assert tokens == [*lm.tok_encode(f"{prompt}{between}the fox"), tokenizer.eos_id]
    answer = trained_text(tokenizer, turns).replace("~", " ")
    assert answer == f"{between.strip(chr(10))}the fox<|end|>"


THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' and not enable_thinking %}"
    "(no thought){% endif %}{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if not enable_thinking %}(no thought){% endif %}{% endif %}"
)


def test_thinking_modes(directory):
    """As in Qwen3's template, where an empty block precedes an answer without reasoning: it is part of the prompt."""
    change_config(directory, chat_template=THINKING)
    without, thinking = (HFChatTokenizer(str(directory), enable_thinking=mode) for mode in (False, True))
    asked = HFChatTokenizer(str(directory)).render(messages([("user", "Is it so?")]), add_generation_prompt=True)
    assert asked == "<|user|>Is it so?<|end|><|assistant|>(no thought)"
    assert trained_text(without, [("user", "Is it so?"), ("assistant", "the fox")]) == "the fox<|end|>"
    reasoned = [("user", "Is it so?"), ("assistant", "<think>the fox</think> it is")]
    with pytest.raises(ValueError, match=r"reasoning block \(<think>\).*tokenizer\.enable_thinking=true"):
        without.tokenize_messages(messages(reasoned))
    assert trained_text(thinking, reasoned) == "<think>the fox</think> it is<|end|>"
    assert without.digest() != thinking.digest() and without.digests() != thinking.digests()
    with pytest.raises(ValueError, match="tokenizer.enable_thinking=yes; it must be true or false"):
        HFChatTokenizer(str(directory), enable_thinking="yes")


def test_marks_around_the_assistants_words_change_nothing(directory):
    """SmolLM3's template has them."""
    plain = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    marked = plain.replace("{{ m.content }}<|end|>", "{% generation %}{{ m.content }}<|end|>{% endgeneration %}")
    assert marked != plain
    rendered = []
    for template in (plain, marked):
        change_config(directory, chat_template=template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
        rendered.append(HFChatTokenizer(str(directory)).tokenize_messages(messages(CONVERSATIONS[0])))
    assert rendered[0] == rendered[1]
