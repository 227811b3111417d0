"""What a run is told and what it leaves: settings, questions, plain errors, signals, the run's folder.

    config, given = configure(GPTConfig, __file__)    # in the script, right after its block of settings
    globals().update(config)
    python train.py config/train_shakespeare.py --batch_size=32 --resume
    python configurator.py                            # answer questions, get a config file

Settings are the fields of dataclasses and the assignments at the top of a script. Config files assign others,
and --name=value flags win over both. A mistake is one line and exit status 2, never a traceback.
"""
import ast
import csv
import dataclasses
import difflib
import errno
import inspect
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import textwrap
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock  # comes with torch

# ----------------------------------------------------------------------------
# plain errors and output

UNDO = ExitStack()  # undoes what a run changed in its process: signal handlers, the lock of out_dir

def clean_up():
    """Leave the process as it was: a notebook goes on, and may start another run."""
    UNDO.close()
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' first lines replaced it

def printable(text):
    """The text with control characters and overrides of its direction as escapes: no terminal obeys them."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]',
                  lambda match: match[0].encode('unicode_escape').decode(), str(text))

def stop(message):
    """End the program: one line on stderr, exit status 2."""
    print(printable(' '.join(str(message).split())), file=sys.stderr)
    clean_up()
    sys.exit(2)

@contextmanager
def plain_errors(what_is_left=None):
    """Turn a ValueError or OSError inside, which are what a user's mistake looks like, into stop(); likewise
    an optional package that is missing. what_is_left() says what survives."""
    try:
        yield
    except ImportError as error:
        stop(f'{error}: pip install {error.name}' if error.name else error)
    except (ValueError, OSError) as error:
        path = getattr(error, 'filename', None)
        message = f'{path}: {error.strerror}' if path else error
        stop(f'{message}; {what_is_left()}' if what_is_left else message)

def set_up_output():
    """Print at once, and read and print whatever the characters; a full stdout ends the program in one
    line."""
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
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='surrogateescape')

def progress(text):
    """On a terminal, a line that the next one replaces."""
    if sys.stdout.isatty():
        print(f'{text}\r', end='', flush=True)

def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'

@contextmanager
def watching(what):
    """What only watches a run cannot end it: whatever fails inside is reported in one line."""
    try:
        yield
    except Exception as error:  # of a package that is not ours
        problem = ' '.join(f'{type(error).__name__}: {error}'.split())
        print(printable(f'{what} failed: {problem[:200]}'))

def catch_signals(quiet=False):
    """Ask the run to save and stop where a signal would end it; a second one stops at once -> the list of
    signals that have come. clean_up() restores the handlers."""
    come = []

    def note(number, frame):
        come.append(number)
        if len(come) > 1 and 'RANK' not in os.environ:  # torchrun repeats the signal
            os._exit(128 + number)
        if len(come) == 1 and not quiet:
            name = signal.Signals(number).name
            again = '' if 'RANK' in os.environ else '; once more stops at once'
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f'\n{name}: finishing this update and saving{again}\n'.encode())

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):  # schedulers announce the end by SIGUSR1
        number = getattr(signal, name, None)  # Windows lacks some
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            UNDO.callback(signal.signal, number, signal.signal(number, note))
    return come

# ----------------------------------------------------------------------------
# settings

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
WORDS = {'true': True, 'yes': True, 'y': True, '1': True, 'false': False, 'no': False, 'n': False, '0': False}

# What nanoGPT's config files say, and what to do here. GPT-2 learns positions, this model rotates by them.
NANOGPT = {
    'gradient_accumulation_steps': 'set tokens_per_update to that many times batch_size x block_size',
    'always_save_checkpoint': 'leave it out, ckpt.pt is always the latest update',
    'backend': 'leave it out, the device decides',
    'dataset=shakespeare_char': "here it is 'shakespeare'",
    'init_from=scratch': 'leave it out',
    'init_from=resume': 'set resume to true',
    'init_from=gpt2': 'a GPT-2 cannot come in, a Llama or Qwen3 can: see sample.py --from_hf',
}

def read_block(source):
    """Settings of a dataclass or of the script at a path -> ({name: default}, {name: comment}, docstring)."""
    defaults, doc = {}, ''
    if isinstance(source, type):
        text = '\n'.join(inspect.getsource(cls) for cls in source.__mro__[:-1])
        defaults = {field.name: field.default for field in dataclasses.fields(source)}
        for name, value in defaults.items():
            if type(value) not in KINDS:
                raise ValueError(f'{source.__name__}.{name} = {value!r} cannot be a setting: let it start as '
                                 'true or false, a number or a text, and let 0 or an empty text mean none')
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

def expanded(text):
    """~/ is the home folder also where a shell does not say so, as in --out_dir=~/a."""
    return os.path.expanduser(text) if text.startswith('~/') else text

def checked(name, value, default, allowed=None):
    """value in default's type (an int is welcome for a float), or ValueError. allowed: the least and the most
    of a number (else any that is not negative), or the choices of a text (else any)."""
    kind = type(default)
    if type(value) is bool and kind is str and 'true' in (allowed or ()):
        value = str(value).lower()
    if not (type(value) is kind or kind is float and type(value) is int):
        raise ValueError(f'{name} must be {KINDS.get(kind, default)}, not {value!r}')
    if kind in (int, float):
        least, most = allowed or (0, 1e15)
        if not least <= value <= most:  # nor is nan
            raise ValueError(f'{name} is {value}: it must be a number from {least} to {most:g}')
    if kind is str and allowed:
        value = value.lower()
        if value not in allowed:
            raise ValueError(f'{name} is {value!r}: it must be one of {", ".join(filter(None, allowed))}')
    return expanded(value) if kind is str else kind(value)

def unknown(name, known, what='setting', advice='--help lists them'):
    """What to say of a name that is not among the known ones."""
    if name in NANOGPT:
        return f"{name} is nanoGPT's: {NANOGPT[name]}"
    near = [other for other in known if name and other.startswith(name)]
    near = near or difflib.get_close_matches(name, known, 1)
    if near:
        advice = f'did you mean {near[0]}?'
    return f'there is no {what} {name!r}: {advice}'

class Namespace(dict):
    """What a config file assigns; where it only reads a setting, it finds the block's default, or what an
    earlier config file gave."""
    settings = {}

    def __missing__(self, name):
        return self.settings[name]

def run_config(path, settings):
    """Execute the config file at path -> what it assigns; modules, functions and names starting with _ are
    ignored."""
    if not (path.endswith('.py') and Path(path).is_file()):
        raise ValueError(f'there is no config file {path!r}; settings are written --name=value')
    names = Namespace(__name__='config')
    names.settings = settings
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), names)
    except (Exception, SystemExit) as error:  # whatever it is, it happened in the user's file
        raise ValueError(f'{path}: {type(error).__name__}: {error}') from None
    own = {name: value for name, value in names.items()
           if not (name.startswith('_') or callable(value) or inspect.ismodule(value))}
    problems = [unknown(name, settings) for name in own if name not in settings]
    if problems:
        raise ValueError(f'{path}: {"; ".join(problems)} (names of your own begin with _)')
    return own

def help_text(sources, settings, allowed):
    """The script's docstring, and each setting where the last source has it."""
    lines, left = [read_block(sources[-1])[2]], dict(settings)
    for source in reversed(sources):
        defaults, comments, _ = read_block(source)
        title = source.__name__ if isinstance(source, type) else Path(source).name
        lines += ['', f'Settings of {title}, with their defaults:']
        for name in [name for name in defaults if name in left]:
            value = left.pop(name)
            flag = f'{name} ...' if isinstance(value, list) else f'--{name}={value}'
            comment = comments.get(name, '')
            if isinstance(value, str) and name in allowed:
                comment += f' ({", ".join(filter(None, allowed[name]))})'
            lines += textwrap.wrap(f'  {flag:32} {comment}', 100, subsequent_indent=' ' * 35)
    return '\n'.join(lines)

