"""Between a script and its user: settings, questions, messages, signals, and the folder of a run.

    config, given = configure(GPTConfig, __file__)    # in a script, right below its block of settings
    python configurator.py                            # answer questions, get a config file

Settings are the fields of a dataclass and the assignments at the top of a script. Config files assign others,
and --name=value flags override both. A user's mistake ends a script with one line and exit status 2.
"""
import ast
import builtins
import csv
import difflib
import errno
import inspect
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock  # comes with torch

# ----------------------------------------------------------------------------
# messages and signals

def printable(text):
    """The text with control characters and direction overrides escaped, so that no terminal obeys them."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]',
                  lambda match: match[0].encode('unicode_escape').decode(), str(text))

def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'

def progress(text, share=None):
    """On a terminal, show a line that the next call replaces; '' erases it. share (0 to 1) adds a bar."""
    if share is not None:
        text = f'[{"#" * int(20 * share):20}] {share:4.0%}  {text}'
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f'{text[:width]}\x1b[K\r', end='', flush=True)  # \x1b[K erases the rest of the line

def green(text):
    """The text in green, on a terminal and without NO_COLOR."""
    plain = not sys.stdout.isatty() or os.environ.get('NO_COLOR')
    return text if plain else f'\x1b[32m{text}\x1b[0m'

def stop(message):
    """Exit with status 2 and one line on stderr."""
    progress('')
    print(printable(' '.join(str(message).split())), file=sys.stderr)
    sys.exit(2)

@contextmanager
def plain_errors(saved=None):
    """Stop with one line at an error that a user can cause; saved() says what the run has saved."""
    try:
        yield
    except ImportError as error:
        stop(f'{error}: pip install {error.name}')
    except (ValueError, OSError) as error:
        stop(f'{error}; {saved()}' if saved else error)

@contextmanager
def watching(what):
    """Report any error in one line and go on: watching a run must not end it."""
    try:
        yield
    except Exception as error:  # raised by a package that is not ours
        print(f'{what} failed: {error!r:.200}')

def set_up_output():
    """Print at once, read and print any characters, and go on when the terminal closes."""
    def write_now(text, write=sys.stdout.write):
        try:
            write(text)
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit fails again
            if error.errno != errno.EIO:  # EIO: the terminal has closed
                stop(f'stdout: {error.strerror}')

    with suppress(AttributeError):  # a test's streams have no reconfigure
        sys.stdout.reconfigure(errors='backslashreplace')
        sys.stdout.write = write_now
        sys.stdin.reconfigure(errors='surrogateescape')

def catch_signals(quiet=False):
    """Collect signals that would end the run, which can save first -> the list of those received."""
    received = []

    def note(number, frame):
        received.append(number)
        if len(received) > 1 and 'RANK' not in os.environ:  # torchrun repeats signals
            os._exit(128 + number)
        if len(received) == 1 and not quiet:
            with suppress(OSError):  # the terminal may have closed
                os.write(2, b'\nfinishing this update, then saving; a second signal exits at once\n')

    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):  # schedulers announce the end by SIGUSR1
        number = getattr(signal, name, None)  # Windows lacks some
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)
    return received

# ----------------------------------------------------------------------------
# settings, and questions about them

KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
WORDS = {'true': True, 'yes': True, 'y': True, '1': True, 'false': False, 'no': False, 'n': False, '0': False}
NANOGPT = {  # what nanoGPT's config files say, and what to do here
    'gradient_accumulation_steps': 'set tokens_per_update to that many times batch_size x block_size',
    'always_save_checkpoint': 'remove it, ckpt.pt is always the latest update',
    'backend': 'remove it, the device decides',
    'dataset=shakespeare_char': "here it is 'shakespeare'",
    'init_from=scratch': 'remove it',
    'init_from=resume': 'set resume to true',
    'init_from=gpt2': 'GPT-2 cannot be loaded, Llama and Qwen3 can: see sample.py --from_hf',
}

def read_block(source):
    """{setting: (default, comment)} of a dataclass, or of a script (its path) above its call of configure."""
    text = inspect.getsource(source) if isinstance(source, type) else Path(source).read_text(encoding='utf-8')
    text = re.split(r'^ *def |\bconfigure\(', text, flags=re.MULTILINE)[0]
    line = r"""^ *([a-z]\w*)(?:: .+?)? = ('.*?'|".*?"|[^#\n]+?) *(?:# (.*))?$"""  # name, value, comment
    block = {}
    for name, value, comment in re.findall(line, text, re.MULTILINE):
        with suppress(ValueError, SyntaxError):  # not a literal, so not a setting
            block[name] = ast.literal_eval(value), comment
    return block

def checked(name, value, default, allowed=None):
    """A value or its text in default's type, or ValueError. allowed: (least, most), or a text's choices."""
    kind = type(default)
    if isinstance(value, str) and kind in (bool, int, float):
        with suppress(ValueError):
            value = WORDS.get(value.lower(), value) if kind is bool else kind(value)
    if kind is str and allowed:
        value = str(value).lower()  # a config file may say compile = True
        if value not in allowed:
            raise ValueError(f'{name} is {value!r}: it must be one of {", ".join(filter(None, allowed))}')
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f'{name} must be {KINDS.get(kind, default)}, not {value!r}')
    if kind in (int, float):
        least, most = allowed or (0, 1e15)
        if not least <= value <= most:  # true of nan, too
            raise ValueError(f'{name} is {value}: it must be a number from {least} to {most:g}')
    return os.path.expanduser(value) if kind is str and value.startswith('~/') else kind(value)

def unknown(name, known, what='setting', advice='--help lists them'):
    """The message for a name that is not among the known ones."""
    if name in NANOGPT:
        return f"{name} is nanoGPT's: {NANOGPT[name]}"
    near = difflib.get_close_matches(name, known, 1, cutoff=0.52)  # temp: temperature; lr: not min_lr
    if near:
        advice = f'did you mean {near[0]}?'
    return f'there is no {what} {name!r}: {advice}'

def run_config(path, settings):
    """Execute the config file at path, which may read settings -> {name: value} of what it assigns."""
    if not (path.endswith('.py') and os.path.isfile(path)):
        raise ValueError(f'there is no config file {path!r}; settings are written --name=value')
    names = {'__builtins__': vars(builtins) | settings}  # where Python finds names that are not assigned
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), names)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(f'{path}: {type(error).__name__}: {error}') from None
    assigned = {name: value for name, value in names.items()
                if not (name.startswith('_') or callable(value) or inspect.ismodule(value))}
    for name in assigned:
        if name not in settings:
            raise ValueError(f'{path}: {unknown(name, settings)} (names of your own begin with _)')
    return assigned

