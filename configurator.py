"""Settings: dataclasses and the blocks at the top of scripts, then config files, then --key=value flags.

    config = configure(GPTConfig, __file__)         # in the script, right after its block
    globals().update(config)
    python train.py config/train_shakespeare.py --batch_size=32 --resume

The block is only read. A config file runs in a namespace of its own that holds the settings so far, and
what it assigns is checked as flags are. A mistake is one line and exit status 2, never a traceback.
"""
import ast
import dataclasses
import difflib
import errno
import inspect
import io
import os
import reprlib
import runpy
import shlex
import sys
import textwrap
import tokenize
import traceback
from contextlib import contextmanager, suppress

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
WORDS = {'true': True, 'yes': True, 'y': True, '1': True, 'false': False, 'no': False, 'n': False, '0': False}

def stop(message):
    """Ends the program: one line on stderr (control characters become spaces), exit status 2."""
    printable = ''.join(c if c.isprintable() else ' ' for c in str(message))
    print(' '.join(printable.split()), file=sys.stderr)
    sys.exit(2)

@contextmanager
def plain_errors():
    """ValueError and OSError raised inside, which are what a user's mistake looks like, become stop()."""
    try:
        yield
    except (ValueError, OSError) as error:
        has_file = isinstance(error, OSError) and error.filename is not None
        stop(f'{error.filename or "an empty name"}: {error.strerror}' if has_file else error)

def set_up_output():
    """Output appears at once, whatever its characters; a full stdout ends the program in one line."""
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # None where it was closed: run on without
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    stream, write = sys.stdout, sys.stdout.write

    def write_now(text):
        try:
            write(text)
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or flushing fails again at exit
            if error.errno != errno.EIO:  # EIO: the terminal has gone, and the program runs on without it
                stop(f'stdout: {error.strerror}')
        return len(text)

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors='backslashreplace')
        stream.write = write_now

def read_source(text):
    """Python source -> (its syntax tree, {line number: comment})."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return ast.parse(text), {t.start[0]: t.string.strip('# ') for t in tokens if t.type == tokenize.COMMENT}

def read_block(script):
    """A script's settings block -> ({name: default}, {name: comment on its line}, docstring)."""
    with tokenize.open(script) as file:
        tree, comments = read_source(file.read())
    defaults, notes = {}, {}
    for node in tree.body:
        calls = [ast.unparse(n.func).split('.')[-1] for n in ast.walk(node) if isinstance(n, ast.Call)]
        if 'configure' in calls:
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, None
            with suppress(ValueError, TypeError):  # not a literal, so not a setting
                value = ast.literal_eval(node.value)
            if name == name.lower() and not name.startswith('_') and type(value) in KINDS:
                defaults[name], notes[name] = value, comments.get(node.end_lineno, '')
    return defaults, notes, ast.get_docstring(tree) or ''

def read_fields(cls):
    """A dataclass's fields, inherited ones too -> as read_block."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    notes = dict.fromkeys(defaults, '')
    for name, value in defaults.items():
        if type(value) not in KINDS:
            raise ValueError(f'{cls.__name__}.{name} needs a default that is {", ".join(KINDS.values())}')
    for base in reversed(cls.__mro__):
        with suppress(OSError, TypeError, SyntaxError):  # typed into a prompt: no comments
            tree, comments = read_source(textwrap.dedent(inspect.getsource(base)))
            fields = [node for node in tree.body[0].body if isinstance(node, ast.AnnAssign)]
            notes.update({ast.unparse(node.target): comments.get(node.end_lineno, '') for node in fields})
    return defaults, notes, ''

def parse(text, default):
    """A flag's or an answer's text in default's type; the text itself where it can't be read as one."""
    with suppress(ValueError):
        return WORDS.get(text.lower(), text) if isinstance(default, bool) else type(default)(text)
    return text

def checked(name, value, default):
    """value in default's type (an int is welcome for a float), or ValueError."""
    kind = type(default)
    right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if kind is float:
        right = type(value) in (int, float) and -1e308 < value < 1e308  # neither nan nor inf
    if not right:
        raise ValueError(f'{name} must be {KINDS[kind]}, not {reprlib.repr(value)}')
    return kind(value)

