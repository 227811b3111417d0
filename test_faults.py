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

# ----------------------------------------------------------------------------
# settings

BLOCK = """
out_dir = 'out'
init_from = ''
dataset = 'shakespeare'
batch_size = 12
tokens_per_update = 0
compile = 'auto'
configure(__file__)"""

@pytest.fixture
def block(empty, monkeypatch, capsys):
    """block(*arguments, status=0) -> the settings, or the one line with which they are refused."""
    monkeypatch.setenv('HOME', '/home/someone')
    Path('script.py').write_text(BLOCK)

    def read(*arguments, status=0):
        allowed = dict(compile=('auto', 'true', 'false'))
        if not status:
            return configurator.configure('script.py', argv=list(arguments), allowed=allowed)[0]
        with pytest.raises(SystemExit) as error:
            configurator.configure('script.py', argv=list(arguments), allowed=allowed)
        said = capsys.readouterr().err
        assert error.value.code == status and said.count('\n') == 1
        return said
    return read

def test_a_tilde_is_the_home_folder_in_flags_config_files_and_sources(block):
    Path('c.py').write_text('init_from = "~/runs/a"\n')
    settings = block('c.py', '--out_dir=~/b', '--dataset=a~/b')
    assert [settings[name] for name in ('init_from', 'out_dir', 'dataset')] == [
        '/home/someone/runs/a', '/home/someone/b', 'a~/b']
    Path('sources.py').write_text('sources = []\nconfigure(__file__)')
    assert configurator.configure('sources.py', argv=['~/a.txt', 'b.txt'])[0] == {
        'sources': ['/home/someone/a.txt', 'b.txt']}

@pytest.mark.parametrize('text, says', [
    ('gradient_accumulation_steps = 5 * 8\nalways_save_checkpoint = False', ['tokens_per_update', 'ckpt.pt is always']),
    ("init_from = 'gpt2-xl'", ['--from_hf']), ("init_from = 'resume'", ['resume to true']),
    ("init_from = 'scratch'", ['leave it out']), ("dataset = 'shakespeare_char'", ["'shakespeare'"]),
])
def test_what_nanogpt_says_another_way_is_refused_with_the_way_here(block, text, says):
    Path('c.py').write_text(text)
    said = block('c.py', status=2)
    assert "nanoGPT's" in said and all(part in said for part in says)
    if 'init_from' in text:
        Path(text.split("'")[1]).mkdir()  # a folder of that name is a run
        block('c.py')

def test_compile_may_be_false_as_in_nanogpt(block):
    Path('c.py').write_text('compile = False')
    assert block('c.py')['compile'] == 'false'

def test_no_message_moves_the_cursor(block):
    Path('c.py').write_text(r'raise ValueError("\x1b[2J\x9b\u2066\udce9 naïve")')
    assert block('c.py', status=2) == 'c.py: ValueError: \\x1b[2J\\x9b\\u2066\\udce9 naïve\n'

def test_what_is_printable_stays():
    kept = 'a\n\tnaïve 👩\u200d👧 שלום\xa0\xad'
    assert configurator.printable(kept) == kept == prepare.printable(kept)
    every = ''.join(map(chr, range(0x3000)))
    escaped = {c for c in every if configurator.printable(c) != c}
    import unicodedata
    control = {c for c in every if unicodedata.category(c) == 'Cc'} - {'\n', '\t'}
    assert escaped == control | set('\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')

# ----------------------------------------------------------------------------
# one process, several runs

def test_a_second_run_in_one_process_finds_neither_lock_nor_handlers(place):
    code = textwrap.dedent(f"""
        import runpy, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        kept = []
        for flags in ['--max_iters=2'], ['--max_iters=0'], ['--max_iters=3'], ['--resume', '--max_iters=4']:
            sys.argv = ['train.py', 'tiny.py', *flags]
            try:
                kept.append(runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__'))
            except SystemExit as error:
                kept.append(error.__traceback__)  # and with it the run's variables, as a notebook keeps them
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, flags
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flags
        """)
    with process([sys.executable, '-c', code]) as child:
        out, err = child.communicate(timeout=100)
    assert child.returncode == 0 and err.count('\n') == 1 and 'max_iters is 0' in err, out + err
    assert update_of('out/ckpt.pt') == 4

