"""For train.py and pretrain.py: progress, saving a state, stopping and resuming, in one folder."""

import signal
import sys
import textwrap

import torch
from tqdm import tqdm

from support.files import hash_of, load, save
from support.processes import RANK, WORLD_SIZE, parallel, share_of_process

try:
    import fcntl  # file locks
except ImportError:  # on Windows
    fcntl = None

SAVE_EVERY = 200  # steps between two states to --resume from

# Ctrl-C, what schedulers send, and what a closed terminal sends. Windows has no SIGHUP.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def lock_folder(folder):
    """Make folder, and a file in it that stays locked until it is closed.

    Raises ValueError if another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")
    if RANK > 0 or fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}; wait for it, or choose another --out"
        ) from None
    return file


class Run:
    """What surrounds the steps of a training run that writes to args.out.

        run = Run(args, "fine-tuning")
        net = run.prepare(model)
        for step in run.steps(optimizer, generator, trained):
            ...                                   # batch, x0, t = run.share((x0, t)), net(...)
            run.watch(error, t, T)

    It shows a progress bar, and saves state.pt every SAVE_EVERY steps and after the last one. On
    Ctrl-C, SIGTERM or SIGHUP it lets the step end, saves, and ends the script. If args.resume is
    set, steps goes on from state.pt, and the run ends in the same bytes as one that never stopped.

    As long as the Run exists, no other one may write to the folder. Both refuse with ValueError:
    Run, before anything is computed, a state of other flags or inputs; and steps one that is
    damaged, and numbers that are no longer finite.

    inputs: {flag: what was read there}, tensors in nested dicts and lists; a resumed run must read
    the same. free: other flags that may change.
    """

    processes = WORLD_SIZE
    is_first = RANK == 0  # of several processes: this one saves and reports

    def __init__(self, args, kind, inputs=None, free=()):
        self.args = args
        self.kind = kind
        self.inputs = {flag: hash_of(contents) for flag, contents in (inputs or {}).items()}
        self.path = args.out / "state.pt"
        named = [flag.replace("-", "_") for flag in self.inputs]
        free = (*free, *named, "resume", "out", "device", "compile")
        self.flags = {key: str(value) for key, value in vars(args).items() if key not in free}
        self.flags["nproc_per_node"] = str(WORLD_SIZE)
        self.lock = lock_folder(args.out)
        self.saved = self.load_state() if args.resume else None
        self.last_saved = 0  # the step of state.pt
        self.stopped_by = None  # the number of a stop signal
        self.means = {}  # a running mean of the loss for each quarter of the timesteps

    # ---- resuming

    def load_state(self):
        """The state of the last run in the folder, of the same flags and inputs."""
        if not self.path.exists():
            raise ValueError(f"{self.path} doesn't exist; start without --resume")
        saved = load(self.path, self.kind)
        then = saved.get("flags", {})
        for key, value in self.flags.items():
            if then.get(key) != value:
                was = textwrap.shorten(f"--{key.replace('_', '-')} {then.get(key)}", 60)
                raise ValueError(
                    f"{self.path} comes from a run with {was}, and this one has {value}; "
                    "resume with the same, or start without --resume"
                )
        for flag, value in self.inputs.items():
            if saved.get("inputs", {}).get(flag) != value:
                raise ValueError(
                    f"{self.path} comes from a run with other contents of --{flag}; "
                    "bring them back, or start without --resume"
                )
        if saved["step"] > self.args.steps:
            raise ValueError(
                f"{self.path} is at step {saved['step']} already; give --steps at least that"
            )
        return saved

    def restore(self, optimizer, generator, tensors):
        """Put the state into the run. Returns the first step that is left to do."""
        try:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(self.saved["tensors"][name])
            optimizer.load_state_dict(self.saved["optimizer"])
            generator.set_state(self.saved["generator"])
        except Exception:
            raise ValueError(
                f"{self.path} isn't a state of this version; start again without --resume"
            ) from None
        return self.saved["step"]

    # ---- the steps

    def prepare(self, model):
        """The module to call in a step: model, compiled and distributed if asked to."""
        net = torch.compile(model) if self.args.compile else model
        return parallel(net, self.args.device)

    def share(self, tensors, parts=1):
        """This process's share of a batch, on its device: see share_of_process."""
        return share_of_process(tensors, self.args.device, parts)

    def steps(self, optimizer, generator, tensors):
        """Yield the number of each step that is left to do.

        tensors: {name: tensor}, what training moves; it is saved and must stay finite.
        """
        self.optimizer = optimizer
        self.generator = generator
        self.tensors = tensors
        first = 0
        if self.saved is not None:
            first = self.last_saved = self.restore(optimizer, generator, tensors)
        steps = range(first, self.args.steps)
        self.bar = steps
        if self.is_first:
            self.bar = tqdm(steps, self.kind, initial=first, total=self.args.steps)

        # with several processes, the first one decides when to stop
        handler = self.stop_soon if self.is_first else signal.SIG_IGN
        before = {}
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants that
                before[number] = signal.signal(number, handler)
        try:
            for step in self.bar:
                yield step
                if self.is_first:
                    self.after_step(step + 1)
        finally:
            for number, old_handler in before.items():
                signal.signal(number, old_handler)
        if self.stopped_by is not None:  # the signal came after the last step was saved
            self.leave()

    def stop_soon(self, number, frame):
        self.stopped_by = number

    def after_step(self, done):
        """Save if it is time to. done: steps, this one included."""
        stopping = self.stopped_by is not None
        if stopping or done == self.args.steps or done % SAVE_EVERY == 0:
            self.check_finite(done)
            self.save_state(done)
        if stopping:
            self.leave()

    def save_state(self, done):
        state = {
            "kind": self.kind,
            "step": done,
            "flags": self.flags,
            "inputs": self.inputs,
            "tensors": self.tensors,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        save(state, self.path)
        self.last_saved = done

    def leave(self):
        """Say where the state is, and end the script with 128 and the number of the signal."""
        self.bar.close()
        print(
            f"stopped after step {self.last_saved} of {self.args.steps}, saved in {self.path}; "
            "go on with --resume"
        )
        sys.exit(128 + self.stopped_by)

    # ---- progress

    def watch(self, error, t, T):
        """Show the running mean of the errors (N,) at timesteps t (N,), for each quarter of 0 .. T.

        Raises ValueError if an error isn't finite. Called before the update, it keeps the
        parameters good.
        """
        error = error.detach().cpu()
        t = t.cpu()
        bad = ~error.isfinite()
        if bad.any():
            low = t[bad].min().item()
            high = t[bad].max().item()
            raise ValueError(
                f"the loss is no longer finite at timesteps {low} to {high}; {self.advice()}"
            )
        quarter = (4 * t / T).long()
        for i in quarter.unique().tolist():
            mean = error[quarter == i].mean().item()
            old = self.means.get(i, mean)
            self.means[i] = 0.98 * old + 0.02 * mean
        shown = " ".join(f"{self.means[i]:.4f}" for i in sorted(self.means))
        if self.is_first:
            self.bar.set_postfix_str(f"loss by quarter of t {shown}", refresh=False)

    def check_finite(self, done):
        """What is saved is finite, also as float16, the dtype of an adapter.

        watch has seen the loss before the last update, but not after it.
        """
        if not all(p.detach().half().isfinite().all() for p in self.tensors.values()):
            raise ValueError(
                f"the parameters are no longer finite after step {done}; {self.advice()}"
            )

    def advice(self):
        """What to do about a divergence, and where the last state from before it is."""
        good = f"{self.path} has step {self.last_saved}" if self.last_saved else "no state is saved"
        return f"--lr {self.args.lr} is too high, lower it ({good})"