@plain_errors()
def configure(*sources, argv=None, allowed={}):
    """(settings, given): {name: value} from dataclasses and scripts (the last one's defaults win), config
    files and flags; and the part that files and flags gave. allowed: {name: as in checked()}."""
    argv = sys.argv[1:] if argv is None else argv
    block, given = {}, {}
    for source in reversed(sources):  # the script's own settings come first, and their defaults win
        for name, entry in read_block(source).items():
            block.setdefault(name, entry)
    settings = {name: default for name, (default, comment) in block.items()}
    if '-h' in argv or '--help' in argv:
        print(sys.modules['__main__'].__doc__, 'Settings, with their defaults:', sep='\n')
        for name, (default, comment) in block.items():
            choices = allowed.get(name, ()) if isinstance(default, str) else ()
            line = f'  --{name}={default}'.ljust(35) + '; '.join(filter(None, [comment, *choices]))
            print(textwrap.fill(line, 100, subsequent_indent=' ' * 35))
        sys.exit()
    end = argv.index('--') if '--' in argv else len(argv)  # there are no flags after it
    flags = [argument for argument in argv[:end] if argument.startswith('-') and argument != '-']
    plain = [argument for argument in argv[:end] if argument not in flags] + argv[end + 1:]
    for name, default in settings.items():
        if isinstance(default, list):  # it takes the plain arguments; then there are no config files
            given[name], plain = plain, []
    for path in plain:
        for name, value in run_config(path, settings | given).items():
            given[name] = checked(f'{path}: {name}', value, settings[name], allowed.get(name))
    for flag in flags:
        name, equals, text = flag.lstrip('-').partition('=')
        if name not in settings:
            raise ValueError(unknown(name, settings))
        if not equals and not isinstance(settings[name], bool):
            raise ValueError(f'{flag} needs a value: write {flag}=VALUE')
        given[name] = checked(f'--{name}', text if equals else 'true', settings[name], allowed.get(name))
    for name, value in given.items():
        pair = f'{name}={value}'.partition('-')[0]  # gpt2-xl is a gpt2
        if pair in NANOGPT and not (os.path.exists(value) or os.path.exists(f'data/{value}')):
            raise ValueError(unknown(pair, settings))
    return settings | given, given