def test_a_folder_that_is_closed_can_be_used_again(empty):
    first = configurator.RunFolder('out', False, 0)
    first.close()
    assert configurator.RunFolder('out', False, 0).path == 'out'

# ----------------------------------------------------------------------------
# questions

def test_numbers_words_and_yes_are_understood_and_custom_asks_for_a_shape_that_fits(place):
    answers = ['1', '0.05', 'huge', '6', '2', '3', '64', '32', 'custom', '2', '2', '64', '32', 'my book', 'no']
    out, _ = call_script('train.py', '--interactive', typed='\n'.join(answers))
    assert '1 plain' in out and 'start it now [yes]' in out and 'divide into n_head 3' in out and "'huge'" in out
    text = Path('config/my_book.py').read_text()
    assert text.splitlines()[1:] == [
        "device = 'cpu'", "dataset = 'plain'", 'minutes = 0.05', 'n_layer = 2', 'n_head = 2', 'n_embd = 64',
        'block_size = 32', "out_dir = 'out-book'"]
    assert '2 layers, 64 wide, 2 query heads' in call_script('train.py', 'config/my_book.py', '--dry_run')[0]

def test_the_configurator_runs_the_same_questions(place):
    out, _ = call_script('configurator.py', typed='plain\n0.05\n2\na\nn\n')
    assert 'later: python' in out and "model_preset = 'tiny'" in Path('config/my_a.py').read_text()
    assert 'python configurator.py' in call_script('configurator.py', '--help')[0]

# ----------------------------------------------------------------------------
# sample.py

@pytest.fixture
def talker(empty, monkeypatch):
    """talker(*flags, typed='', says='') -> (out, err) of sample.py, and what the model was told last."""
    save_checkpoint('char.pt', checkpoint(tiny(vocab_size=9), tokenizer={'kind': 'char', 'chars': '\n\tabcdeé'}))
    told = {}

    def talk(*flags, typed='', says=''):
        coder = Tokenizer({'kind': 'char', 'chars': '\n\tabcdeé'})

        def stream(self, prompts, max_new_tokens, **options):
            told.update(options, text=coder.decode(prompts[0]), max_new_tokens=max_new_tokens)
            for id in coder.encode(says):
                yield torch.tensor([id])

        monkeypatch.setattr(GPT, 'stream', stream)
        return *call_script('sample.py', '--out_dir=char.pt', *flags, typed=typed), told
    return talk

def test_options_reach_the_model_from_flags_and_from_the_talk(talker):
    _, _, told = talker('--start=a')
    assert (told['min_p'], told['repetition_penalty']) == (0, 1)
    typed = '/min_p 0.1\n/repetition_penalty 1.2\na\n/help\n'
    out, _, told = talker('--interactive', '--top_k=3', typed=typed)
    assert (told['min_p'], told['repetition_penalty'], told['top_k']) == (0.1, 1.2, 3) and '/min_p 0.1' in out
    assert 'min_p is 2' in call_script('sample.py', '--out_dir=char.pt', '--min_p=2', status=2)[1]

def test_line_breaks_and_tabs_are_read_in_start_stop_and_the_talk(talker):
    out, _, told = talker(r'--start=a\n\tb', r'--stop=\n\n', says='cd\n\nab')
    assert told['text'] == 'a\n\tb' and out == 'a\n\tbcd\n'
    assert talker('--interactive', typed='a\\n\\tb\n')[2]['text'].endswith('a\n\tb')

def test_bytes_that_are_not_utf8_are_replaced_and_the_talk_goes_on(place):
    command = [*map(os.fsencode, script('sample.py', '--max_new_tokens=2'))]
    done = subprocess.run([*command, b'--start=The \xe9'], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b'The ') and 'know it: \ufffd\n' in done.stderr.decode()
    typed = b'The \xe9\nquick\n/quit\n'
    done = subprocess.run([*command, b'--interactive'], input=typed, capture_output=True, timeout=60)
    assert done.returncode == 0 and b'Traceback' not in done.stderr and done.stdout.count(b'\n> ') == 3