@plain_errors()
def configure(*sources, argv=None, allowed={}):
    """(settings, given): every {name: value} of the sources (dataclasses and scripts' paths; a later one's
    default wins) after config files and flags, and the part that these gave. Each config file is executed
    once. allowed: {name: (least, most) or choices}; other numbers must not be negative."""
    argv = sys.argv[1:] if argv is None else argv
    settings, flags, plain = {}, {}, []
    for source in sources:
        settings.update(read_block(source)[0])
    if '-h' in argv or '--help' in argv:
        print(help_text(sources, settings, allowed))
        sys.exit(0)
    end = argv.index('--') if '--' in argv else len(argv)  # what follows are no flags
    for argument in argv[:end]:
        name, equals, text = argument.lstrip('-').partition('=')
        if not argument.startswith('-') or argument == '-':
            plain.append(expanded(argument))
        elif name not in settings:
            raise ValueError(unknown(name, settings))
        elif equals or isinstance(settings[name], bool):
            value = parse(text if equals else 'true', settings[name])
            flags[name] = checked(f'--{name}', value, settings[name], allowed.get(name))
        else:
            raise ValueError(f'{argument} needs a value: write {argument}=VALUE, with an equals sign')
    plain += map(expanded, argv[end + 1:])
    collects = [name for name in settings if isinstance(settings[name], list)]
    if collects:  # it takes what is no flag, and there are no config files
        flags[collects[0]], plain = plain, []
    given = {}
    for path in plain:
        for name, value in run_config(path, settings | given).items():
            given[name] = checked(f'{path}: {name}', value, settings[name], allowed.get(name))
    given.update(flags)
    for name, value in given.items():
        said = f'{name}={value}'.partition('-')[0]  # gpt2-xl is a gpt2
        there = said in NANOGPT and (os.path.exists(value) or os.path.exists(os.path.join('data', value)))
        if said in NANOGPT and not there:
            raise ValueError(unknown(said, settings))
    return settings | given, given