def ask(question, default, check=None, choices=()):
    """Ask until the answer is valid -> check(answer), or the answer in default's type, one of the choices."""
    listed = f' ({", ".join(choices)})' if choices else ''
    while True:
        try:
            answer = input(f'{question}{listed} [{default}] ').strip() or default
            answer = checked('the answer', answer, default, None if check else choices)
            return check(answer) if check else answer
        except (EOFError, KeyboardInterrupt):
            stop('no answer (is this a terminal?): each question is also a flag, see --help')
        except (ValueError, OSError) as error:
            print(f'  {printable(error)}')

def interview(script, questions):
    """Ask questions, each (setting, *arguments of ask), write the answers into a config file, and run it."""
    def new_name(answer):
        name = re.sub(r'[^\w-]+', '_', answer)
        if os.path.exists(f'config/{name}.py'):
            raise ValueError(f'config/{name}.py exists already: give another name, or run it as it is')
        return name

    answers = {setting: ask(*question) for setting, *question in questions}
    name = ask('name of the run', answers.get('dataset', 'run'), new_name)
    answers['out_dir'] = f'out-{name}'
    script, path = os.path.relpath(script), Path(f'config/{name}.py')
    path.parent.mkdir(exist_ok=True)
    lines = [f'{setting} = {answer!r}\n' for setting, answer in answers.items() if answer != 'auto']
    path.write_text(f'# python {script} {path}\n{"".join(lines)}', encoding='utf-8')
    print(f'wrote {path}; to run it: python {script} {path}')
    if ask('start it now, yes or no', 'yes').lower().startswith('y'):
        os.execv(sys.executable, [sys.executable, script, str(path)])  # so that signals reach the run
    sys.exit()

# ----------------------------------------------------------------------------
# the folder of a run