def check(config, name, low, high):
    if not low <= config[name] <= high:
        raise ValueError(f'{name} is {config[name]}: it must be from {low} to {high:g}')

def choose(config, name, choices):
    if config[name] not in choices:
        raise ValueError(f'{name} is {reprlib.repr(config[name])}: it must be one of {", ".join(choices)}')

def unknown(name, settings):
    near = difflib.get_close_matches(name, settings, 1, cutoff=0.5)
    advice = f'did you mean {near[0]}?' if near else '--help lists them'
    return f'there is no setting {reprlib.repr(name)}: {advice}'

def run_config(path, settings):
    """The settings as the config file at path changes them; its modules, functions and _names don't count."""
    try:
        space = runpy.run_path(path, settings, 'config')
    except (Exception, SystemExit) as error:  # whatever it is, it happened in the user's file: say where
        lines = [f' line {f.lineno}' for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        raise ValueError(f'{path}{"".join(lines[-1:])}: {type(error).__name__}: {error}') from None
    for name, value in space.items():
        if name in settings:
            settings[name] = checked(f'{path}: {name}', value, settings[name])
        elif not (name.startswith('_') or callable(value) or inspect.ismodule(value)):
            raise ValueError(f'{path}: {unknown(name, settings)} (names of your own begin with _)')
    return settings

def help_text(settings, notes, titles, doc):
    lines = [doc]
    for title in reversed(dict.fromkeys(titles.values())):
        lines += ['', f'Settings of {title}, with their defaults:']
        for name in [name for name in settings if titles[name] == title]:
            is_list = isinstance(settings[name], list)
            row = f'  {name} ...' if is_list else f'  --{name}={shlex.quote(str(settings[name]))}'
            lines += textwrap.wrap(f'{row:34} {notes[name]}', 100, subsequent_indent=' ' * 35)
    return '\n'.join(lines)

@plain_errors()
def configure(*sources, argv=None, saved={}):
    """The resolved {name: value} of the sources (dataclasses and scripts' paths; a later one's default wins),
    config files and flags. What is in saved, a run's earlier settings, takes the place of the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    settings, notes, titles, flags, plain = {}, {}, {}, {}, []
    for source in sources:
        defaults, comments, doc = read_fields(source) if isinstance(source, type) else read_block(source)
        settings.update(defaults)
        notes.update(comments)
        titles.update(dict.fromkeys(defaults, getattr(source, '__name__', os.path.basename(str(source)))))
    for name in settings.keys() & saved.keys():
        settings[name] = checked(name, saved[name], settings[name])
    if '-h' in argv or '--help' in argv:
        print(help_text(settings, notes, titles, doc))
        sys.exit(0)
    for argument in argv:
        name, equals, text = argument.lstrip('-').partition('=')
        if not argument.startswith('-'):
            plain.append(argument)
        elif name not in settings:
            raise ValueError(f'{argument}: {unknown(name, settings)}')
        elif equals:
            flags[name] = checked(f'--{name}', parse(text, settings[name]), settings[name])
        elif isinstance(settings[name], bool):
            flags[name] = True
        else:
            raise ValueError(f'{argument} needs a value: write {argument}=VALUE, with an equals sign')
    collects = next((name for name, value in settings.items() if isinstance(value, list)), None)
    if collects:
        return {**settings, collects: settings[collects] + plain, **flags}
    for path in plain:
        if not (path.endswith('.py') and os.path.isfile(path)):
            raise ValueError(f'there is no config file {path!r}; settings are written --name=value')
        settings = run_config(path, settings)
    return {**settings, **flags}

def ask(question, default, check=None):
    """The answer typed on the terminal, asked for until it has default's type and check(value) accepts it."""
    while True:
        try:
            text = input(f'{question} [{default}] ').strip()
            value = checked('the answer', parse(text, default) if text else default, default)
            if check:
                check(value)
            return value
        except (ValueError, ConnectionError) as error:
            print(f'  {error}')
        except (EOFError, KeyboardInterrupt, RuntimeError, OSError):
            stop('no answer (is this a terminal?): each question is also a flag, see --help')
