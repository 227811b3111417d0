"""Faults that were met and mended: sampling, settings, the talk, a second run in one process, damaged folders."""
from test_model import *
from test_model import empty, place, runs, step  # pytest finds fixtures by name

def alone(model, prompts, n, **options):
    """The texts of the prompts, generated one by one."""
    return [model.generate(torch.tensor([prompt]), n, **options)[0] for prompt in prompts]

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7], list(range(40)), [8]]

@pytest.mark.parametrize('options', [dict(), dict(stop_token=7), dict(repetition_penalty=1.5)], ids=str)
def test_prompts_of_any_length_in_one_batch_equal_one_by_one(step, options):
    model = tiny()
    together = model.generate(PROMPTS, 30, temperature=0, **options)
    for text, prompt, expected in zip(together, PROMPTS, alone(model, PROMPTS, 30, temperature=0, **options)):
        assert text[:len(expected)].equal(expected) and text[:len(prompt)].tolist() == prompt
        assert set(text[len(expected):].tolist()) <= {7}  # a row that stopped repeats the stop token
    as_tensors = model.generate([torch.tensor(prompt) for prompt in PROMPTS], 30, temperature=0, **options)
    assert all(map(torch.equal, together, as_tensors))

def test_a_tensor_of_prompts_gives_a_tensor_and_a_list_a_list():
    model, x = tiny(), ids(3, 5)
    texts = model.generate(x, 4, temperature=0)
    assert texts.shape == (3, 9) and torch.equal(torch.stack(model.generate(list(x), 4, temperature=0)), texts)
    assert [len(text) for text in model.generate([[1, 2]], 4, num_samples=3)] == [6] * 3

@pytest.mark.parametrize('options, says', [
    (dict(top_k=-1), 'top_k is -1'), (dict(temperature=-1), 'temperature is -1'), (dict(top_p=0), 'top_p is 0'),
    (dict(min_p=2), 'min_p is 2'), (dict(repetition_penalty=0), 'repetition_penalty is 0'),
    (dict(temperature=math.nan), 'temperature is nan'), (dict(max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(num_samples=0), 'num_samples is 0'), (dict(input_ids=[[3, 50]]), 'the id 50'),
    (dict(input_ids=torch.tensor([[3, -1]])), 'the id -1'), (dict(input_ids=[[1], []]), 'one id or more'),
    (dict(input_ids=[]), 'no prompt'), (dict(input_ids=torch.rand(1, 3)), 'float32'),
    (dict(input_ids=torch.zeros(3, dtype=torch.int64)), 'list of prompts'),
])
def test_what_cannot_be_drawn_is_refused_with_its_value(options, says):
    assert says in refusal(tiny().generate, **{**dict(input_ids=[[1]], max_new_tokens=1), **options})

def shares(options, n=20000):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(n, 1)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=4) / n

@pytest.mark.parametrize('options, expected', [
    (dict(min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),  # 0.15 is 0.3 times 0.5, 0.1 is 0.2 times
    (dict(min_p=0.4, temperature=0.5), [1, 0, 0, 0]),  # after the temperature 0.25 is a quarter of 1
    (dict(min_p=0.21, top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (dict(min_p=1.0), [1, 0, 0, 0]),
])
def test_min_p_keeps_what_is_that_likely_beside_the_likeliest(options, expected):
    torch.testing.assert_close(shares(options), torch.tensor(expected).float(), atol=0.015, rtol=0)

def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_ids():
    logits, seen = torch.tensor([[2.0, 1.9, -1.0, -1.1]]), torch.tensor([[True, False, False, False]])
    assert sample(logits, temperature=0, repetition_penalty=1.1, seen=seen).item() == 1  # 1.82 < 1.9
    assert sample(logits, temperature=0, repetition_penalty=1.01, seen=seen).item() == 0
    negative = torch.tensor([[-9.0, -9.0, -1.0, -1.1]])
    assert sample(negative, temperature=0, repetition_penalty=1.2, seen=torch.tensor([[False] * 2 + [True, False]])) == 3

def test_generation_penalizes_what_the_text_has_so_far(step):
    model, text = tiny(), ids(2, 5)
    drawn = model.generate(text, 20, temperature=0, repetition_penalty=1.3)
    for T in range(5, 25):
        logits = plain(model, drawn[:, :T])[:, -1]
        for row in range(2):
            for id in set(drawn[row, :T].tolist()):
                logits[row, id] *= 1 / 1.3 if logits[row, id] > 0 else 1.3
        assert torch.equal(logits.argmax(dim=-1), drawn[:, T])
    assert not torch.equal(drawn, model.generate(text, 20, temperature=0))