def test_unknown_characters_are_left_out_and_named_unless_nothing_is_left(talker):
    out, err, told = talker('--start=aüb\u4e2d\x1b')
    assert told['text'] == 'ab' and out == 'ab\n' and 'does not know it: \\x1b ü 中' in err
    assert 'does not know ü' in call_script('sample.py', '--out_dir=char.pt', '--start=üü', status=2)[1]
    out, err, told = talker('--interactive', typed='ü\naü\n')
    assert 'does not know ü: ' in out and 'does not know it: ü' in err and told['text'].endswith('a')
    assert "'ü'" in refusal(Tokenizer({'kind': 'char', 'chars': 'a'}).encode, 'ü')

def test_an_unknown_command_is_named_with_the_nearest(talker):
    out, _, _ = talker('--interactive', typed='/temp 1\n/xyz\n/help\n')
    assert "no command '/temp': did you mean /temperature?" in out and "no command '/xyz': /help lists them" in out

def test_a_prompt_file_may_be_in_the_home_folder(talker, empty, monkeypatch):
    monkeypatch.setenv('HOME', str(empty))
    Path('a.txt').write_text(r'a\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir('/')
        err = call_script('sample.py', f'--out_dir={empty}/char.pt', '--start=FILE:~/a.txt')[1]
    assert r'does not know it: \ n' in err  # of a file every character counts

# ----------------------------------------------------------------------------
# damaged folders

@pytest.fixture
def folder(empty):
    """A Hugging Face folder, without the packages that others need for one."""
    pytest.importorskip('gguf')
    save_checkpoint('model.pt', checkpoint(tiny(vocab_size=9), tokenizer={'kind': 'char', 'chars': '\n\tabcdeé'}))
    call_script('sample.py', '--out_dir=model.pt', '--to_hf=folder')
    return Path('folder')

def test_the_pad_token_comes_in_and_goes_out(folder):
    (folder / 'tokenizer_config.json').write_text('{"pad_token": {"content": "a"}}')
    call_script('sample.py', '--from_hf=folder')
    meta = load_checkpoint('out-folder')['tokenizer']
    assert meta['pad'] == 2
    call_script('sample.py', '--out_dir=out-folder', '--to_hf=again')
    assert json.loads(Path('again/config.json').read_text())['pad_token_id'] == 2
    assert json.loads(Path('again/tokenizer_config.json').read_text())['pad_token'] == 'a'

@pytest.mark.parametrize('file, contents, says', [
    ('tokenizer.json', '{"version": 1}', 'tokenizer.json is not a tokenizer'),
    ('tokenizer.json', '[1]', 'tokenizer.json is damaged'), ('tokenizer.json', '{', 'tokenizer.json is damaged'),
    ('config.json', '"text"', 'config.json is damaged'), ('config.json', '[]', 'config.json is damaged'),
    ('config.json', dict(rope_scaling='yarn'), "rope_scaling is 'yarn'"),
    ('config.json', dict(rope_parameters=[1]), 'rope_parameters is [1]'),
    ('config.json', dict(layer_types='full'), "layer_types is 'full'"),
    ('config.json', dict(eos_token_id={'a': 1}), "ends with {'a': 1}"),
    ('config.json', dict(num_hidden_layers='two'), "n_layer is 'two'"),
    ('tokenizer_config.json', '{"pad_token": 7}', 'pad_token is 7'),
])
def test_a_damaged_folder_is_refused_in_one_line(folder, file, contents, says):
    if isinstance(contents, dict):
        contents = json.dumps(json.loads((folder / file).read_text()) | contents)
    (folder / file).write_text(contents)
    _, err = call_script('sample.py', '--from_hf=folder', status=2)
    assert says in err and err.count('\n') == 1 and not Path('out-folder').exists()