# ----------------------------------------------------------------------------
# questions

def ask(question, default, check=None, choices=()):
    """The answer typed on the terminal, in default's type, as check(answer) returns it; asked again while
    that raises an error. Choices are listed, and their numbers are answers; without a check, nothing else
    is. Where there is one choice, nothing is asked."""
    if len(choices) == 1:
        return default
    numbers = {str(number): choice for number, choice in enumerate(choices, 1)}
    for number, choice in numbers.items():
        print(f'  {number} {choice}')
    shown = ('yes' if default else 'no') if isinstance(default, bool) else default
    while True:
        try:
            text = input(f'{question} [{shown}] ').strip()
        except (EOFError, KeyboardInterrupt, RuntimeError):  # RuntimeError: there is no stdin
            stop('no answer (is this a terminal?): each question is also a flag, see --help')
        try:
            value = parse(numbers.get(text, text), default) if text else default
            value = checked('the answer', value, default, None if check else choices)
            return check(value) if check else value
        except (ValueError, OSError) as error:
            print(f'  {printable(error)}')

def above_zero(number):
    if not number > 0:
        raise ValueError('it must be more than 0')
    return number

def ask_all(questions):
    """Ask questions, each (setting, *arguments of ask) -> {setting: answer}. An answer may be a dict of
    settings itself; auto, which is every setting's default, is left out."""
    answers = {}
    for name, *question in questions:
        answer = ask(*question)
        answers |= answer if isinstance(answer, dict) else {name: answer}
    return {name: answer for name, answer in answers.items() if answer != 'auto'}

def or_custom(choices, make, questions):
    """A check for ask(): the answer is one of the choices. For custom it is the {setting: answer} of these
    questions, if make(**answers) raises no ValueError."""
    def check(answer):
        answer = checked('the answer', answer, '', choices)
        if answer != 'custom':
            return answer
        answers = ask_all(questions)
        make(**answers)
        return answers

    return check

