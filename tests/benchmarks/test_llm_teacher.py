"""The benchmark of language models as teachers: what is drawn, asked and compared, and that a call goes on."""

import llm_server
import torch

import tiny


def test_what_is_kept_of_a_beginning_changes_no_answer(tmp_path):
    """A cache that is cut at the wrong token gives the answer to another prompt."""
    model = llm_server.Model(str(tiny.build_model_folder("llama", tmp_path / "llama")), "float32")
    model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    begin = "Labels:\nA: a superb film\nB: a dull film"
    texts = ["a superb film", "a dull film to the end", "a superb film", "a dull film, said nobody"]
    for prompt in (f"{start}\n\nText: {text}\nAnswer:" for text in texts for start in (begin, begin + " again")):
        likely, read = model.answer(prompt)
        tokens = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            alone = model.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert read == len(tokens)
        torch.testing.assert_close(likely, alone, atol=1e-4, rtol=0)
