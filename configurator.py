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
import os
import re
import runpy
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
WORDS = {'true': True, 'yes': True, 'y': True, '1': True, 'false': False, 'no': False, 'n': False, '0': False}

def stop(message):
    """Ends the program: one line on stderr, exit status 2."""
    print(' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)

@contextmanager
def plain_errors():
    """ValueError and OSError raised inside, which are what a user's mistake looks like, become stop(); so
    does an optional package that is not there."""
    try:
        yield
    except ImportError as error:
        stop(f'{error}: pip install {error.name}' if error.name else error)
    except (ValueError, OSError) as error:
        path = getattr(error, 'filename', None)
        stop(f'{path}: {error.strerror}' if path else error)

def set_up_output():
    """Output appears at once, whatever its characters; a full stdout ends the program in one line."""
    stream, write = sys.stdout, sys.stdout.write

    def write_now(text):
        try:
            write(text)
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or flushing fails again at exit
            if error.errno != errno.EIO:  # EIO: the terminal has gone, and the run goes on without it
                stop(f'stdout: {error.strerror}')

    if hasattr(stream, 'reconfigure'):  # a notebook's has not
        stream.reconfigure(errors='backslashreplace')
        stream.write = write_now

def read_block(source):
    """Settings of a dataclass or of the script at a path -> ({name: default}, {name: comment}, docstring)."""
    defaults, doc = {}, ''
    if isinstance(source, type):
        text = '\n'.join(inspect.getsource(cls) for cls in source.__mro__[:-1])
        defaults = {field.name: field.default for field in dataclasses.fields(source)}
    else:
        text = Path(source).read_text(encoding='utf-8')
        tree = ast.parse(text)
        doc = ast.get_docstring(tree) or ''
        for node in tree.body:
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if 'configure' in calls:
                break
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                with suppress(ValueError):  # not a literal, so not a setting
                    if name.islower():
                        defaults[name] = ast.literal_eval(node.value)
    comments = re.findall(r'^ *(\w+)[^=\n]*=.*? # *(.*)$', text, re.MULTILINE)
    return defaults, dict(reversed(comments)), doc  # reversed: the first line that assigns a name counts

def parse(text, default):
    """A flag's or an answer's text in default's type; the text itself where it can't be read as one."""
    with suppress(ValueError, TypeError):
        return WORDS.get(text.lower(), text) if isinstance(default, bool) else type(default)(text)
    return text

def checked(name, value, default):
    """value in default's type (an int is welcome for a float), or ValueError."""
    kind = type(default)
    right = type(value) is kind
    if kind is float:
        right = type(value) in (int, float) and -1e308 < value < 1e308  # neither nan nor inf
    if not right:
        raise ValueError(f'{name} must be {KINDS.get(kind, default)}, not {value!r}')
    return float(value) if kind is float else value

def check(config, name, low, high):
    if not low <= config[name] <= high:
        raise ValueError(f'{name} is {config[name]}: it must be from {low} to {high:g}')

def choose(config, name, choices):
    if config[name] not in choices:
        raise ValueError(f'{name} is {config[name]!r}: it must be one of {", ".join(choices)}')

def unknown(name, settings):
    near = difflib.get_close_matches(name, settings, 1, cutoff=0.5)
    advice = f'did you mean {near[0]}?' if near else '--help lists them'
    return f'there is no setting {name!r}: {advice}'

def run_config(path, settings):
    """The settings as the config file at path changes them; its modules, functions and _names don't count."""
    if not (path.endswith('.py') and Path(path).is_file()):
        raise ValueError(f'there is no config file {path!r}; settings are written --name=value')
    try:
        space = runpy.run_path(path, settings, 'config')
    except (Exception, SystemExit) as error:  # whatever it is, it happened in the user's file
        raise ValueError(f'{path}: {type(error).__name__}: {error}') from None
    for name, value in space.items():
        if name in settings:
            settings[name] = checked(f'{path}: {name}', value, settings[name])
        elif not (name.startswith('_') or callable(value) or inspect.ismodule(value)):
            raise ValueError(f'{path}: {unknown(name, settings)} (names of your own begin with _)')
    return settings

def help_text(sources, settings):
    """The script's docstring, and each setting where the last source has it."""
    lines, left = [read_block(sources[-1])[2]], dict(settings)
    for source in reversed(sources):
        defaults, comments, _ = read_block(source)
        title = source.__name__ if isinstance(source, type) else Path(source).name
        lines += ['', f'Settings of {title}, with their defaults:']
        for name in [name for name in defaults if name in left]:
            value = left.pop(name)
            flag = f'{name} ...' if isinstance(value, list) else f'--{name}={value}'
            lines += textwrap.wrap(f'  {flag:32} {comments.get(name, "")}', 100, subsequent_indent=' ' * 35)
    return '\n'.join(lines)

@plain_errors()
def configure(*sources, argv=None, saved={}):
    """The resolved {name: value} of the sources (dataclasses and scripts' paths; a later one's default wins),
    config files and flags. What is in saved, a run's earlier settings, takes the place of the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    settings, flags, plain = {}, {}, []
    for source in sources:
        settings.update(read_block(source)[0])
    for name in settings.keys() & saved.keys():
        settings[name] = checked(name, saved[name], settings[name])
    if '-h' in argv or '--help' in argv:
        print(help_text(sources, settings))
        sys.exit(0)
    for argument in argv:
        name, equals, text = argument.lstrip('-').partition('=')
        if not argument.startswith('-'):
            plain.append(argument)
        elif name not in settings:
            raise ValueError(unknown(name, settings))
        elif equals or isinstance(settings[name], bool):
            value = parse(text if equals else 'true', settings[name])
            flags[name] = checked(f'--{name}', value, settings[name])
        else:
            raise ValueError(f'{argument} needs a value: write {argument}=VALUE, with an equals sign')
    collects = [name for name in settings if isinstance(settings[name], list)]
    if collects:  # it takes what is no flag, and there are no config files
        return {**settings, collects[0]: plain, **flags}
    for path in plain:
        settings = run_config(path, settings)
    return {**settings, **flags}

def ask(question, default, check=None):
    """The answer typed on the terminal, asked for until it has default's type and check(value) accepts it."""
    while True:
        try:
            text = input(f'{question} [{default}] ').strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: there is no stdin
            stop('no answer (is this a terminal?): each question is also a flag, see --help')
        try:
            value = checked('the answer', parse(text, default) if text else default, default)
            if check:
                check(value)
            return value
        except (ValueError, OSError) as error:
            print(f'  {error}')
