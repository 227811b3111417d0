"""
Settings: the block of plain assignments at the top of a script, then config files, then --key=value flags.

    config = configure(__file__); globals().update(config)      # in the script, right after its block
    python train.py config/train_shakespeare.py --batch_size=32 --resume

The block is only read. A config file is executed, in a namespace of its own that holds the settings so far, and what
it assigns is checked like the flags are. A mistake is one line and exit status 2, never a traceback or a guess.
"""
import ast
import copy
import difflib
import glob
import os
import reprlib
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
    print(' '.join(''.join(c if c.isprintable() else ' ' for c in str(message)).split()), file=sys.stderr)
    sys.exit(2)


@contextmanager
def plain_errors():
    """ValueError and OSError raised inside, which are what a user's mistake looks like, become stop()."""
    try:
        yield
    except (ValueError, OSError) as error:
        has_file = isinstance(error, OSError) and error.filename is not None
        stop(f'{error.filename or "an empty name"}: {error.strerror}' if has_file else error)


def read_block(script):
    """The script's settings block -> ({name: default}, {name: comment on its line}, docstring), by reading only."""
    with tokenize.open(script) as file:
        comments = {t.start[0]: t.string.strip('# ') for t in tokenize.generate_tokens(file.readline)
                    if t.type == tokenize.COMMENT}
        file.seek(0)
        tree = ast.parse(file.read())
    defaults, notes = {}, {}
    for node in tree.body:
        if any(isinstance(n, ast.Call) and ast.unparse(n.func).endswith('configure') for n in ast.walk(node)):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, None
            with suppress(ValueError, TypeError):  # not a literal, so not a setting
                value = ast.literal_eval(node.value)
            if name == name.lower() and not name.startswith('_') and type(value) in KINDS:
                defaults[name], notes[name] = value, comments.get(node.end_lineno, '')
    return defaults, notes, ast.get_docstring(tree) or ''


def parse(text, default):
    """A flag's or an answer's text as a value of default's type; the text itself where it can't be read as one."""
    with suppress(ValueError):
        return WORDS.get(text.lower(), text) if isinstance(default, bool) else type(default)(text)
    return text


def checked(name, value, default):
    """value in default's type (an int is welcome for a float), or ValueError."""
    kind = type(default)
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if right and kind in (int, float):
        right = -2 ** 63 <= value < 2 ** 63 if kind is int else -1e308 < value < 1e308  # neither nan nor inf
    if right and kind is str:
        right = not any(c == '\0' or '\ud800' <= c <= '\udfff' for c in value)  # surrogates: bytes that aren't UTF-8
    if not right:
        raise ValueError(f'{name} is {KINDS[kind]}, not {reprlib.repr(value)}')
    return kind(value)


def unknown(name, settings):
    near = difflib.get_close_matches(name, settings, 1, cutoff=0.5)
    return f'there is no setting {reprlib.repr(name)}: ' + (f'did you mean {near[0]}?' if near else '--help lists them')


def run_config(path, settings):
    """The settings as the config file at path changes them. Its imports, functions and _names are its own business."""
    space = {**copy.deepcopy(settings), '__name__': 'config', '__file__': path}
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read(), path)
        exec(compile(tree, path, 'exec'), space)
    except BaseException as error:  # whatever it is, it happened in the user's file: say where
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == path else []
        where = f'{path} line {lines[-1]}' if lines and lines[-1] else path
        raise ValueError(f'{where}: {type(error).__name__}: {getattr(error, "msg", error)}') from None
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name, value in space.items():
        if name in settings:
            settings[name] = checked(f'{path} line {lines.get(name, "?")}: {name}', value, settings[name])
        elif name in lines and not name.startswith('_'):
            raise ValueError(f'{path} line {lines[name]}: {unknown(name, settings)} (names of your own begin with _)')
    return settings


def help_text(settings, notes, doc):
    rows = {n: shlex.quote(v) if isinstance(v, str) and v.isprintable() else repr(v) for n, v in settings.items()}
    rows = {n: f'  {n} ...' if isinstance(settings[n], list) else f'  --{n}={text}' for n, text in rows.items()}
    width = min(max(map(len, rows.values()), default=0), 44) + 2
    lines = [textwrap.fill(notes[n] or '-', 120, initial_indent=row.ljust(width - 1) + ' ',
                           subsequent_indent=' ' * width) for n, row in rows.items()]
    return '\n'.join([doc, '', 'Settings, with their defaults:', *lines])


@plain_errors()
def configure(*scripts, argv=None, saved={}):
    """The resolved {name: value} of the scripts' blocks (a later script's default wins), config files and flags.
    What is in saved, a run's earlier settings, takes the place of the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    settings, notes, flags, plain = {}, {}, {}, []
    for script in scripts:
        defaults, comments, doc = read_block(script)
        settings, notes = {**settings, **defaults}, {**notes, **comments}
    settings.update({name: checked(name, value, settings[name]) for name, value in saved.items() if name in settings})
    if '-h' in argv or '--help' in argv:
        print(help_text(settings, notes, doc))
        sys.exit(0)
    for argument, following in zip(argv, [*argv[1:], '']):
        name, equals, text = argument[2:].partition('=')
        if not argument.startswith('-'):
            plain.append(argument)
        elif not argument.startswith('--'):
            raise ValueError(f'{argument}: settings are written --name=value')
        elif name not in settings:
            raise ValueError(f'{argument}: {unknown(name, settings)}')
        elif not equals and (not isinstance(settings[name], bool) or following.lower() in WORDS):
            value = following if following and not following.startswith('-') else 'VALUE'
            raise ValueError(f'{argument} needs a value: write --{name}={shlex.quote(value)}')
        else:
            flags[name] = checked(f'--{name}', parse(text, settings[name]) if equals else True, settings[name])
    collects = next((name for name, value in settings.items() if isinstance(value, list)), None)
    if collects:
        return {**settings, collects: settings[collects] + plain, **flags}
    for path in plain:
        if not path.endswith('.py'):
            raise ValueError(f'{path!r} is neither --name=value nor a config file (.py)')
        if not os.path.exists(path):
            folder = 'config' if os.path.isdir('config') else os.path.join(os.path.dirname(scripts[-1]), 'config')
            there = ', '.join(sorted(glob.glob(os.path.join(glob.escape(folder), '*.py'))))
            raise ValueError(f'{path} does not exist; config files here: {there or "none"}')
        settings = run_config(path, settings)
    return {**settings, **flags}


def ask(question, default, check=None):
    """Asks on the terminal until the answer has default's type and check(value) raises no ValueError; the value."""
    while True:
        try:
            text = input(f'{question} [{default}] ').strip()
            value = checked('the answer', parse(text, default) if text else default, default)
            if check:
                check(value)
            return value
        except ValueError as error:
            print(f'  {error}')
        except (EOFError, KeyboardInterrupt, RuntimeError, OSError):
            stop('no answer (is this a terminal?): each question is also a flag, see --help')