class RunFolder:
    """out_dir with the files of one run, locked until the process ends."""
    def __init__(self, path, resume, bytes_needed):
        self.path, self.log_path = Path(path), Path(path, 'log.csv')
        self.rows, self.columns, self.wandb_run = [], [], None
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.path / '.lock')
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ValueError(f'another run is using {path}: choose another --out_dir') from None
        if shutil.disk_usage(path).free < bytes_needed:
            raise ValueError(f'{path} needs {bytes_needed / 2**30:.2f} GiB of disk: use another --out_dir')
        if not resume:
            self.put_aside()

    def put_aside(self):
        """Move an older run's files to the first free path-1, path-2, ..."""
        files = ('ckpt.pt', 'best.pt', 'log.csv', 'loss.png', '.wandb')
        older = [self.path / name for name in files if (self.path / name).exists()]
        if older:
            numbered = (Path(f'{self.path.absolute()}-{number}') for number in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            aside.mkdir()
            for file in older:
                shutil.move(file, aside)
            print(printable(f'kept    the run that was in {self.path} is in {os.path.relpath(aside)} now'))

    def resume_log(self, step, val_step):
        """Read log.csv up to update step, evaluations up to val_step: the run writes the later rows again."""
        with suppress(FileNotFoundError), open(self.log_path, encoding='utf-8', newline='') as file:
            for row in csv.DictReader(file):
                last = val_step if row.get('val_loss') else step
                if None not in row.values() and int(row['iter']) <= last:  # None: the line was cut
                    self.rows.append(row)

    def log(self, row):
        """Append a row {column: value} to log.csv; the first row and a new column write the whole file."""
        self.path.mkdir(parents=True, exist_ok=True)  # it may have been deleted
        self.rows.append(row)
        if self.log_path.exists() and set(row) <= set(self.columns):
            with open(self.log_path, 'a', encoding='utf-8', newline='') as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
            with open(f'{self.log_path}.part', 'w', encoding='utf-8', newline='') as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(f'{self.log_path}.part', self.log_path)
        if self.wandb_run:
            with watching('wandb'):
                self.wandb_run.log({name: float(value) for name, value in row.items() if value != ''})

    def watch_with_wandb(self, project, name, config):
        """Log to Weights & Biases, too; a resumed run continues there."""
        with watching('wandb'):
            import wandb
            id_file = self.path / '.wandb'  # of the run there
            id = id_file.read_text() if id_file.exists() else None
            name = name or str(self.path)
            self.wandb_run = wandb.init(project=project, name=name, config=config, id=id, resume='allow')
            id_file.write_text(self.wandb_run.id)

    def plot(self, title):
        """Draw the losses in log.csv over time as loss.png."""
        with suppress(ImportError):  # matplotlib is optional
            import matplotlib.figure
            figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout='constrained')
            axes = figure.subplots()
            unit, seconds = ('minutes', 60) if float(self.rows[-1]['elapsed_s']) > 120 else ('seconds', 1)
            for name, style in (('train_loss', 'C0-'), ('val_loss', 'C1o-')):
                rows = [row for row in self.rows if row.get(name)]
                times = [float(row['elapsed_s']) / seconds for row in rows]
                losses = [float(row[name]) for row in rows]
                axes.plot(times, losses, style, label=name.replace('_', ' '), markersize=4)
            axes.set(xlabel=unit, ylabel='loss (nats per token)', title=title)
            axes.legend()
            figure.savefig(self.path / 'loss.png', dpi=110)

def show_status(machine, data_sets, load):
    """Print the machine, the data sets, the runs in folders below (read by load) and the next command."""
    print(f'{machine}\n\ndata sets: {", ".join(data_sets) or "none yet (python prepare.py FILE makes one)"}')
    finished, unfinished = 'python train.py config/train_shakespeare_quick.py', ''
    for path in sorted([*Path().glob('*/ckpt.pt'), *Path().glob('*/*/ckpt.pt')], key=os.path.getmtime):
        with watching(f'reading {path}'):
            run = load(path)
            config, update, result = run['config'], run['iter_num'], 'not evaluated yet'
            if run['best_step']:
                result = (f'last validation loss {run["val_loss"]:.4f}, {run["val_bits_per_byte"]:.4f} bits '
                          'per byte')
            print(printable(f'run in {path.parent}: {config["dataset"]}, '
                            f'update {update} of {config["max_iters"]}, {result}'))
            folder = shlex.quote(str(path.parent))
            finished = f'python sample.py --out_dir={folder}'
            if update < config['max_iters'] and not 0 < config['patience'] <= run['evals_since_best']:
                unfinished = f'python train.py --resume --out_dir={folder}'
    print(f'next: {unfinished or finished}')

if __name__ == '__main__':
    print(__doc__, flush=True)
    if len(sys.argv) == 1:
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name('train.py')), '--interactive'])