def interview(script, questions):
    """ask_all() the questions, write the answers into config/my_NAME.py for this script, and run it if told
    to."""
    def new_path(name):
        name = re.sub('[^A-Za-z0-9_-]+', '_', name).removeprefix('my_')
        path = os.path.join('config', f'my_{name}.py')
        if os.path.exists(path):
            raise ValueError(f'{path} exists already')
        return path

    answers = ask_all(questions)
    path = ask('name of the run', answers.get('dataset', 'run'), new_path)
    answers['out_dir'] = 'out-' + Path(path).stem.removeprefix('my_')
    os.makedirs('config', exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(f'# python {script} {path}; all settings: python {script} --help\n')
        file.writelines(f'{name} = {value!r}\n' for name, value in answers.items())
    print(f'wrote {path}')
    if not ask('start it now', True):
        print(f'later: python {script} {path}')
        sys.exit()
    os.execv(sys.executable, [sys.executable, script, path])  # signals reach the run itself

# ----------------------------------------------------------------------------
# the run's folder

class RunFolder:
    """out_dir, locked against other runs: the checkpoints, log.csv and loss.png of one run. An older run's
    files are put aside unless it is resumed. ValueError where that fails, or the disk has less than
    bytes_needed."""
    FILES = ('ckpt.pt', 'best.pt', 'log.csv', 'loss.png', '.wandb')
    wandb_run, columns = None, ()

    def __init__(self, path, resume, bytes_needed):
        UNDO.close()  # after another run in this process
        self.path = path
        self.log_path = os.path.join(path, 'log.csv')
        os.makedirs(path, exist_ok=True)
        self.lock = filelock.FileLock(os.path.join(path, '.lock'))
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(f'another run is using {path}: choose another --out_dir') from None
        UNDO.callback(self.close)
        free = shutil.disk_usage(path).free
        if free < bytes_needed:
            raise ValueError(f'{path} has {free / 2**30:.2f} GiB free, the checkpoints take about '
                             f'{bytes_needed / 2**30:.2f} GiB: free some, or choose another --out_dir')
        if not resume:
            self.put_aside()

    def close(self):
        """Let another run use the folder."""
        self.lock.release()

    def put_aside(self):
        """Move an older run's files to the first free path-1, path-2, ..."""
        older = [name for name in self.FILES if os.path.exists(os.path.join(self.path, name))]
        if not older:
            return
        number = 1
        while os.path.exists(f'{os.path.abspath(self.path)}-{number}'):
            number += 1
        aside = f'{os.path.abspath(self.path)}-{number}'
        os.mkdir(aside)
        for name in older:
            shutil.move(os.path.join(self.path, name), aside)
        print(printable(f'kept    the run that was in {self.path} is in {os.path.relpath(aside)} now'))

    def rows(self):
        """The whole rows of log.csv, each {column: text}."""
        if not os.path.exists(self.log_path):
            return []
        with open(self.log_path, encoding='utf-8', newline='') as file:
            return [row for row in csv.DictReader(file, restval=None) if None not in row.values()]

    def rewrite(self, rows):
        """log.csv with these rows; a column that a row does not have is empty there."""
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        with open(f'{self.log_path}.part', 'w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, self.columns, restval='')
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f'{self.log_path}.part', self.log_path)

    def drop_rows_after(self, step, val_step):
        """Drop the rows that a run resumed at this update, whose last evaluation was at val_step, will write
        again."""
        kept = [row for row in self.rows() if int(row['iter']) <= (val_step if row.get('val_loss') else step)]
        if os.path.exists(self.log_path):
            self.rewrite(kept)

    def watch_with_wandb(self, project, name, config):
        """Log to Weights & Biases, too; a resumed run continues there."""
        with watching('wandb'):
            import wandb
            kept = Path(self.path, '.wandb')  # the id of the run there
            id = kept.read_text() if kept.exists() else None
            self.wandb_run = wandb.init(project=project, name=name or self.path, config=config, id=id,
                                        resume='allow')
            kept.write_text(self.wandb_run.id)

    def log(self, row):
        """Append a row {column: value} to log.csv; a new column is empty in earlier rows."""
        os.makedirs(self.path, exist_ok=True)  # it may have been deleted
        if os.path.exists(self.log_path) and set(row) <= set(self.columns):
            with open(self.log_path, 'a', encoding='utf-8', newline='') as file:
                csv.DictWriter(file, self.columns, restval='').writerow(row)
        else:
            self.rewrite([*self.rows(), row])
        if self.wandb_run:
            with watching('wandb'):
                self.wandb_run.log({name: float(value) for name, value in row.items() if value != ''})

    def plot(self, title):
        """Draw loss.png from log.csv, where matplotlib is installed."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use('Agg')
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
        for name, style in (('train_loss', 'C0-'), ('val_loss', 'C1o-')):
            points = [(float(row['elapsed_s']), float(row[name])) for row in self.rows() if row.get(name)]
            if points:
                axes.plot(*zip(*points), style, label=name.replace('_', ' '), markersize=4, linewidth=1.5)
        axes.set(xlabel='seconds', ylabel='loss (nats per token)', title=title)
        axes.legend()
        figure.savefig(os.path.join(self.path, 'loss.png'), dpi=110)
        pyplot.close(figure)

def show_status(machine, data_sets, load):
    """Print what the machine has, the data sets, each run below the current folder as load(path) reads its
    checkpoint, and the command that comes next."""
    print(machine)
    print(f'\ndata sets in data/: {", ".join(data_sets) or "none yet (python prepare.py FILE makes one)"}')
    command = 'python train.py config/train_shakespeare_quick.py'
    paths = [*Path('.').glob('*/ckpt.pt'), *Path('.').glob('*/*/ckpt.pt')]
    for path in sorted(paths, key=os.path.getmtime):
        try:
            run = load(path)
        except ValueError as error:
            print(printable(f'run in {path.parent}: {error}'))
            continue
        updates, loss = run['config']['max_iters'], run['best_val_loss']
        judged = 'not evaluated yet' if loss == float('inf') else f'best validation loss {loss:.4f}'
        print(f'run in {path.parent}: {run["config"]["dataset"]}, update {run["iter_num"]} of {updates}, '
              f'{judged}')
        script = 'train.py --resume' if run['iter_num'] < updates else 'sample.py'
        command = f'python {script} --out_dir={shlex.quote(str(path.parent))}'
    print(f'next: {command}')

if __name__ == '__main__':
    if '-h' in sys.argv or '--help' in sys.argv:
        print(__doc__)
    else:
        script = os.path.relpath(Path(__file__).with_name('train.py'))
        sys.argv = [script, '--interactive', *sys.argv[1:]]
        runpy.run_path(script, run_name='__main__')
