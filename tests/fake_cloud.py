"""A cloud on this machine for the launch scripts: a PATH on which nothing real can be found, and a gcloud with one TPU slice.

As a program it is that gcloud: it writes down its arguments, and `tpu-vm ssh --command` runs in the home of a worker.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = shlex.split(
    "basename bash cat chmod cksum cp date dirname env flock git grep gzip head ln ls mkdir mktemp mv rm sed setsid sleep sort"
    " tail tar"
)
WORKERS = 2
RECORD = 'printf "%s\\n" "${0##*/} $*" >>"$CLOUD/calls"\n'
TAKE_LINE = '[ -e "$1" ] && head -n 1 "$1" && if [ "$(grep -c . "$1")" -gt 1 ]; then sed -i 1d "$1"; fi\n'
UV = """case $1 in
  venv) mkdir -p .venv/bin && echo home >.venv/pyvenv.cfg && echo 'exit 0' >.venv/bin/python && chmod +x .venv/bin/python ;;
  pip) cp "$CLOUD/dpo-jax" .venv/bin/ ;;
esac
"""


class Cloud:
    """A clone of the launch scripts, a disk that workers share, and what the fakes have written down."""

    def __init__(self, path):
        self.path, self.bin, self.share, self.clone = path, path / "bin", path / "share", path / "clone"
        for folder in (self.bin, self.share, path / "home"):
            folder.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/{tool}-is-missing")
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.clone)
        (self.clone / "configs").mkdir()
        for config in ROOT.glob("configs/hh_pythia28_*.yaml"):
            shutil.copy(config, self.clone / "configs")
        for name in ("configs/hh.yaml", "configs/gpu_mixtral_8x7b_h100.yaml", "c.yaml"):
            (self.clone / name).touch()
        self.processes = []
        self.environment = {"PATH": str(self.bin), "HOME": str(path / "home"), "CLOUD": str(path)}
        self.environment |= {"DPO_JAX_MOUNT": str(self.share), "DPO_JAX_POLL_SECONDS": "0.02", "DPO_JAX_SYS": "/nowhere"}
        self.add("gcloud", f'exec "{sys.executable}" -S "{__file__}" "$@"')
        self.add("sudo", RECORD)
        self.add("mountpoint", "exit 1")
        self.add("findmnt", 'sed -n "s/.*mount -t nfs \\([^ ]*\\) .*/\\1/p" "$CLOUD/calls" | tail -n 1')
        self.add("uv", UV)
        self.add("take_line", TAKE_LINE)

    def add(self, name, text, *, folder=None):
        file = (folder or self.bin) / name
        file.write_text(f"#!{shutil.which('bash')}\n{text}")
        file.chmod(0o755)

    def program(self, text):
        """What the worker's `dpo-jax` does, after writing down arguments and keys. Each --check takes the next code from
        $CLOUD/check, but leaves the last one."""
        check = 'case " $* " in *" --check "*) exit "$(take_line "$CLOUD/check" || echo 0)" ;; esac\n'
        note = 'printf "%s\\0" "$@" >"$HOME/argv"\nprintf "%s " "${HF_TOKEN:-}" "${WANDB_API_KEY:-}" >"$HOME/keys"\n'
        self.add("dpo-jax", check + note + text, folder=self.path)

    def commit(self):
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        for words in (("init", "-q"), ("add", "."), (*me, "commit", "-qm", "all")):
            subprocess.run(["git", *words], cwd=self.clone, check=True, env=self.environment)

    def popen(self, *words, out=subprocess.PIPE, **environment):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "text": True}
        command = [self.clone / words[0], *map(str, words[1:])]
        process = subprocess.Popen(command, env=self.environment | environment, cwd="/", start_new_session=True, **pipes)
        self.processes.append(process)
        return process

    def run(self, *words, **environment):
        process = self.popen(*words, **environment)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self):
        """The words of each call of gcloud."""
        file = self.path / "gcloud.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self):
        """What was asked of gcloud, one word or two a call, without the questions for the state."""
        short = [(words[2:4], words[-1]) for words in self.calls()]
        named = [f"ssh {last.split()[4]}" if "detached.sh" in last else verb[1] for verb, last in short]
        named = ["ssh check" if last.endswith(" --check") else name for name, (_, last) in zip(named, short, strict=True)]
        return [name for name in named if name != "describe"]

    def worker(self, number):
        return self.path / "workers" / str(number)

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):  # an unclosed one would be the failure of another test
                if pipe is not None:
                    pipe.close()
        for worker in self.path.glob("workers/*"):
            shoot(worker)


def shoot(worker):
    """The machine is gone, and what ran on it."""
    for file in worker.glob("dpo_jax/runs/detached/pid"):
        try:
            os.killpg(os.getpgid(int(file.read_text())), signal.SIGKILL)
        except ProcessLookupError:
            continue


def main(words):
    cloud = Path(os.environ["CLOUD"])
    with open(cloud / "gcloud.jsonl", "a") as file:
        file.write(json.dumps(words) + "\n")
    assert words[:2] == ["compute", "tpus"], words
    group, verb, name = words[2:5]
    options = dict(word[2:].split("=", 1) for word in words[5:] if word.startswith("--") and "=" in word)
    assert options["zone"] == "z1", words
    states, workers = cloud / "states", cloud / "workers"
    if (group, verb) == ("queued-resources", "create"):
        assert not states.exists(), "ALREADY_EXISTS"
        following = cloud / "next_states"
        if following.exists() and not following.read_text():
            print("ERROR: PERMISSION_DENIED", file=sys.stderr)
            return 1
        states.write_text(following.read_text() if following.exists() else "WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
        for number in range(WORKERS):
            (workers / str(number)).mkdir(parents=True)
        return 0
    if not states.exists():
        print(f"ERROR: NOT_FOUND: {name}", file=sys.stderr)
        return 1
    if (group, verb) == ("queued-resources", "delete"):
        assert "--quiet" in words
        states.unlink()
        for worker in workers.glob("*"):
            shoot(worker)
        shutil.rmtree(workers, ignore_errors=True)
        return 0
    if (group, verb) == ("queued-resources", "describe"):
        now, *later = states.read_text().split()
        states.write_text(" ".join(later or [now]))
        print(now)
        return 0
    if states.read_text().split()[0] != "ACTIVE":
        print("ERROR: the TPU is in state PREEMPTED", file=sys.stderr)
        return 1
    if (group, verb) == ("tpu-vm", "describe"):
        print(WORKERS)
        return 0
    chosen = range(WORKERS) if options["worker"] == "all" else [int(options["worker"])]
    if (group, verb) == ("tpu-vm", "scp"):
        source, target = words[4:6]
        assert target.endswith(":")
        for number in chosen:
            shutil.copy(source, workers / str(number))
        return 0
    assert (group, verb) == ("tpu-vm", "ssh"), words
    return ssh(cloud, chosen, options["command"])


def ssh(cloud, chosen, command):
    codes = []
    for number in chosen:
        if number == 0 and command.endswith(" status") and does_not_answer(cloud):
            codes.append(255)
            continue
        home = cloud / "workers" / str(number)
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "CLOUD": str(cloud), "HOSTNAME": f"worker-{number}"}
        shell = subprocess.Popen(["bash", "-c", command], cwd=home, env=environment, start_new_session=True)
        preempt = cloud / "preempt"
        if preempt.exists() and (during := preempt.read_text().split()[-1]) in command:
            wait_for(lambda: during != "follow" or (cloud / "steps").read_text().count("\n") == 3)
            if "notice" in preempt.read_text():
                (cloud / "states").write_text("ACTIVE SUSPENDING SUSPENDED")
                for pid in cloud.glob("workers/*/dpo_jax/runs/detached/pid"):
                    os.kill(int(pid.read_text()), signal.SIGTERM)
                code = shell.wait()
            else:
                (cloud / "states").write_text("SUSPENDING SUSPENDED")
                for worker in (cloud / "workers").iterdir():
                    shoot(worker)
                os.killpg(shell.pid, signal.SIGKILL)
                code = 255
            preempt.unlink()
            return code
        codes.append(shell.wait())
    return max(codes)


def does_not_answer(cloud):
    """Whether the first worker does not say its status this time; $CLOUD/silent says how often."""
    times = int((cloud / "silent").read_text()) if (cloud / "silent").exists() else 0
    (cloud / "silent").write_text(str(max(0, times - 1)))
    return times > 0


def wait_for(happened, process=None):
    """Until something is so, and no longer than `process` lives."""
    deadline = time.monotonic() + 30
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
